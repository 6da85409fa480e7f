"""How exceptions of any class are pickled and made again."""

from __future__ import annotations

import gc
import itertools
import random
import signal
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.wire.travel import travel
from zrpc.errors import RemoteError
from zrpc.ids import WorkerInfo
from zrpc.wire import pickling
from zrpc.wire.exceptions import RemoteTraceback, dump_exception, load_exception

WORKER = WorkerInfo("callee", 3)


def as_value(error: Any) -> Any:
    """`error` as it arrives as an argument or result."""
    return pickling.loads(travel(pickling.dumps(error)))


def as_outcome(error: BaseException) -> Any:
    """`error` as the caller of a function that raises it gets it."""
    try:
        raise error
    except BaseException as caught:
        failure, payload = dump_exception(caught)
    return load_exception(WORKER, failure, travel(payload))


BOTH = pytest.mark.parametrize("sent", [as_value, as_outcome])


class Slotted(ValueError):
    __slots__ = ("__private", "axis", "ndim")

    def __init__(self, axis: int, ndim: int) -> None:
        self.axis, self.ndim, self.__private = axis, ndim, "p"

    def __str__(self) -> str:
        return f"axis {self.axis} of {self.ndim} {self.__private}"


class SlottedBelow(Slotted):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__(4, 1)
        self.extra = [1]


@dataclass(frozen=True)
class Frozen(Exception):
    code: int
    detail: str = "d"


@dataclass(frozen=True, slots=True)
class FrozenSlotted(Exception):
    code: int


class Refused(Exception):
    def __init__(self, code: int) -> None:
        super().__init__("refused")
        self.code, self.lock, self.later = code, threading.Lock(), [5]


class NeedsItsState(Exception):
    """Like gRPC's: its text is made of something that cannot travel."""

    def __init__(self) -> None:
        super().__init__()
        self._state = (threading.Condition(), "deadline exceeded")
        self.code = 4

    def __str__(self) -> str:
        return self._state[1]


class Quota(Exception):
    def __init__(self, limit: int, used: int) -> None:
        super().__init__(f"{used} of {limit}")
        self.limit, self.used = limit, used


class Answers(Exception):
    """It takes every attribute out of a dict that another worker does not have while it is made."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self.payload = payload

    def __getattr__(self, name: str) -> Any:
        return self.payload[name]


class SaysOtherwise(Exception):
    """Its `__reduce__` names a constructor that does not take what it gives."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__("text")
        self.a, self.b = a, b

    def __reduce__(self) -> Any:
        return SaysOtherwise, (1,)


class SetsItself(Exception):
    def __setstate__(self, state: Any) -> None:
        raise SystemExit("no state")


class Lookup(Exception):
    pass


class Final(Lookup):
    state: Any

    def __init_subclass__(cls) -> None:
        raise TypeError("there is no class below this one")

    def __str__(self) -> str:
        return f"{self.args[0]} at a place" if self.state.locked() is not None else ""


@BOTH
def test_slots_arrive_those_of_base_classes_and_private_ones_included(sent: Any) -> None:
    after = sent(SlottedBelow())
    assert type(after) is SlottedBelow
    assert (after.axis, after.ndim, after.extra) == (4, 1, [1])
    assert str(after) == "axis 4 of 1 p"


@BOTH
def test_numpys_axis_error_arrives(sent: Any) -> None:
    import numpy as np

    with pytest.raises(ValueError, match="axis 4") as caught:
        np.zeros(3).sum(axis=4)
    after = sent(caught.value)
    assert type(after) is type(caught.value)
    assert str(after) == str(caught.value)


@BOTH
@pytest.mark.parametrize("error", [Frozen(7), FrozenSlotted(7)], ids=repr)
def test_frozen_dataclasses_arrive(sent: Any, error: Any) -> None:
    after = sent(error)
    assert type(after) is type(error)
    assert after == error


@BOTH
def test_one_attribute_that_cannot_be_pickled_takes_no_other_along(sent: Any) -> None:
    after = sent(Refused(403))
    assert type(after) is Refused
    assert (after.code, after.later) == (403, [5])
    assert not hasattr(after, "lock")
    assert str(after) == "refused"


