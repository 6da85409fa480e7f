"""Notes that travel: found like slabs, the same one again and again, and what was made of them goes with them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from zrpc.errors import ProtocolError
from zrpc.transport import slabs
from zrpc.transport.attachments import Attachments
from zrpc.transport.note import Note
from zrpc.transport.shared_memory import SharedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not slabs.is_supported(), reason="this system has no anonymous memory files")

A, B = b"A" * 8, b"B" * 8


@pytest.fixture
def attachments() -> Iterator[Attachments]:
    made = Attachments()
    yield made
    made.close()


class Made:
    """What somebody makes of a note."""

    alive = 0

    def __init__(self) -> None:
        Made.alive += 1

    def __del__(self) -> None:
        Made.alive -= 1


def test_a_note_goes_again_and_again_and_both_sides_write_to_it(attachments: Attachments) -> None:
    note = Note(100)
    note.view[:3] = (1, 2, 3)
    for number in range(3):
        assert note.is_free()
        note.hold()
        came = attachments.fetch(A, note.descriptor, [])
        assert not note.is_free()
        assert bytes(came[:3]) == bytes((1, 2, 3))
        came[10] = number
        assert note.view[10] == number
        del came
    assert note.is_free()
    note.hold()
    note.free()
    assert note.is_free()
    note.retire()


def test_what_is_made_of_a_note_is_made_once_and_goes_when_the_note_does(attachments: Attachments) -> None:
    note, other = Note(100), Note(100)
    made = [attachments.beside(attachments.fetch(A, note.descriptor, []), Made) for _ in range(3)]
    assert len(set(map(id, made))) == Made.alive == 1
    made.clear()
    assert Made.alive == 1, "the next message finds it"
    note.retire()
    came = attachments.fetch(A, other.descriptor, [])
    assert Made.alive == 0, "a new slab is mapped, and what is retired goes"
    attachments.beside(came, Made)
    attachments.forget(A)
    assert Made.alive == 1, "it is used"
    del came
    assert Made.alive == 0
    other.retire()


@pytest.mark.parametrize("buffer", [b"abc", memoryview(bytearray(100))])
def test_what_is_no_note_has_nothing_beside_it(attachments: Attachments, buffer: bytes | memoryview) -> None:
    with pytest.raises(ProtocolError, match="does not lie in shared memory"):
        attachments.beside(buffer, Made)


def test_only_who_can_open_what_is_here_gets_notes() -> None:
    here, there = SharedMemory(), SharedMemory()
    try:
        here.meet(B, there.card())
        assert here.note(B, 100) is None, "it has not tried yet"
        there.meet(A, here.card())
        note = here.note(B, 100)
        assert note is not None
        files = len(os.listdir("/proc/self/fd"))
        note.hold()
        came = there.fetch(A, note.descriptor, [])
        assert there.beside(came, Made) is there.beside(came, Made)
        assert here.note(A, 100) is None, "a stranger"
        note.retire()
        assert len(os.listdir("/proc/self/fd")) == files - 1
        del came
    finally:
        here.close()
        there.close()
    assert Made.alive == 0
