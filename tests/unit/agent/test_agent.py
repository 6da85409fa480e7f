"""Agents in one process over a network of memory: requests, answers, losses, limits, hooks."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.logs import handled_by
from tests.unit.agent.network import WAIT_S, Network, Worker, workers
from tests.waiting import until
from zrpc import finalizers
from zrpc.agent import client
from zrpc.config import RpcBackendOptions
from zrpc.errors import (
    AgentClosedError,
    ConfigError,
    PeerLostError,
    ProtocolError,
    RemoteError,
    RpcTimeoutError,
    SerializationError,
    StaleWorkerError,
    UnknownWorkerError,
)
from zrpc.ids import GlobalId, WorkerInfo, new_incarnation
from zrpc.membership.group import Member
from zrpc.wire import pickling
from zrpc.wire.envelope import Envelope, encode
from zrpc.wire.exceptions import RemoteTraceback
from zrpc.wire.messages import (
    Failure,
    Forming,
    Message,
    PythonCall,
    ReleaseContexts,
    Reply,
    RRefFetch,
    RRefForkRequest,
    RRefUserDelete,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.agent.request import Request
    from zrpc.wire.payload import Payload

R, F = GlobalId(0, 1), GlobalId(0, 2)
FETCH = RRefFetch(R, F)
DELETE = RRefUserDelete(R, F)


class Gate:
    """A handler whose requests a test lets go."""

    def __init__(self) -> None:
        self.came = threading.Semaphore(0)
        self.requests: list[Request[Any]] = []

    def __call__(self, request: Request[Any]) -> None:
        self.requests.append(request)
        self.came.release()

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.came.acquire(timeout=WAIT_S)


def echo(request: Request[Any]) -> None:
    request.reply(request.payload)


def _unsendable() -> torch.Tensor:
    """A tensor that cannot travel: it stands for another."""
    made: torch.Tensor = torch._to_functional_tensor(torch.ones(3))
    return made


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# ---- requests and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waited", [False, True])
@pytest.mark.parametrize(("inline", "thread"), [(True, "reader"), (False, "zrpc-handler-0")])
def test_a_request_is_served_where_it_should_be_and_answered(inline: bool, thread: str, waited: bool) -> None:
    seen: list[tuple[str, WorkerInfo, Message]] = []

    def serve(request: Request[RRefFetch]) -> None:
        seen.append((threading.current_thread().name, request.source, request.message))
        request.reply(pickling.dumps({"double": pickling.loads(request.payload) * 2}))

    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, serve, inline=inline)
        call = a.agent.request(b.info, FETCH, pickling.dumps(torch.arange(5000)), waited=waited)
        assert torch.equal(pickling.loads(call.wait())["double"], torch.arange(5000) * 2)
        assert seen == [(thread, a.info, FETCH)]


def test_a_worker_can_call_itself() -> None:
    with workers("a") as (a,):
        a.agent.handle(RRefFetch, echo, inline=False)
        tensor = torch.ones(3)
        after = pickling.loads(a.agent.request(a.info, FETCH, pickling.dumps(tensor)).wait())
        after.zero_()
        assert tensor.sum() == 3


def test_a_request_without_payload_gets_an_answer_without_one() -> None:
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefUserDelete, lambda request: request.reply(), inline=True)
        assert pickling.loads(a.agent.request(b.info, DELETE).wait()) is None


def test_many_requests_from_many_threads_get_each_its_own_answer() -> None:
    failures: list[object] = []
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, echo, inline=False)

        def work(thread: int) -> None:
            for number in range(100):
                call = a.agent.request(b.info, FETCH, pickling.dumps((thread, number)))
                if pickling.loads(call.wait()) != (thread, number):
                    failures.append((thread, number))

        threads = [in_thread(lambda thread=thread: work(thread)) for thread in range(6)]  # type: ignore[misc]
        for one in threads:
            one.join()
    assert failures == []


@pytest.mark.parametrize("inline", [False, True])
def test_what_the_handler_raises_is_the_answer(inline: bool) -> None:
    def serve(request: Request[Any]) -> None:
        raise KeyError("missing", request.source.name)

    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, serve, inline=inline)
        call = a.agent.request(b.info, FETCH)
        with pytest.raises(KeyError) as caught:
            call.wait()
        assert caught.value.args == ("missing", "a")
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert caught.value.__cause__.worker == b.info
        assert "in serve" in str(caught.value.__cause__)


def test_a_handler_may_fail_its_request_later_from_any_thread() -> None:
    gate = Gate()
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, gate, inline=True)
        call = a.agent.request(b.info, FETCH)
        gate.wait()
        in_thread(lambda: gate.requests[0].fail(ValueError("later"))).join()
        with pytest.raises(ValueError, match="later"):
            call.wait()


def test_a_second_answer_is_refused_and_the_first_counts(caplog: pytest.LogCaptureFixture) -> None:
    refusals: list[ProtocolError] = []
    finished = threading.Event()

    def serve(request: Request[Any]) -> None:
        request.reply(pickling.dumps("first"))
        answers: list[Callable[[], None]] = [request.reply, lambda: request.fail(ValueError("third"))]
        for answer in answers:
            try:
                answer()
            except ProtocolError as error:
                refusals.append(error)
        finished.set()
        raise RuntimeError("after the answer")

    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, serve, inline=False)
        assert pickling.loads(a.agent.request(b.info, FETCH).wait()) == "first"
        assert finished.wait(WAIT_S)
        assert [str(refusal) for refusal in refusals] == [f"RRefFetch from {a.info} was answered twice"] * 2
        assert b.agent.quiesce(WAIT_S)
    assert "failed after its answer" in caplog.text


def test_an_answer_that_cannot_be_sent_is_an_error_of_the_call() -> None:
    unsendable = _unsendable()

    def serve(request: Request[Any]) -> None:
        request.reply(pickling.dumps(unsendable))

    def fail(request: Request[Any]) -> None:
        request.fail(ValueError("and what it was about", unsendable))

    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, serve, inline=False)
        b.agent.handle(RRefUserDelete, fail, inline=False)
        with pytest.raises(SerializationError, match="cannot be sent"):
            a.agent.request(b.info, FETCH).wait()
        with pytest.raises(ValueError, match="and what it was about"):
            a.agent.request(b.info, DELETE).wait()
        assert b.agent.quiesce(WAIT_S), "the request counts as served"


def test_a_request_that_cannot_be_sent_raises_at_once_and_leaves_no_call() -> None:
    unsendable = _unsendable()
    with workers("a", "b") as (a, b):
        with pytest.raises(SerializationError):
            a.agent.request(b.info, FETCH, pickling.dumps(unsendable))
        with pytest.raises(ConfigError):
            a.agent.request(b.info, FETCH, timeout_s=-1)
        assert a.agent.counts()["client_active_calls"] == 0


@pytest.mark.parametrize("message", [FETCH, Forming([], 1, 1.0), ReleaseContexts([1])])
def test_a_message_that_nobody_serves_is_refused(message: Message) -> None:
    with workers("a", "b") as (a, b):
        with pytest.raises(ProtocolError, match=f"name=b.* does not serve {type(message).__name__}"):
            a.agent.request(b.info, message).wait()
        assert b.agent.quiesce(WAIT_S)


def test_damaged_messages_are_dropped_and_the_next_one_is_read(caplog: pytest.LogCaptureFixture) -> None:
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, echo, inline=True)
        damaged: list[list[Any]] = [
            [b"garbage"],
            [b""],
            [],
            [b"\xc1", b"chunk"],
            encode(Envelope(Reply(), 999_999)),
            encode(Envelope(FETCH, 999_999, None, b"", [[0, "float32", [9], False, 5]])),
        ]
        for frames in damaged:
            b.endpoint.deliver(a.endpoint.incarnation, frames)
        assert pickling.loads(a.agent.request(b.info, FETCH, pickling.dumps(5)).wait()) == 5
    assert caplog.text.count("was dropped") == 1, "the one without frames"
    assert caplog.text.count("could not be read") == 4, "one of them a request, which is answered"


@pytest.mark.parametrize("forger", ["a member", "a stranger"])
def test_where_members_have_keys_of_their_own_a_call_is_answered_by_its_callee_alone(
    caplog: pytest.LogCaptureFixture, forger: str
) -> None:
    """Whoever is let in could guess the number of a call. A late answer of the callee is no forged one."""
    gate = Gate()
    with workers("a", "b", "c", checks_answers=True) as (a, b, c):
        b.agent.handle(RRefFetch, gate, inline=True)
        call = a.agent.request(b.info, FETCH, pickling.dumps(5))
        late = a.agent.request(b.info, FETCH, pickling.dumps(5), timeout_s=0.05)
        gate.wait(2)
        with pytest.raises(RpcTimeoutError):
            late.wait()
        source = c.endpoint.incarnation if forger == "a member" else new_incarnation()
        for message in (Reply(), Failure("E", "forged", "")):
            a.endpoint.deliver(source, list(encode(Envelope(message, call.call_id))))
        until(lambda: a.endpoint.num_read >= 2, "what is forged was read")
        for request in gate.requests:
            request.reply(pickling.dumps(7))
        assert pickling.loads(call.wait()) == 7
    finalizers.run_pending()
    assert caplog.text.count("to a call of another worker was dropped") == 2


def test_while_a_damaged_message_is_logged_the_next_ones_are_read() -> None:
    """A handler of the log that takes long does not keep the thread that reads from reading."""
    logs, go_on = threading.Event(), threading.Event()

    def handle(_: logging.LogRecord) -> None:
        logs.set()
        assert go_on.wait(WAIT_S)

    with workers("a", "b") as (a, b), handled_by(handle):
        b.agent.handle(RRefFetch, echo, inline=True)
        b.endpoint.deliver(a.endpoint.incarnation, [b"garbage"])
        assert logs.wait(WAIT_S)
        try:
            call = a.agent.request(b.info, FETCH, pickling.dumps(5), waited=True, timeout_s=WAIT_S / 2)
            assert pickling.loads(call.wait()) == 5
        finally:
            go_on.set()


# ---- time limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waited", [False, True])
def test_a_call_without_an_answer_times_out_and_a_late_answer_does_no_harm(waited: bool) -> None:
    gate = Gate()
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, gate, inline=True)
        call = a.agent.request(b.info, FETCH, timeout_s=0.02, waited=waited)
        with pytest.raises(RpcTimeoutError, match=r"20 ms: RRefFetch to WorkerInfo\(id=1, name=b\)"):
            call.wait()
        gate.wait()
        gate.requests[0].reply(pickling.dumps("late"))
        b.agent.handle(RRefUserDelete, lambda request: request.reply(), inline=True)
        a.agent.request(b.info, DELETE).wait()  # so the late answer has been read
        assert isinstance(call.error, RpcTimeoutError)
        assert a.agent.counts()["client_active_calls"] == 0


def test_a_call_that_nobody_waits_for_times_out() -> None:
    done = threading.Event()
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, Gate(), inline=True)
        a.agent.set_rpc_timeout(0.02)
        a.agent.request(b.info, FETCH).add_done_callback(lambda call: done.set())
        assert done.wait(WAIT_S)


def test_a_call_may_have_no_time_limit() -> None:
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, echo, inline=True)
        call = a.agent.request(b.info, FETCH, timeout_s=0)
        call.wait()
        assert call.timeout_s == 0


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_a_lost_peer_ends_its_calls_and_only_them() -> None:
    gate = Gate()
    heard: list[tuple[WorkerInfo, str]] = []
    told = threading.Event()

    def listen(info: WorkerInfo, reason: str) -> None:
        heard.append((info, reason))
        told.set()

    with workers("a", "b", "c") as (a, b, c):
        for worker in (b, c):
            worker.agent.handle(RRefFetch, gate, inline=True)
        a.agent.on_peer_lost(listen)
        calls = [a.agent.request(to.info, FETCH) for to in (b, c, b)]
        gate.wait(3)
        a.endpoint.lose(b.endpoint.incarnation, "it fell silent")
        for call in (calls[0], calls[2]):
            with pytest.raises(PeerLostError, match=r"name=b\) is lost: it fell silent\. It is not known"):
                call.wait()
        assert not calls[1].done()
        assert told.wait(WAIT_S)
        assert heard == [(b.info, "it fell silent")]
        for request in gate.requests:
            request.reply()
        calls[1].wait()
        assert a.agent.resolve("b") == b.info, "in a static group it stays known"
        with pytest.raises(PeerLostError, match=r"name=b\) is lost"):
            a.agent.request(b.info, FETCH).wait()


def test_a_worker_lost_to_a_dynamic_group_is_forgotten() -> None:
    with workers("a", "b", dynamic=True) as (a, b):
        a.endpoint.lose(b.endpoint.incarnation, "it fell silent")
        with pytest.raises(UnknownWorkerError, match=r"destination name b; .* are a \(0\)"):
            a.agent.resolve("b")
        with pytest.raises(PeerLostError, match="not in the group any more"):
            a.agent.request(b.info, FETCH).wait()
        a.endpoint.lose(b.endpoint.incarnation, "again")
        assert a.disconnected == []


def test_a_worker_that_left_ends_its_calls_and_its_connection() -> None:
    gate = Gate()
    with workers("a", "b", dynamic=True) as (a, b):
        b.agent.handle(RRefFetch, gate, inline=True)
        call = a.agent.request(b.info, FETCH)
        gate.wait()
        a.group.on_left(b.endpoint.incarnation, False, "it left the group")
        with pytest.raises(PeerLostError, match="it left the group"):
            call.wait()
        assert a.disconnected == [b.endpoint.incarnation]


def test_the_loss_of_a_stranger_is_nobodys_business() -> None:
    with workers("a") as (a,):
        a.endpoint.lose(new_incarnation(), "who?")
        a.group.on_left(new_incarnation(), False, "who?")
        assert [info.name for info in a.agent.members.all()] == ["a"]


def test_answers_to_one_who_is_gone_are_dropped() -> None:
    gate = Gate()
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, gate, inline=True)
        call = a.agent.request(b.info, FETCH)
        gate.wait()
        b.endpoint.lose(a.endpoint.incarnation, "gone")
        gate.requests[0].reply(pickling.dumps("nobody reads this"))
        assert b.agent.quiesce(WAIT_S)
        assert not call.done()


def test_watching_a_worker_is_the_transports_business() -> None:
    with workers("a", "b") as (a, b):
        a.agent.watch(b.info)
        a.agent.watch(WorkerInfo("nobody", 9))
        assert a.endpoint.watched == [b.endpoint.incarnation]


# ---- notifications ---------------------------------------------------------------------------------------------------


class Done:
    """What `on_done` was told."""

    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []
        self.called = threading.Event()

    def __call__(self, error: BaseException | None) -> None:
        self.errors.append(error)
        self.called.set()


def test_a_notification_is_repeated_until_it_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "NOTIFY_TIMEOUT_S", 0.01)
    network = Network()
    fates = {RRefUserDelete: iter([True, True, True, False, False]), Reply: iter([True, False])}
    network.loses = lambda message: next(fates.get(type(message), iter(())), False)
    served: list[Message] = []
    done = Done()

    def serve(request: Request[Any]) -> None:
        served.append(request.message)
        request.reply()

    with workers("a", "b", network=network) as (a, b):
        b.agent.handle(RRefUserDelete, serve, inline=True)
        a.agent.notify(b.info, DELETE, done)
        assert done.called.wait(WAIT_S)
        assert a.agent.quiesce(WAIT_S)
    assert done.errors == [None]
    assert set(served) == {DELETE}
    assert len(served) >= 2, "the first acknowledgement was lost"


def test_a_notification_that_is_refused_is_not_repeated() -> None:
    done = Done()
    with workers("a", "b") as (a, b):
        a.agent.notify(b.info, DELETE, done)
        assert done.called.wait(WAIT_S)
    assert isinstance(done.errors[0], ProtocolError)
    assert len(done.errors) == 1


def test_a_notification_ends_with_its_peer_or_its_worker() -> None:
    gate, lost, closed, late = Gate(), Done(), Done(), Done()
    with workers("a", "b", "c") as (a, b, c):
        for worker in (b, c):
            worker.agent.handle(RRefUserDelete, gate, inline=True)
        a.agent.notify(b.info, DELETE, lost)
        a.agent.notify(c.info, DELETE, closed)
        gate.wait(2)
        a.endpoint.lose(b.endpoint.incarnation, "dead")
        assert lost.called.wait(WAIT_S)
        a.agent.close(WAIT_S)
        assert closed.called.wait(WAIT_S)
        a.agent.notify(c.info, DELETE, late)
        assert late.called.wait(WAIT_S)
    assert [type(done.errors[0]) for done in (lost, closed, late)] == [
        PeerLostError,
        AgentClosedError,
        AgentClosedError,
    ]


def test_only_idempotent_messages_are_notifications() -> None:
    with workers("a") as (a,):
        with pytest.raises(ProtocolError, match="RRefFetch is not idempotent"):
            a.agent.notify(a.info, FETCH)
        a.agent.handle(RRefForkRequest, lambda request: request.reply(), inline=True)
        a.agent.notify(a.info, RRefForkRequest(R, F))
        assert a.agent.quiesce(WAIT_S)


# ---- coming and going ------------------------------------------------------------------------------------------------


def test_requests_that_come_early_are_kept_back() -> None:
    gate = Gate()
    with workers("a", "b", open_them=False) as (a, b):
        a.agent.open()
        b.agent.handle(RRefFetch, gate, inline=True)
        calls = [a.agent.request(b.info, FETCH, pickling.dumps(number)) for number in range(3)]
        b.agent.handle(RRefUserDelete, gate, inline=True)
        a.agent.handle(RRefFetch, lambda request: request.reply(), inline=True)
        b.agent.request(a.info, FETCH, pickling.dumps(0)).wait()  # its answer comes after the requests
        assert not any(call.done() for call in calls)
        assert gate.requests == []
        b.agent.open()
        gate.wait(3)
        assert [pickling.loads(request.payload) for request in gate.requests] == [0, 1, 2]
        for request in gate.requests:
            request.reply()
        for call in calls:
            call.wait()


def test_requests_that_come_while_those_kept_back_are_served_are_served_after_them() -> None:
    """A worker opens with requests kept back; while it serves the first of them a newer one comes: the order holds."""
    served: list[int] = []
    has_begun, may_end = threading.Event(), threading.Event()

    def serve(request: Request[Any]) -> None:
        number = pickling.loads(request.payload)
        if not number:
            has_begun.set()
            assert may_end.wait(WAIT_S)
        served.append(number)
        request.reply()

    with workers("a", "b", open_them=False) as (a, b):
        a.agent.open()
        b.agent.handle(RRefFetch, serve, inline=True)
        calls = [a.agent.request(b.info, FETCH, pickling.dumps(number)) for number in range(2)]
        until(lambda: b.endpoint.num_read == 2, "both are kept back")
        opening = in_thread(b.agent.open)
        assert has_begun.wait(WAIT_S)
        calls.append(a.agent.request(b.info, FETCH, pickling.dumps(2)))
        until(lambda: b.endpoint.num_read == 3, "the newer one has come")
        may_end.set()
        opening.join()
        for call in calls:
            call.wait()
        assert served == [0, 1, 2]


def test_the_reading_thread_opens_no_sockets_to_watch_a_peer() -> None:
    """A handler on the reading thread has a peer watched: the control thread does that, other threads do it at once."""
    with workers("a", "b", "c") as (a, b, c):
        c.agent.watch(b.info)
        assert c.endpoint.watched == [b.endpoint.incarnation]

        def serve(request: Request[Any]) -> None:
            b.agent.watch(c.info)
            request.reply()

        b.agent.handle(RRefFetch, serve, inline=True)
        a.agent.request(b.info, FETCH).wait()
        until(lambda: b.endpoint.watched, "it is watched")
        assert b.endpoint.watched == [c.endpoint.incarnation]
        assert b.endpoint.watched_on == ["zrpc-control"]


def test_a_peer_that_cannot_be_watched_now_is_watched_later(caplog: pytest.LogCaptureFixture) -> None:
    """No socket can be made for one peer: the next time that one is to be watched both are, once each."""
    with workers("a", "b", "c") as (a, b, c):

        def serve(request: Request[Any]) -> None:
            b.agent.watch((a, c)[pickling.loads(request.payload)].info)
            request.reply()

        b.agent.handle(RRefFetch, serve, inline=True)
        b.endpoint.num_refused = 1
        for number in range(2):
            a.agent.request(b.info, FETCH, pickling.dumps(number)).wait()
        until(lambda: len(b.endpoint.watched) == 2, "both are watched")
        assert b.endpoint.watched == [a.endpoint.incarnation, c.endpoint.incarnation]
    assert "no more files" in caplog.text


def test_an_agent_that_is_not_open_may_call() -> None:
    with workers("a", "b", open_them=False) as (a, b):
        b.agent.handle(RRefFetch, echo, inline=True)
        b.agent.open()
        assert pickling.loads(a.agent.request(b.info, FETCH, pickling.dumps(1)).wait()) == 1


def test_a_newcomer_is_looked_for_when_its_request_comes() -> None:
    network = Network()
    with workers("a", dynamic=True, network=network) as (a,):
        newcomer = Worker(network, "b", 1)
        newcomer.join([a.member(), newcomer.member()], None)
        newcomer.agent.open()
        try:
            a.agent.handle(RRefFetch, echo, inline=False)
            a.group.newcomers = [newcomer.member()]
            assert pickling.loads(newcomer.agent.request(a.info, FETCH, pickling.dumps(3)).wait()) == 3
            assert a.agent.resolve("b") == newcomer.info
            assert [member.info.name for member in a.connected] == ["a", "b"]
        finally:
            newcomer.agent.close(WAIT_S)


@pytest.mark.parametrize("is_told_first", [False, True])
def test_a_loss_ends_the_calls_to_that_life_and_not_those_to_the_next(is_told_first: bool) -> None:
    """The next life has name and rank of the one before, and joins before or after the loss is told."""
    network = Network()
    with workers("a", "b", dynamic=True, network=network) as (a, b):
        successor, gates = Worker(network, "b", 1), (Gate(), Gate())
        for worker, gate in zip((b, successor), gates, strict=True):
            worker.agent.handle(RRefFetch, gate, inline=True)
        successor.join([a.member(), successor.member()], None)
        successor.agent.open()
        try:
            to_first = a.agent.request(b.info, FETCH)
            gates[0].wait()
            if is_told_first:
                a.endpoint.lose(b.endpoint.incarnation, "it died")
            a.group.on_joined(successor.member())
            assert a.agent.resolve("b").incarnation == successor.endpoint.incarnation
            to_second = a.agent.request(a.agent.resolve("b"), FETCH)
            gates[1].wait()
            a.endpoint.lose(b.endpoint.incarnation, "it died")
            with pytest.raises(PeerLostError, match="it died" if is_told_first else "came in its place"):
                to_first.wait()
            a.endpoint.lose(b.endpoint.incarnation, "told again")
            gates[1].requests[0].reply()
            to_second.wait()
            with pytest.raises(StaleWorkerError):
                a.agent.resolve(b.info)
        finally:
            successor.agent.close(WAIT_S)


def test_what_comes_late_of_a_worker_that_is_gone_is_dropped_without_a_look() -> None:
    """It is no newcomer."""
    with workers("a", "b", dynamic=True) as (a, b):
        a.agent.handle(RRefUserDelete, lambda request: request.reply(), inline=True)
        b.agent.request(a.info, DELETE).wait()
        a.endpoint.lose(b.endpoint.incarnation, "it died")
        before = a.group.refreshes
        late = b.agent.request(a.info, DELETE, timeout_s=0.2)
        with pytest.raises(RpcTimeoutError):
            late.wait()
        assert a.group.refreshes == before


def test_a_newcomer_is_looked_for_when_its_name_is_not_known() -> None:
    with workers("a", dynamic=True) as (a,):
        newcomer = Member(WorkerInfo("b", 1), new_incarnation())
        a.group.newcomers = [newcomer]
        assert a.agent.resolve("b") == newcomer.info
        assert a.group.refreshes == 1
        assert a.agent.resolve(1) == newcomer.info
        assert a.group.refreshes == 1
        with pytest.raises(UnknownWorkerError):
            a.agent.resolve("c")
        assert a.group.refreshes == 2


def test_a_request_of_a_stranger_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with workers("a", dynamic=True) as (a,):
        gate = Gate()
        a.agent.handle(RRefFetch, gate, inline=True)
        a.endpoint.deliver(new_incarnation(), list(encode(Envelope(FETCH, 1))))
        a.agent.request(a.info, FETCH)
        gate.wait()
        gate.requests[0].reply()
        a.agent.close(WAIT_S)
        assert [request.source for request in gate.requests] == [a.info]
    assert "RRefFetch of an unknown worker was dropped" in caplog.text


def test_workers_are_named_by_name_rank_or_info() -> None:
    with workers("a", "b") as (a, b):
        for name in ("b", 1, b.info, WorkerInfo("b", 1)):
            assert a.agent.resolve(name) == b.info
        for unknown in ("c", 2, -1, WorkerInfo("x", 7)):
            with pytest.raises(UnknownWorkerError, match=r"workers of this group are a \(0\), b \(1\)"):
                a.agent.resolve(unknown)
        for odd in (None, 1.0, True, b"b"):
            with pytest.raises(ValueError, match="name, its rank or its WorkerInfo"):
                a.agent.resolve(odd)  # type: ignore[arg-type]
        assert a.group.refreshes == 0, "nobody comes to a static group"


def test_closing_ends_the_calls_under_way() -> None:
    gate = Gate()
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, gate, inline=True)
        calls = [a.agent.request(b.info, FETCH) for _ in range(3)]
        outcomes: list[str] = []

        def wait() -> None:
            try:
                calls[0].wait()
            except AgentClosedError:
                outcomes.append("closed")

        thread = in_thread(wait)
        gate.wait(3)
        for _ in range(2):
            a.agent.close(WAIT_S)
        thread.join()
        for call in calls:
            with pytest.raises(AgentClosedError, match="shut down while the call was under way"):
                call.wait()
        assert outcomes == ["closed"]
        with pytest.raises(AgentClosedError):
            a.agent.request(b.info, FETCH).wait()
        assert a.group.left


def test_closing_lets_requests_being_served_be_answered() -> None:
    started, release = threading.Event(), threading.Event()

    def serve(request: Request[Any]) -> None:
        started.set()
        assert release.wait(WAIT_S)
        request.reply(pickling.dumps("answered"))

    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, serve, inline=False)
        call = a.agent.request(b.info, FETCH)
        assert started.wait(WAIT_S)
        closer = in_thread(lambda: b.agent.close(WAIT_S))
        release.set()
        closer.join()
        assert pickling.loads(call.wait()) == "answered"


def test_a_handler_thread_that_waits_for_a_call_does_not_hold_up_the_close_for_ever() -> None:
    gate = Gate()
    errors: list[type[BaseException]] = []

    def wait_for_c(request: Request[Any]) -> None:
        try:
            b.agent.request(c.info, FETCH).wait()
        except AgentClosedError as error:
            errors.append(type(error))

    with workers("a", "b", "c") as (a, b, c):
        c.agent.handle(RRefFetch, gate, inline=True)
        b.agent.handle(RRefUserDelete, wait_for_c, inline=False)
        a.agent.request(b.info, DELETE)
        gate.wait()
        threads = list(b.agent._server.pool._threads)
        b.agent.close(0.05)
        for thread in threads:
            thread.join(WAIT_S)
        assert errors == [AgentClosedError]


def test_quiescence_is_waited_for() -> None:
    gate = Gate()
    with workers("a", "b") as (a, b):
        assert a.agent.quiesce(0.01)
        b.agent.handle(RRefFetch, gate, inline=True)
        call = a.agent.request(b.info, FETCH)
        gate.wait()
        assert not a.agent.quiesce(0.01), "a call is under way"
        assert not b.agent.quiesce(0.01), "a request is being served"
        assert a.agent.counts()["client_active_calls"] == 1
        assert b.agent.counts()["server_active_calls"] == 1
        waiter = in_thread(lambda: b.agent.quiesce(0))
        gate.requests[0].reply()
        call.wait()
        waiter.join()
        assert a.agent.quiesce(WAIT_S)
        assert b.agent.quiesce(WAIT_S)
        counts = b.agent.counts()
        del counts["protocol_errors"]  # of this process, of all tests before
        assert counts == {
            "client_active_calls": 0,
            "server_active_calls": 0,
            "server_active_async_calls": 0,
            "server_queued_calls": 0,
            "server_refused_calls": 0,
            "server_over_limit_calls": 0,
            "server_cancelled_calls": 0,
            "server_expired_calls": 0,
            "thread_pool_size": 0,
            "num_idle_threads": 0,
        }


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_that_call_back_do_not_use_up_the_handler_threads(threads: int) -> None:
    depth = 20
    with workers("a", "b", threads=threads) as (a, b):
        others = {"a": (a, b), "b": (b, a)}

        def serve(request: Request[Any]) -> None:
            level, name = pickling.loads(request.payload)
            me, other = others[name]
            if level:
                call = me.agent.request(other.info, FETCH, pickling.dumps((level - 1, other.info.name)))
                level = pickling.loads(call.wait()) + 1
            request.reply(pickling.dumps(level))

        for worker in (a, b):
            worker.agent.handle(RRefFetch, serve, inline=False)
        calls = [a.agent.request(b.info, FETCH, pickling.dumps((depth, "b"))) for _ in range(5)]
        assert [pickling.loads(call.wait()) for call in calls] == [depth] * 5


# ---- hooks -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A hook that counts, doubles tensors on their way, and notes what it is asked."""

    key = "recorder"
    is_idle = False

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.fails_on: str | None = None

    def send(self, to: WorkerInfo, message: Message, payload: Payload, request_meta: object | None) -> object | None:
        kind = "request" if request_meta is None else "answer"
        if self.fails_on == kind:
            raise RuntimeError(f"the hook does not like this {kind}")
        self.log.append((kind, to.name, type(message).__name__, request_meta))
        payload.tensors = [tensor * 2 for tensor in payload.tensors]
        return {"n": len(self.log)}

    @contextmanager
    def _serving(self) -> Iterator[None]:
        self.log.append(("enter",))
        yield
        self.log.append(("exit",))

    def receive(self, source: WorkerInfo, meta: object, payload: Payload, is_reply: bool) -> Any:
        self.log.append(("reply" if is_reply else "received", source.name, meta))
        payload.tensors = [tensor + 1 for tensor in payload.tensors]
        return self._serving()


