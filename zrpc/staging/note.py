"""What a sender and a receiver write to each other of one piece of device memory.

The note lies in memory that both share, and is held and given back as a slab is: whoever is told of it holds it, and
with it the device memory, until he lets go of it. By byte: 0 the answer, 1 to 255 why the receiver refused it (UTF-8),
256 and after the ticket, packed with msgpack: what an `Accelerator` needs to open the memory. The sender writes the
ticket before anybody is told of the note, the receiver everything else: no byte is ever written by two.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

import msgpack

from zrpc.errors import ProtocolError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from zrpc.wire.envelope import Buffer

NOTE_NBYTES = 4096
"""A ticket of CUDA's takes about 300 bytes where memory is one allocation, and more where it is made of segments."""
_REASON = slice(1, 256)
_TICKET_AT = 256
_LENGTH_NBYTES = 4


class Answer(IntEnum):
    """What the receiver says of the memory."""

    NONE = 0
    """He has not tried it yet."""
    OPENED = 1
    """It can be used."""
    REFUSED = 2
    """It cannot be opened there."""


class Note(Protocol):
    """The sender's end of a note.

    Attributes:
        view: its content, `NOTE_NBYTES` of uint8, at first zeros.
        descriptor: what travels.
    """

    view: npt.NDArray[np.uint8]
    descriptor: list[Any]

    def hold(self) -> None:
        """It is the receiver's from now on, who is about to be told of it."""

    def free(self) -> None:
        """The receiver was not told of it after all."""

    def is_free(self) -> bool:
        """Whether the receiver has let go of it, or was never told of it."""

    def retire(self) -> None:
        """Let go of it; the receiver should keep nothing that he made of it. Once."""


MakeNote = Callable[[], "Note | None"]
"""Makes a note for one peer; None: memory is not shared with it. Raises OSError where there is no memory for it."""


def write_ticket(view: npt.NDArray[np.uint8], ticket: list[Any]) -> None:
    """Write the ticket into a fresh note.

    Raises:
        RuntimeError: it is too long.
    """
    packed: bytes = msgpack.packb(ticket)
    content = len(packed).to_bytes(_LENGTH_NBYTES, "little") + packed
    if len(content) > view.nbytes - _TICKET_AT:
        raise RuntimeError(f"what another process needs to open the memory takes {len(packed)} bytes")
    view[_TICKET_AT : _TICKET_AT + len(content)] = bytearray(content)


def read_ticket(note: Buffer) -> list[Any]:
    """The ticket in a note that came.

    Raises:
        ProtocolError: it is no note.
    """
    view = memoryview(note)
    try:
        length = int.from_bytes(view[_TICKET_AT : _TICKET_AT + _LENGTH_NBYTES], "little")
        start = _TICKET_AT + _LENGTH_NBYTES
        ticket = msgpack.unpackb(view[start : start + length], use_list=True)
    except Exception as error:
        raise ProtocolError(f"a note of device memory cannot be read: {error}") from error
    if view.readonly or not isinstance(ticket, list):
        raise ProtocolError("a note of device memory has no ticket, or cannot be answered")
    return ticket


def answer(note: Buffer, what: Answer, reason: str = "") -> None:
    """Answer, in a note that came; `reason` is cut where it is too long."""
    view = memoryview(note)
    text = reason.encode()[: _REASON.stop - _REASON.start]
    view[1 : 1 + len(text)] = text
    view[0] = what


def answer_in(view: npt.NDArray[np.uint8]) -> Answer:
    """What the receiver has answered."""
    return Answer(int(view[0]))


def reason_in(view: npt.NDArray[np.uint8]) -> str:
    """Why he refused."""
    return bytes(view[_REASON]).rstrip(b"\0").decode(errors="replace")
