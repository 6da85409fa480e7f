"""Values taken apart by pickle: tensors and large buffers are set aside, and everything comes together again."""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
import threading
import types
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from tests.unit.wire.travel import sent, travel
from zrpc.errors import ProtocolError, SerializationError
from zrpc.ids import WorkerInfo
from zrpc.wire import by_value, pickling
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Callable


def roundtrip(value: Any) -> Any:
    return pickling.loads(travel(pickling.dumps(value)))


@dataclass
class Batch:
    name: str
    inputs: torch.Tensor
    extra: dict[str, Any] = field(default_factory=dict)


class Nested:
    """Pickles something by zrpc's own rules while it is being pickled by them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __reduce__(self) -> tuple[Any, ...]:
        inner = pickling.dumps(self.inner)
        return _make_nested, (bytes(inner.data), inner.tensors, [bytes(buffer) for buffer in inner.buffers])


def _make_nested(data: bytes, tensors: list[torch.Tensor], buffers: list[bytes]) -> Nested:
    return Nested(pickling.loads(Payload(data, tensors, buffers)))


def twice(x: int) -> int:
    return 2 * x


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(values)
def test_plain_values_come_back(value: Any) -> None:
    assert roundtrip(value) == value


def test_nothing_and_one_tensor_are_not_pickled() -> None:
    assert pickling.dumps(None) == Payload(b"")
    tensor = torch.randn(3)
    payload = pickling.dumps(tensor)
    assert len(payload.data) == 2
    assert payload.tensors[0] is tensor
    assert roundtrip(None) is None
    assert torch.equal(roundtrip(tensor), tensor)


@pytest.mark.parametrize("value", [True, 0, -(2**63), 2**64 - 1, -0.0, float("inf"), "", "ä", b"\0", b"x" * 60_000])
def test_plain_results_are_not_pickled(value: Any) -> None:
    payload = pickling.dumps(value)
    assert payload.data[:2] == b"\xc1\x01"
    after = pickling.loads(travel(payload))
    assert (type(after), repr(after)) == (type(value), repr(value))


def test_what_msgpack_cannot_hold_is_pickled() -> None:
    for value in (2**64, -(2**63) - 1, "\ud800"):
        assert pickling.dumps(value).data[:1] == b"\x80"
        assert roundtrip(value) == value
        call = pickling.dumps_call((twice, (value,), {}))
        assert call.data[:1] == b"\x80"
        assert pickling.loads(travel(call)) == (twice, (value,), {})


@given(st.lists(scalars), st.dictionaries(st.text(), scalars))
def test_calls_with_plain_arguments_come_back(args: list[Any], kwargs: dict[str, Any]) -> None:
    call = (twice, tuple(args), kwargs)
    assert pickling.loads(travel(pickling.dumps_call(call))) == call


def test_a_call_of_a_named_function_with_tensors_is_not_pickled() -> None:
    tensor = torch.randn(3)
    payload = pickling.dumps_call((twice, (tensor, 2, tensor), {"x": tensor[1:]}))
    assert payload.data[:2] == b"\xc1\x02"
    function, args, kwargs = pickling.loads(travel(payload))
    assert function is twice
    assert args[0] is args[2], "the same one arrives as one"
    assert torch.equal(args[0], tensor)
    args[0].zero_()
    assert not kwargs["x"].any(), "views of one storage arrive as views of one storage"


class Text(str):
    """Not a plain string."""


@pytest.mark.parametrize(
    "call",
    [
        (twice, ([1],), {}),
        (twice, (), {"x": (1, 2)}),
        (twice, (Text("x"),), {}),
        (twice, (nn.Parameter(torch.ones(1)),), {}),
        (Nested, (1,), {}),
        (len, ((),), {}),
        (torch.nn.functional.relu, ([],), {}),
        (nn.Linear(1, 1), (torch.ones(1),), {}),
    ],
)
def test_other_calls_are_pickled(call: Any) -> None:
    payload = pickling.dumps_call(call)
    assert payload.data[:1] == b"\x80"
    after = pickling.loads(travel(payload))
    assert [type(part) for part in (*after[1], *after[2].values())] == [
        type(part) for part in (*call[1], *call[2].values())
    ]


def test_a_function_that_its_module_does_not_name_so_is_refused_by_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for cloudpickle: see test_by_value.py."""
    monkeypatch.setattr(by_value, "pickler_class", lambda: None)
    impostor = types.FunctionType(twice.__code__, globals(), "twice")
    for function in (impostor, lambda: None):
        with pytest.raises(SerializationError, match="cannot be pickled"):
            pickling.dumps_call((function, (), {}))


