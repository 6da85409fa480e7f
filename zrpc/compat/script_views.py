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
from enum import Enum
from typing import Any
from weakref import WeakValueDictionary

import torch

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
            _merged(self._value, self._before, now)
            self._before = self._future.wait()


_views: WeakValueDictionary[tuple[int, int], View] = WeakValueDictionary()
_lock = threading.Lock()


def view_of(value: Any, wrap: Wrap) -> View:
    """The view of the Python object `value`. RRefs to one object share one, for as long as any of them has it."""
    key = id(value), id(wrap)  # a view keeps both, so that they stay theirs
    with _lock:
        found = _views.get(key)
        if found is None:
            found = _views[key] = View(value, wrap)
        return found


def _differ(before: Any, now: Any) -> bool:
    """Whether two Python values that one TorchScript type has differ. Tensors are compared by identity."""
    if type(before) is not type(now):
        return True
    if isinstance(before, list | tuple):
        if isinstance(before, list) and before and type(before[0]) in _PLAIN:  # and so are all: a list has one type
            return bool(before != now)
        return len(before) != len(now) or any(map(_differ, before, now))
    if isinstance(before, dict):
        return list(before) != list(now) or any(_differ(before[key], now[key]) for key in before)
    if type(before) in _PLAIN:
        return bool(before != now)
    if _has_fields(before):
        return _differ(vars(before), vars(now))
    return before is not now


def _merged(value: Any, before: Any, now: Any) -> Any:
    """`now`, as far as possible in the very object `value`, which was equal to `before`."""
    if type(value) is not type(now) or not _differ(before, now):
        return value if type(value) is type(now) else now
    if isinstance(value, list | tuple):
        parts = list(now)
        if len(value) == len(before) == len(now):
            parts = list(map(_merged, value, before, now))
        if isinstance(value, list):
            value[:] = parts
            return value
        same = len(parts) == len(value) and all(part is old for part, old in zip(parts, value, strict=True))
        return value if same else now
    if isinstance(value, dict):
        known = {key: _merged(value[key], before[key], now[key]) for key in now if key in before and key in value}
        value.clear()
        value.update({**now, **known})
        return value
    if not _has_fields(now):
        return now
    for name, content in vars(now).items():
        setattr(value, name, _merged(getattr(value, name, None), getattr(before, name, None), content))
    return value


_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))


def _has_fields(value: Any) -> bool:
    """Whether it is an instance of a TorchScript class."""
    return not isinstance(value, torch.Tensor | torch.nn.Module | Enum) and hasattr(value, "__dict__")
