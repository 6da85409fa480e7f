"""Values behind RRefs as compiled code sees them, so that what it changes is changed for all.

A value that a TorchScript function made is a TorchScript object already (`zrpc.agent.scripted`). One that Python made
is not: TorchScript turns a list, a dict or an instance of one of its classes into one of its own. Such an object, the
*view* of the value, is made when compiled code first asks for it, and kept beside the value. What compiled code changed
in it is written back into the Python object when the compiled function ends that was given the RRef, and whenever
Python asks for the value. What Python changed makes a new view, when compiled code asks next.

Not seen: what Python changes in a value while compiled code that changes it too is at work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Wrap = Callable[[Any], Any]
"""Makes a TorchScript value of a Python value, in a future."""


class View:
    """The TorchScript object of a Python value. The lock owns all fields.

    Args:
        value: the Python object.
        wrap: see `Wrap`.
    """

    def __init__(self, value: Any, wrap: Wrap) -> None:
        self._lock = threading.Lock()
        self._value = value
        self._wrap = wrap
        self._make()

    def future(self) -> Any:
        """A future that holds the TorchScript object, which is that of the value as it is now."""
        with self._lock:
            self._write_back()
            if _differ(self._before, self._value):
                self._make()
            return self._future

    def write_back(self) -> None:
        """Change in the Python object what compiled code has changed."""
        with self._lock:
            self._write_back()

    def _make(self) -> None:
        self._future = self._wrap(self._value)
        self._before = self._future.wait()  # a copy

    def _write_back(self) -> None:
        now = self._future.wait()
        if _differ(self._before, now):
            _write(self._value, now)
            self._before = self._future.wait()


def _differ(before: Any, now: Any) -> bool:
    """Whether two Python values that one TorchScript type has differ. Tensors are compared by identity."""
    if type(before) is not type(now):
        return True
    if isinstance(before, list | tuple):
        return len(before) != len(now) or any(map(_differ, before, now))
    if isinstance(before, dict):
        return list(before) != list(now) or any(_differ(before[key], now[key]) for key in before)
    if isinstance(before, bool | int | float | str | complex | bytes | None):
        return bool(before != now)
    if type(before).__module__ != "torch" and hasattr(before, "__dict__"):
        return _differ(vars(before), vars(now))
    return before is not now


def _write(value: Any, now: Any) -> None:
    """Make the Python object `value` equal to `now`."""
    if isinstance(value, list):
        value[:] = now
    elif isinstance(value, dict):
        value.clear()
        value.update(now)
    elif hasattr(value, "__dict__") and hasattr(now, "__dict__"):
        for name, content in vars(now).items():
            setattr(value, name, content)
