"""Device memory that workers of this host may copy from: CUDA IPC.

A sender owns slabs of device memory, each for one peer. To send a buffer it copies it into a free slab, on the device,
waits until that is done, and sends the descriptor of the slab's note. The receiver, who has opened the slab's memory
once, copies from it into memory of his own, on a device again, and lets go of the note when that copy is done.

Invariants:

- A message that names a slab leaves when the bytes are in it: nobody waits for another process's device.
- A slab is written by its sender only while its note is free, and read by its one receiver only while he holds it.
- The memory of a slab is used for nothing else before its note is free or the receiver's process has ended, nor before
  the receiver has let go of what he opened (`Accelerator.export`). That a peer is lost says neither: his slabs are kept
  and looked after until one of both is so.
- A slab is used only after its receiver has said in its note that he has opened it. To have it tried, the note rides on
  a message whose bytes go through the host. So no call fails because memory cannot be opened: whatever the reason, its
  bytes have come. One slab of a peer is tried at a time; after a refusal none goes to him any more.

The tensors of the program are never exported themselves. torch puts a counter before the memory of a storage each time
that it exports it, and does not give such memory up while the counter of a killed receiver stands. CUDA exports all of
the allocation that a tensor is a part of, and to open and close it for each message is slow. Beside that a second copy
on the device is cheap.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc import finalizers
from zrpc.errors import DeviceError
from zrpc.staging.export_slab import ExportSlab, SlabExport, room_for
from zrpc.staging.note import Answer, reason_in, write_ticket

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    import torch

    from zrpc.ids import Incarnation
    from zrpc.staging.accelerator import Accelerator
    from zrpc.staging.note import MakeNote, Note
    from zrpc.staging.process import Process

log = logging.getLogger("zrpc")

MIN_NBYTES = 65_536
"""Smaller buffers go through the host. Not measured."""
PEER_MAX_NBYTES = 512 << 20
"""What the slabs for one peer may take together. Not measured: two tensors of 256 MiB, as many as overlap."""
PEER_MAX_COUNT = 64
"""How many slabs one peer may have: the note of each is an open file."""
PAUSE = 64
"""So many buffers go through the host once a device had no room for a slab, before it is asked again."""
SEE_OFF_S = 10.0
"""For so long it is waited for the end of a lost peer's process; after that it is looked for now and then."""
_LOOK_S = 0.05
_REFUSED = "%s cannot open memory of this worker's %s: tensors go there through the host (%s)"
_UNSHARED = "device memory cannot be shared for now, tensors go through the host: %s"


@dataclass(slots=True)
class Tally:
    """What was done so far. Owned by the lock of `Exports`."""

    tensors: int = 0
    nbytes: int = 0
    fallbacks: int = 0
    """Buffers that were large enough, for a peer that may be exported to, and went through the host."""


