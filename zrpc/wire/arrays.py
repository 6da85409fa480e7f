"""How numpy arrays travel: their memory as a buffer of the message, neither copied nor part of the pickle stream.

numpy offers that memory to pickle as a `PickleBuffer`. Objects that do the same, and a `PickleBuffer` that is itself an
argument, stay in the stream: they arrive as pickle says, `bytes` of memory that is read-only and else `bytearray`.
Importing this module is what makes arrays travel so.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from zrpc.wire import reducers

if TYPE_CHECKING:
    from collections.abc import Callable


def _reduce(array: np.ndarray[Any, Any]) -> Any:
    reduced: Any = array.__reduce_ex__(5)
    make, (memory, *rest) = reduced[:2]
    if type(memory) is not pickle.PickleBuffer:
        return reduced
    raw = memory.raw()
    index = reducers.set_aside(raw)
    return reduced if index is None else (_make, (make, index, raw.readonly, *rest))


def _make(make: Callable[..., Any], index: int, is_readonly: bool, *rest: Any) -> Any:
    memory = memoryview(reducers.own_buffer(index))
    return make(memory.toreadonly() if is_readonly else memory, *rest)


reducers.register_reducer(np.ndarray, _reduce)
