"""Gatherings among workers that leave, die and come again, on agents that call each other's functions at once."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from zrpc import gather
from zrpc.errors import PeerLostError
from zrpc.gather import Gatherings
from zrpc.ids import WorkerInfo
from zrpc.membership.group import Member
from zrpc.membership.registry import Registry
from zrpc.wire import pickling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 20.0
_here = threading.local()


class World:
    """Every worker, in each of its lives."""

    def __init__(self) -> None:
        self.agents: dict[bytes, FakeAgent] = {}

    def join(self, name: str) -> FakeAgent:
        """A new life of `name`; those who are there learn of it, and it of them."""
        agent = FakeAgent(self, name, len(self.agents).to_bytes(8, "big"))
        for other in self.agents.values():
            if other.is_alive:
                other.members.add(agent.member)
                agent.members.add(other.member)
        self.agents[agent.info.incarnation] = agent
        return agent

    def end(self, agent: FakeAgent) -> Callable[[], None]:
        """`agent` is gone; what is called then tells the others' gatherings, late."""
        agent.is_alive = False
        others = [other for other in self.agents.values() if other.is_alive]
        for other in others:
            other.members.end(agent.info.incarnation, "it died", keep=False)

        def tell() -> None:
            for other in others:
                other.tell_lost(agent.info)

        return tell


class FakeAgent:
    """What gatherings need of an agent."""

    is_static_group = False

    def __init__(self, world: World, name: str, life: bytes) -> None:
        self.is_alive = True
        self.info = WorkerInfo(name, ord(name[0]), life)
        self.member = Member(self.info, life)
        self.members = Registry()
        self.members.add(self.member)
        self.extensions: dict[type, Any] = {}
        self._world = world
        self._listeners: list[Callable[[WorkerInfo, str], None]] = []
        gather.install(self)  # type: ignore[arg-type]

    @property
    def gatherings(self) -> Gatherings:
        found: Gatherings = self.extensions[Gatherings]
        return found

    def on_peer_lost(self, listener: Callable[[WorkerInfo, str], None]) -> None:
        self._listeners.append(listener)

    def tell_lost(self, info: WorkerInfo) -> None:
        for listener in self._listeners:
            listener(info, "it died")

    def refresh(self) -> None:
        pass

    def watch(self, to: WorkerInfo) -> None:
        pass

    def resolve(self, name: str) -> WorkerInfo:
        return self.members.find(name)

    def request(self, to: WorkerInfo, message: Any, payload: Any, **_: Any) -> Any:
        target = self._world.agents[to.incarnation]
        func, args, kwargs = pickling.loads(payload)
        outer, _here.agent = getattr(_here, "agent", None), target
        error: Exception | None = None
        try:
            if not target.is_alive:
                raise PeerLostError(f"{to} is gone")
            func(*args, **kwargs)
        except PeerLostError as raised:
            error = raised
        finally:
            _here.agent = outer

        def wait() -> None:
            if error is not None:
                raise error

        return SimpleNamespace(wait=wait, peer=to)


