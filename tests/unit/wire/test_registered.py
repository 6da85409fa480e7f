"""The rule of what is registered: calls and values without pickle, and what is refused on either side."""

from __future__ import annotations

import pickle
import subprocess
from collections import namedtuple
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from zrpc.errors import NotAllowedError, ProtocolError, RemoteError, SerializationError
from zrpc.exposed import expose
from zrpc.ids import WorkerInfo
from zrpc.wire import carried, loading, pickling, values
from zrpc.wire.exceptions import dump_exception, load_exception
from zrpc.wire.payload import Payload
from zrpc.wire.registered import RegisteredRules

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKER = WorkerInfo("callee", 1)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    rules = RegisteredRules("callee")
    loading.use(rules)
    pickling.use(rules.codec())
    yield
    loading.use(None)
    pickling.use(pickling.PICKLE)


@expose
def exposed(value: Any) -> Any:
    """May be called."""
    return value


def hidden(value: Any) -> Any:
    """May not."""
    return value


@expose
class Exposed:
    """May be made."""

    def method(self) -> int:
        """May be called."""
        return 1

    def _private(self) -> int:
        return 1


class HiddenModule(torch.nn.Module):
    """May not be run."""


@expose
class ExposedModule(torch.nn.Module):
    """May be run."""


Pair = namedtuple("Pair", "a b")


def travelled(value: Any) -> Any:
    return pickling.loads(pickling.dumps(value))


# ---- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, True, 1, -(2**63), 1.5, "a", b"b", 1j, [1, [2]], (1, (2,)), {"a": {1: (2, [3])}}, {(1, 2): 3}, torch.float32,
     torch.device("cpu"), torch.strided, torch.channels_last, torch.Size([1, 2]), WORKER, exposed, Exposed,
     torch.optim.SGD, "long" * 100_000, b"long" * 100_000],
)  # fmt: skip
def test_plain_values_arrive_as_they_are(value: Any) -> None:
    """Each on its own and within others."""
    assert travelled(value) == value
    assert type(travelled(value)) is type(value)
    assert travelled([{"a": (value,)}]) == [{"a": (value,)}]


@pytest.mark.parametrize(
    "array",
    [np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3).T, np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
     np.ones((0, 3)), np.ones(()), np.arange(9)[::-2], np.array(["a", "bc"]), np.array([True]),
     np.array(["2020"], "M8[Y]"), np.array([(1, 2.0)], [("a", "i4"), ("b", ">f8")]), np.arange(3, dtype=">i2")],
)  # fmt: skip
def test_arrays_arrive_with_type_shape_and_content(array: Any) -> None:
    """Of any layout, writable, and beside the stream."""
    made = travelled({"array": array})["array"]
    assert made.dtype == array.dtype
    assert made.shape == array.shape
    assert np.array_equal(made, array)
    if made.size:
        made[...] = made  # nothing else has its memory, so it may be written to


def test_tensors_and_scalars_arrive() -> None:
    """A tensor that is there twice arrives as one."""
    tensor = torch.arange(3)
    first, second = travelled([tensor, tensor])
    assert first is second
    assert torch.equal(first, tensor)
    assert type(travelled(np.float64(2.5))) is np.float64


@pytest.mark.parametrize(
    "value", [{1}, object(), hidden, HiddenModule, Pair(1, 2), np.array([object()]), 2**70, ValueError("x"), print, int]
)
def test_other_values_are_refused_where_they_are_sent(value: Any) -> None:
    """The error says what values may be made of."""
    with pytest.raises(SerializationError, match="values are made of"):
        pickling.dumps([value])


def test_a_value_that_holds_itself_is_refused() -> None:
    """It would have no end."""
    value: list[Any] = []
    value.append(value)
    with pytest.raises(SerializationError):
        pickling.dumps(value)


# ---- what is refused -------------------------------------------------------------------------------------------


