"""RRefs of agents that share one process, on a network that is held, repeats, loses and reorders."""

from __future__ import annotations

import gc
import pickle
import random
import threading
from typing import Any

import pytest
import torch

from tests.unit.rref.workers import Chaos, Worker, cluster
from tests.waiting import until
from zrpc.errors import (
    LimitError,
    OverloadedError,
    PeerLostError,
    ProtocolError,
    RpcTimeoutError,
    RRefError,
    SerializationError,
)
from zrpc.rref import context as context_module
from zrpc.rref.cell import Cell
from zrpc.rref.rref import RRef
from zrpc.rref.states import UserState
from zrpc.wire import pickling
from zrpc.wire.messages import (
    PythonCall,
    PythonRemote,
    Reply,
    RRefChildAccept,
    RRefFetch,
    RRefForkRequest,
    RRefUserDelete,
)


def make(value: Any) -> Any:
    return value


def boom() -> None:
    raise ValueError("Expected error")


def fetch(rref: RRef[Any]) -> Any:
    return rref.to_here()


def state_of(rref: RRef[Any]) -> str:
    return rref._context.user_state(rref._fork_id).name if rref._fork_id else "OWNER"


def give_back(rref: RRef[Any]) -> RRef[Any]:
    return rref


def own(value: Any) -> RRef[Any]:
    return RRef(value)


_kept: list[Any] = []


def keep(rref: Any) -> None:
    _kept.append(rref)


def empty(workers: list[Worker]) -> None:
    gc.collect()
    for worker in workers:
        worker.wait_counts(owners=0, users=0, children=0, unconfirmed=0, sending=0)
        assert not worker.rrefs._cells


@pytest.fixture(autouse=True)
def nothing_kept() -> Any:
    yield
    _kept.clear()


@pytest.mark.parametrize("seed", range(6))
def test_a_network_that_repeats_loses_and_reorders(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chaos = Chaos(seed, reorder=True, repeat=0.3, lose=0.2)
    dice = random.Random(seed)
    with cluster(monkeypatch, 3, chaos) as c:
        held: list[tuple[Worker, RRef[Any], int]] = []
        for value in range(40):
            worker, to, via = (dice.choice(c.workers) for _ in range(3))
            rref = worker.remote(to, make, value) if dice.random() < 0.7 else worker.local(value)
            held.append((worker, rref, value))
            holder, one, number = dice.choice(held)
            assert holder.call(via, fetch, one) == number
            back = holder.call(via, give_back, one)
            with holder:
                assert back.to_here() == number
            if dice.random() < 0.5:
                held.append((holder, back, number))
            while len(held) > 10:
                del held[dice.randrange(len(held))]
            rref = one = back = None  # type: ignore[assignment]
        for holder, one, number in held:
            with holder:
                assert one.to_here() == number
        del one
        held.clear()
        empty(c.workers)


def test_users_are_confirmed_before_a_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch) as c:
        a, b, o = c.workers
        rref = a.remote(o, make, 1)
        c.network.hold(RRefForkRequest)
        results: list[str] = []
        caller = threading.Thread(target=lambda rref: results.append(a.call(b, state_of, rref)), args=(rref,))
        caller.start()
        c.network.wait_held()
        assert not results
        c.network.release()
        caller.join()
        del caller
        assert results == [UserState.CONFIRMED.name]
        del rref
        empty(c.workers)


def test_a_delete_that_overtakes_its_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        c.network.hold(PythonRemote)
        rref = a.remote(o, make, 1, timeout=0.05)
        with pytest.raises(RpcTimeoutError):
            rref._get_future().wait()
        a.wait_counts(unconfirmed=0)
        with a, pytest.raises(RpcTimeoutError, match="RRef creation via"):
            rref.to_here()
        with a, pytest.raises(RuntimeError, match="RRef creation via"):
            pickling.dumps(rref)
        del rref
        empty(c.workers)
        c.network.release()
        assert a.call(o, make, 2) == 2
        empty(c.workers)


def test_a_fetch_that_overtakes_its_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        c.network.hold(PythonRemote)
        rref = a.remote(o, make, 7)
        values: list[int] = []
        asker = threading.Thread(target=lambda rref: values.append(rref.to_here()), args=(rref,))
        asker.start()
        o.wait_counts(owners=1)
        c.network.release()
        asker.join()
        del asker
        assert values == [7]
        del rref
        empty(c.workers)


