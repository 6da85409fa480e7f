"""Errors of functions that other workers run: each comes back at once, as what it was."""

from __future__ import annotations

import itertools
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.unit.wire import test_exception_state as kinds
from zrpc.errors import RpcTimeoutError

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

LIMIT_S = 40.0
"""Of each call. One that reaches it was never answered."""


def other(rank: int) -> str:
    return f"worker{1 - rank}"


def by_sync(to: str, function: Any, *args: Any) -> Any:
    return rpc.rpc_sync(to, function, args=args, timeout=LIMIT_S)


def by_async(to: str, function: Any, *args: Any) -> Any:
    return rpc.rpc_async(to, function, args=args, timeout=LIMIT_S).wait()


def by_callback(to: str, function: Any, *args: Any) -> Any:
    """Nobody waits for the call itself: a completer completes its future."""
    done = threading.Event()
    future = rpc.rpc_async(to, function, args=args, timeout=LIMIT_S)
    future.add_done_callback(lambda _: done.set())
    assert done.wait(LIMIT_S + 5), "the future never ended"
    return future.value()


def by_reference(to: str, function: Any, *args: Any) -> Any:
    return rpc.remote(to, function, args=args, timeout=LIMIT_S).to_here(LIMIT_S)


def by_futures(to: str, function: Any, *args: Any) -> Any:
    return rpc.rpc_sync(to, fails_later, args=(function, *args), timeout=LIMIT_S)


@rpc.functions.async_execution
def fails_later(function: Any, *args: Any) -> torch.futures.Future[Any]:
    """Its future fails with what `function` raises."""
    future: rpc.Future[Any] = rpc.Future()
    origin: rpc.Future[int] = rpc.Future()
    origin.set_result(0)
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)  # type: ignore[arg-type]
    except BaseException as error:
        raised = error
        return origin.then(lambda _: throw(raised))
    return future


def throw(error: BaseException) -> Any:
    raise error


WAYS = (by_sync, by_async, by_callback, by_reference, by_futures)