def serve_in_context(request: Request[Any]) -> None:
    with request.context():
        value = pickling.loads(request.payload)
        request.reply(pickling.dumps(value))


def hooked(a: Worker, b: Worker) -> tuple[Recorder, Recorder]:
    recorders = Recorder(), Recorder()
    for worker, recorder in zip((a, b), recorders, strict=True):
        worker.agent.add_hook(recorder)
    b.agent.handle(RRefFetch, serve_in_context, inline=False)
    return recorders


def test_hooks_see_hooked_calls_both_ways() -> None:
    with workers("a", "b") as (a, b):
        caller, callee = hooked(a, b)
        call = a.agent.request(b.info, FETCH, pickling.dumps(torch.zeros(1)), hooked=True)
        assert pickling.loads(call.wait()).item() == 3.0  # ((0 * 2 + 1) * 2) + 1
        assert caller.log == [("request", "b", "RRefFetch", None), ("reply", "b", {"n": 3})]
        assert b.agent.quiesce(WAIT_S)
        b.agent.close(WAIT_S)
        assert callee.log == [
            ("received", "a", {"n": 1}),
            ("enter",),
            ("answer", "a", "Reply", {"n": 1}),
            ("exit",),
        ]


def test_hooks_see_nothing_of_other_calls() -> None:
    with workers("a", "b") as (a, b):
        caller, callee = hooked(a, b)
        tensor = torch.ones(1)
        assert pickling.loads(a.agent.request(b.info, FETCH, pickling.dumps(tensor)).wait()) == tensor
        assert caller.log == callee.log == []


