"""Bounds of what a tensor table may say: sizes, strides and offsets that fit into the memory that came.

What: torch believes the sizes that it is given. A view that is larger than its memory makes the memory larger, or reads
past its end, and a fresh tensor takes as much memory as its sizes say. So all of it is checked before torch is called.

Failure: what does not fit is a `ProtocolError`, or what Python raises where a number is none, of which
`zrpc.wire.received` makes one. Threads: any.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from zrpc.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

MAX_NUMEL = 1 << 58
"""Of elements that a view may say it has: their bytes can still be counted in 64 bits."""


def numel_of(shape: Sequence[int]) -> int:
    """How many elements a tensor of that shape has.

    Raises:
        ProtocolError: it is no shape, or one that torch cannot count.
    """
    count, extent = 1, 1  # torch multiplies the other sizes where one is 0, too
    for size in shape:
        if type(size) is not int or size < 0:
            raise ProtocolError(f"{reprlib.repr(shape)} is not the shape of a tensor")
        count *= size
        extent *= size or 1
        if extent > MAX_NUMEL:
            raise ProtocolError(f"a tensor of shape {reprlib.repr(shape)} has too many elements")
    return count


def span_of(shape: Sequence[int], strides: Sequence[int], offset: int, count: int = MAX_NUMEL) -> int:
    """How many elements of its memory a view spans, from the first on; 0 if it has none itself.

    Args:
        shape: its sizes.
        strides: its strides, in elements.
        offset: where it begins.
        count: how many elements its memory has.

    Raises:
        ProtocolError: it would see more than these.
    """
    numel = numel_of(shape)
    if type(offset) is not int or len(shape) != len(strides):
        raise ProtocolError(f"{reprlib.repr((shape, strides, offset))} is no view of a tensor")
    last, lowest, highest = offset, offset, offset
    for size, stride in zip(shape, strides, strict=True):
        if type(stride) is not int:
            raise ProtocolError(f"{reprlib.repr(strides)} are not the strides of a tensor")
        last += (size - 1) * stride
        lowest, highest = min(lowest, stride), max(highest, stride)
    if lowest < 0 or highest > MAX_NUMEL:
        raise ProtocolError(f"a view has the strides {reprlib.repr(strides)} and the offset {offset}")
    if not numel:
        if offset > count:
            raise ProtocolError(f"a view begins behind the {count} elements of its memory")
        return 0
    if last >= count:
        raise ProtocolError(f"a view sees {last + 1} elements, and its memory has {count}")
    return last + 1


def check_sparse(indices: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether what a sparse tensor is made of is to be checked by torch; not if there is no memory to be looked at.

    Raises:
        ProtocolError: one part has memory, and the other none.
    """
    if indices.device != values.device:
        raise ProtocolError(f"a sparse tensor has indices on {indices.device} and values on {values.device}")
    return not values.is_meta


_PER_BYTE = {"quint4x2": 2, "quint2x4": 4}
"""Elements in a byte of quantized dtypes that pack them; rows begin on whole bytes."""


def packed_nbytes(name: str, shape: Sequence[int]) -> int:
    """How many bytes the memory of a quantized tensor has whose elements are packed."""
    if not shape:
        return 1
    return numel_of(shape[:-1]) * -(-shape[-1] // _PER_BYTE[name])


def hollow(shape: Sequence[int], axis: int) -> list[int]:
    """A shape of as many dimensions that has nothing in it, and the size of `shape` along `axis`."""
    return [size if place == axis else 0 for place, size in enumerate(shape)]


def check_parts(what: str, *lengths: Any) -> None:
    """See whether all of `lengths` are the same.

    Raises:
        ProtocolError: the parts do not fit each other.
    """
    if len(set(lengths)) != 1:
        raise ProtocolError(f"the parts of a {what} tensor do not fit each other")