def outcome(way: Any, to: str, function: Any, *args: Any) -> Any:
    """What the call raised: always an exception that the main thread survives."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # of any class
        way(to, function, *args)
    assert not issubclass(caught.type, RpcTimeoutError), f"never answered: {args}"
    return caught.value


def raise_slotted() -> None:
    raise kinds.SlottedBelow


def raise_refused() -> None:
    raise kinds.Refused(403)


def raise_frozen() -> None:
    raise kinds.Frozen(7)


def raise_group() -> None:
    raise ExceptionGroup("two", [KeyError("k"), kinds.Quota(3, 4), kinds.local(OSError, code=5)])


def raise_linked() -> None:
    raise kinds.linked()


def raise_exit(kind: type[BaseException]) -> None:
    raise kind("not an error")


def return_errors(*errors: BaseException) -> Any:
    return [*errors, kinds.Refused(403), kinds.local(KeyError, code=5)]


def raise_misbehaving(methods: dict[str, Any], base: type[BaseException], is_importable: bool) -> None:
    raise kinds.misbehaving(methods, base, is_importable)


def errors_arrive(rank: int) -> int:
    to = other(rank)
    for way in WAYS:
        slotted = outcome(way, to, raise_slotted)
        refused = outcome(way, to, raise_refused)
        frozen = outcome(way, to, raise_frozen)
        if way is not by_reference:  # a future that a callback made holds a RuntimeError, as torch's does
            assert type(slotted) is kinds.SlottedBelow, way
        assert str(slotted) == "axis 4 of 1 p"
        assert (type(refused), refused.code, refused.later) == (kinds.Refused, 403, [5])
        assert frozen == kinds.Frozen(7)
        group = outcome(way, to, raise_group)
        assert [type(one).__name__ for one in group.exceptions] == ["KeyError", "Quota", "NoSuchKey"]
        assert isinstance(group.exceptions[2], OSError)
        assert group.exceptions[1].used == 4
        linked = outcome(way, to, raise_linked)
        assert linked.__context__ == kinds.Frozen(1)
        for kind in (SystemExit, KeyboardInterrupt, GeneratorExit):
            assert kind.__name__ in str(outcome(way, to, raise_exit, kind))
    given, refused, local = rpc.rpc_sync(to, return_errors, args=(kinds.SlottedBelow(),))
    assert (type(given), given.extra) == (kinds.SlottedBelow, [1])
    assert (type(refused), refused.code) == (kinds.Refused, 403)
    assert isinstance(local, KeyError)
    assert local.code == 5
    return 1


def test_errors_arrive_as_their_class_with_their_attributes(cluster_in_each_mode: Cluster) -> None:
    assert cluster_in_each_mode.run(errors_arrive, 2) == [1, 1]


def with_rrefs_in_arguments(rank: int) -> int:
    """What rides on a call (RRefs, a context, a profile) does not change its error."""
    import zrpc.autograd as dist_autograd

    to = other(rank)
    rref = rpc.RRef(torch.ones(1))
    with pytest.raises(kinds.Frozen):
        rpc.rpc_sync(to, raise_with, args=(rref,))
    with dist_autograd.context():
        with pytest.raises(kinds.Frozen):
            rpc.rpc_sync(to, raise_with, args=(rref, torch.ones(2, requires_grad=True)))
        with pytest.raises(kinds.Frozen):
            rpc.remote(to, raise_with, args=(rref, torch.ones(2, requires_grad=True))).to_here()
    with torch.autograd.profiler.profile(), pytest.raises(kinds.Frozen):
        rpc.rpc_sync(to, raise_with, args=(rref,))
    return 1


def raise_with(*_: Any) -> None:
    raise kinds.Frozen(7)


def test_a_frozen_error_passes_through_what_rides_on_a_call(cluster: Cluster) -> None:
    assert cluster.run(with_rrefs_in_arguments, 2) == [1, 1]


def misbehave(rank: int, num_classes: int) -> int:
    """Functions that raise errors of random classes, on a worker that goes on to serve."""
    rng = random.Random(rank)
    numbers = itertools.count()
    for _ in range(num_classes):
        methods = {
            rng.choice(kinds.METHODS): rng.choice([*kinds.RAISED, None]) for _ in range(rng.randrange(6))
        }  # fmt: skip
        base = rng.choice([Exception, ValueError, OSError, RuntimeError, SystemExit, KeyboardInterrupt, ExceptionGroup])
        way = WAYS[next(numbers) % len(WAYS)]
        outcome(way, other(rank), raise_misbehaving, methods, base, False)
        assert rpc.rpc_sync(other(rank), abs, args=(-3,), timeout=LIMIT_S) == 3
    return num_classes


@pytest.mark.parametrize("num_classes", [60])
def test_whatever_a_class_of_errors_does_each_call_ends(cluster_in_each_mode: Cluster, num_classes: int) -> None:
    done = cluster_in_each_mode.run(misbehave, 2, args=(num_classes,), timeout_s=110)
    assert done == [num_classes, num_classes]


def slow() -> None:
    threading.Event().wait(LIMIT_S)


def wait_for_the_first(rank: int) -> int:
    if rank == 0:
        futures = [rpc.rpc_async("worker1", slow), rpc.rpc_async("worker1", raise_refused)]
        with pytest.raises(kinds.Refused):
            torch.futures.wait_all(futures)
        with pytest.raises(kinds.Refused):
            torch.futures.collect_all(futures).wait()
        assert not futures[0].done(), "it was waited for"
        rpc.shutdown(graceful=False)
    return 1


def test_wait_all_ends_at_the_first_failure(cluster: Cluster) -> None:
    running = cluster.start(end_without_shutdown, 2, init=False, args=(cluster.new_init_method(),))
    outcomes = running.wait(60)
    assert outcomes[0].error is None, outcomes[0].error


def end_without_shutdown(rank: int, init_method: str) -> int:
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 1:
        slow()
    return wait_for_the_first(rank)
