"""Sessions: what a thread's profile gathers, without any call."""

from __future__ import annotations

import threading

import torch
from torch.autograd import profiler_legacy

from zrpc.profiling import is_profiling, legacy, process
from zrpc.profiling.events import Event
from zrpc.profiling.legacy import Settings
from zrpc.profiling.session import Session, current, profiling_into, stop


def test_what_the_thread_does_is_recorded() -> None:
    session = Session(Settings(record_shapes=True))
    with profiling_into(session):
        assert is_profiling()
        assert current() is session
        torch.ones(2, 3).add(1)
    assert not is_profiling()
    assert current() is None
    added = next(event for event in session.events(4) if event.name == "aten::add")
    assert added.node_id == 4
    assert [2, 3] in added.shapes
    assert added.end_us >= added.start_us > 1e15  # microseconds since the epoch


def test_memory_is_recorded_only_if_asked_for() -> None:
    used = []
    for wanted in (True, False):
        session = Session(Settings(profile_memory=wanted))
        with profiling_into(session):
            torch.ones(1000)
        used.append(any(event.cpu_memory for event in session.operations))
    assert used == [True, False]


def test_stopping_early_ends_it_once() -> None:
    session = Session(Settings())
    with profiling_into(session):
        torch.ones(2)
        stop(session)
        torch.zeros(2)
    names = {event.name for event in session.operations}
    assert "aten::ones" in names
    assert "aten::zeros" not in names


def test_sessions_on_one_thread_share_the_profiler() -> None:
    outer, inner = Session(Settings()), Session(Settings())
    with profiling_into(outer), profiling_into(inner):
        torch.ones(2)
    assert outer.operations
    assert [event.name for event in inner.operations] == [event.name for event in outer.operations]


def test_a_call_is_there_when_it_is_done() -> None:
    session = Session(Settings())
    done, open_one = session.record("done", 1, is_async=False), session.record("open", 1, is_async=True)
    done.add_remote([Event("aten::mul", 1.0, 2.0, node_id=2)])
    names = [event.name for event in session.events(1)]
    assert names == ["done", "done#remote_op: aten::mul"]
    open_one.finish()
    assert [event.name for event in session.events(1)][-1] == "open"


def test_a_thread_that_somebody_else_profiles_is_left_alone() -> None:
    session = Session(Settings())
    with torch.profiler.profile(), profiling_into(session):
        torch.ones(2)
    assert not session.operations


def test_other_threads_are_not_recorded() -> None:
    session = Session(Settings())
    with profiling_into(session):
        thread = threading.Thread(target=lambda: torch.zeros(2))
        thread.start()
        thread.join()
    assert "aten::zeros" not in {event.name for event in session.operations}


def test_settings_are_those_of_the_users_profile() -> None:
    profile = profiler_legacy.profile(record_shapes=True, with_stack=True)
    assert Settings.of(profile) == Settings(record_shapes=True, with_stack=True)


def test_records_of_a_profile_tell_when_it_began() -> None:
    legacy.start(Settings())
    torch.ones(1)
    events = legacy.stop()
    assert all(event.start_us > 1e15 for event in events)


def test_a_process_profile_has_a_list_for_every_request() -> None:
    from zrpc.agent import execution

    outer = process.start(Settings())
    execution._run(torch.add, (torch.ones(1), 1), {})
    inner = process.start(Settings())
    execution._run(torch.sub, (torch.ones(1), 1), {})
    only_inner, both = process.stop(inner), process.stop(outer)
    execution._run(torch.mul, (torch.ones(1), 1), {})
    assert [{"aten::sub"} <= {event.name for event in events} for events in only_inner] == [True]
    assert [events[0].name for events in both] == ["aten::add", "aten::sub"]