class PeerExports:
    """The slabs for one peer: an `Exporter` (`zrpc.wire.route`). Any thread may call it; the lock owns everything.

    Args:
        of: all of this worker's.
        name: the peer's.
        make_note: makes notes that the peer can open.
        open_process: finds the peer's process.
    """

    def __init__(self, of: Exports, name: str, make_note: MakeNote, open_process: Callable[[], Process]) -> None:
        self._of = of
        self._name = name
        self._make_note = make_note
        self._open_process = open_process
        self._process: Process | None = None
        self._slabs: list[ExportSlab] = []  # the one used last is the last
        self._tickets: list[list[Any]] = []  # of slabs that were let go of, and that the peer may have open yet
        self._pause = 0
        self._is_over = False

    def export(self, source: torch.Tensor, device: str, target: str) -> SlabExport | None:
        """See `zrpc.wire.route.Exporter.export`."""
        nbytes = source.numel()
        if nbytes < MIN_NBYTES:
            return None
        of = self._of
        with of.lock:
            slab = self._take(nbytes, device, target)
            if slab is None or slab.answer is not Answer.OPENED:
                of.tally.fallbacks += 1
                return None if slab is None else SlabExport(slab, 0, of.waiting)
            of.tally.tensors += 1
            of.tally.nbytes += nbytes
            exported = SlabExport(slab, nbytes, of.waiting)
        try:
            slab.fill(of.accelerator(), source)
        except RuntimeError as error:
            raise DeviceError(f"a tensor of {nbytes} bytes cannot be copied within {device}: {error}") from error
        return exported

    def end(self) -> None:
        """No slab goes to this peer any more. Call it under the lock."""
        self._is_over = True
        self.sweep()

    def sweep(self) -> bool:
        """Once it has ended, let go of slabs that nobody holds any more. Call it under the lock.

        Returns:
            Whether there is anything left to look after.
        """
        if self._is_over:
            has_ended = self._process is not None and self._process.has_ended()
            for slab in list(self._slabs):
                if slab.is_idle(has_ended):
                    self._drop(slab)
            if has_ended:
                for ticket in self._tickets:
                    self._withdraw(ticket)
                self._tickets.clear()
        return bool(self._slabs or self._tickets)

    def has_slabs(self) -> bool:
        """Whether there are slabs. Call it under the lock."""
        return bool(self._slabs)

    def await_end(self, within_s: float) -> None:
        """Wait for the end of the peer's process, up to that time."""
        process = self._process
        if process is not None:
            process.has_ended(within_s)

    def abandon(self) -> None:
        """Let go of all slabs, though the peer may hold some, but not of what a thread here is about to send.

        Call it under the lock.
        """
        for slab in [slab for slab in self._slabs if not slab.hands]:
            slab.await_filled()
            self._drop(slab)

    def counts(self) -> tuple[int, int, int]:
        """How many slabs there are, how many of them are held, and their bytes. Call it under the lock."""
        held = sum(not slab.note.is_free() for slab in self._slabs)
        return len(self._slabs), held, sum(slab.room for slab in self._slabs)

    def _take(self, nbytes: int, device: str, target: str) -> ExportSlab | None:
        """A slab, from now on held: one that the peer has opened, or one for him to try. Call it under the lock."""
        self._hear()
        if self._is_over:
            self.sweep()
            return None
        slab = self._find(nbytes, device, target) or self._find_untried(device, target)
        if slab is None and all(one.answer is Answer.OPENED for one in self._slabs):
            slab = self._make(nbytes, device, target)
        if slab is not None:
            slab.note.hold()
        return slab

    def _hear(self) -> None:
        """See whether the peer has refused a slab."""
        refused = next((slab for slab in self._slabs if slab.answer is Answer.REFUSED), None)
        if refused is not None and not self._is_over:
            reason = reason_in(refused.note.view)
            finalizers.defer(partial(log.warning, _REFUSED, self._name, refused.device, reason))
            self.end()

    def _find(self, nbytes: int, device: str, target: str) -> ExportSlab | None:
        """The smallest free slab that takes so much, of several the one used last; it is the last from now on."""
        best: ExportSlab | None = None
        for slab in reversed(self._slabs):
            if slab.room < nbytes or not slab.serves(device, target) or (best is not None and slab.room >= best.room):
                continue
            if slab.answer is Answer.OPENED and slab.note.is_free():
                best = slab
        if best is not None:
            self._slabs.remove(best)
            self._slabs.append(best)
        return best

    def _find_untried(self, device: str, target: str) -> ExportSlab | None:
        """The slab that is to be tried, if the message that it rode on came to nothing."""
        for slab in self._slabs:
            if slab.answer is Answer.NONE and slab.note.is_free() and slab.serves(device, target):
                return slab
        return None

    def _make(self, nbytes: int, device: str, target: str) -> ExportSlab | None:
        """A fresh slab, for which idle ones may have to go; None where there can be none."""
        room = room_for(nbytes)
        if room > PEER_MAX_NBYTES or not self._may_ask() or not self._make_way(room):
            return None
        try:
            if self._process is None:
                self._process = self._open_process()
            note = self._make_note()
        except OSError as error:
            self._put_off(error)
            return None
        if note is None:  # the peer has not tried yet what it can open
            return None
        slab = self._fit_out(note, room, device, target)
        if slab is None:
            note.retire()
        else:
            self._slabs.append(slab)
        return slab

    def _fit_out(self, note: Note, room: int, device: str, target: str) -> ExportSlab | None:
        """The slab that `note` is for; None where there is no memory for it, or none that can be exported."""
        accelerator = self._of.accelerator()
        try:
            memory = accelerator.empty(room, device, accelerator.new_stream(device))
        except RuntimeError as error:
            self._put_off(error)
            return None
        try:
            ticket = accelerator.export(memory)
        except RuntimeError as error:
            self._of.warn(str(error))
            self.end()
            return None
        try:
            write_ticket(note.view, ticket)
        except RuntimeError as error:
            self._of.warn(str(error))
            self._withdraw(ticket)
            self.end()
            return None
        return ExportSlab(device, target, memory, ticket, note)

    def _put_off(self, error: Exception) -> None:
        """What is missing may be there later."""
        self._of.warn(str(error))
        self._pause = PAUSE

    def _make_way(self, room: int) -> bool:
        """See to it that a slab of `room` fits beside the others, by letting go of idle ones; whether it does."""
        idle = [slab for slab in self._slabs if slab.is_idle()]
        _, _, nbytes = self.counts()
        while nbytes + room > PEER_MAX_NBYTES or len(self._slabs) >= PEER_MAX_COUNT:
            if not idle:
                return False
            slab = idle.pop(0)
            nbytes -= slab.room
            self._drop(slab)
        return True

    def _may_ask(self) -> bool:
        self._pause = max(0, self._pause - 1)
        return not self._pause

    def _drop(self, slab: ExportSlab) -> None:
        """Let go of a slab. The peer, who may have it open, sees that its note is retired."""
        self._slabs.remove(slab)
        slab.note.retire()
        if slab.answer is Answer.OPENED or not slab.note.is_free():
            self._tickets.append(slab.ticket)
        else:
            self._withdraw(slab.ticket)

    def _withdraw(self, ticket: list[Any]) -> None:
        try:
            self._of.accelerator().withdraw(ticket)
        except RuntimeError as error:
            finalizers.defer(partial(log.debug, "device memory for %s cannot be taken back: %s", self._name, error))