class Broken:
    def __setstate__(self, state: Any) -> None:
        raise KeyError("cannot be made again")


class Killer:
    def __reduce__(self) -> Any:
        raise SystemExit


@BOTH
@pytest.mark.parametrize(
    "part", [Broken(), Killer(), torch.nn.Parameter, (i for i in "ab")], ids=lambda p: type(p).__name__
)
def test_one_attribute_that_cannot_be_made_again_takes_no_other_along(sent: Any, part: Any) -> None:
    error = Quota(3, 4)
    if isinstance(part, Broken):
        part.x = 1  # type: ignore[attr-defined]
    error.part = part  # type: ignore[attr-defined]
    done: list[Any] = []
    run_elsewhere(lambda: done.append(sent(error)))
    assert type(done[0]) is Quota
    assert (done[0].limit, done[0].used) == (3, 4)


@BOTH
def test_one_whose_text_needs_what_cannot_travel_is_a_runtime_error_of_its_class_with_its_text(sent: Any) -> None:
    after = sent(NeedsItsState())
    assert isinstance(after, NeedsItsState)
    assert isinstance(after, RuntimeError)
    assert type(after).__name__ == "NeedsItsState"
    assert str(after) == "deadline exceeded"
    assert after.code == 4


@BOTH
def test_one_that_answers_for_every_attribute_arrives(sent: Any) -> None:
    after = sent(Answers({"code": 5}))
    assert isinstance(after, Answers)
    assert after.payload == {"code": 5}
    assert after.code == 5


@BOTH
def test_where_reduce_gives_what_cannot_be_made_the_class_is_made_as_any(sent: Any) -> None:
    after = sent(SaysOtherwise(1, 2))
    assert type(after) is SaysOtherwise
    assert (after.a, after.b, str(after)) == (1, 2, "text")


@BOTH
def test_a_setstate_that_raises_keeps_nothing_back(sent: Any) -> None:
    error = SetsItself("x")
    error.code = 3  # type: ignore[attr-defined]
    done: list[Any] = []
    run_elsewhere(lambda: done.append(sent(error)))
    assert type(done[0]) is SetsItself
    assert done[0].code == 3


def local(base: type[Exception], **attributes: Any) -> Any:
    """An error of a class that no other worker can import."""
    error = type("NoSuchKey", (base,), {"__module__": "botocore.errorfactory"})("gone")
    vars(error).update(attributes)
    return error


@BOTH
@pytest.mark.parametrize("base", [Quota, ValueError, OSError, KeyError])
def test_one_of_a_class_made_at_run_time_is_a_runtime_error_of_the_nearest_base(sent: Any, base: Any) -> None:
    error = type("NoSuchKey", (Quota,), {})(3, 4) if base is Quota else local(base, code=5)
    after = sent(error)
    assert isinstance(after, base)
    assert isinstance(after, RuntimeError)
    assert isinstance(after, RemoteError)
    assert type(after).__name__ == "NoSuchKey"
    assert str(after) == str(error)
    assert after.args == error.args
    assert vars(after).items() >= vars(error).items()


@BOTH
def test_what_stands_for_an_error_of_another_worker_does_so_on_a_third(sent: Any) -> None:
    error = local(OSError, code=5)
    after = sent(sent(error))
    assert isinstance(after, OSError)
    assert (type(after).__name__, str(after), after.code) == ("NoSuchKey", "gone", 5)


@BOTH
def test_a_class_that_takes_no_subclass_gives_its_base(sent: Any) -> None:
    error = Final("final", threading.Lock())
    error.state = threading.Lock()
    after = sent(error)
    assert isinstance(after, Lookup)
    assert isinstance(after, RemoteError)
    assert (type(after).__name__, str(after)) == ("Final", "final at a place")


@BOTH
def test_members_of_groups_arrive_as_any_exception(sent: Any) -> None:
    inner = ExceptionGroup("inner", [Frozen(1), local(KeyError)])
    after = sent(ExceptionGroup("two", [KeyError("k"), Quota(3, 4), Refused(5), inner]))
    assert type(after) is ExceptionGroup
    assert after.message == "two"
    key, quota, refused, group = after.exceptions
    assert (type(key), quota.used, refused.code) == (KeyError, 4, 5)
    assert group.exceptions[0] == Frozen(1)
    assert isinstance(group.exceptions[1], KeyError)
    seen: list[Any] = []
    try:
        raise after
    except* Quota as quotas:
        seen += quotas.exceptions
    except* Exception:
        pass
    assert [one.limit for one in seen] == [3]


