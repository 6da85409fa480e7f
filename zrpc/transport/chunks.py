"""Large buffers over sockets: cut into chunks on one side, put together in warm memory on the other.

A frame of 256 MiB is received into fresh pages, and touching those is what bounds it (about 1 GB/s here). Chunks of
`CHUNK_NBYTES` pass through memory that the allocator uses again, and are copied into destination buffers that are
kept and used again too. While one chunk is copied the next is on its way. Up to `MIN_NBYTES` the allocator keeps even
the memory of whole frames warm, and the copy is saved: over loopback, on a quiet machine, 16 MiB as one frame were a
quarter to a half faster.

A chunk is a message of two frames: a header that begins with `MAGIC` (no envelope does) and names the transfer, and
the bytes. The envelope follows the last chunk on the same connection, which keeps their order, and names its
transfers by descriptors `[number, nbytes]`. A chunk of a transfer of 0 bytes takes back what came of it.

What a transfer says of its size is a claim. Its memory is made at once, as it must be one piece, but the system gives
it pages only as chunks are copied into it. What is claimed and has not come may not be more than the machine has left.
"""

from __future__ import annotations

import itertools
import reprlib
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zrpc import finalizers, interrupts
from zrpc.errors import ProtocolError, ZrpcError
from zrpc.ids import Incarnation
from zrpc.transport.headroom import available_nbytes
from zrpc.wire.envelope import Arriving, Buffer

MAGIC = 0xC1
MIN_NBYTES = 20 << 20
"""Smaller buffers travel as one frame: glibc keeps up to 32 MiB, and a heap of its threads has room for three of 20."""
ENCRYPTED_MIN_NBYTES = 2 << 20
"""The same where connections are encrypted: ZeroMQ makes fresh memory for each frame that it encrypts, and one chunk is
encrypted while another one is decrypted (`compare.py --tcp --only sink_16MB_GBps`: 1.5 times as fast)."""
CHUNK_NBYTES = 1 << 20
MAX_RATIO = 1.25
"""A kept buffer serves for one that is up to so many times smaller: batches of varying length use it again."""
KEPT_MAX_NBYTES = 1 << 30
"""Destination buffers kept for use again; more than that are given back to the system."""
CLAIMS_FREE_NBYTES = 256 << 20
"""So much may be on its way in before it is asked how much memory is left, which takes up to 0.5 ms."""
INCOMING_MAX = 4096
"""Transfers that no envelope has named yet."""
_FIRST_BYTE = bytes([MAGIC])
_HEADER = struct.Struct("<BQQQ")  # magic, transfer, offset, total

Descriptor = list[Any]
Bytes = npt.NDArray[np.uint8]
MakeMemory = Callable[[int], Bytes]
Send = Callable[[Incarnation, Sequence[Buffer]], None]


_KEPT_BLOCK_NBYTES = (32 << 20) - (64 << 10)


def keep_freed_memory() -> None:
    """Make the allocator keep large blocks that are freed, so that the next ones are warm.

    ZeroMQ receives each large frame into a fresh block. At first glibc maps each block of 128 KiB or more anew and
    unmaps it when it is freed, and 1 MiB of fresh pages costs more than its way through the socket (0.2-0.3 ms against
    0.25). It raises that limit by itself to the size of the largest mapped block that was ever freed, up to 32 MiB,
    and keeps twice as much: so one such block is freed here. It is never touched. Any program that frees a tensor of
    that size has the same effect; where MALLOC_MMAP_THRESHOLD_ is set, or malloc is another one, there is none.
    """
    np.empty(_KEPT_BLOCK_NBYTES, np.uint8)


def plain(nbytes: int) -> Bytes:
    return np.empty(nbytes, np.uint8)