@pytest.mark.parametrize("data", [b"\xc1\x02", b"\xc1\x02\x90", b"\xc1\x02\x94\x01\x02\x03\x04", b"\xc1\x02\xc0"])
def test_a_damaged_call_is_refused(data: bytes) -> None:
    with pytest.raises((ProtocolError, SerializationError)):
        pickling.loads(Payload(data))


def test_a_whole_stream_holds_everything_but_the_tensors() -> None:
    tensor, array = torch.randn(3), np.arange(10_000)
    for value in (None, tensor, [tensor, array]):
        payload = pickling.dumps(value, whole=True)
        assert payload.data[:1] == b"\x80"
        assert not payload.buffers
    assert np.array_equal(pickling.loads(travel(pickling.dumps([array], whole=True)))[0], array)


def test_tensors_are_set_aside_in_order_and_the_same_one_once() -> None:
    a, b = torch.randn(3), torch.randn(5000)
    value = (a, {"b": b, "again": a}, Batch("x", b[10:]))
    payload = pickling.dumps(value)
    assert [t.data_ptr() for t in payload.tensors] == [a.data_ptr(), b.data_ptr(), b[10:].data_ptr()]
    after = pickling.loads(travel(payload))
    assert after[1]["again"] is after[0]
    assert torch.equal(after[2].inputs, b[10:])
    after[1]["b"].zero_()
    assert not after[2].inputs.any(), "views of one storage arrive as views of one storage"
    assert b.any()


def test_tensor_table_may_be_replaced_on_the_way() -> None:
    payload = travel(pickling.dumps([torch.ones(2), 3]))
    payload.tensors[0] = torch.zeros(2)
    assert torch.equal(pickling.loads(payload)[0], torch.zeros(2))


@pytest.mark.parametrize("nbytes", [0, 800, 12_000, 800_000])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_arrays_leave_the_stream_and_arrive_in_memory_of_their_own(order: Any, nbytes: int) -> None:
    array = np.asarray(np.random.default_rng(0).random((nbytes // 32, 4)), order=order)
    frozen = array.copy(order)
    frozen.flags.writeable = False
    payload = pickling.dumps({"a": array, "frozen": frozen})
    assert len(payload.data) < 1000
    after = pickling.loads(travel(payload))
    original = array.copy()
    for received in after.values():
        assert np.array_equal(received, array)
        assert received.flags.f_contiguous == array.flags.f_contiguous
    assert not after["frozen"].flags.writeable, "as it was sent"
    after["a"][...] = 0
    assert np.array_equal(array, original)


def test_arrays_and_tensors_of_one_message_keep_apart() -> None:
    value = [np.arange(3000.0), torch.arange(3000.0), np.arange(3, dtype=">i2"), torch.arange(3), np.array(["a", "bc"])]
    after = roundtrip(value)
    for one, other in zip(value, after, strict=True):
        assert type(one) is type(other)
        assert np.array_equal(one, other)  # type: ignore[arg-type]  # a tensor is an array, too


def test_a_buffer_with_holes_is_refused_in_words() -> None:
    holes = pickle.PickleBuffer(memoryview(bytearray(100))[::2])
    with pytest.raises(SerializationError, match="cannot be pickled"):
        pickling.dumps([holes])


def test_parameters_modules_and_subclasses_arrive_as_what_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 2))
    payload = pickling.dumps(model)
    assert len(payload.tensors) == 4, "the data of parameters goes to the table"
    after = pickling.loads(travel(payload))
    x = torch.randn(3, 4)
    assert torch.equal(after(x), model(x))
    for name, parameter in after.named_parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.requires_grad
        assert torch.equal(parameter, model.get_parameter(name))
    frozen = roundtrip(nn.Parameter(torch.ones(2), requires_grad=False))
    assert type(frozen) is nn.Parameter
    assert not frozen.requires_grad
    state = roundtrip(model.state_dict())
    assert isinstance(state, OrderedDict)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_functions_classes_and_torch_objects_travel_by_name() -> None:
    for value in (twice, Batch, torch.add, torch.relu, torch.float16, torch.device("cpu"), torch.Size([1, 2]), len):
        assert roundtrip([value]) == [value]
    assert roundtrip(WorkerInfo("ps", 1)) == WorkerInfo("ps", 1)


def test_dumps_within_dumps_keeps_its_own_tensors() -> None:
    a, b, c = torch.ones(3), torch.zeros(4), torch.full((5,), 5.0)
    inner = Nested({"b": b, "array": np.arange(4), "deeper": Nested([c])})
    after = roundtrip([a, inner, a, b])
    assert torch.equal(after[0], a)
    assert after[2] is after[0]
    assert torch.equal(after[1].inner["b"], b)
    assert np.array_equal(after[1].inner["array"], np.arange(4))
    assert torch.equal(after[1].inner["deeper"].inner[0], c)
    assert torch.equal(after[3], b)


def test_threads_pickle_side_by_side() -> None:
    failures: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            barrier.wait(10)
            for _ in range(50):
                value = [torch.full((3,), float(number)), Nested(torch.full((2,), float(number)))]
                after = roundtrip(value)
                assert after[0].unique().tolist() == [number]
                assert after[1].inner.unique().tolist() == [number]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


class Registered(Point):
    pass


class Derived(Registered):
    pass


def test_registered_reducers_are_used_for_exactly_their_class() -> None:
    pickling.register_reducer(Registered, lambda value: (Registered, (value.x + 100,)))
    assert roundtrip([Registered(1)])[0].x == 101
    assert roundtrip([Derived(1)])[0].x == 1
    assert pickle.loads(pickle.dumps(Registered(1))).x == 1, "other pickling is none of our business"


def test_reducers_given_to_copyreg_later_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, Point, lambda value: (Point, (value.x + 7,)))
    assert roundtrip([Point(1)])[0].x == 8