class Collected(ExceptionGroup[Exception]):
    """A group with a constructor of its own."""

    def __new__(cls, errors: list[Exception]) -> Collected:
        return super().__new__(cls, "collected", errors)


@BOTH
def test_groups_of_classes_of_their_own_arrive(sent: Any) -> None:
    after = sent(Collected([Quota(3, 4)]))
    assert type(after) is Collected
    assert (after.message, after.exceptions[0].used) == ("collected", 4)


def linked() -> Exception:
    try:
        try:
            raise Quota(3, 4)
        except Quota as quota:
            raise Frozen(1) from quota
    except Frozen:
        try:
            raise Refused(403)
        except Refused as refused:
            return refused


@BOTH
def test_cause_and_context_arrive_as_any_exception(sent: Any) -> None:
    error = linked()
    context = error.__context__
    assert isinstance(context, Frozen)
    after = sent(error)
    assert after.__context__ == Frozen(1)
    assert type(after.__context__.__cause__) is Quota
    assert after.__context__.__cause__.used == 4
    if sent is as_value:
        assert after.__cause__ is None
        assert after.__suppress_context__ is False


@BOTH
def test_exceptions_held_as_attributes_arguments_and_in_containers_arrive(sent: Any) -> None:
    error = Plain("x", local(ValueError), {"in": [Refused(1)]})
    error.original = Slotted(1, 2)  # type: ignore[attr-defined]
    after = sent(error)
    assert isinstance(after.args[1], ValueError)
    assert after.args[2]["in"][0].code == 1
    assert str(after.original) == "axis 1 of 2 p"


class Plain(Exception):
    pass


class Holder:
    def __init__(self, error: Any) -> None:
        self.error = error


@BOTH
def test_an_exception_that_leads_back_to_itself_arrives_as_one_object(sent: Any) -> None:
    error, other = Plain("one"), Plain("other")
    error.self, error.__context__, error.holder = error, other, Holder(error)  # type: ignore[attr-defined]
    other.__context__ = error
    after = sent(error)
    assert after.self is after
    assert after.holder.error is after
    assert after.__context__.args == ("other",)
    assert after.__context__.__context__ is after


def test_an_exception_among_its_own_arguments_ends() -> None:
    error = Plain()
    error.args = (error, 2)
    after = as_value(error)
    assert type(after) is Plain
    assert after.args[1] == 2


def test_an_exception_that_is_twice_in_a_value_arrives_as_one_object() -> None:
    error = Plain("x")
    error.friend = Plain("y")  # type: ignore[attr-defined]
    a, b, friend = as_value([error, error, error.friend])  # type: ignore[attr-defined]
    assert a is b
    assert a.friend is friend
    friend, a = as_value([error.friend, error])  # type: ignore[attr-defined]
    assert a.friend is friend


def test_tensors_in_exceptions_travel_and_those_of_parts_left_behind_do_not() -> None:
    error = Plain("x")
    error.value = torch.ones(3)  # type: ignore[attr-defined]
    error.both = [torch.zeros(2), threading.Lock()]  # type: ignore[attr-defined]
    payload = pickling.dumps([torch.full((1,), 7.0), error, torch.full((1,), 8.0)])
    assert len(payload.tensors) == 3
    first, after, last = pickling.loads(travel(payload))
    assert (float(first), float(last)) == (7, 8)
    assert torch.equal(after.value, torch.ones(3))
    assert not hasattr(after, "both")


def test_without_attachments_the_rest_of_an_exception_travels() -> None:
    error = Quota(3, 4)
    error.value = torch.ones(3)  # type: ignore[attr-defined]
    failure, payload = dump_exception(error, attachments=False)
    assert not payload.tensors
    after: Any = load_exception(WORKER, failure, travel(payload))
    assert type(after) is Quota
    assert (after.used, hasattr(after, "value")) == (4, False)


