"""The agent of a process: one at most, none in a forked child."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.unit.agent.network import workers
from zrpc.agent import current
from zrpc.errors import AlreadyInitializedError, NotInitializedError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _nobody_here() -> Iterator[None]:
    yield
    current.set_agent(None)


def test_without_an_agent_calls_are_refused() -> None:
    assert not current.is_agent_set()
    with pytest.raises(NotInitializedError, match=r"RPC has not been initialized\. Call init_rpc first\."):
        current.current_agent()


def test_a_process_has_one_agent_at_a_time() -> None:
    with workers("a", "b") as (a, b):
        current.set_agent(a.agent)
        assert current.is_agent_set()
        assert current.current_agent() is a.agent
        with pytest.raises(AlreadyInitializedError):
            current.set_agent(b.agent)
        assert current.current_agent() is a.agent
        current.set_agent(None)
        current.set_agent(b.agent)
        assert current.current_agent() is b.agent


def test_a_forked_child_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with workers("a") as (a,):
        current.set_agent(a.agent)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        assert not current.is_agent_set()
        with pytest.raises(NotInitializedError):
            current.current_agent()
        current.set_agent(a.agent)
        assert current.current_agent() is a.agent
