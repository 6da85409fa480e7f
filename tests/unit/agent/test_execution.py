"""Operators by name, and which functions count as asynchronous."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zrpc import functions
from zrpc.agent import execution
from zrpc.agent.future import Future
from zrpc.agent.request import AsyncCalls
from zrpc.agent.served import ServedCall
from zrpc.errors import ProtocolError
from zrpc.wire import pickling, values

if TYPE_CHECKING:
    from collections.abc import Iterator


class Served(ServedCall):
    """What running a function takes of a request."""

    def __init__(self, func: object, *args: Any) -> None:
        super().__init__(None)
        self.payload = pickling.dumps((func, args, {}))


def python(func: object, *args: Any) -> Any:
    return execution.execute_python(Served(func, *args))  # type: ignore[arg-type]


def builtin(op: str, *args: Any, **kwargs: Any) -> Any:
    return execution.execute_builtin(op, values.pack((args, kwargs)))


def test_operators_run_by_name() -> None:
    x = torch.ones(2, 2)
    assert torch.equal(builtin("aten::add", x, x), x + x)
    assert torch.equal(builtin("aten::add.Tensor", x, x, alpha=3), x * 4)
    assert torch.equal(builtin("aten::sum", x, [0]), x.sum(0))
    assert builtin("aten::size", x) == [2, 2]


def test_operators_return_what_they_return_in_torchscript() -> None:
    x = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    for op, args in [("aten::max", (x, 1)), ("aten::split", (x, 1)), ("aten::add", (2, 1.5)), ("aten::add", (x, 1))]:
        mine, its = builtin(op, *args), getattr(torch.ops.aten, op.removeprefix("aten::"))(*args)
        assert type(mine) is type(its)
        assert str(mine) == str(its)


@pytest.mark.parametrize("op", ["aten::no_such_operator", "nowhere::add", "aten::add.NoOverload", "add", ""])
def test_operators_that_are_none_are_named(op: str) -> None:
    with pytest.raises(ProtocolError, match=f"no operator {op}"):
        builtin(op, torch.ones(1))


def test_arguments_that_fit_no_schema_are_refused() -> None:
    with pytest.raises(RuntimeError):
        builtin("aten::add", "x", [])


def test_an_observer_surrounds_what_is_run() -> None:
    seen: list[str] = []

    @contextmanager
    def observer() -> Iterator[None]:
        seen.append("before")
        yield
        seen.append("after")

    execution.observe(observer)
    try:
        assert python(max, 1, 2) == 2
        assert builtin("aten::neg", torch.ones(1)).item() == -1
    finally:
        execution.observe(None)
    assert python(max, 1, 2) == 2
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("kind", [torch.futures.Future, Future])
def test_futures_of_any_kind_are_waited_for_without_a_thread(kind: type[torch.futures.Future[int]]) -> None:
    outcomes: list[Any] = []
    futures = [kind() for _ in range(3)]
    watched = [futures[0], futures[1], futures[2].then(lambda future: future.value() + 1)]
    for future in watched:
        execution.when_done(future, AsyncCalls(), outcomes.append, outcomes.append)
    assert outcomes == []
    error: Any = ValueError("x")
    futures[0].set_result(1)
    futures[1].set_exception(error)
    futures[2].set_result(2)
    assert outcomes == [1, error, 3]


def test_asynchronous_calls_are_counted_until_their_futures_are_done() -> None:
    """What returned a future counts as under way; what ends with an error counts no more either."""
    calls = AsyncCalls()
    futures: list[torch.futures.Future[int]] = [torch.futures.Future(), torch.futures.Future()]
    for future in futures:
        execution.when_done(future, calls, lambda _: None, lambda _: None)
    assert calls.num == 2
    futures[0].set_result(1)
    futures[1].set_exception(ValueError("no"))  # type: ignore[arg-type]  # torch's own annotation is wrong
    assert calls.num == 0


def test_what_is_no_future_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"must return a torch\.futures\.Future object, but this one returned a str"):
        execution.when_done("result", AsyncCalls(), print, print)


def test_the_mark_of_asynchronous_functions() -> None:
    @functions.async_execution
    def func(x: int) -> int:
        """Its own words."""
        return x + 1

    assert hasattr(func, execution.ASYNC_ATTRIBUTE)
    assert func(1) == 2
    assert func.__doc__ == "Its own words."
    assert not hasattr(max, execution.ASYNC_ATTRIBUTE)