def test_a_hook_that_only_one_side_has_is_passed_over() -> None:
    with workers("a", "b") as (a, b):
        caller, _ = hooked(a, b)
        b.agent.hooks.clear()
        assert pickling.loads(a.agent.request(b.info, FETCH, pickling.dumps(torch.ones(1)), hooked=True).wait()) == 2
        assert [entry[0] for entry in caller.log] == ["request"]


def test_failures_of_hooked_calls_pass_the_hooks_too() -> None:
    def fail(request: Request[Any]) -> None:
        with request.context():
            raise ValueError("served in vain")

    with workers("a", "b") as (a, b):
        caller, callee = hooked(a, b)
        b.agent.handle(RRefFetch, fail, inline=False)
        with pytest.raises(ValueError, match="served in vain"):
            a.agent.request(b.info, FETCH, hooked=True).wait()
        assert caller.log[-1][0] == "reply"
        assert ("answer", "a", "Failure", {"n": 1}) in callee.log


def test_a_hook_that_fails_on_the_request_raises_at_once() -> None:
    with workers("a", "b") as (a, b):
        caller, _ = hooked(a, b)
        caller.fails_on = "request"
        with pytest.raises(RuntimeError, match="does not like this request"):
            a.agent.request(b.info, FETCH, hooked=True)
        assert a.agent.counts()["client_active_calls"] == 0