class Exports:
    """All of this worker's. Any thread may call it; the lock owns all tables, those of the peers too.

    Args:
        accelerator: gives the devices.
        submit: runs a task on another thread, unless the worker is closed.
        waiting: entered while a thread waits.

    Attributes:
        lock: see above.
        tally: what was done.
    """

    def __init__(
        self,
        accelerator: Callable[[], Accelerator],
        submit: Callable[[Callable[[], None]], None],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.accelerator = accelerator
        self.waiting = waiting
        self.lock = threading.Lock()
        self.tally = Tally()
        self._submit = submit
        self._peers: dict[Incarnation, PeerExports] = {}
        self._lost: list[PeerExports] = []
        self._has_warned = False

    def to(self, peer: Incarnation, name: str, make_note: MakeNote, open_process: Callable[[], Process]) -> PeerExports:
        """The slabs for that peer; see `PeerExports`."""
        with self.lock:
            if peer not in self._peers:
                self._peers[peer] = PeerExports(self, name, make_note, open_process)
            return self._peers[peer]

    def forget(self, peer: Incarnation) -> None:
        """`peer` is gone. What he holds is kept until he lets go of it or his process has ended."""
        with self.lock:
            exports = self._peers.pop(peer, None)
            if exports is None:
                return
            exports.end()
            if not exports.sweep():
                return
            self._lost.append(exports)
        self._submit(partial(self._see_off, exports, time.monotonic() + SEE_OFF_S))

    def counts(self) -> dict[str, int]:
        """What was exported so far, and what went through the host instead; the slabs, those held, and their bytes."""
        with self.lock:
            self._sweep()
            each = [exports.counts() for exports in (*self._peers.values(), *self._lost)]
            slabs, held, nbytes = (sum(column) for column in zip(*each, strict=True)) if each else (0, 0, 0)
            tally = self.tally
            return {
                "ipc_tensors": tally.tensors, "ipc_nbytes": tally.nbytes, "ipc_fallbacks": tally.fallbacks,
                "ipc_slabs": slabs, "ipc_slabs_held": held, "ipc_slabs_nbytes": nbytes,
            }  # fmt: skip

    def warn(self, reason: str) -> None:
        """Log, once, that memory could not be exported. Call it under the lock, under which nothing is logged."""
        if not self._has_warned:
            self._has_warned = True
            finalizers.defer(partial(log.warning, _UNSHARED, reason))

    def close(self, timeout_s: float) -> None:
        """Let go of everything, once peers have, but after `timeout_s` at any rate. Idempotent."""
        deadline = time.monotonic() + timeout_s
        with self.lock:
            for exports in self._peers.values():
                exports.end()
            self._lost.extend(self._peers.values())
            self._peers.clear()
        while not self._is_swept() and time.monotonic() < deadline:
            time.sleep(_LOOK_S / 10)  # they only write into the notes
        with self.lock:
            for exports in self._lost:
                exports.abandon()
            self._lost.clear()

    def _is_swept(self) -> bool:
        with self.lock:
            self._sweep()
            return not any(exports.has_slabs() for exports in self._lost)

    def _sweep(self) -> None:
        """Look after peers that are gone. Call it under the lock."""
        self._lost = [exports for exports in self._lost if exports.sweep()]

    def _see_off(self, exports: PeerExports, deadline: float) -> None:
        """Look after a peer that is gone, for a moment at a time: its pool must be able to close."""
        with self.waiting():
            exports.await_end(_LOOK_S)
        with self.lock:
            self._sweep()
            is_left = exports in self._lost
        if is_left and time.monotonic() < deadline:
            self._submit(partial(self._see_off, exports, deadline))
