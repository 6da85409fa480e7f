"""Which TorchScript functions are being compiled.

TorchScript knows a function by its name from the beginning of its compilation on, and the compiler runs Python, so that
other threads run meanwhile. What they find by that name cannot be called yet: it raises `RuntimeError: std::exception`.
"""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MANGLED = re.compile(r"___torch_mangle_\d+\.")
"""What TorchScript puts into the name of a function that is compiled when it has one of that name."""


class Compilations:
    """The compilations that are under way in this process. For any thread."""

    def __init__(self) -> None:
        self._under_way: list[tuple[str, int, threading.Event]] = []

    @contextmanager
    def under_way(self, name: str) -> Iterator[None]:
        """Around the compilation of the function of that qualified name, on this thread."""
        entry = (_MANGLED.sub("", name), threading.get_ident(), threading.Event())
        self._under_way.append(entry)
        try:
            yield
        finally:
            self._under_way.remove(entry)
            entry[2].set()

    def wait(self, name: str) -> None:
        """Wait until no other thread compiles a function of that qualified name."""
        if not self._under_way:
            return
        plain, this_thread = _MANGLED.sub("", name), threading.get_ident()
        for compiled, thread, over in list(self._under_way):
            if compiled == plain and thread != this_thread:
                over.wait()


compilations = Compilations()
