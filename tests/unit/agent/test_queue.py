"""Which calls may wait for a thread, without threads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from zrpc.agent.queue import Queue
from zrpc.ids import WorkerInfo

ME = WorkerInfo("callee", 1)


def request(number: int, *, of_users: bool = True) -> Any:
    return SimpleNamespace(key=(b"caller", number), is_of_users=of_users)


def test_calls_of_users_over_the_limit_are_refused_with_the_worker_and_their_number() -> None:
    queue = Queue(2, refuses=True)
    assert [queue.enter(request(number), ME) for number in range(2)] == [None, None]
    refusal = queue.enter(request(2), ME)
    assert refusal is not None
    for words in ("callee", "certainly did not run", "2 calls wait", "max_queued_calls (2)"):
        assert words in str(refusal)
    assert queue.enter(request(3, of_users=False), ME) is None, "what zrpc itself calls is never refused"
    assert (len(queue), queue.num_refused, queue.num_over_limit) == (3, 1, 1)


def test_where_none_is_refused_those_over_the_limit_are_counted() -> None:
    queue = Queue(1, refuses=False)
    assert [queue.enter(request(number), ME) for number in range(5)] == [None] * 5
    assert (len(queue), queue.num_refused, queue.num_over_limit) == (5, 0, 4)


def test_without_a_limit_any_number_waits() -> None:
    queue = Queue(0, refuses=True)
    assert [queue.enter(request(number), ME) for number in range(100)] == [None] * 100
    assert queue.num_over_limit == 0


def test_a_request_leaves_once_for_its_thread_or_for_who_cancels_it() -> None:
    queue = Queue(1, refuses=True)
    first = request(0)
    queue.enter(first, ME)
    assert [queue.leave(first), queue.leave(first), len(queue)] == [True, False, 0]
    assert queue.enter(request(1), ME) is None, "there is room again"