@pytest.mark.parametrize("serves", [True, False])
def test_a_hook_that_fails_on_the_answer_is_told_to_the_caller(serves: bool) -> None:
    def fail(request: Request[Any]) -> None:
        raise ValueError("served in vain")

    with workers("a", "b") as (a, b):
        _, callee = hooked(a, b)
        callee.fails_on = "answer"
        if not serves:
            b.agent.handle(RRefFetch, fail, inline=False)
        words = "does not like this answer" if serves else "served in vain"
        with pytest.raises(RuntimeError if serves else ValueError, match=words):
            a.agent.request(b.info, FETCH, hooked=True).wait()
        assert b.agent.quiesce(WAIT_S), "the request counts as served"


# ---- user functions --------------------------------------------------------------------------------------------------


def add(a: int, b: int = 0) -> int:
    return a + b


def where() -> str:
    return threading.current_thread().name


def leave() -> None:
    raise SystemExit(3)


def unsendable() -> object:
    return threading.Lock()


def later(value: int) -> torch.futures.Future[int]:
    future: torch.futures.Future[int] = torch.futures.Future()
    threading.Thread(target=future.set_result, args=(value,)).start()
    return future


def later_failing() -> torch.futures.Future[int]:
    future: torch.futures.Future[int] = torch.futures.Future()
    failure: Any = ValueError("after a while")
    threading.Thread(target=future.set_exception, args=(failure,)).start()
    return future