def test_a_fetch_after_the_delete_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        rref = a.remote(o, make, 7)
        assert rref.to_here() == 7
        rref_id, fork_id = rref._rref_id, rref._fork_id
        assert fork_id is not None
        del rref
        empty(c.workers)
        with pytest.raises(RRefError, match="was deleted"):
            a.agent.request(o.info, RRefFetch(rref_id, fork_id)).wait()
        empty(c.workers)


def test_repeated_control_messages_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        rref = a.remote(o, make, 7)
        assert rref.to_here() == 7
        other = a.remote(o, make, 8)
        assert other.to_here() == 8
        rref_id, fork_id = rref._rref_id, rref._fork_id
        assert fork_id is not None
        for _ in range(2):
            a.agent.request(o.info, RRefForkRequest(rref_id, fork_id)).wait()
        o.wait_counts(owners=2)
        del rref
        o.wait_counts(owners=1)
        for message in (RRefForkRequest(rref_id, fork_id), RRefUserDelete(rref_id, fork_id), RRefChildAccept(fork_id)):
            a.agent.request(o.info, message).wait()
        assert o.rrefs.debug_info()["num_forks"] == "1"
        del other
        empty(c.workers)


def test_a_dead_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch) as c:
        a, b, o = c.workers
        mine = o.local(5)
        assert o.call(b, keep, mine) is None
        o.wait_counts(owners=1)
        made = a.remote(o, make, 1)
        a.call(b, keep, made)
        c.kill(b.info.id)
        o.wait_counts(owners=1)
        assert made.to_here() == 1
        del made
        empty([a, o])


def test_a_dead_user_that_got_its_rref_in_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        rref = a.call(o, own, 3)
        assert rref.to_here() == 3
        a.wait_counts(sending=0)
        assert o.rrefs._table.owned_forks() == {rref._rref_id: {rref._fork_id: a.info.incarnation}}
        c.kill(a.info.id)
        empty([o])


