"""Reaching the processes that a program starts.

Forked children have what their parent has. Every other Python process (spawned, started by a fork server, by
torchrun or by `subprocess`) inherits PYTHONPATH, and with it a folder whose `sitecustomize` installs the replacement
when the process imports torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

_VARIABLE = "PYTHONPATH"
SITE = str(Path(__file__).parent / "site")
"""The folder with our `sitecustomize`."""


def reaching(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a Python process that is to have the replacement."""
    made = dict(environment)
    _add_site(made)
    return made


def reach_children() -> None:
    """From now on the processes that this one starts have the replacement. Idempotent."""
    _add_site(os.environ)


def _add_site(environment: MutableMapping[str, str]) -> None:
    entries = [entry for entry in environment.get(_VARIABLE, "").split(os.pathsep) if entry]
    if SITE not in entries:
        environment[_VARIABLE] = os.pathsep.join([SITE, *entries])
