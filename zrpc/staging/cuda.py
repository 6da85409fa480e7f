"""CUDA as an `Accelerator`. The only module of zrpc that calls torch.cuda for more than the number of devices."""

from __future__ import annotations

import ctypes
import logging
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from zrpc import finalizers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zrpc.staging.accelerator import Event

log = logging.getLogger("zrpc")

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices
_SUCCESS = 0

Stream = torch.cuda.Stream


class CudaAccelerator:
    """See `zrpc.staging.accelerator.Accelerator`. CUDA is initialized when it is made, and used from no other process.

    Raises:
        RuntimeError: CUDA cannot be initialized here.
    """

    def __init__(self) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]

    def current_stream(self, device: str) -> Stream:
        """See `Accelerator.current_stream`."""
        return torch.cuda.current_stream(device)

    def new_stream(self, device: str) -> Stream:
        """See `Accelerator.new_stream`: torch has 32 of them for each device."""
        return Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def running_on(self, streams: Sequence[Stream]) -> Iterator[None]:
        """See `Accelerator.running_on`."""
        device = torch.cuda.current_device()
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            torch.cuda.set_device(device)  # entering a stream changes it; leaving restores it
            yield

    def record(self, stream: Stream) -> Event:
        """See `Accelerator.record`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: Stream, event: Any) -> None:
        """See `Accelerator.wait`."""
        stream.wait_event(event)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """See `Accelerator.copy`."""
        with torch.no_grad(), torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def empty(self, nbytes: int, device: str, stream: Stream) -> torch.Tensor:
        """See `Accelerator.empty`."""
        with torch.cuda.stream(stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        """See `Accelerator.keep`."""
        tensor.record_stream(stream)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See `Accelerator.pinned`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def register(self, address: int, nbytes: int) -> bool:
        """See `Accelerator.register`."""
        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))  # type: ignore[no-untyped-call]
        if code != _SUCCESS:
            finalizers.defer(partial(log.debug, "%d bytes of memory cannot be pinned: CUDA error %d", nbytes, code))
            _forget_error()
        return code == _SUCCESS

    def unregister(self, address: int) -> None:
        """See `Accelerator.unregister`."""
        code = int(torch.cuda.cudart().cudaHostUnregister(address))  # type: ignore[no-untyped-call]
        if code != _SUCCESS:
            finalizers.defer(partial(log.debug, "shared memory cannot be unpinned: CUDA error %d", code))
            _forget_error()


def _forget_error() -> None:
    """Take back the error that CUDA keeps of a failed call: torch would find it, and blame its next kernel for it."""
    major = (torch.version.cuda or "0").split(".")[0]
    for name in (None, f"libcudart.so.{major}"):  # None: what is linked into this process
        try:
            ctypes.CDLL(name).cudaGetLastError()
        except (AttributeError, OSError):
            continue
        return
    finalizers.defer(partial(log.warning, "the error of a CUDA call cannot be taken back: libcudart is not found"))
