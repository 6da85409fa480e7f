"""The gate: threads wait at it for room, for as long as they may."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.waiting import until
from zrpc.agent.gate import Gate, Gates, Standing, payload_nbytes
from zrpc.agent.pool import HandlerPool
from zrpc.errors import AgentClosedError, OverloadedError, PeerLostError
from zrpc.ids import WorkerInfo
from zrpc.wire.envelope import Envelope
from zrpc.wire.messages import PythonCall

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 20.0
KB = 1000
PEER = WorkerInfo("callee", 1)


def envelope(nbytes: int) -> Envelope:
    return Envelope(PythonCall(), data=bytes(nbytes))


def free() -> Standing:
    return Standing.FREE


def serving() -> Standing:
    return Standing.SERVING


def needed() -> Standing:
    return Standing.NEEDED


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def until_waiting(gate: Gate, count: int) -> None:
    until(lambda: gate._window.num_waiting >= count, f"{count} calls wait at the gate")


def test_the_size_of_an_envelope_is_that_of_its_payload() -> None:
    buffers = [b"ab", memoryview(bytearray(80)).cast("d"), bytearray(3)]
    assert payload_nbytes(Envelope(PythonCall(), data=b"12345", buffers=buffers)) == 5 + 2 + 80 + 3
    assert payload_nbytes(Envelope(PythonCall())) == 0


def test_a_call_waits_until_another_is_answered(threads: ThreadPoolExecutor) -> None:
    gate = Gate(10 * KB, 0)
    assert gate.enter(1, envelope(8 * KB), PEER, 0.0, free) == 0.0
    second = threads.submit(gate.enter, 2, envelope(8 * KB), PEER, WAIT_S, free)
    until_waiting(gate, 1)
    assert gate.enter(3, envelope(100), PEER, WAIT_S, free) == WAIT_S, "a small one need not wait"
    assert gate.leave(1)
    assert 0 < second.result(WAIT_S) < WAIT_S, "what it waited is taken from its time"
    assert gate.nbytes == 8 * KB
    assert not gate.leave(1), "it is answered already"
    assert gate.leave(2)
    assert gate.leave(3)
    assert (gate.nbytes, gate.num_calls) == (0, 0)


def test_small_calls_wait_for_their_number(threads: ThreadPoolExecutor) -> None:
    gate = Gate(0, 2)
    for call in (1, 2):
        gate.enter(call, envelope(10), PEER, 0.0, free)
    third = threads.submit(gate.enter, 3, envelope(10), PEER, 0.0, free)
    until_waiting(gate, 1)
    gate.leave(2)
    assert third.result(WAIT_S) == 0.0
    assert gate.num_calls == 2


def test_who_waits_too_long_is_refused_and_says_what_to_change() -> None:
    gate = Gate(10 * KB, 77)
    gate.enter(1, envelope(10 * KB), PEER, 0.0, free)
    with pytest.raises(
        OverloadedError, match=r"5000 bytes to .*callee.* 0.02 s .* 1 calls with 10000 .*_nbytes \(10000\)"
    ):
        gate.enter(2, envelope(5 * KB), PEER, 0.02, free)
    gate.leave(1)
    assert gate.enter(3, envelope(5 * KB), PEER, 0.02, free) == 0.02, "who was refused left nothing behind"
    assert gate.num_calls == 1


def test_a_thread_that_is_needed_passes_and_counts() -> None:
    gate = Gate(10 * KB, 1)
    gate.enter(1, envelope(10 * KB), PEER, 0.0, free)
    for call in (2, 3):
        assert gate.enter(call, envelope(10 * KB), PEER, WAIT_S, needed) == WAIT_S
    assert (gate.nbytes, gate.num_calls) == (30 * KB, 3)


def test_a_thread_that_serves_passes_once_at_a_time() -> None:
    """Else requests that call each other could wait for each other's room in a circle."""
    here, there = Gate(10 * KB, 0), Gate(10 * KB, 0)
    for gate in (here, there):
        gate.enter(1, envelope(10 * KB), PEER, 0.0, free)
    assert here.enter(2, envelope(5 * KB), PEER, 0.02, serving) == 0.02
    for gate in (here, there):  # its first call is on the way
        with pytest.raises(OverloadedError):
            gate.enter(3, envelope(5 * KB), PEER, 0.02, serving)
    here.leave(2)
    assert there.enter(4, envelope(5 * KB), PEER, 0.02, serving) == 0.02
    assert (here.nbytes, there.nbytes) == (10 * KB, 15 * KB)


def test_a_lost_peer_wakes_who_waits_and_says_so(threads: ThreadPoolExecutor) -> None:
    gates = Gates(10 * KB, 0)
    gates[1].enter(1, envelope(10 * KB), PEER, 0.0, free)
    waiting = [threads.submit(gates[1].enter, call, envelope(9 * KB), PEER, 0.0, free) for call in (2, 3)]
    until_waiting(gates[1], 2)
    old = gates[1]
    gates.drop(1, PeerLostError("callee is lost: it died"))
    for future in waiting:
        with pytest.raises(PeerLostError, match=r"it died\. The call was not sent"):
            future.result(WAIT_S)
    assert old.enter(4, envelope(90 * KB), PEER, 0.0, free) == 0.0, "too late: the transport will say so"
    assert (gates[1].nbytes, gates[1].num_calls) == (0, 0), "the next worker of that rank begins anew"


