"""All-gather and barrier over calls: all tell the leader, the leader tells all.

There are two kinds.

- `all_gather`: the leader is the first of the workers' names in order. A worker that is lost before it has told the
  leader ends the gathering with an error on every other worker.
- `gather_living`, for shutdown: a loss ends nothing. The gathering is complete when each worker has told the leader or
  is lost; then every worker gets the same result, which names the lost ones. The leader is the first name that is not
  lost. Where it is lost itself, each worker tells the next one, as soon as it notices.

A leader that is lost after it has told some of the workers leaves them with the result. Each keeps it, and gives it to
workers that tell it later. In the last gathering before the end those may have left by then: who was not told by them
names them as lost too.

A gathering is one of certain lives of the workers (`Key`), which each worker looks up as it comes. So a worker that has
left or died, and comes again under its name, takes part in new gatherings, and the numbers of these begin anew on all.
What comes for a gathering that is over here, or that a lost worker was to take part in, is refused."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc import interrupts
from zrpc.agent.current import current_agent
from zrpc.agent.pool import blocking
from zrpc.agent.repeating import outlast
from zrpc.errors import PeerLostError, RendezvousError, RpcTimeoutError
from zrpc.exposed import expose
from zrpc.gathering import Gathering, GatheringTable, Key, LateError, Lost, WorkersLostError
from zrpc.wire import carried, pickling
from zrpc.wire.messages import PythonCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zrpc.agent.agent import Agent
    from zrpc.agent.call import Call
    from zrpc.ids import Incarnation, WorkerInfo
    from zrpc.wire.payload import Payload

log = logging.getLogger("zrpc")
RemoteCall = tuple["Callable[..., Any]", tuple[Any, ...]]

REPORT_S = 10.0  # how often the log says for whom a shutdown waits
ASK_TIMEOUT_S = 1.0  # how long a worker whose time is over waits to be told, or to tell, who did not come
TELL_TIMEOUT_S = 30.0  # how long it may take to give a result to a worker that asks for it late


class RemoteFunctions:
    """What the workers of a gathering call on each other. Each method gives a function and its arguments."""

    def contribution(self, key: Key, name: str, obj: Any) -> RemoteCall:
        """On the leader: `name` takes part with `obj`."""
        return _contribute, (key, name, obj)

    def conclusion(self, key: Key, objects: dict[str, Any]) -> RemoteCall:
        """On a follower: all took part, and this came of it."""
        return _conclude, (key, objects, None)

    def failure(self, key: Key, reason: str) -> RemoteCall:
        """On a follower: the gathering failed."""
        return _conclude, (key, {}, reason)


class Gatherings:
    """The gatherings of one worker."""

    def __init__(self, agent: Agent) -> None:
        self._remote = RemoteFunctions()
        self._agent = agent
        self._changed = threading.Condition(threading.Lock())  # its lock owns what follows
        self._table = GatheringTable(lambda: agent.info.name)
        agent.on_peer_lost(self._on_peer_lost)

    def call_by(self, remote: RemoteFunctions) -> None:
        """Have others call the functions of `remote` from now on. For programs that know them under other names."""
        self._remote = remote

    def __len__(self) -> int:
        """Of how many gatherings, and series of gatherings of the same lives, something is kept here."""
        with self._changed:
            return len(self._table)

    def gather(
        self, obj: Any, names: tuple[str, ...], call_timeout_s: float, wait_timeout_s: float | None
    ) -> dict[str, Any]:
        """Take part in the next gathering of `names`; see `all_gather`."""
        (key, gathering), me, leader = self._begin(names, survives_loss=False), self._agent.info.name, names[0]
        try:
            if me == leader:
                self._watch_all(key)
                self.contribute(key, me, obj)
            else:
                self._tell_leader(key, gathering, obj, call_timeout_s)
            with blocking(), self._changed:
                if not self._changed.wait_for(lambda: gathering.is_complete, wait_timeout_s):
                    gathering.fail(f"not all of {', '.join(names)} came within {wait_timeout_s:g} s")
            if me == leader:
                self._tell_followers(key, gathering, call_timeout_s)
            if gathering.error is not None:
                raise PeerLostError(f"the gathering of {', '.join(names)} cannot be completed: {gathering.error}")
            return gathering.objects
        finally:
            with self._changed:
                self._table.end(key)

    def gather_living(self, obj: Any, names: tuple[str, ...], timeout_s: float) -> dict[str, Any]:
        """Take part in the next gathering of `names` that survives losses; see `gather_living`."""
        me = self._agent.info.name
        deadline = time.monotonic() + timeout_s if timeout_s else None
        key, gathering = self._begin(names, survives_loss=True)
        try:
            self.contribute(key, me, obj)
            while not gathering.is_complete:
                leader = gathering.leader(self._table.lost(key))
                if leader == me:
                    self._watch_all(key)
                else:
                    self._tell_next_leader(key, leader, obj, deadline)
                if not self._wait_while_led_by(leader, gathering, deadline):
                    break
            if not gathering.is_complete:
                raise self._late(key, gathering, timeout_s)
            if gathering.is_led_here:
                self._tell_followers(key, gathering, timeout_s)
            return gathering.objects
        finally:
            with self._changed:
                if gathering.is_complete:  # else others may ask who came
                    self._table.end(key)

    def contribute(self, key: Key, name: str, obj: Any) -> None:
        """On the leader, or who may become it: `name` takes part with `obj`.

        Raises:
            PeerLostError: the gathering is over here, or will not be complete.
        """
        with self._changed:
            result = self._table.contribute(key, name, obj)
            self._changed.notify_all()
        if result is not None and name != self._agent.info.name:  # the leader was lost before it could tell `name`
            with suppress(PeerLostError):
                self._start(key, name, _payload(self._remote.conclusion(key, result)), TELL_TIMEOUT_S)

    def conclude(self, key: Key, objects: dict[str, Any], error: str | None) -> None:
        """On a follower: this is what the leader gathered."""
        with self._changed:
            self._table.conclude(key, objects, error)
            self._changed.notify_all()

    def missing(self, key: Key) -> list[str]:
        """Which workers have not come to a gathering, as far as this worker knows; without those that are lost."""
        with self._changed:
            return self._table.missing(key)

    def give_up(self, key: Key, missing: list[str]) -> None:
        """On a follower: the leader's time is over, and `missing` had not come to it. This worker waits on."""
        with self._changed:
            self._table.give_up(key, missing)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _begin(self, names: tuple[str, ...], survives_loss: bool) -> tuple[Key, Gathering]:
        if not self._agent.is_static_group:
            with suppress(RendezvousError):  # the store is gone: those who are known here may still gather
                self._agent.refresh()
        lives = tuple(self._agent.members.find(name).incarnation for name in names)  # also of those that drain
        with self._changed:
            gathering = self._table.begin(Key(names, 0, survives_loss, lives))
        return gathering.key, gathering

    def _tell_leader(self, key: Key, gathering: Gathering, obj: Any, timeout_s: float) -> None:
        """Take part, unless the leader has given up already and said so, maybe as its last word."""
        try:
            if not gathering.is_complete:
                told = self._remote.contribution(key, self._agent.info.name, obj)
                with interrupts.deferred:
                    outlast(lambda: self._start(key, key.names[0], told, timeout_s, waited=True))
        except PeerLostError:
            if not gathering.is_complete:
                raise

    def _tell_next_leader(self, key: Key, leader: str, obj: Any, deadline: float | None) -> None:
        """The same where the leader may be lost; then it is known here to be lost."""
        told = self._remote.contribution(key, self._agent.info.name, obj)
        try:
            with interrupts.deferred:
                outlast(lambda: self._start(key, leader, told, _left_s(deadline) or 0.0, waited=True))
        except RpcTimeoutError:
            return  # the wait that follows finds that the time is over
        except PeerLostError as error:
            self._note_lost(key.life_of(leader), str(error))

    def _wait_while_led_by(self, leader: str, gathering: Gathering, deadline: float | None) -> bool:
        """Wait until it is complete, or another worker than `leader` is to lead it; false: the time is over."""
        while True:
            limit_s = min(_left_s(deadline) or REPORT_S, REPORT_S)
            with blocking(), self._changed:
                if self._changed.wait_for(partial(self._is_led_on, leader, gathering), limit_s):
                    return True
            if limit_s < REPORT_S:
                return False
            awaited = self.missing(gathering.key) if leader == self._agent.info.name else [leader]
            log.warning("this worker waits at its shutdown for %s", ", ".join(awaited))

    def _is_led_on(self, leader: str, gathering: Gathering) -> bool:
        return gathering.is_complete or gathering.leader(self._table.lost(gathering.key)) != leader

    def _watch_all(self, key: Key) -> None:
        lost = self._table.lost(key)
        for name in key.names:
            member = self._agent.members.by_incarnation(key.life_of(name))
            if name != self._agent.info.name and name not in lost and member is not None:
                self._agent.watch(member.info)

    def _late(self, key: Key, gathering: Gathering, timeout_s: float) -> LateError:
        """The time is over: which workers did not come? The leader knows, and tells those that did."""
        known_lost = self._table.lost(key)
        me, leader = self._agent.info.name, gathering.leader(known_lost)
        if leader != me:
            missing = gathering.missing or self._ask_missing(key, leader) or [leader]
        else:
            missing = self.missing(key)
            if gathering.missing is not None:  # its leader before knew more
                missing = [name for name in missing if name in gathering.missing] or missing
            news = _payload((_give_up, (key, missing)))
            others = [name for name in gathering.objects if name != me and name not in known_lost]
            for call in [self._start(key, name, news, ASK_TIMEOUT_S) for name in others]:
                _outcome(call)
        lost = "".join(f"; {name} is lost" for name in known_lost)
        return LateError(
            f"the gathering of {', '.join(key.names)} cannot be completed: {', '.join(missing)} did not come within "
            f"{timeout_s:g} s{lost}", missing,
        )  # fmt: skip

    def _ask_missing(self, key: Key, leader: str) -> list[str] | None:
        answer = _outcome(self._start(key, leader, _payload((_missing, (key,))), ASK_TIMEOUT_S, waited=True))
        return None if answer is None else pickling.loads(answer)

    def _tell_followers(self, key: Key, gathering: Gathering, timeout_s: float) -> None:
        if gathering.error is None:
            news = self._remote.conclusion(key, gathering.objects)
        else:
            news = self._remote.failure(key, gathering.error)
        told = _payload(news)
        calls = []
        failed: list[tuple[str, Exception]] = []
        for name in key.names:
            if name == self._agent.info.name or name in self._table.lost(key):
                continue
            try:
                calls.append(self._start(key, name, told, timeout_s))
            except PeerLostError as error:
                if not key.survives_loss:
                    failed.append((name, error))
            told = _payload(news) if told.passengers else told  # a passenger goes to one worker only
        for call in calls:
            try:
                outlast(partial(self._start, key, call.peer.name, news, timeout_s), call)
            except RuntimeError as error:
                if not (key.survives_loss and isinstance(error, PeerLostError)):  # the next gathering names it
                    failed.append((call.peer.name, error))
        if failed and gathering.error is None:
            raise RpcTimeoutError(
                f"Followers {[name for name, _ in failed]} timed out in _all_gather after {timeout_s:.2f} seconds. "
                f"The first exception is {failed[0][1]}"
            )

    def _start(self, key: Key, name: str, told: RemoteCall | Payload, timeout_s: float, waited: bool = False) -> Call:
        member = self._agent.members.by_incarnation(key.life_of(name))
        if member is None:
            reason = self._table.lost(key).get(name, "it is not in the group any more")
            raise PeerLostError(f"{name} is lost ({reason})")
        with interrupts.deferred:
            payload = _payload(told) if isinstance(told, tuple) else told
            return self._agent.request(member.info, PythonCall(), payload, timeout_s=timeout_s, waited=waited)

    def _on_peer_lost(self, worker: WorkerInfo, reason: str) -> None:
        for key, names in self._note_lost(worker.incarnation, reason):
            news = self._remote.failure(key, f"{worker.name} is lost ({reason})")
            for name in names:
                with suppress(PeerLostError):
                    self._start(key, name, news, TELL_TIMEOUT_S)

    def _note_lost(self, life: Incarnation, reason: str) -> list[tuple[Key, list[str]]]:
        """See `GatheringTable.lose`."""
        with self._changed:
            over = self._table.lose(life, reason)
            self._changed.notify_all()
        return over