class WarmBuffers:
    """Destination buffers, handed out and taken back when nobody sees them any more. The lock owns what is kept.

    What is kept longest without use makes room for what comes back, and is given back after a while (`trim`).

    Args:
        kept_max_nbytes: how much is kept at most.
        make: makes fresh memory of so many bytes.
    """

    def __init__(self, kept_max_nbytes: int = KEPT_MAX_NBYTES, make: MakeMemory = plain) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._kept: list[Bytes] = []  # the one used last is the last
        self._num_unused = 0  # so many of them, the first ones, were there at the last `trim`
        self._kept_max_nbytes = kept_max_nbytes
        self._returned: deque[Bytes] = deque()  # by a weakref callback, which may run anywhere
        self._loans: dict[int, weakref.ref[Any]] = {}

    @property
    def kept_nbytes(self) -> int:
        """How much is kept for use again."""
        with self._lock:
            self._take_back()
            return sum(memory.nbytes for memory in self._kept)

    def lend(self, nbytes: int) -> Bytes:
        """Writable memory of `nbytes`, its content undefined; it comes back by itself when nobody sees it any more."""
        with self._lock:
            self._take_back()
            memory = self._find(nbytes)
        if memory is None:
            memory = self._make(nbytes)
        loan: Bytes = np.frombuffer(memory.data, np.uint8, nbytes)  # views of it keep it alive, and not `memory`
        whole = memory

        @interrupts.uninterrupted
        def on_freed(reference: weakref.ref[Any]) -> None:
            self._loans.pop(id(reference), None)
            self._returned.append(whole)
            finalizers.defer(self._settle)

        reference = weakref.ref(loan, on_freed)
        self._loans[id(reference)] = reference
        return loan

    def _find(self, nbytes: int) -> Bytes | None:
        """The smallest that is kept of at least `nbytes`, and not of so many more that too much would lie idle."""
        fitting = [memory for memory in self._kept if nbytes <= memory.nbytes <= nbytes * MAX_RATIO]
        if not fitting:
            return None
        found = min(fitting, key=lambda memory: memory.nbytes)
        self._take_out(next(index for index, memory in enumerate(self._kept) if memory is found))
        return found

    def _take_back(self) -> None:
        """Keep what was returned, as far as there is room. Call it under the lock."""
        while self._returned:
            self._kept.append(self._returned.popleft())
        nbytes = sum(memory.nbytes for memory in self._kept)
        while nbytes > self._kept_max_nbytes:
            nbytes -= self._take_out(0).nbytes

    def _take_out(self, index: int) -> Bytes:
        self._num_unused -= index < self._num_unused
        return self._kept.pop(index)

    def trim(self) -> None:
        """Give back to the system what was not used since this was called before."""
        with self._lock:
            self._take_back()
            unused, self._kept = self._kept[: self._num_unused], self._kept[self._num_unused :]
            self._num_unused = len(self._kept)
        unused.clear()  # outside of the lock: it takes a while

    def _settle(self) -> None:
        with self._lock:
            self._take_back()


@dataclass(slots=True)
class _Incoming:
    """A transfer on its way in: where it goes, how many bytes are missing yet, and where the next chunk may begin.

    Chunks come in order. What is lost with a connection leaves a gap; none is written to twice. So where nothing is
    missing, all of the memory is the sender's: it may hold what others sent before.
    """

    loan: Bytes
    missing: int
    next_at: int = 0