def later_unsendable() -> torch.futures.Future[object]:
    future: torch.futures.Future[object] = torch.futures.Future()
    future.set_result(threading.Lock())
    return future


def later_by_then() -> torch.futures.Future[int]:
    return later(20).then(lambda future: future.value() + 1)


def call_python(a: Worker, b: Worker, func: Callable[..., Any], *args: Any, asynchronous: bool = False) -> Any:
    call = a.agent.request(b.info, PythonCall(asynchronous), pickling.dumps((func, args, {})), hooked=True)
    return pickling.loads(call.wait())


def test_python_functions_are_run_on_handler_threads(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "zrpc")
    with workers("a", "b") as (a, b):
        assert call_python(a, b, add, 2, 3) == 5
        assert call_python(a, b, where).startswith("zrpc-handler-")
        with pytest.raises(TypeError, match="missing 1 required"):
            call_python(a, b, add)
        with pytest.raises(RemoteError, match="SystemExit: 3"):
            call_python(a, b, leave)
        with pytest.raises(SerializationError, match="cannot be pickled"):
            call_python(a, b, unsendable)
        assert call_python(a, b, add, 1) == 1, "and the worker is still there"


def test_functions_that_return_a_future_are_answered_when_it_is_done(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "zrpc")
    with workers("a", "b", threads=1) as (a, b):
        assert call_python(a, b, later, 7, asynchronous=True) == 7
        assert call_python(a, b, later_by_then, asynchronous=True) == 21
        with pytest.raises(ValueError, match="after a while"):
            call_python(a, b, later_failing, asynchronous=True)
        with pytest.raises(SerializationError, match="cannot be pickled"):
            call_python(a, b, later_unsendable, asynchronous=True)
        with pytest.raises(RuntimeError, match=r"must return a torch\.futures\.Future object, but .* a int"):
            call_python(a, b, add, 1, asynchronous=True)