def install(agent: Agent) -> None:
    """Give `agent` its gatherings."""
    agent.extensions[Gatherings] = Gatherings(agent)


def all_gather(obj: Any, worker_names: Iterable[str] | None = None, timeout: float | None = None) -> dict[str, Any]:
    """Exchange one object with every worker.

    Args:
        obj: this worker's object; it is pickled.
        worker_names: who takes part, this worker included; all of the group if None.
        timeout: seconds for each call and for the wait; 0: no limit; None: the calls' default, no limit for the wait.

    Returns:
        Worker name -> the object of that worker.

    Raises:
        PeerLostError: a worker that should take part is lost, or did not come in time.
        RpcTimeoutError: the leader was not reached, or a follower not told, in time.
    """
    agent = current_agent()
    if not worker_names:
        agent.refresh()
        worker_names = {info.name for info in agent.members.all()}
    names = tuple(sorted(set(worker_names)))
    gatherings: Gatherings = agent.extensions[Gatherings]
    if timeout is None:
        return gatherings.gather(obj, names, agent.rpc_timeout_s, None)
    return gatherings.gather(obj, names, timeout, timeout or None)


def gather_living(timeout: float) -> None:
    """Wait until every worker of a static group has come here as often as this one, but those that are lost.

    Args:
        timeout: seconds; 0: no limit.

    Raises:
        WorkersLostError: all others came, but the workers that it names are lost. All get the same error.
        PeerLostError: not all came within `timeout`; it names those that did not.
        RpcTimeoutError: a worker that came could not be told in time that all had come.
    """
    agent = current_agent()
    gatherings: Gatherings = agent.extensions[Gatherings]
    names = tuple(sorted(info.name for info in agent.members.all()))
    objects = gatherings.gather_living(None, names, timeout)
    lost = [f"{name} is lost ({obj.reason})" for name, obj in objects.items() if isinstance(obj, Lost)]
    if lost:
        agent.note_lost()  # it may know of it from the leader alone
        raise WorkersLostError(f"all other workers came to their shutdown, but {'; '.join(lost)}")