# ---- what cannot travel ----------------------------------------------------------------------------------------------


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no text")

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("no pickle either")


@pytest.mark.parametrize("value", [threading.Lock(), lambda: 1, [io.StringIO, threading.Event()], (i for i in "ab")])
def test_what_cannot_be_pickled_is_refused_with_cause_and_advice(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_value, "pickler_class", lambda: None)
    with pytest.raises(SerializationError, match=r"cannot be pickled: .* top level of a module") as caught:
        pickling.dumps([value])
    assert caught.value.__cause__ is not None


def test_a_value_without_text_is_refused_in_words() -> None:
    with pytest.raises(SerializationError, match="a Unprintable cannot be pickled: no pickle either"):
        pickling.dumps(Unprintable())


def test_long_values_are_named_in_brief() -> None:
    with pytest.raises(SerializationError) as caught:
        pickling.dumps([threading.Lock(), "x" * 100_000])
    assert len(str(caught.value)) < 1000


@pytest.fixture
def passing_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("zrpc_passing_module")
    exec("def function(): pass\nclass Class: pass", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("dumps", [pickling.dumps, pickling.dumps_call])
@pytest.mark.parametrize("name", ["function", "Class"])
def test_a_function_or_class_that_is_missing_here_is_named(
    passing_module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, dumps: Callable[[Any], Payload]
) -> None:
    payload = travel(dumps((getattr(passing_module, name), (), {})))
    assert pickling.loads(payload)[0] is getattr(passing_module, name)
    with monkeypatch.context() as without:
        without.delattr(passing_module, name)
        with pytest.raises(SerializationError, match=f"{name}.* does not serialize function code.* both import"):
            pickling.loads(payload)
    monkeypatch.delitem(sys.modules, passing_module.__name__)
    with pytest.raises(SerializationError, match="No module named 'zrpc_passing_module'"):
        pickling.loads(payload)


class Refusing:
    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise KeyError("not today")


def test_what_fails_while_it_is_put_together_is_named() -> None:
    with pytest.raises(SerializationError, match="cannot be unpickled: KeyError: 'not today'"):
        roundtrip([Refusing()])
    assert roundtrip([torch.ones(1)])[0].item() == 1


@pytest.mark.parametrize("data", [b"\x80", b"\x80\x05", b"garbage", pickle.dumps([1])[:-1]])
def test_damaged_streams_are_refused(data: bytes) -> None:
    with pytest.raises(SerializationError, match="cannot be unpickled"):
        pickling.loads(Payload(data))


def test_streams_that_miss_a_tensor_or_buffer_are_refused() -> None:
    tensors = pickling.dumps([torch.ones(3)])
    buffers = pickling.dumps([np.ones(3)])
    one = pickling.dumps(torch.ones(3))
    for payload in (tensors, buffers):
        with pytest.raises(SerializationError, match="cannot be unpickled"):
            pickling.loads(Payload(payload.data))
    with pytest.raises(ProtocolError):
        pickling.loads(Payload(one.data))


def test_a_stream_with_a_tensor_table_is_read_by_zrpc_alone() -> None:
    data = pickling.dumps([torch.ones(3)]).data
    with pytest.raises(pickle.UnpicklingError, match="only be read by zrpc"):
        pickle.loads(data)


def test_small_messages_are_one_frame() -> None:
    assert len(sent(pickling.dumps((twice, (1, torch.ones(100)), {})))) == 1


# ---- passengers ----------------------------------------------------------------------------------------------------


class Traveller:
    """Boards the payload that it is pickled into, under its key."""

    def __init__(self, key: bytes) -> None:
        self.key = key


class Ticket:
    """Its passenger."""

    def __init__(self) -> None:
        self.left = 0

    def has_left(self) -> None:
        self.left += 1


def _reduce_traveller(traveller: Traveller) -> tuple[Any, tuple[bytes]]:
    pickling.board(traveller.key, Ticket())
    return pickling.alight, (traveller.key,)


pickling.register_reducer(Traveller, _reduce_traveller)


def arrived(payload: Payload, passengers: dict[bytes, Any] | None) -> Payload:
    return Payload(payload.data, payload.tensors, payload.buffers, passengers)


def test_passengers_board_and_alight_by_their_keys() -> None:
    payload = pickling.dumps([Traveller(b"one"), Traveller(b"two"), torch.ones(1)])
    assert payload.passengers is not None
    assert list(payload.passengers) == [b"one", b"two"]
    payload.has_left()
    assert [ticket.left for ticket in payload.passengers.values()] == [1, 1]
    there = arrived(payload, {b"one": "first", b"three": "third"})
    first, second, _ = pickling.loads(there)
    assert (first, second) == ("first", None)
    assert there.passengers == {b"three": "third"}, "nobody took it"
    assert pickling.loads(arrived(payload, None))[:2] == [None, None]
    assert pickling.alight(b"one") is None, "nothing is read"


def test_keys_of_passengers_are_found_in_streams_in_pieces() -> None:
    payload = pickling.dumps([bytes(1 << 20), Traveller(b"one"), bytearray(1 << 20), Traveller(b"two")])
    assert len(payload.buffers) > 1
    assert payload.has_in_stream(b"one")
    assert payload.has_in_stream(b"two")
    assert not payload.has_in_stream(b"three")


def test_a_payload_without_passengers_has_none() -> None:
    payload = pickling.dumps([1, torch.ones(1)])
    assert payload.passengers is None
    payload.has_left()


def test_passengers_of_a_pickling_that_failed_are_freed_at_once() -> None:
    freed: list[int] = []

    class Watched(Ticket):
        def __del__(self) -> None:
            freed.append(self.left)

    class Fails:
        def __reduce__(self) -> Any:
            pickling.board(b"one", Watched())
            raise ValueError("Expected error")

    with pytest.raises(SerializationError) as caught:
        pickling.dumps([Fails()])
    assert freed == [0], "though the error is still there"
    assert caught.value.__cause__ is not None


def test_passengers_of_a_nested_pickling_travel_in_the_outer_payload() -> None:
    payload = pickling.dumps([Nested([Traveller(b"inner")]), Traveller(b"outer")])
    assert payload.passengers is not None
    assert sorted(payload.passengers) == [b"inner", b"outer"]
    there = arrived(payload, {b"inner": 1, b"outer": 2})
    nested, outer = pickling.loads(there)
    assert (nested.inner, outer) == ([1], 2)
    assert not there.passengers


def test_memory_formats_are_named_by_torch() -> None:
    """Not by whichever module has imported it, which the other side may lack."""
    for memory_format in (torch.channels_last, torch.contiguous_format, torch.preserve_format):
        payload = pickling.dumps([memory_format])
        assert b"torch_constant" in payload.data
        assert pickling.loads(payload) == [memory_format]