class Transfers:
    """The chunked buffers of one worker, out and in. Incoming ones are owned by the reading thread.

    Args:
        send: sends a message to a peer, as `Endpoint.send`.
        make: makes memory for what comes in.
        available_nbytes: how much memory is left; None: it is not known.
        is_encrypted: whether what is sent is: then smaller buffers travel in chunks, too.

    Attributes:
        num_placed: how many buffers were sent in chunks so far.
        buffers: where what comes in is put together.
    """

    def __init__(
        self, send: Send, make: MakeMemory = plain, available_nbytes: Callable[[], int | None] = available_nbytes,
        is_encrypted: bool = False,
    ) -> None:  # fmt: skip
        keep_freed_memory()
        self._is_encrypted = is_encrypted
        self.num_placed = 0
        self._send = send
        self._available_nbytes = available_nbytes
        self._numbers = itertools.count(1)
        self.buffers = WarmBuffers(make=make)
        self._incoming: dict[tuple[Incarnation, int], _Incoming] = {}

    def place(self, peer: Incarnation, buffer: Buffer | Arriving) -> Descriptor | None:
        """Send `buffer` to `peer` in chunks; None where it should travel as one frame.

        Its memory must stay unchanged until the message it belongs to was answered. What arrives in pieces leaves in
        the same ones, each as soon as it is there.

        Raises:
            PeerLostError: the peer is gone.
            DeviceError: the buffer does not come.
        """
        nbytes = len(buffer)
        min_nbytes = ENCRYPTED_MIN_NBYTES if self._is_encrypted else MIN_NBYTES
        if nbytes < (CHUNK_NBYTES if isinstance(buffer, Arriving) else min_nbytes):
            return None
        number = next(self._numbers)
        try:
            offset = 0
            for chunk in buffer.pieces() if isinstance(buffer, Arriving) else _cut(memoryview(buffer)):
                self._send(peer, (_HEADER.pack(MAGIC, number, offset, nbytes), chunk))
                offset += len(chunk)
        except BaseException:
            self.take_back(peer, [number, nbytes])
            raise
        self.num_placed += 1
        return [number, nbytes]

    def take_back(self, peer: Incarnation, descriptor: Descriptor) -> None:
        """No envelope will name `descriptor`: `peer` need not keep what came of it."""
        with suppress(ZrpcError):  # one that cannot be reached keeps nothing for long
            self._send(peer, (_HEADER.pack(MAGIC, descriptor[0], 0, 0), b""))

    def is_chunk(self, frames: Sequence[Buffer]) -> bool:
        """Whether `frames` are a chunk and no envelope."""
        return len(frames) == 2 and frames[0][:1] == _FIRST_BYTE

    def receive(self, source: Incarnation, frames: Sequence[Buffer]) -> None:
        """Take in a chunk.

        Raises:
            ProtocolError: it does not fit its transfer.
        """
        if len(frames[0]) != _HEADER.size:
            raise ProtocolError(f"the header of a chunk has {len(frames[0])} bytes instead of {_HEADER.size}")
        _, number, offset, nbytes = _HEADER.unpack(frames[0])
        chunk = np.frombuffer(frames[1], np.uint8)
        if offset + chunk.nbytes > nbytes:
            raise ProtocolError(f"a chunk ends at byte {offset + chunk.nbytes} of a transfer of {nbytes}")
        if not nbytes:
            self._incoming.pop((source, number), None)
            return
        transfer = self._incoming.get((source, number))
        if transfer is None:
            self._check_room(nbytes)
            try:
                loan = self.buffers.lend(nbytes)
            except MemoryError:
                raise ProtocolError(f"a transfer of {nbytes} bytes is said to come, and there is no memory") from None
            transfer = self._incoming[source, number] = _Incoming(loan, nbytes)
        if nbytes != transfer.loan.nbytes:
            raise ProtocolError(f"a chunk of transfer {number} says {nbytes} bytes, another {transfer.loan.nbytes}")
        if offset < transfer.next_at:
            raise ProtocolError(f"a chunk begins at byte {offset} of transfer {number}, of which more has come")
        np.copyto(transfer.loan[offset : offset + chunk.nbytes], chunk)
        transfer.missing -= chunk.nbytes
        transfer.next_at = offset + chunk.nbytes

    def _check_room(self, nbytes: int) -> None:
        """See whether a transfer of so many bytes may begin."""
        if len(self._incoming) >= INCOMING_MAX:
            raise ProtocolError(f"{INCOMING_MAX} transfers have begun, and no message has named them")
        claimed = nbytes + sum([transfer.missing for transfer in list(self._incoming.values())])
        if claimed > CLAIMS_FREE_NBYTES:
            available = self._available_nbytes()
            if available is not None and claimed > available:
                raise ProtocolError(
                    f"transfers of {claimed} bytes are said to come, and there is memory for {available}: send less at "
                    "once, or receive on a machine with more memory"
                )

    def fetch(self, source: Incarnation, descriptor: Descriptor) -> memoryview:
        """The buffer that `descriptor` tells of, which has come.

        Raises:
            ProtocolError: it has not, or not all of it: a connection that breaks and is made again loses messages.
        """
        if [type(part) for part in descriptor] != [int, int]:
            raise ProtocolError(f"{reprlib.repr(descriptor)} describes no transfer")
        number, nbytes = descriptor
        transfer = self._incoming.pop((source, number), None)
        if transfer is None or transfer.loan.nbytes != nbytes:
            raise ProtocolError(f"transfer {number} of {nbytes} bytes has not come")
        if transfer.missing:
            raise ProtocolError(f"{transfer.missing} of the {nbytes} bytes of transfer {number} were lost on their way")
        return transfer.loan.data

    def forget(self, source: Incarnation) -> None:
        """`source` is gone: drop what it has begun to send."""
        for key in [key for key in list(self._incoming) if key[0] == source]:
            self._incoming.pop(key, None)


def _cut(view: memoryview) -> Iterator[memoryview]:
    for offset in range(0, len(view), CHUNK_NBYTES):
        yield view[offset : offset + CHUNK_NBYTES]