def test_nothing_is_unpickled() -> None:
    """Not as an answer, a call, a part of an exception or a stream in pieces."""
    ruled = RegisteredRules("callee").codec()
    pickling.use(pickling.PICKLE)
    pickled = [pickling.dumps(value) for value in ([1, {2}], [ValueError("x")], [b"x" * (1 << 20)])]
    pickled += [pickling.dumps_call((exposed, (object,), {})), Payload(pickle.dumps(1))]
    pickling.use(ruled)
    for made in pickled:
        for load in (pickling.loads, pickling.loads_call):
            with pytest.raises(NotAllowedError, match=r"callee refuses .*expose"):
                load(made)
    for refused in (loading.loads, loading.load_from):
        with pytest.raises(NotAllowedError):
            refused(b"")
    with pytest.raises(NotAllowedError):
        pickling.dumps(1, whole=True)


def test_a_call_of_what_is_exposed_arrives() -> None:
    """Also where the caller has no such rule, and the arguments are plain."""
    for made in (pickling.dumps_call((exposed, (1,), {})), pickling.PICKLE.dumps_call((exposed, (1,), {}))):
        assert pickling.loads_call(made) == (exposed, (1,), {})
    assert pickling.loads_call(pickling.dumps_call((Exposed, (), {"a": [1]}))) == (Exposed, (), {"a": [1]})


def test_a_call_of_anything_else_is_refused_on_both_sides() -> None:
    """On the caller, and on a callee whom another caller asks."""
    for function in (hidden, print, eval, subprocess.getoutput, torch.optim.SGD, Exposed().method, Exposed.method):
        with pytest.raises(NotAllowedError, match="callee refuses"):
            pickling.dumps_call((function, (), {}))
    for function in (hidden, subprocess.getoutput):
        with pytest.raises(NotAllowedError, match=function.__name__):
            pickling.loads_call(pickling.PICKLE.dumps_call((function, (1,), {})))


def test_a_call_is_no_value_and_a_value_is_no_call() -> None:
    """An optimizer, say, may be an argument, and is not called because one comes in the place of a call."""
    with pytest.raises(NotAllowedError):
        pickling.loads_call(pickling.dumps([torch.optim.SGD, [], {}]))
    with pytest.raises(NotAllowedError):
        pickling.loads(pickling.dumps_call((exposed, (1,), {})))


def test_names_of_what_is_not_exposed_here_are_refused_as_arguments() -> None:
    """The sender may have exposed more than the receiver."""
    payload = pickling.dumps([exposed])
    data = bytes(payload.data).replace(b"exposed", b"hidden_", 2)
    assert data != payload.data
    with pytest.raises((NotAllowedError, ProtocolError)):
        pickling.loads(Payload(data))


def test_a_damaged_value_is_a_protocol_error() -> None:
    """Whatever is wrong with it."""
    whole = pickling.dumps([np.arange(3), exposed, 1])
    for end in range(3, len(whole.data)):
        with pytest.raises((ProtocolError, NotAllowedError)):
            pickling.loads(Payload(whole.data[:end], [], whole.buffers))
    with pytest.raises(ProtocolError):
        pickling.loads(Payload(whole.data, [], ()))


@pytest.mark.parametrize("described", [["|O", [1], False, 0], ["<i8", [-1], False, 0], ["<i8", [3], False, 1],
                                       ["<i8", [3], False, -1], ["<i8", [4], False, 0], ["<i8", 3, False, 0],
                                       ["nothing", [1], False, 0], [1, 2]])  # fmt: skip
def test_an_array_that_does_not_fit_its_bytes_is_a_protocol_error(described: Any) -> None:
    """Objects, negative lengths, buffers that are not there, too few bytes."""
    code = carried.Packing().extend(np.arange(3)).code
    data = values.VALUES + values.msgpack.packb(values.msgpack.ExtType(code, values.msgpack.packb(described)))
    with pytest.raises(ProtocolError):
        pickling.loads(Payload(data, [], [bytes(24)]))


# ---- methods, modules, operators -------------------------------------------------------------------------------


