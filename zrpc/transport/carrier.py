"""Envelopes between workers: each large buffer goes the best way there is, the rest through the endpoint.

In shared memory, between workers of one host; else in chunks, where it is very large; else as a frame of
its own. The two first go beside their envelope, which names them by descriptors.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc import finalizers, protocol_errors
from zrpc.errors import LimitError, PeerLostError, ProtocolError, ZrpcError
from zrpc.exception_text import log_error
from zrpc.transport.batches import MAX_NBYTES, Batches, is_batch, messages_of
from zrpc.transport.chunks import Transfers, plain
from zrpc.transport.filling import Filling
from zrpc.transport.packets import Bundle
from zrpc.transport.shared_memory import is_refusal, refusal
from zrpc.transport.slab import DESCRIPTOR_LENGTH
from zrpc.wire.envelope import Arriving, Envelope, decode, encode
from zrpc.wire.region import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.transport.chunks import MakeMemory
    from zrpc.transport.endpoint import Endpoint, OnLost
    from zrpc.transport.filling import Fill, Unfilled
    from zrpc.transport.inbox import Work
    from zrpc.transport.packets import OwnedFile
    from zrpc.transport.shared_memory import SharedMemory
    from zrpc.transport.slab import Pins
    from zrpc.wire.envelope import Buffer
    from zrpc.wire.region import SharedBuffers

    OnEnvelope = Callable[[Incarnation, Envelope], Work | None]

log = logging.getLogger("zrpc")

TRIM_S = 5.0
"""Memory that is kept for use again and was not used for so long is given back, at twice that time at the latest.