def test_a_worker_that_could_not_be_connected_to_is_watched_at_the_next_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A creation that needs a connection which cannot be made fails; the creator of the next one is watched."""
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        watched: list[bytes] = []

        def refuse(peer: bytes) -> None:
            raise LimitError("too many open files")

        monkeypatch.setattr(c.endpoints[o.info.id], "watch", refuse)
        with pytest.raises(LimitError, match="too many open files"):
            a.remote(o, make, 1)._get_future().wait()
        monkeypatch.setattr(c.endpoints[o.info.id], "watch", watched.append)
        rref = a.remote(o, make, 1)
        assert rref.to_here() == 1
        assert a.info.incarnation in watched
        c.kill(a.info.id)
        empty([o])


def test_a_dead_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        rref = a.remote(o, make, 1)
        assert rref.to_here() == 1
        c.kill(o.info.id)
        with pytest.raises(PeerLostError):
            rref.to_here()
        a.wait_lost(o)
        with pytest.raises(RuntimeError, match="lost"):
            pickling.dumps(rref)
        del rref
        empty([a])


def test_a_creator_that_dies_before_its_creation_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch) as c:
        a, b, o = c.workers
        c.network.hold(PythonRemote)
        rref = a.remote(o, make, 1)
        a.call(b, keep, rref)
        asking = b.agent.request(o.info, RRefFetch(rref._rref_id, _kept[0]._fork_id))
        o.wait_counts(owners=1)
        c.network.discard_held()
        c.kill(a.info.id)
        with pytest.raises(PeerLostError, match="before it created"):
            asking.wait()
        with b, pytest.raises(PeerLostError, match="before it created"):
            _kept[0].to_here()
        _kept.clear()
        empty([b, o])


def test_an_own_rref_comes_home_before_its_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        c.network.hold(PythonRemote)
        rref = a.remote(o, make, 1)
        a.call(o, keep, rref)
        (home,) = _kept
        assert home.is_owner()
        o.wait_counts(owners=1)
        c.network.release()
        assert home.local_value() == 1
        del home, rref
        _kept.clear()
        empty(c.workers)


def test_forks_in_a_call_that_cannot_be_read_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch) as c:
        a, b, o = c.workers
        mine, made = a.local(1), a.remote(o, make, 2)
        with pytest.raises(SerializationError):
            a.call(b, make, (_Unreadable(), mine, made))
        del mine, made
        empty(c.workers)


class _Unreadable:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return boom, ()


def own_two(value: Any, other: Any) -> tuple[RRef[Any], Any, RRef[Any]]:
    return RRef(value), other, RRef(value)


def own_a_lock(rref: RRef[Any]) -> Any:
    return rref, RRef(1), threading.Lock()


def test_forks_that_are_pickled_and_do_not_leave_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        used, owned = a.remote(o, make, 1), a.local(2)
        with pytest.raises(SerializationError):  # half of it is pickled
            a.call(o, make, (used, owned, threading.Lock()))
        with pytest.raises(SerializationError):  # all of it is, but it cannot be sent
            a.call(o, make, (used, owned, torch._to_functional_tensor(torch.ones(1))))
        with pytest.raises(SerializationError):  # so with an answer
            a.call(o, own_a_lock, used)
        assert used.to_here() == 1
        for worker in c.workers:
            worker.wait_counts(children=0)
        a.wait_counts(owners=0)
        o.wait_counts(owners=1)
        del used, owned
        empty(c.workers)


def test_forks_in_a_call_that_finds_no_room_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        mine = a.local(2)
        a.agent._gates._max_calls = 1
        c.network.hold(PythonCall)
        filling = threading.Thread(target=a.call, args=(o, make, 1))
        filling.start()
        c.network.wait_held()
        with pytest.raises(OverloadedError):
            a.call(o, fetch, mine, timeout=0.05)
        c.network.release()
        filling.join()
        del mine
        empty(c.workers)


def test_forks_in_an_answer_that_comes_too_late_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch) as c:
        a, b, o = c.workers
        made = b.remote(o, make, 5)
        assert made.to_here() == 5
        b.agent.extensions["made"] = made  # type: ignore[index]
        c.network.hold(Reply)
        for answerer, func, args in ((o, own, (3,)), (b, lend, ())):
            with pytest.raises(RpcTimeoutError):
                a.call(answerer, func, *args, timeout=0.1)
        c.network.wait_held(2)
        c.network.release()
        b.wait_counts(children=0)
        o.wait_counts(owners=1)
        a.wait_counts(users=0)
        del b.agent.extensions["made"], made  # type: ignore[arg-type]
        empty(c.workers)


def lend() -> Any:
    from zrpc.rref import travel

    return travel.current_agent().extensions["made"]  # type: ignore[index]


def test_forks_in_an_answer_that_cannot_be_read_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        with pytest.raises(SerializationError):
            a.call(o, own_two, 3, _Unwritable())
        empty(c.workers)


class _Unwritable:
    """Travels to its callee, and back no more."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _Unreadable, ()


def test_a_fork_in_an_answer_needs_no_word_to_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        c.network.hold(RRefForkRequest)
        rref = a.call(o, own, 3)
        assert o.rrefs._table.owned_forks() == {rref._rref_id: {rref._fork_id: a.info.incarnation}}
        assert rref.to_here() == 3
        assert not c.network.held
        del rref
        empty(c.workers)


def test_what_making_the_value_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        rref = a.remote(o, boom)
        with pytest.raises(ValueError, match="Expected error"):
            rref.to_here()
        here = a.remote(a, boom)
        with pytest.raises(ValueError, match="Expected error"):
            here.local_value()
        del rref, here
        empty(c.workers)


def test_remote_to_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, b = c.workers
        c.network.hold(Reply)
        rref = a.remote(a, make, [1])
        assert rref.is_owner()
        assert rref.local_value() == [1]
        assert rref.to_here() is rref.local_value()
        c.network.release()
        a.wait_counts(owners=0)
        assert a.call(b, fetch, rref) == [1]
        del rref
        empty(c.workers)


def test_shutdown_deletes_users_and_waits_for_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, b = c.workers
        ours, theirs = a.remote(b, make, 1), b.remote(a, make, 2)
        assert (ours.to_here(), theirs.to_here()) == (1, 2)
        enders = [
            threading.Thread(target=worker.rrefs.delete_all_user_and_unforked_owner_rrefs, args=(10.0,))
            for worker in c.workers
        ]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()
        empty(c.workers)
        for worker in c.workers:
            worker.rrefs.destroy(ignore_leak=False)
        with pytest.raises(RRefError, match=r"Cannot call to_here\(\) on it after deletion"):
            ours.to_here()
        with pytest.raises(RuntimeError, match="Cannot call fork an UserRRef after deletion"):
            pickling.dumps(ours)