def test_device_maps_hold_both_ways() -> None:
    worker = Worker(Network(), "a", 0)
    try:
        worker.join([worker.member(device_count=8, device_maps={"b": {"cuda:0": "cuda:1"}})], None)
        join = worker.group.on_joined
        join(Member(WorkerInfo("b", 1), new_incarnation(), {"device_maps": {"a": {"cuda:5": "cuda:6"}}}))
        join(Member(WorkerInfo("c", 2), new_incarnation(), {"device_maps": {"a": {"cuda:3": "cuda:4"}}}))
        others = [worker.agent.resolve("b"), worker.agent.resolve("c"), WorkerInfo("d", 3)]
        routes = [worker.agent.routes(other) for other in others]
        assert [route.requests.devices for route in routes] == [{"cuda:0": "cuda:1"}, {"cuda:4": "cuda:3"}, {}]
        assert [route.replies.devices for route in routes] == [{"cuda:6": "cuda:5"}, {"cuda:4": "cuda:3"}, {}]
        worker.agent.control.flush(WAIT_S)
        assert worker.agent.staging.devices == ("cuda:0", "cuda:4", "cuda:6"), "as maps of newcomers name them"
        join(Member(WorkerInfo("c", 2), new_incarnation(), {}))
        assert worker.agent.routes(worker.agent.resolve("c")).requests.devices == {}, "a new life has maps of its own"
    finally:
        worker.agent.close(0.0)