Fresh pages cost a second for each GB, warm ones a tenth of that: a program that sends as much only every few seconds
keeps them."""
_NO_ENVELOPE = b"\xc1"
"""What everything begins with that is no envelope."""


class Carrier:
    """One worker's end. Any thread may send; what comes is handed on by the endpoint's reading thread.

    Args:
        endpoint: the sockets; the carrier starts and closes them.
        shared_memory: None: large buffers go through the endpoint.
        make: makes memory for what comes through sockets.
    """

    def __init__(self, endpoint: Endpoint, shared_memory: SharedMemory | None, make: MakeMemory = plain) -> None:
        self._endpoint = endpoint
        self._shared_memory = shared_memory
        self._transfers = Transfers(endpoint.send, make, is_encrypted=endpoint.is_encrypted)
        self._batches = Batches(endpoint.send, self.forget)
        self._on_envelope: OnEnvelope
        self._is_over = False
        self._trim_at = time.monotonic() + TRIM_S  # of the control thread
        self.inbox = endpoint.inbox
        self.interrupt = endpoint.interrupt

    @property
    def incarnation(self) -> Incarnation:
        """This life of the worker."""
        return self._endpoint.incarnation

    def start(self, on_envelope: OnEnvelope, on_lost: OnLost, on_callers_left: Callable[[], None]) -> None:
        """Begin to read. `on_envelope(source, envelope)` is held to what `Inbox` says of `Take`.

        For `on_lost` see `Endpoint.start`, for `on_callers_left` `Inbox.tell`.
        """
        self._on_envelope = on_envelope
        self.inbox.tell(self._batches.flush, on_callers_left)
        self._endpoint.start(self._on_frames, on_lost)

    def meet(self, peer: Incarnation) -> None:
        """`peer` came."""
        self._endpoint.meet(peer)

    def watch(self, peer: Incarnation) -> None:
        """See `Endpoint.watch`."""
        self._endpoint.watch(peer)

    def send(self, peer: Incarnation, envelope: Envelope, *, may_lie: bool = False) -> None:
        """Send `envelope`; buffers that go through sockets must stay unchanged until the message was answered.

        It gives up those that nobody else sees, where it is their last use.

        Args:
            peer: to whom.
            envelope: what.
            may_lie: it may lie here for a moment, to leave with others: this thread will not wait for what it leads to.

        Raises:
            PeerLostError: the worker is not connected, or known to be lost.
            AgentClosedError: this end is closed.
            ProtocolError: a field is not something that msgpack can carry.
        """
        placed: list[list[Any]] = []
        later: list[Fill] = []
        files: list[OwnedFile] = []
        try:
            frames = self._encoded(peer, envelope, placed, later, files)
        except PeerLostError:
            self.forget(peer)
            raise
        except BaseException:
            for descriptor in placed:
                self._take_back(peer, descriptor, is_unsent=True)
            raise
        try:
            if files:
                self._endpoint.send(peer, Bundle(frames, files))
            else:
                self._send(peer, frames, may_lie)
            if later and self._shared_memory is not None:
                self._shared_memory.fill(later)
        except PeerLostError:
            self.forget(peer)
            raise
        except BaseException:  # it may have left all the same, or be kept to be sent later
            for descriptor in placed:
                self._take_back(peer, descriptor, is_unsent=False)
            raise

    def _send(self, peer: Incarnation, frames: list[Buffer], may_lie: bool) -> None:
        if not (may_lie and self.inbox.serves_queue_here and len(frames) == 1 and len(frames[0]) <= MAX_NBYTES):
            if self._batches.count:
                self._batches.flush()
            self._endpoint.send(peer, frames)
            return
        self._batches.add(peer, frames[0])
        if not self.inbox.serves_queue_here:  # whoever reads now may have looked for what lies here before
            self._batches.flush()

    def _encoded(
        self, peer: Incarnation, envelope: Envelope, placed: list[list[Any]], later: list[Fill],
        files: list[OwnedFile],
    ) -> list[Buffer]:  # fmt: skip
        """Its frames. `placed` gets the descriptors of what goes beside it, `later` what is to do when it has left.

        `files` gets those that go with it.

        What is handed back is taken back only if nothing was sent: else `peer` may hold it already.
        """
        if not envelope.buffers:
            return encode(envelope)
        memory = self._shared_memory
        if memory is None or not envelope.is_last_use:
            return encode(envelope, partial(self._place, peer, placed, later, files, envelope.shared))
        handed: list[list[Any]] = []
        envelope.buffers = buffers = list(envelope.buffers)
        try:
            memory.hand_back(peer, buffers, handed)
            return encode(envelope, partial(self._place, peer, placed, later, files, None))
        except BaseException:
            for descriptor in handed:
                memory.take_handed_back(peer, descriptor)
            raise

    def pin(self, buffer: Buffer, pins: Pins) -> None:
        """Have `pins` pin the memory that a received buffer lies in, if it is shared with another worker."""
        if self._shared_memory is not None:
            self._shared_memory.pin(buffer, pins)

    def queued_nbytes(self, peer: Incarnation) -> int:
        """See `Endpoint.queued_nbytes`."""
        return self._endpoint.queued_nbytes(peer)

    def shared_counts(self) -> dict[str, int]:
        """See `SharedMemory.counts` and `SharedMemory.counts_of_others`; nothing where there is none."""
        memory = self._shared_memory
        return {} if memory is None else {**memory.counts(), **memory.counts_of_others()}

    def forget(self, peer: Incarnation) -> None:
        """`peer` is gone."""
        if self._shared_memory is not None:
            self._shared_memory.forget(peer)
        self._transfers.forget(peer)

    def break_off(self, peers: frozenset[Incarnation]) -> None:
        """What was on its way from these peers may be lost: what has come of it in part is dropped."""
        for peer in peers:
            self._transfers.forget(peer)

    def trim(self) -> float:
        """Give back memory that is kept for use again and was not used lately. For the control thread.

        Returns:
            After how many seconds to call it again; earlier calls do nothing.
        """
        now = time.monotonic()
        if now >= self._trim_at:
            self._trim_at = now + TRIM_S
            if self._shared_memory is not None:
                self._shared_memory.trim()
            self._transfers.buffers.trim()
        return self._trim_at - now

    def wind_down(self) -> None:
        """This worker shuts down: it keeps no answers back, and waits for no memory that a peer has not filled yet."""
        self._is_over = True
        self._batches.close()

    def flush(self) -> None:
        """See `Endpoint.release`."""
        self._endpoint.release()

    def close(self, flush_s: float, *, at_exit: bool = False) -> None:
        """See `Endpoint.close`. Idempotent."""
        self.wind_down()
        self.flush()
        self._endpoint.close(flush_s, at_exit=at_exit)
        if self._shared_memory is not None:
            self._shared_memory.close()

    def _place(
        self, peer: Incarnation, placed: list[list[Any]], later: list[Fill], files: list[OwnedFile],
        shared: SharedBuffers | None, buffer: Buffer | Arriving | Region,
    ) -> list[Any] | None:  # fmt: skip
        """See to it that a large buffer goes beside its envelope, and give its descriptor; see `_encoded`.

        None: it travels as a frame.
        """
        memory = self._shared_memory
        descriptor = None
        if memory is not None and self._endpoint.takes_files(peer):
            descriptor = None if shared is None else self._share(memory, peer, shared, buffer, files)
            descriptor = descriptor or memory.place(peer, buffer, later, files)
        if descriptor is None and not isinstance(buffer, Region):
            descriptor = self._transfers.place(peer, buffer)
        if descriptor is not None:
            placed.append(descriptor)
        return descriptor

    def _share(
        self, memory: SharedMemory, peer: Incarnation, shared: SharedBuffers, buffer: Buffer | Arriving | Region,
        files: list[OwnedFile],
    ) -> list[Any] | None:  # fmt: skip
        """What `peer` is to be told of the memory that it shares with other receivers of `buffer`; None: of none."""
        assert not isinstance(buffer, Arriving)
        told = shared.placed.get(id(buffer))
        if told is None:
            told = memory.share([one for one in shared.receivers if self._is_local(one)], buffer) or {}
            shared.placed[id(buffer)] = told
        descriptor = told.pop(peer, None)
        if descriptor is not None:
            memory.attach(peer, descriptor, files)
        return descriptor

    def _is_local(self, peer: Incarnation) -> bool:
        try:
            return self._endpoint.takes_files(peer)
        except ZrpcError:  # it is gone: what is sent to it will say so
            return False

    def end_sharing(self, shared: SharedBuffers) -> None:
        """All envelopes that `shared` is of are sent: whoever was not told of its memory will not be."""
        for told in shared.placed.values():
            while told and self._shared_memory is not None:
                self._shared_memory.take_back(told.popitem()[1])

    def _take_back(self, peer: Incarnation, descriptor: list[Any], *, is_unsent: bool) -> None:
        """The envelope that was to name `descriptor` is not sent. `is_unsent`: nobody will ever have seen it."""
        if len(descriptor) >= DESCRIPTOR_LENGTH and self._shared_memory is not None:
            take_back = self._shared_memory.take_back if is_unsent else self._shared_memory.give_up
            take_back(descriptor)
        else:
            self._transfers.take_back(peer, descriptor)

    def _on_frames(self, source: Incarnation, frames: list[Buffer]) -> Work | None:
        try:
            if frames[0][:1] == _NO_ENVELOPE:
                return self._on_others(source, frames)
            unfilled: Unfilled = []
            files = frames.files if type(frames) is Bundle else ()
            envelope = decode(frames, partial(self._fetch, source, unfilled, files))
            if unfilled:
                envelope.pending = Filling(unfilled, lambda: self._is_over)
            return self._on_envelope(source, envelope)
        except ProtocolError as error:
            protocol_errors.received.note("message", source.hex(), error)
            return None
        except Exception as error:  # whatever one message does, the next one is read
            finalizers.defer(partial(log_error, log, "a message of %s was dropped", source.hex(), error=error))
            return None

    def _on_others(self, source: Incarnation, frames: list[Buffer]) -> Work | None:
        """Take in what is no envelope, or several.

        Raises:
            ProtocolError: it is not known, or damaged.
        """
        if self._transfers.is_chunk(frames):
            self._transfers.receive(source, frames)
        elif is_batch(frames):
            works = [work for message in messages_of(frames) if (work := self._on_frames(source, [message]))]
            return partial(_do_all, works) if works else None  # answers are none
        elif self._shared_memory is not None and is_refusal(frames):
            self._shared_memory.take_refusal(source, frames[0])
        else:
            raise ProtocolError(f"a message of {len(frames)} frames begins with {bytes(frames[0][:2])!r}")
        return None

    def _fetch(
        self, source: Incarnation, unfilled: Unfilled, files: Sequence[OwnedFile | None], descriptor: list[Any]
    ) -> Buffer:
        """The memory of a large buffer that goes beside its envelope; see `SharedMemory.fetch`."""
        if len(descriptor) >= DESCRIPTOR_LENGTH and self._shared_memory is not None:
            try:
                return self._shared_memory.fetch(source, descriptor, unfilled, files)
            except LimitError:
                with suppress(ZrpcError):  # one that cannot be reached takes it back when it learns of that
                    self._endpoint.send(source, (refusal(descriptor),))
                raise
        return self._transfers.fetch(source, descriptor)


def _do_all(works: list[Work]) -> None:
    for work in works:
        try:
            work()
        except BaseException as error:  # the others are of other calls
            log_error(log, "a request failed in an unexpected way", error=error)
            del error