def barrier(worker_names: Iterable[str] | None = None) -> None:
    """Wait until all of `worker_names` are here; a failure is logged and not raised, as in torch."""
    try:
        all_gather(None, worker_names)
    except RuntimeError:
        log.exception("a barrier was not completed")


def _payload(call: RemoteCall) -> Payload:
    return pickling.dumps_call((*call, {}))


@expose
def _contribute(key: Key, name: str, obj: Any) -> None:
    current_agent().extensions[Gatherings].contribute(key, name, obj)


@expose
def _conclude(key: Key, objects: dict[str, Any], error: str | None) -> None:
    current_agent().extensions[Gatherings].conclude(key, objects, error)


@expose
def _missing(key: Key) -> list[str]:
    return current_agent().extensions[Gatherings].missing(key)  # type: ignore[no-any-return]


@expose
def _give_up(key: Key, missing: list[str]) -> None:
    current_agent().extensions[Gatherings].give_up(key, missing)


def _outcome(call: Call) -> Payload | None:
    """What came of a call; None if it failed, in whatever way."""
    try:
        return call.wait()
    except RuntimeError:
        return None


def _left_s(deadline: float | None) -> float | None:
    """Seconds until `deadline`, more than 0: that would be no limit."""
    return None if deadline is None else max(0.001, deadline - time.monotonic())


carried.register_parts(Key, carried.KEY, tuple, Key)
carried.register_parts(Lost, carried.LOST, lambda lost: (lost.reason,), Lost)