@pytest.mark.parametrize("size", [None, 1])
def test_device_maps_that_do_not_fit_are_refused(size: int | None) -> None:
    worker = Worker(Network(), "a", 0)
    try:
        with pytest.raises(
            ConfigError,
            match=r"Node a has (source devices with invalid indices|invalid target node names) in its device map",
        ):
            worker.join([worker.member(device_count=1, device_maps={"b": {"cuda:1": "cuda:0"}})], size)
        assert worker.group.lingered == bool(size), "the others of a static group are to find out themselves"
    finally:
        worker.agent.close(0.0)


def test_options_are_taken_over() -> None:
    network = Network()
    worker = Worker(network, "a", 0, RpcBackendOptions(rpc_timeout=7, num_worker_threads=3))
    assert worker.agent.rpc_timeout_s == 7
    worker.agent.close(0.0)


# ---- interrupts ------------------------------------------------------------------------------------------------------


def test_a_call_that_is_interrupted_while_it_is_sent_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with workers("a", "b") as (a, b):
        with monkeypatch.context() as patched:
            patched.setattr(a.agent._peers, "send", interrupt)
            for waited in (True, False):
                with pytest.raises(KeyboardInterrupt):
                    a.agent.request(b.info, FETCH, timeout_s=0, waited=waited)
        assert a.agent.quiesce(WAIT_S)


