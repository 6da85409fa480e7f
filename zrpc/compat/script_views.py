"""Values behind RRefs as compiled code sees them, so that what it changes is changed for all.

A value that a TorchScript function made is a TorchScript object already (`zrpc.agent.scripted`). One that Python made
is not: TorchScript turns a list, a dict or an instance of one of its classes into one of its own. For as long as
compiled code uses such a value, there is one view of it, which all compiled code shares. When the last use is over,
which the RRef's link tells by going away, what has changed in the view is written back into the Python object.

Invariants: a view that did not change writes nothing. Not seen: what Python code changes while compiled code uses the
value too, in a value that compiled code changes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from zrpc.agent.scripted import ScriptValue

log = logging.getLogger("zrpc")

Wrap = Callable[[Any], Any]
"""Makes a TorchScript value of a Python value, in a future."""


class View:
    """A TorchScript value made of a Python value. It is written back when it goes.

    Attributes:
        future: holds the TorchScript value.
    """

    def __init__(self, value: Any, wrap: Wrap) -> None:
        self._value = value
        self.future = wrap(value)
        self._before = self.future.wait()

    def __del__(self) -> None:
        try:
            now = self.future.wait()
            if _differ(self._before, now):
                _write(self._value, now)
        except Exception:
            log.exception("what compiled code changed in a %s was not written back", type(self._value).__name__)


_views: WeakValueDictionary[int, View] = WeakValueDictionary()
_lock = threading.Lock()


def future_of(kept: Any, wrap: Wrap, held: dict[str, Any]) -> Any:
    """A future that holds `kept` as a TorchScript value.

    Args:
        kept: the value of an RRef on its owner.
        wrap: see `Wrap`.
        held: keeps the view for as long as compiled code uses the RRef.
    """
    if type(kept) is ScriptValue:
        return kept.future
    with _lock:
        view = _views.get(id(kept))  # the view keeps the value, so its id stays its own
        if view is None:
            view = _views[id(kept)] = View(kept, wrap)
    held["view"] = view
    return view.future


def _differ(before: Any, now: Any) -> bool:
    """Whether two Python values made of one TorchScript value differ. Tensors are compared by identity."""
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
    elif hasattr(value, "__dict__"):
        for name, content in vars(now).items():
            setattr(value, name, content)