def test_shutdown_does_not_wait_for_what_never_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_module, "UNSENT_GRACE_S", 0.05)
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        used, owned = a.remote(o, make, 1), a.local(2)
        assert used.to_here() == 1
        for rref in (used, owned):
            rref._serialize()
        a.rrefs.delete_all_user_and_unforked_owner_rrefs(20.0)
        empty(c.workers)
        a.rrefs.destroy(ignore_leak=False)


def test_a_leak_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        rref = a.remote(o, make, 1)
        assert rref.to_here() == 1
        with pytest.raises(RRefError, match=r"Leaking RRef GloballyUniqueId\(created_on=0, local_id=0\) with fork Id"):
            o.rrefs.destroy(ignore_leak=False)
        o.rrefs.destroy(ignore_leak=False)


def test_values_are_let_go_of_on_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    class Tracked:
        def __del__(self) -> None:
            threads.append(threading.current_thread().name)

    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        mine = o.local(Tracked())
        o.call(a, keep, mine)
        del mine
        assert threads == []
        _kept.clear()
        empty(c.workers)
        until(lambda: threads, "the value is let go of")
        assert threads == ["zrpc-finalizer-0"]


def test_plain_pickle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 1) as c:
        rref = c.workers[0].local(1)
        with pytest.raises(RuntimeError, match="Can not pickle rref in python pickler"):
            pickle.dumps(rref)


def test_serialized_rrefs_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, b = c.workers
        mine = a.local(4)
        fields = mine._serialize()
        with b:
            rref = RRef._deserialize(fields)
            assert rref.to_here() == 4
            with pytest.raises(ProtocolError, match="is CONFIRMED"):
                RRef._deserialize(fields)
            with pytest.raises(ProtocolError, match="not a serialized RRef"):
                RRef._deserialize((1, 2))  # type: ignore[arg-type]
        del rref, mine
        empty(c.workers)


def test_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        rref = a.remote(o, make, torch.ones(()))
        rref.backward(5, retain_graph=True)
        assert o.passes == [(5, [torch.ones(())], True)]
        with pytest.raises(RuntimeError, match="User RRefs require 'dist_autograd_ctx_id' to be specified"):
            rref.backward()
        text = a.remote(o, make, "foo")
        with pytest.raises(RuntimeError, match=r"RRef should contain a tensor for .backward\(\)"):
            text.backward(5)
        t = torch.ones(2, requires_grad=True)
        a.local(t.sum()).backward()
        assert torch.equal(t.grad, torch.ones(2)) if t.grad is not None else False
        with pytest.raises(RuntimeError, match="does not require grad and does not have a grad_fn"):
            a.local(torch.ones(())).backward()
        del rref, text
        empty(c.workers)


def test_a_value_asked_for_in_time_only() -> None:
    cell = Cell()
    with pytest.raises(RpcTimeoutError):
        cell.wait(0.01)
    cell.set_value(1)
    cell.set_error(ValueError("too late"))
    assert cell.wait(0.01) == 1
    assert Cell.holding(2).get() == 2


def test_profiling_future_and_creation_future(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        rref = a.remote(o, make, 1)
        assert rref._get_future().wait() is None
        assert isinstance(rref._get_future(), torch._C.Future)
        assert a.local(1)._get_future().wait() is None
        with pytest.raises(RRefError, match="Profiling future has not been set"):
            rref._get_profiling_future()
        done: torch.futures.Future[int] = torch.futures.Future()
        rref._set_profiling_future(done)
        assert rref._get_profiling_future() is done


def test_a_value_whose_owner_has_shut_down_is_gone_for_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(monkeypatch, 2) as c:
        a, o = c.workers
        rref = a.remote(o, make, 7)
        with a:
            assert rref.to_here() == 7
        o.rrefs.destroy(ignore_leak=True)  # before its agent ends
        with a, pytest.raises(RRefError, match=r"is gone: its owner .*worker1.* has shut down"):
            rref.to_here()
