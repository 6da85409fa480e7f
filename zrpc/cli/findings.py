"""What `zrpc doctor` finds: OK, WARN (it works, but not as well as it could) or FAIL, with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad it is."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        about: what was looked at.
        level: how bad it is.
        text: what is there.
        todo: what to do; empty: nothing.
    """

    about: str
    level: Level
    text: str
    todo: str = ""


Check = Callable[[], Iterator[Finding]]


def run(checks: dict[str, Check]) -> Iterator[Finding]:
    """What all of them find. One that cannot be carried out is a finding, too."""
    for about, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            text = f"this could not be looked at: {type(error).__name__}: {error}"
            yield Finding(about, Level.WARN, text, "report this as a fault of zrpc doctor")


def ok(about: str, text: str) -> Finding:
    """All is well."""
    return Finding(about, Level.OK, text)


def warn(about: str, text: str, todo: str) -> Finding:
    """It works, but not as well as it could."""
    return Finding(about, Level.WARN, text, todo)


def fail(about: str, text: str, todo: str) -> Finding:
    """Workers will not start, or not meet."""
    return Finding(about, Level.FAIL, text, todo)
