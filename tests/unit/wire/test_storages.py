"""Storages, and what is pickled by its storage, travel as bytes of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zrpc.wire.storages
from tests.unit.wire.travel import sent, travel
from zrpc.wire import pickling

assert zrpc.wire.storages, "importing it is what makes storages travel"


class Tagged(torch.Tensor):
    """A tensor with an attribute."""

    tag: str


def round_trip(value: Any, *, whole: bool = False) -> Any:
    return pickling.loads(travel(pickling.dumps(value, whole=whole)))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5000])
def test_an_untyped_storage_arrives(count: int, whole: bool) -> None:
    storage = torch.arange(float(count)).untyped_storage()
    after = round_trip(storage, whole=whole)
    assert type(after) is torch.UntypedStorage
    assert bytes(after.tolist()) == bytes(storage.tolist())
    after.fill_(1)
    assert count < 2 or bytes(storage.tolist()) != bytes(after.tolist())


def test_a_typed_storage_arrives() -> None:
    storage = torch.arange(5000, dtype=torch.int16)._typed_storage()  # type: ignore[attr-defined]
    after = round_trip(storage)
    assert type(after) is torch.TypedStorage
    assert after.dtype is torch.int16
    assert bytes(after._untyped_storage.tolist()) == bytes(storage._untyped_storage.tolist())


def test_the_bytes_stay_out_of_the_stream() -> None:
    storage = torch.arange(5000.0).untyped_storage()
    assert sorted(map(len, sent(pickling.dumps(storage))))[1:] == [20_000]


def test_a_tensor_subclass_arrives_with_its_attributes() -> None:
    tensor = torch.arange(5000.0).as_subclass(Tagged)
    tensor.tag = "seven"
    assert len(sent(pickling.dumps(tensor))) == 2
    after = round_trip(tensor)
    assert type(after) is Tagged
    assert after.tag == "seven"
    assert torch.equal(after, tensor)


def test_a_storage_and_a_view_of_it_stay_one() -> None:
    tensor = torch.arange(5000.0)
    storage, view = round_trip([tensor.untyped_storage(), tensor[3:]])
    storage.fill_(0)
    assert not view.any()
    assert tensor.any()


def test_a_storage_on_the_meta_device_arrives() -> None:
    storage = torch.empty(7, device="meta").untyped_storage()
    after = round_trip(storage)
    assert (after.device.type, after.nbytes()) == ("meta", 28)
