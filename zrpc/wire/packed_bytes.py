"""msgpack from other workers, unpacked into no more memory than it deserves.

What: an array begins with the number of its elements, and msgpack makes room for all of them before it has seen one:
arrays within arrays, of which each claims as many as the message has bytes, cost a thousand times the message. So
arrays are taken as short ones. Where one is longer, the message is looked through first, which makes nothing: what is
there in full takes as much memory as its objects do.

Threads: any. Failure: what msgpack raises; who calls makes a `ProtocolError` of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from collections.abc import Callable

    Buffer = bytes | bytearray | memoryview

SHORT_MAX_LENGTH = 96
"""Of an array: msgpack takes up to 1024 within each other, whose claims come to less than 1 MiB together."""


def unpack(packed: Buffer, *, max_length: int | None = None) -> Any:
    """The value that `packed` holds. Keys of maps are text or bytes.

    Args:
        packed: all of it.
        max_length: how many elements an array may have; None: as many as are there.

    Raises:
        Exception: it is damaged.
    """
    try:
        return msgpack.unpackb(packed, max_array_len=SHORT_MAX_LENGTH if max_length is None else max_length)
    except ValueError as error:
        if max_length is not None or not _is_too_long(error):
            raise
    _look_through(packed)
    return msgpack.unpackb(packed)


def unpack_values(packed: Buffer, ext_hook: Callable[[int, bytes], Any]) -> Any:
    """The same, with any keys; `ext_hook` makes what msgpack has no type for. It may be called twice for one."""
    try:
        return msgpack.unpackb(packed, ext_hook=ext_hook, strict_map_key=False, max_array_len=SHORT_MAX_LENGTH)
    except ValueError as error:
        if not _is_too_long(error):
            raise
    _look_through(packed)
    return msgpack.unpackb(packed, ext_hook=ext_hook, strict_map_key=False)


def _is_too_long(error: ValueError) -> bool:
    return "max_array_len" in str(error)


def _look_through(packed: Buffer) -> None:
    """Raise unless all is there that arrays claim."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(packed))
    unpacker.feed(packed)
    unpacker.skip()
