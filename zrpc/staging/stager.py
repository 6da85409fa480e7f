"""Staging: tensors on devices travel through pinned memory of the host. See docs/cuda.md for how it fits together."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import torch

from zrpc.errors import DeviceError
from zrpc.staging import handover
from zrpc.staging.held import Held
from zrpc.staging.outgoing import Outgoing
from zrpc.staging.pinned import PinnedPool
from zrpc.staging.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from zrpc.staging.accelerator import Accelerator, Event, Stream
    from zrpc.wire.envelope import Buffer

SMALL_MAX_NBYTES = 65_536
"""Received buffers up to this size are copied into pinned memory first; larger ones are copied from where they lie."""
RECEIVED_MAX_SHARE = 0.5
"""The part of the pinned pool that memory for what comes through sockets may take."""


def _leave(_: Buffer) -> None:
    """Pageable memory can be copied from too."""


class Staging:
    """What brings tensors to and from the devices of one worker. Any thread may use it.

    Nothing is done before `use` is told of a device: CUDA is not even initialized.

    Args:
        open_accelerator: makes the accelerator, once.
        pinned_pool_nbytes: how much memory of the host may be pinned.
        submit: runs a task on another thread, unless the worker is closed.
        waiting: entered while a thread waits for a device.
        pin: may pin the memory that a received buffer lies in, which then is copied from faster.
        on_streams: is told of `streams` when `use` changes them.

    Attributes:
        devices: the devices that the worker uses.
        streams: the streams of its requests; None: it uses no device.
    """

    def __init__(
        self,
        open_accelerator: Callable[[], Accelerator],
        pinned_pool_nbytes: int,
        submit: Callable[[Callable[[], None]], None],
        waiting: Callable[[], AbstractContextManager[None]],
        *,
        pin: Callable[[Buffer], None] = _leave,
        on_streams: Callable[[Streams | None], None] = handover.order_by,
    ) -> None:
        self._open_accelerator = open_accelerator
        self._pool_nbytes = pinned_pool_nbytes
        self._waiting = waiting
        self._lock = threading.Lock()  # owns the making of the accelerator
        self._accelerator: Accelerator | None = None
        self._pool: PinnedPool
        self._held = Held(submit, waiting)
        self._inward: dict[str, Stream] = {}
        self.devices: Sequence[str] = ()
        self.streams: Streams | None = None
        self._pin = pin
        self._on_streams = on_streams

    @property
    def accelerator(self) -> Accelerator:
        """The devices; to ask for them initializes CUDA.

        Raises:
            DeviceError: there are none.
        """
        if self._accelerator is None:
            with self._lock:
                if self._accelerator is None:
                    try:
                        made = self._open_accelerator()
                    except Exception as error:
                        raise DeviceError(f"CUDA cannot be used in this process: {error}") from error
                    self._pool = PinnedPool(made.pinned, self._pool_nbytes)
                    self._accelerator = made
        return self._accelerator

    def use(self, devices: Sequence[str]) -> None:
        """The worker uses `devices` from now on, whatever it used before.

        Raises:
            DeviceError: they cannot be used.
        """
        if list(devices) != list(self.devices):
            self.streams = Streams(self.accelerator, devices) if devices else None
            self.devices = tuple(devices)
            self._on_streams(self.streams)

    def fetch(self, source: torch.Tensor, device: str) -> Outgoing:
        """See `zrpc.wire.route.Stager.fetch`. The stream that copies is none of the caller's, who is not held up."""
        accelerator = self.accelerator
        try:
            stream = accelerator.new_stream(device)
            accelerator.wait(stream, accelerator.record(accelerator.current_stream(device)))
            accelerator.keep(source, stream)
            return Outgoing(accelerator, self._pool, self._waiting, source, stream)
        except RuntimeError as error:
            raise DeviceError(f"a tensor of {source.numel()} bytes cannot be copied from {device}: {error}") from error

    def deliver(self, buffer: Buffer, device: str) -> torch.Tensor:
        """See `zrpc.wire.route.Stager.deliver`. `buffer` is held until it is copied."""
        accelerator = self.accelerator
        nbytes = len(buffer)
        try:
            stream = self._inward_stream(device)
            target = accelerator.empty(nbytes, device, stream)
            if nbytes:
                self._bring(buffer, target, stream)
                consumer = accelerator.current_stream(device)
                accelerator.wait(consumer, accelerator.record(stream))
                accelerator.keep(target, consumer)
        except RuntimeError as error:
            raise DeviceError(
                f"a tensor of {nbytes} bytes that was sent to this worker cannot be brought to its {device}: {error}. "
                "If there is no room, free some there, or send less at once"
            ) from error
        return target

    def receive_memory(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Memory for what comes through sockets, its content undefined: pinned, if the worker uses devices."""
        loan = self._pool.lend(nbytes, RECEIVED_MAX_SHARE) if self.devices else None
        return np.empty(nbytes, np.uint8) if loan is None else loan.array

    def register(self, address: int, nbytes: int) -> bool:
        """Pin memory of the host that is there already; see `Accelerator.register`."""
        return self.accelerator.register(address, nbytes)

    def unregister(self, address: int) -> None:
        """Undo `register`, once no device copies from received memory any more."""
        self.drain()
        self.accelerator.unregister(address)

    def drain(self) -> None:
        """Wait until devices copy from no received memory any more."""
        self._held.drain()

    def counts(self) -> dict[str, int]:
        """See `PinnedPool.counts`; and how many received buffers are held."""
        if self._accelerator is None:
            return {}
        return {**self._pool.counts(), "staged_buffers_held": len(self._held)}

    def _bring(self, buffer: Buffer, target: torch.Tensor, stream: Stream) -> None:
        """Have `stream` copy `buffer` to `target`."""
        if len(buffer) <= SMALL_MAX_NBYTES:
            loan = self._pool.borrow(len(buffer))
            np.copyto(loan.array, np.frombuffer(buffer, np.uint8))
            event = self._copy(target, loan.tensor, stream)
            loan.in_use_until(event)
            if not loan.is_pooled:
                self._held.until(event, loan)
            return
        self._pin(buffer)
        view = memoryview(buffer)
        source = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
        self._held.until(self._copy(target, source, stream), source)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> Event:
        self.accelerator.copy(target, source, stream)
        return self.accelerator.record(stream)

    def _inward_stream(self, device: str) -> Stream:
        """The one stream that copies to `device`: it waits for nothing but earlier copies."""
        stream = self._inward.get(device)
        if stream is None:
            stream = self._inward.setdefault(device, self.accelerator.new_stream(device))
        return stream
