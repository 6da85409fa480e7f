"""How CUDA's calls are made, as far as that can be seen without a device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from zrpc.staging import cuda
from zrpc.staging.cuda import CudaAccelerator

TICKET = [0, b"memory", 1 << 20, 512, b"/torch_counter", 77, b"event", True]
"""As torch makes it: device, handle, size, offset, counter and its place, event, whether to wait for that."""


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> CudaAccelerator:
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(cuda, "Stream", lambda device: None)
    return object.__new__(CudaAccelerator)


def test_memory_is_opened_on_the_device_that_it_is_for(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(*args: Any) -> None:
        asked.extend(args)
        raise RuntimeError("invalid device context")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", refuse)
    with pytest.raises(RuntimeError, match="invalid device context"):
        accelerator.import_memory(TICKET, "cuda:3")
    assert asked == [3, *TICKET[1:]], "the sender's number of its device means nothing here"


def test_who_will_not_open_memory_is_counted_out(accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[Any] = []
    monkeypatch.setattr(torch.UntypedStorage, "_release_ipc_counter_cuda", lambda *args: released.extend(args))
    accelerator.withdraw(TICKET)
    assert released == [b"/torch_counter", 77]


def test_memory_of_the_host_cannot_be_exported(accelerator: CudaAccelerator) -> None:
    with pytest.raises(RuntimeError):
        accelerator.export(torch.empty(10, dtype=torch.uint8))
    with pytest.raises(RuntimeError):
        accelerator.import_memory(TICKET, "cuda:0")