def test_exposed_methods_alone_are_called_on_values_of_rrefs() -> None:
    """Not even a tensor has others."""
    assert loading.method(Exposed(), "method")() == 1
    for value, name in ((Exposed(), "_private"), (Exposed(), "__init__"), (torch.ones(1), "sum"), ([], "append")):
        with pytest.raises(NotAllowedError, match=name):
            loading.method(value, name)


def test_modules_of_exposed_classes_alone_are_run() -> None:
    """By a RemoteModule."""
    loading.check_module(ExposedModule())
    for module in (HiddenModule(), torch.nn.ReLU()):
        with pytest.raises(NotAllowedError):
            loading.check_module(module)


def test_types_of_values_arrive_as_classes_or_stand_ins() -> None:
    """A proxy asks for them, to know which methods are asynchronous."""
    assert travelled(loading.type_of(Exposed())) is Exposed
    assert travelled(loading.type_of(torch.ones(1))) is torch.Tensor
    stand_in = travelled(loading.type_of(HiddenModule()))
    assert isinstance(stand_in, type)
    assert stand_in.anything is None  # type: ignore[attr-defined]


def test_names_are_refused_everywhere_else() -> None:
    """Compiled code, classes of exceptions, operators that open files or are not torch's own."""
    for refused in (
        lambda: loading.find("os", "getpid"), lambda: loading.check("torch.jit", "load"),
        lambda: loading.check_operator("aten", "from_file"), lambda: loading.check_operator("mine", "op"),
    ):  # fmt: skip
        with pytest.raises(NotAllowedError):
            refused()
    loading.check_operator("aten", "add")


def test_a_code_is_taken_once() -> None:
    """Two classes under one code could not be told apart."""
    with pytest.raises(ValueError, match="taken"):
        carried.register(Pair, carried.Packing().extend(np.arange(3)).code, lambda *_: b"", lambda *_: None)


# ---- exceptions ------------------------------------------------------------------------------------------------


class OwnError(KeyError):
    """Not in the table."""


def failed(error: Exception) -> BaseException:
    failure, payload = dump_exception(error)
    assert b"\x80\x05" not in payload.data  # no pickle
    return load_exception(WORKER, failure, payload)


def test_exceptions_of_the_interpreter_and_of_zrpc_arrive_as_themselves() -> None:
    """With plain arguments, and the remote traceback as their cause."""
    for error in (ValueError("a", 1), KeyError("k"), FileNotFoundError(2, "no", "file"), NotAllowedError("no"),
                  StopIteration(3), UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")):  # fmt: skip
        made = failed(error)
        assert type(made) is type(error)
        assert made.args == error.args
        assert str(made) == str(error)
        assert "callee" in str(made.__cause__)


def test_other_exceptions_arrive_as_remote_errors_of_their_nearest_class() -> None:
    """Their own class is neither imported nor asked for; their text arrives."""
    made = failed(OwnError("text"))
    assert isinstance(made, KeyError)
    assert isinstance(made, RemoteError)
    assert type(made) is not OwnError
    assert "text" in str(made)
    assert "object at" in str(failed(ValueError(object())))
    assert "two" in str(failed(ExceptionGroup("two", [ValueError(1)])))


def test_an_exception_that_was_pickled_arrives_as_text() -> None:
    """Of a worker without the rule."""
    pickling.use(pickling.PICKLE)
    failure, payload = dump_exception(OwnError("text"))
    pickling.use(RegisteredRules("caller").codec())
    made = load_exception(WORKER, failure, payload)
    assert isinstance(made, RemoteError)
    assert "text" in str(made)


def test_a_worker_without_the_rule_reads_the_exceptions_of_one_with_it() -> None:
    """They are plain values."""
    failure, payload = dump_exception(KeyError("k"))
    pickling.use(pickling.PICKLE)
    assert type(load_exception(WORKER, failure, payload)) is KeyError
    damaged = Payload(payload.data[:-2])
    assert isinstance(load_exception(WORKER, failure, damaged), RemoteError)