def test_closing_wakes_everybody(threads: ThreadPoolExecutor) -> None:
    gates = Gates(10 * KB, 0)
    waiting = []
    for rank in (1, 2):
        gates[rank].enter(rank, envelope(10 * KB), PEER, 0.0, free)
        waiting.append(threads.submit(gates[rank].enter, 10 + rank, envelope(9 * KB), PEER, 0.0, free))
        until_waiting(gates[rank], 1)
    gates.close(AgentClosedError("this worker shut down"))
    for future in waiting:
        with pytest.raises(AgentClosedError):
            future.result(WAIT_S)


def test_an_answer_that_nobody_waits_for_makes_room() -> None:
    gates = Gates(10 * KB, 0)
    gates[1].enter(1, envelope(9 * KB), PEER, 0.0, free)
    gates[2].enter(2, envelope(9 * KB), PEER, 0.0, free)
    gates.leave(2)
    gates.leave(99)
    assert (gates[1].nbytes, gates[2].nbytes) == (9 * KB, 0)


def test_answers_are_refused_beyond_a_window_that_is_not_filled_by_requests() -> None:
    gate = Gate(10 * KB, 0)
    here = WorkerInfo("answerer", 0)
    gate.check_answer(10 * KB, here, PEER)
    words = r"dropped: 10001 bytes wait at .*answerer.* for .*callee.*_nbytes \(10000\)"
    with pytest.raises(OverloadedError, match=words):
        gate.check_answer(10 * KB + 1, here, PEER)
    gate.enter(1, envelope(50 * KB), PEER, 0.0, free)  # what waits may be this request
    gate.check_answer(60 * KB, here, PEER)
    Gate(0, 0).check_answer(10**15, here, PEER)


def test_a_waiting_handler_thread_gives_its_place_to_another() -> None:
    """Else calls that wait for room in each other's windows would wait for ever."""
    gate = Gate(10 * KB, 0)
    gate.enter(1, envelope(9 * KB), PEER, 0.0, free)
    pool = HandlerPool(1, "test-handler")
    entered = threading.Event()

    def nested() -> None:
        gate.enter(2, envelope(9 * KB), PEER, WAIT_S, free)
        entered.set()

    pool.submit(nested)
    until_waiting(gate, 1)
    pool.submit(lambda: gate.leave(1) and None)  # type: ignore[func-returns-value]
    assert entered.wait(WAIT_S)
    pool.close(WAIT_S)


def test_an_interrupted_wait_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(10 * KB, 0)
    gate.enter(1, envelope(9 * KB), PEER, 0.0, free)

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    monkeypatch.setattr("zrpc.agent.gate.threading.Event", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        gate.enter(2, envelope(9 * KB), PEER, 0.0, free)
    gate.leave(1)
    assert (gate.nbytes, gate.num_calls, gate._window.num_waiting) == (0, 0, 0)


def test_many_threads_lose_no_place_and_no_turn(threads: ThreadPoolExecutor) -> None:
    """Callers and answerers race for few places: whoever misses a turn hangs, whoever miscounts leaves a rest."""
    gate = Gate(20 * KB, 3)

    def call(first: int) -> None:
        for number in range(300):
            call_id = first + number
            gate.enter(call_id, envelope((7 * KB, 10, 19 * KB)[number % 3]), PEER, WAIT_S, free)
            assert gate.leave(call_id)

    for future in [threads.submit(call, 1000 * caller) for caller in range(8)]:
        future.result(60)
    assert (gate.nbytes, gate.num_calls, gate._window.num_waiting) == (0, 0, 0)


def test_each_life_of_a_peer_has_a_gate_of_its_own_and_none_is_kept_of_those_that_are_over() -> None:
    """Not of hundreds of departures either, though answers to them are checked and calls to them end late."""
    here = {b"now"}
    gates = Gates(10 * KB, 0, here.__contains__)
    gates[b"now"].enter(1, envelope(8 * KB), PEER, 0.0, free)
    for number in range(300):
        life = number.to_bytes(8, "big")
        here.add(life)
        gates[life].enter(1000 + number, envelope(8 * KB), PEER, 0.0, free)
        here.discard(life)
        gates.drop(life, PeerLostError("gone"))
        gates[life].check_answer(1, PEER, PEER)
        gates[life].enter(2000 + number, envelope(8 * KB), PEER, 0.0, free)
        gates.leave(1000 + number)
    assert list(gates) == [b"now"]
    assert (gates[b"now"].num_calls, gates[b"now"].nbytes) == (1, 8 * KB)
