"""RRefs between real worker processes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import zrpc as rpc
from tests.integration.harness import Cluster
from tests.waiting import until
from zrpc.agent.current import current_agent
from zrpc.functions import async_execution
from zrpc.gather import all_gather
from zrpc.rref.context import RRefContext
from zrpc.rref.rref import RRef


@pytest.fixture
def cluster(tmp_path: Any) -> Any:
    started = Cluster("file", tmp_path)
    yield started
    started.close()


class Counter:
    def __init__(self, start: Any, slow: bool = False) -> None:
        if slow:
            time.sleep(1)
        self.value = start

    def add(self, n: Any) -> Any:
        self.value += n
        return self.value

    def nap(self) -> None:
        time.sleep(3)

    @staticmethod
    @async_execution
    def static_async(to: str, x: Any, y: Any) -> Any:
        return rpc.rpc_async(to, torch.add, args=(x, y))

    @classmethod
    @async_execution
    def class_async(cls, to: str, x: Any, y: Any) -> Any:
        return rpc.rpc_async(to, torch.add, args=(x, y))

    @async_execution
    def bound_async(self, to: str, x: Any, y: Any) -> Any:
        return rpc.rpc_async(to, torch.add, args=(x, y))


def name(rank: int) -> str:
    return f"worker{rank}"


def info() -> dict[str, str]:
    found: dict[str, str] = current_agent().extensions[RRefContext].debug_info()
    return found


def flush() -> None:
    def is_flushed() -> bool:
        now = info()
        return now["num_pending_users"] == now["num_pending_futures"] == "0"

    until(is_flushed, "nothing is pending", info)


def wait_counts(rank: int, owners: int, forks: int) -> None:
    def there() -> dict[str, str]:
        found: dict[str, str] = rpc.rpc_sync(name(rank), info)
        return found

    def is_so() -> bool:
        now = there()
        return (now["num_owner_rrefs"], now["num_forks"]) == (str(owners), str(forks))

    until(is_so, f"{owners} owners, {forks} forks", there)


def add_rref(rref: RRef[Any], value: Any) -> Any:
    return rref.to_here() + value


def sum_rrefs(a: RRef[Any], b: RRef[Any]) -> Any:
    return a.to_here() + b.to_here()


def is_confirmed(rref: RRef[Any]) -> bool:
    return rref.confirmed_by_owner()


def nested(to: str) -> Any:
    return rpc.remote(to, torch.add, args=(torch.ones(2), 1)), rpc.remote(to, torch.add, args=(torch.ones(2), 2))


def chain(rank: int, n: int, rref: RRef[Any], ttl: int) -> Any:
    if ttl:
        return [rpc.remote(name(rank), chain, args=((rank + 1) % n, n, rref, ttl - 1))]
    return rref.to_here()


def boom() -> None:
    raise ValueError("Expected error")


def slow(seconds: float) -> torch.Tensor:
    time.sleep(seconds)
    return torch.ones(1)


def make_rrefs(values: list[Any]) -> list[RRef[Any]]:
    return [RRef(Counter(value)) for value in values]


def call_method(method: Any, rref: RRef[Any], *args: Any) -> Any:
    return method(rref.local_value(), *args)


@async_execution
def async_add(to: str, x: Any, y: Any) -> Any:
    return rpc.rpc_async(to, torch.add, args=(x, y))


kept: list[Any] = []


def keep(rref: Any) -> None:
    kept.append(rref)


def forget() -> None:
    kept.clear()


def sharing(rank: int) -> None:
    n = 3
    nxt, after = name((rank + 1) % n), name((rank + 2) % n)
    a = rpc.remote(nxt, torch.add, args=(torch.ones(2), 2))
    b = rpc.remote(nxt, torch.add, args=(torch.ones(2), 1))
    for to in (nxt, after, name(rank)):
        assert torch.equal(rpc.rpc_sync(to, sum_rrefs, args=(a, b)), torch.full((2,), 5.0))
        assert torch.equal(rpc.remote(to, sum_rrefs, args=(a, b)).to_here(), torch.full((2,), 5.0))
        assert rpc.rpc_sync(to, is_confirmed, args=(a,))
    for one in rpc.remote(nxt, nested, args=(after,)).to_here():
        assert one.to_here().shape == (2,)
    made = chain((rank + 1) % n, n, a, 6)
    for _ in range(6):
        (rref,) = made
        made = rref.to_here()
    assert torch.equal(made, torch.full((2,), 3.0))
    local = RRef(40)
    assert rpc.rpc_async(nxt, add_rref, args=(local, 50)).wait() == 90
    assert rpc.remote(nxt, add_rref, args=(local, 50)).to_here() == 90
    rrefs = rpc.rpc_sync(nxt, make_rrefs, args=([1, 2, 3],))
    for one in rrefs:
        rpc.rpc_sync(one.owner(), call_method, args=(Counter.add, one, 10))
    assert [one.rpc_sync().add(0) for one in rrefs] == [11, 12, 13]
    mine = rpc.remote(name(rank), slow, args=(0.1,))
    assert rpc.rpc_sync(nxt, add_rref, args=(mine, 1)) == 2
    assert mine.to_here() == 1
    with pytest.raises(ValueError, match="Expected error"):
        rpc.remote(nxt, boom).to_here()
    assert torch.equal(rpc.remote(nxt, async_add, args=(after, torch.ones(1), 2)).to_here(), torch.full((1,), 3.0))


def proxies(rank: int) -> None:
    n = 3
    nxt, after = name((rank + 1) % n), name((rank + 2) % n)
    for to in (nxt, name(rank)):
        rref = rpc.remote(to, Counter, args=(7,))
        assert rref.rpc_sync().add(3) == 10
        assert rref.rpc_async().add(3).wait() == 13
        assert rref.remote().add(3).to_here() == 16
        total = rref.rpc_sync().static_async(after, 1, 2) + rref.rpc_async().class_async(after, 1, 2).wait()
        assert total + rref.remote().bound_async(after, 1, 2).to_here() == 9
        for ask in (
            lambda r: r.rpc_sync().nope(),
            lambda r: r.rpc_async().nope().wait(),
            lambda r: r.remote().nope(),
        ):
            with pytest.raises(AttributeError, match="has no attribute 'nope'"):
                ask(rref)  # type: ignore[no-untyped-call]
        assert rref._get_type() is Counter
        assert rref._get_type(blocking=False) is rref._get_type(blocking=False)
    with pytest.raises(RuntimeError, match="RPC ran for more than"):
        rref.rpc_sync(timeout=0.1).nap()
    late = rpc.remote(nxt, Counter, args=(1, True))
    with pytest.raises(RuntimeError, match="RPC ran for more than"):
        late._get_type(timeout=0.1)
    with pytest.raises(RuntimeError, match="RPC ran for more than"):
        late.rpc_async(timeout=0.1).add(1).wait()
    assert late._get_type() is Counter
    failing = rpc.remote(nxt, boom)
    with pytest.raises(ValueError, match="Expected error"):
        failing._get_type()


def counters(rank: int) -> None:
    nxt = name((rank + 1) % 2)
    local = RRef(rank)
    assert str(local) == f"OwnerRRef(GloballyUniqueId(created_on={rank}, local_id=0))"
    assert set(info().values()) == {"0"}
    all_gather(None)
    made = rpc.remote(nxt, torch.add, args=(torch.ones(2), 1))
    expected = f"GloballyUniqueId(created_on={rank}, local_id={{}})"
    assert str(made) == f"UserRRef(RRefId = {expected.format(1)}, ForkId = {expected.format(2)})"
    with pytest.raises(RuntimeError, match="can't call localValue"):
        made.local_value()
    made.to_here()
    all_gather(None)
    flush()
    wait_counts(1 - rank, 1, 1)
    all_gather(None)
    rpc.rpc_sync(nxt, keep, args=(local,))
    all_gather(None)
    wait_counts(rank, 2, 2)
    all_gather(None)
    rpc.rpc_sync(nxt, forget)
    all_gather(None)
    wait_counts(rank, 1, 1)
    all_gather(None)
    del made
    all_gather(None)
    wait_counts(rank, 0, 0)
    flush()


def timed_out(rank: int) -> None:
    if rank:
        return
    rref = rpc.remote(name(1), slow, args=(1,), timeout=0.01)
    with pytest.raises(RuntimeError, match="RPC ran for more than"):
        rref._get_future().wait()
    flush()
    with pytest.raises(RuntimeError, match="RRef creation"):
        rref.to_here()
    with pytest.raises(RuntimeError, match="RRef creation"):
        rpc.rpc_async(name(1), add_rref, args=(rref, 1))
    with pytest.raises(RuntimeError, match="RRef creation"):
        rref._serialize()
    wait_counts(1, 1, 1)
    del rref
    wait_counts(1, 0, 0)


def after_shutdown(rank: int, options: dict[str, Any]) -> None:
    rpc.init_rpc(name(rank), rank=rank, world_size=2, rpc_backend_options=rpc.RpcBackendOptions(**options))
    rref = rpc.remote(name(1 - rank), torch.add, args=(torch.ones(1), 1))
    local = RRef(1)
    context = current_agent().extensions[RRefContext]
    rpc.shutdown()
    assert not context._cells
    with pytest.raises(RuntimeError, match=r"Cannot call to_here\(\) on it after deletion."):
        rref.to_here()
    with pytest.raises(RuntimeError, match=r"Cannot call fork an UserRRef after deletion."):
        rref._serialize()
    with pytest.raises(RuntimeError, match="shut down"):
        local._serialize()
    assert local.local_value() == 1
    del rref, local


def gathered(rank: int) -> list[int]:
    """Everybody gets an RRef of its own from everybody; dropping one leaves the others as they are."""
    mine = RRef(10 + rank)
    everybody = all_gather(mine)
    if rank == 1:
        everybody.clear()
    all_gather(None)
    values = [rref.to_here() for _, rref in sorted(everybody.items())]
    all_gather(None)
    return values


def test_rrefs_that_are_gathered(cluster: Cluster) -> None:
    assert cluster.run(gathered, 4) == [[10, 11, 12, 13], [], [10, 11, 12, 13], [10, 11, 12, 13]]


def test_sharing(cluster: Cluster) -> None:
    cluster.run(sharing, 3)


def test_proxies(cluster: Cluster) -> None:
    cluster.run(proxies, 3)


def test_counters(cluster: Cluster) -> None:
    cluster.run(counters, 2)


def test_creation_times_out(cluster: Cluster) -> None:
    cluster.run(timed_out, 2)


def test_use_after_shutdown(cluster: Cluster, tmp_path: Any) -> None:
    options = {"init_method": f"file://{tmp_path}/rendezvous"}
    cluster.run(after_shutdown, 2, args=(options,), init=False)