@pytest.fixture(autouse=True)
def agents_of_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each thread is the worker that it was called on."""
    monkeypatch.setattr(gather, "current_agent", lambda: _here.agent)
    yield
    _here.agent = None


def gather_all(*agents: FakeAgent, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Each of `agents` takes part with its own life; what came of it, or was raised, by name."""
    names = names or tuple(sorted(agent.info.name for agent in agents))
    outcomes: dict[str, Any] = {}

    def run(agent: FakeAgent) -> None:
        try:
            outcomes[agent.info.name] = agent.gatherings.gather(agent.info.incarnation, names, WAIT_S, WAIT_S)
        except PeerLostError as error:
            outcomes[agent.info.name] = error

    threads = [threading.Thread(target=run, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def check_all_came(*agents: FakeAgent) -> None:
    wanted = {agent.info.name: agent.info.incarnation for agent in agents}
    assert gather_all(*agents) == dict.fromkeys(wanted, wanted)


def test_a_worker_that_comes_again_takes_part_again() -> None:
    """Its gatherings are numbered anew on all workers, in whichever life it is, as a leader and as a follower."""
    world = World()
    b = world.join("b")
    for name in ("a", "c"):
        for _ in range(3):
            guest = world.join(name)
            for _ in range(2):
                check_all_came(b, guest)
            world.end(guest)()
        check_all_came(b)


def test_a_loss_that_is_told_late_ends_no_gathering_of_the_next_life() -> None:
    """The next life has joined, and gathers, before the gatherings hear of the end of the one before."""
    world = World()
    a, first = world.join("a"), world.join("b")
    check_all_came(a, first)
    tell_of_first = world.end(first)
    second = world.join("b")
    check_all_came(a, second)
    tell_of_first()
    check_all_came(a, second)


def test_a_worker_that_is_lost_ends_a_gathering_that_the_leader_has_not_begun() -> None:
    """Who came to it is told, and need not wait for a leader that gathers with others by now."""
    world = World()
    a, b, c = world.join("a"), world.join("b"), world.join("c")
    outcomes: dict[str, Any] = {}
    waiting = threading.Thread(target=lambda: outcomes.update(gather_all(b, names=("a", "b", "c"))))
    waiting.start()
    while not len(a.gatherings):
        assert waiting.is_alive()
    world.end(c)()
    waiting.join(WAIT_S)
    assert "c is lost (it died)" in str(outcomes["b"])
    check_all_came(a, b)


def test_who_comes_late_to_a_gathering_that_is_over_is_told_so() -> None:
    """It gets the leader's error at once; and what comes for it on the leader is refused, and not kept."""
    world = World()
    a, b = world.join("a"), world.join("b")
    with pytest.raises(PeerLostError, match="not all of a, b came within"):
        a.gatherings.gather(None, ("a", "b"), WAIT_S, 0.01)
    kept = len(a.gatherings)
    with pytest.raises(PeerLostError, match="not all of a, b came within"):
        b.gatherings.gather(None, ("a", "b"), WAIT_S, WAIT_S)
    late = gather.Key(("a", "b"), 0, False, (a.info.incarnation, b.info.incarnation))
    with pytest.raises(PeerLostError, match="a has taken part in it, and waits no longer"):
        a.gatherings.contribute(late, "b", None)
    assert len(a.gatherings) == kept
    check_all_came(a, b)


def test_hundreds_of_departures_leave_nothing_behind() -> None:
    """Neither of gatherings that were completed nor of what comes late for those that a lost worker was part of."""
    world = World()
    a, b = world.join("a"), world.join("b")
    check_all_came(a, b)
    kept = len(a.gatherings)
    for _ in range(300):
        guest = world.join("guest")
        check_all_came(a, b, guest)
        tell = world.end(guest)
        tell()
        late = gather.Key(("a", "b", "guest"), 5, False, tuple(one.info.incarnation for one in (a, b, guest)))
        with pytest.raises(PeerLostError, match="guest is lost"):
            a.gatherings.contribute(late, "b", None)
        a.gatherings.conclude(late, {}, None)
        a.gatherings.give_up(late, ["guest"])
        a.gatherings.missing(late)
    assert len(a.gatherings) == len(b.gatherings) == kept


steps = st.lists(st.sampled_from(["gather", "gather", "b leaves", "c leaves", "tell"]), max_size=25)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(steps)
def test_all_who_are_there_gather_whatever_came_before(history: list[str]) -> None:
    """In whichever order workers leave and come again, gather, and the losses are told."""
    world = World()
    present = {name: world.join(name) for name in "abc"}
    untold: list[Callable[[], None]] = []
    for step in history:
        if step == "gather":
            check_all_came(*present.values())
        elif step == "tell":
            while untold:
                untold.pop()()
        else:
            untold.append(world.end(present[step[0]]))
            present[step[0]] = world.join(step[0])
    check_all_came(*present.values())
