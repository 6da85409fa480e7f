"""Operators' arguments, packed without pickle."""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given

from tests.unit.wire.travel import travel
from zrpc.errors import ProtocolError
from zrpc.wire import pickling, values
from zrpc.wire.payload import Payload


def roundtrip(value: Any) -> Any:
    payload = values.pack(value)
    assert payload.data[0] == values.MAGIC
    return pickling.loads(travel(payload))


class Color(enum.IntEnum):
    RED = 1


class Pair(NamedTuple):
    a: int
    b: int


class Text(str):
    __slots__ = ()


SAMPLES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    (1 << 64) - 1,
    -(1 << 63),
    1.5,
    math.inf,
    -0.0,
    "",
    "größe\N{GRINNING FACE}",
    1 + 2j,
    complex("-inf+0j"),
    (),
    (1,),
    [1, [2, (3, [4])]],
    ((1, 2), [(3,)]),
    {"a": (1,), "b": {"c": None}},
    {1: "one", (2, 3): "tuple"},
    torch.Size([2, 3]),
    torch.Size([]),
    torch.device("cpu"),
    torch.device("cuda", 3),
    torch.device("meta"),
    torch.contiguous_format,
    torch.channels_last,
    torch.preserve_format,
]


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    if isinstance(one, float | complex):
        return repr(one) == repr(other)
    return bool(one == other)


@pytest.mark.parametrize("name", ["_dynamo", "onnx", "load", "ops", "nothing"])
def test_the_name_of_a_constant_imports_nothing(name: str) -> None:
    """torch imports some of its modules when they are first asked for."""
    with pytest.raises(ProtocolError):
        values.torch_constant(name)


@pytest.mark.parametrize("value", SAMPLES, ids=repr)
def test_values_come_back_with_their_types(value: Any) -> None:
    assert _same(roundtrip(value), value)
    assert _same(roundtrip(([value], {"k": value})), ([value], {"k": value}))


def test_every_dtype_layout_and_memory_format_travels() -> None:
    kinds = (torch.dtype, torch.layout, torch.memory_format)
    every = [value for name in dir(torch) if isinstance(value := getattr(torch, name), kinds)]
    assert len(every) > 50
    assert all(one is other for one, other in zip(roundtrip(every), every, strict=True))


numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
scalars = st.none() | st.booleans() | numbers | st.text()
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(0, 99), inner),
    max_leaves=20,
)


@given(anything)
def test_whatever_is_built_of_them_comes_back(value: Any) -> None:
    assert _same(roundtrip(value), value)


def test_tensors_are_set_aside_and_one_that_is_there_twice_arrives_as_one() -> None:
    a, b = torch.randn(3), torch.randn(3000)
    payload = values.pack(((a, [b, (a, b[5:])]), {"out": a}))
    assert [t is a for t in payload.tensors] == [True, False, False]
    after = pickling.loads(travel(payload))
    assert torch.equal(after[0][0], a)
    assert after[0][0] is after[0][1][1][0]
    assert after[0][0] is after[1]["out"]
    assert torch.equal(after[0][1][1][1], b[5:])
    after[0][1][0].zero_()
    assert not after[0][1][1][1].any()


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        len,
        Color.RED,
        Pair(1, 2),
        Text("x"),
        np.float32(1),
        np.ones(2),
        torch.nn.UninitializedParameter(),
        torch.Generator(),
        1 << 64,
        -(1 << 63) - 1,
        "\ud800",
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_left_to_pickle(value: Any) -> None:
    for place in (value, [value], (1, (value,)), {"k": value}):
        with pytest.raises(values.UnpackableError):
            values.pack(place)


def test_what_is_nested_too_deep_is_left_to_pickle() -> None:
    for wrap in (lambda inner: [inner], lambda inner: (inner,)):
        deep: Any = 1
        for _ in range(5000):
            deep = wrap(deep)
        with pytest.raises(values.UnpackableError):
            values.pack(deep)


def test_a_value_that_holds_itself_is_left_to_pickle() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(values.UnpackableError):
        values.pack(loop)


def _stream(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return bytes([values.MAGIC, 1]) + packed


@pytest.mark.parametrize(
    "data",
    [
        bytes([values.MAGIC]),
        bytes([values.MAGIC, 7]),
        bytes([values.MAGIC, 1]),
        _stream([1])[:-1],
        _stream(msgpack.ExtType(99, b"")),
        _stream(msgpack.ExtType(0, b"\x00\x00\x00\x00")),
        _stream(msgpack.ExtType(1, b"\xc1")),
        _stream(msgpack.ExtType(2, b"short")),
        _stream(msgpack.ExtType(3, b"load")),
        _stream(msgpack.ExtType(3, b"no_such_name")),
        _stream(msgpack.ExtType(4, b"toaster:1")),
        _stream(msgpack.ExtType(7, b"\x01")),
        _stream({1: 2}) + b"\x00",
    ],
)
def test_damaged_streams_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        pickling.loads(Payload(data))


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    payload = values.pack(((torch.ones(2), (1, 2.5, "x"), torch.float32), {"k": 1j, "d": torch.device("cpu")}))
    data = bytearray(payload.data)
    for at, value in changes:
        data[2 + at % (len(data) - 2)] = value
    try:
        values.unpack(Payload(bytes(data), payload.tensors))
    except ProtocolError:
        return
