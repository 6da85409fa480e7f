"""Puts zrpc in the place of torch's RPC in every Python process that finds this file, as soon as it imports torch.

`zrpc.compat.children` puts this folder into PYTHONPATH. Python runs the first `sitecustomize` that it finds when it
starts; so this one runs the one that it hides. A process that never imports torch pays for one entry in
`sys.meta_path`; one whose Python has no zrpc keeps torch's RPC.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Installing(Loader):
    """Loads torch as `loader` does, and installs zrpc's replacement behind it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if importlib.util.find_spec("zrpc") is not None:
            import zrpc.compat

            zrpc.compat.install()


class _OnTorch(MetaPathFinder):
    """Notices the first import of torch."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Installing(spec.loader)
        return spec


def _run_hidden() -> None:
    """Run the `sitecustomize` that this one hides, if there is one."""
    path = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
    spec = PathFinder.find_spec(__name__, path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules[__name__] = module
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _OnTorch())
_run_hidden()