def test_a_call_whose_only_thread_is_interrupted_has_ended_and_another_is_waited_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    gate = Gate()
    with workers("a", "b") as (a, b):
        b.agent.handle(RRefFetch, gate, inline=True)
        waited, other = (a.agent.request(b.info, FETCH, timeout_s=0, waited=waited) for waited in (True, False))
        for call in (waited, other):
            with monkeypatch.context() as patched:
                patched.setattr(a.endpoint.inbox, "wait_for", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    call.wait()
        assert waited.done()
        assert not other.done()
        assert a.agent.counts()["client_active_calls"] == 1
        gate.wait(2)
        for request in gate.requests:
            request.reply(pickling.dumps("late"))
        assert pickling.loads(other.wait()) == "late"


def test_large_answers_leave_before_the_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    with workers("a") as (a,):
        monkeypatch.setattr(a.agent._carrier, "flush", lambda: steps.append("flush"))
        monkeypatch.setattr(a.group, "leave", lambda timeout_s, at_exit: steps.append("leave"))
        a.agent.close(1.0)
    assert steps[:2] == ["flush", "leave"]


def test_a_newcomer_whose_device_maps_cannot_be_is_no_end_of_the_reader(caplog: pytest.LogCaptureFixture) -> None:
    with workers("a", "b", dynamic=True) as (a, b):
        for rank, maps in enumerate(({"a": 5}, 5), 7):
            a.group.on_joined(Member(WorkerInfo(f"n{rank}", rank), new_incarnation(), {"device_maps": maps}))
            a.agent.control.flush(WAIT_S)
            assert f"what the device maps of WorkerInfo(id={rank}" in caplog.text
        b.agent.handle(RRefFetch, lambda request: request.reply(pickling.dumps(5)), inline=True)
        assert pickling.loads(a.agent.request(b.info, FETCH).wait()) == 5