def test_a_long_chain_arrives() -> None:
    error = Plain(0)
    for number in range(1, 3000):
        above = Plain(number)
        above.__context__ = error
        error = above
    after: Any = as_outcome(error)
    assert after.args == (2999,)
    length = 0
    while after is not None:
        after, length = after.__context__, length + 1
    assert length == 3000


def test_nothing_of_an_exception_that_was_sent_is_kept() -> None:
    error = Plain("x")
    gone = weakref.ref(error)
    as_outcome(error)
    del error
    gc.collect()
    assert gone() is None


def test_text_that_is_not_unicode_arrives() -> None:
    after = as_outcome(OSError(2, "No such file", "/\udcff"))
    assert after.filename == "/\udcff"
    assert "\\udcff" in str(after.__cause__)


def run_elsewhere(work: Any) -> None:
    """Run `work` on a thread that gets no interrupts, as handlers do."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not raised, repr(raised)


# ---- any class -------------------------------------------------------------------------------------------------------

METHODS = (
    "__str__", "__repr__", "__getattr__", "__getattribute__", "__setattr__", "__reduce__", "__reduce_ex__",
    "__setstate__", "__getstate__", "__eq__", "__hash__", "__bool__", "__len__", "__del__", "__init__", "__new__",
    "__dir__", "__format__", "__init_subclass__", "with_traceback", "add_note", "__notes__", "args", "__cause__",
    "__context__",
    "__traceback__", "__class__",
)  # fmt: skip
_PROPERTIES = ("__notes__", "args", "__cause__", "__context__", "__traceback__", "__class__")
RAISED = (ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, RecursionError, AttributeError)
_numbers = itertools.count()


class OddStr(str):
    def __str__(self) -> str:
        raise ValueError("no")

    __len__ = encode = __add__ = __str__  # type: ignore[assignment]


def misbehaving(methods: dict[str, Any], base: type[BaseException], importable: bool) -> BaseException:
    """An error of a class whose `methods` raise what they are mapped to, or return something odd (None)."""

    def method(name: str, raised: Any) -> Any:
        def act(*_: Any, **__: Any) -> Any:
            if raised is None:
                return random.choice([None, 5, OddStr("odd"), (), object()])
            raise raised(f"of {name}")

        return property(act) if name in _PROPERTIES else act

    name = f"Misbehaving{next(_numbers)}"
    namespace = {each: method(each, raised) for each, raised in methods.items()}
    made: Any = type(name, (base,), {"__module__": __name__, **namespace})
    args = ("text", [ValueError()]) if base is ExceptionGroup else ("text", 2)
    error: BaseException = base.__new__(made, *args)  # type: ignore[call-overload]
    attributes = object.__getattribute__(error, "__dict__")
    attributes.update(code=3, lock=threading.Lock(), nested=Plain("n"))
    if importable:
        globals()[name] = made
    return error


@given(
    st.dictionaries(st.sampled_from(METHODS), st.sampled_from((*RAISED, None)), max_size=6),
    st.sampled_from([Exception, ValueError, OSError, KeyError, RuntimeError, SystemExit, ExceptionGroup]),
    st.booleans(),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of __del__
def test_whatever_a_class_of_errors_does_the_caller_gets_an_error_that_tells_of_it(
    methods: dict[str, Any], base: Any, importable: bool
) -> None:
    error = misbehaving(methods, base, importable)
    done: list[Any] = []

    def go() -> None:
        failure, payload = dump_exception(error)
        done.append(load_exception(WORKER, failure, travel(payload)))

    run_elsewhere(go)
    (after,) = done
    assert issubclass(type(after), Exception)
    if base is not SystemExit:
        assert issubclass(type(after), base)
    links = {id(after): after}
    cause: Any = after
    while (cause := vars(BaseException)["__cause__"].__get__(cause)) is not None and id(cause) not in links:
        links[id(cause)] = cause
    assert any(type(one) is RemoteTraceback for one in links.values())


# ---- on the main thread, where signals strike --------------------------------------------------------------------


class Comparable(type):
    """A metaclass whose classes are equal by name, and so have no hash."""

    def __eq__(cls, other: object) -> bool:
        return cls.__name__ == getattr(other, "__name__", None)


class Unhashable(ValueError, metaclass=Comparable):
    pass


class Value(metaclass=Comparable):
    pass


@BOTH
def test_an_error_whose_class_has_no_hash_arrives(sent: Any) -> None:
    if sent is as_value:
        after = as_value(ExceptionGroup("g", [Unhashable("wrong")])).exceptions[0]
    else:
        after = sent(Unhashable("wrong"))
    assert type(after) is Unhashable
    assert after.args == ("wrong",)


@BOTH
def test_an_attribute_whose_class_has_no_hash_takes_no_other_along(sent: Any) -> None:
    error = Plain("x")
    error.code, error.value = 5, Value()  # type: ignore[attr-defined]
    after = sent(error)
    assert (type(after), after.code, hasattr(after, "value")) == (Plain, 5, False)


class SaysExit(Exception):
    def __str__(self) -> str:
        raise SystemExit("of __str__")


class ExitsAtImport:
    def __reduce__(self) -> Any:
        return sys.exit, ("of an argument",)


@BOTH
@pytest.mark.parametrize(
    "error",
    [SetsItself("x"), SaysExit("x"), Plain(ExitsAtImport(), 2)],
    ids=["SetsItself", "SaysExit", "ExitsAtImport"],
)
def test_what_a_class_raises_on_the_main_thread_is_no_interrupt(sent: Any, error: Any) -> None:
    assert isinstance(sent(error), type(error))


def test_ctrl_c_while_an_error_is_made_again_is_raised() -> None:
    error = Plain("x")
    error.part = RaisesSignal()  # type: ignore[attr-defined]
    payload = pickling.dumps(error)
    with pytest.raises(KeyboardInterrupt):
        pickling.loads(travel(payload))
    previous = signal.signal(signal.SIGINT, lambda *_: sys.exit("of a handler"))
    try:
        with pytest.raises(SystemExit):
            pickling.loads(travel(payload))
    finally:
        signal.signal(signal.SIGINT, previous)


class RaisesSignal:
    def __reduce__(self) -> Any:
        return signal.raise_signal, (signal.SIGINT,)


# ---- tables -------------------------------------------------------------------------------------------------------


def test_an_exception_is_made_though_another_part_that_leads_to_it_cannot_be() -> None:
    inner, broken, error = Plain("inner"), Broken(), Plain("outer")
    broken.x = 1  # type: ignore[attr-defined]
    error.details, error.__cause__ = [broken, inner], inner  # type: ignore[attr-defined]
    after = as_value(error)
    assert type(after.__cause__) is Plain
    assert after.__cause__.args == ("inner",)


def test_a_chain_of_long_texts_takes_as_much_as_its_texts() -> None:
    error = None
    for _ in range(300):
        above = Plain("y" * 100_000)
        above.__context__ = error
        error = above
    assert error is not None
    payload = pickling.dumps(error)
    assert len(payload.data) < 300 * 250_000
    after: Any = pickling.loads(travel(payload))
    length = 0
    while after is not None:
        after, length = after.__context__, length + 1
    assert length == 300


@BOTH
def test_a_class_that_was_made_by_exec_is_of_its_base(sent: Any) -> None:
    namespace: dict[str, Any] = {}
    exec("class E(ValueError): pass", namespace)
    error = namespace["E"]("x", 1)
    error.code = 5
    after = sent(error)
    assert isinstance(after, ValueError)
    assert (type(after).__name__, after.args, after.code) == ("E", ("x", 1), 5)


class HalfReduced(Exception):
    def __reduce__(self) -> Any:
        return HalfReduced, self.args, self.__dict__


def test_what_a_reduction_leaves_that_fails_half_way_does_not_travel() -> None:
    error = HalfReduced(torch.ones(2))
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    payload = pickling.dumps(error)
    assert len(payload.tensors) == 1
    assert torch.equal(pickling.loads(travel(payload)).args[0], torch.ones(2))


def test_a_group_that_shares_its_members_many_times_over_is_told_of_in_brief() -> None:
    error: Any = Plain("x")
    for _ in range(40):
        error = ExceptionGroup("g", [error, error])
    after = as_outcome(error)
    assert type(after) is ExceptionGroup
    assert after.exceptions[0] is after.exceptions[1]
    assert "g (2 sub-exceptions)" in str(after.__cause__)
