"""All-gather and barrier over calls: everybody tells the leader, the leader tells everybody.

The leader is the first of the workers' names in order. A worker that is lost before it has told the leader ends the
gathering with an error on every other worker: nobody waits for the dead.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zrpc.agent.current import current_agent
from zrpc.agent.pool import blocking
from zrpc.errors import PeerLostError, RpcTimeoutError
from zrpc.wire import pickling
from zrpc.wire.messages import PythonCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zrpc.agent.agent import Agent
    from zrpc.agent.call import Call
    from zrpc.ids import WorkerInfo
    from zrpc.wire.payload import Payload

log = logging.getLogger("zrpc")

RemoteCall = tuple["Callable[..., None]", tuple[Any, ...]]
Key = tuple[tuple[str, ...], int]
"""Which gathering: the sorted names, and how many gatherings of the same workers came before."""


@dataclass(slots=True)
class _Gathering:
    """One gathering, owned by its `Gatherings`' lock until `complete` is set."""

    objects: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    complete: threading.Event = field(default_factory=threading.Event)


class RemoteFunctions:
    """What the workers of a gathering call on each other. Each method gives a function and its arguments."""

    def contribution(self, key: Key, name: str, obj: Any) -> RemoteCall:
        """On the leader: `name` takes part with `obj`."""
        return _contribute, (key, name, obj)

    def conclusion(self, key: Key, objects: dict[str, Any]) -> RemoteCall:
        """On a follower: everybody took part, and this came of it."""
        return _conclude, (key, objects, None)

    def failure(self, key: Key, reason: str) -> RemoteCall:
        """On a follower: the gathering failed."""
        return _conclude, (key, {}, reason)


class Gatherings:
    """The gatherings of one worker.

    Attributes:
        remote: the functions called on others; may be replaced.
    """

    def __init__(self, agent: Agent) -> None:
        self.remote = RemoteFunctions()
        self._agent = agent
        self._lock = threading.Lock()
        self._gatherings: defaultdict[Key, _Gathering] = defaultdict(_Gathering)
        self._counters: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self._lost: dict[str, str] = {}
        agent.on_peer_lost(self._on_peer_lost)

    def gather(
        self, obj: Any, names: tuple[str, ...], call_timeout_s: float, wait_timeout_s: float | None
    ) -> dict[str, Any]:
        """Take part in the next gathering of `names`; see `all_gather`."""
        me, leader = self._agent.info.name, names[0]
        with self._lock:
            key = (names, self._counters[names])
            self._counters[names] += 1
            gathering = self._gatherings[key]
        try:
            if me == leader:
                for name in names:
                    self._agent.watch(self._agent.resolve(name))
                self.contribute(key, me, obj)
            else:
                self._tell_leader(key, gathering, obj, call_timeout_s)
            with blocking():
                if not gathering.complete.wait(wait_timeout_s):
                    self._fail(gathering, f"not all of {', '.join(names)} came within {wait_timeout_s:g} s")
            if me == leader:
                self._tell_followers(key, gathering, names, call_timeout_s)
            if gathering.error is not None:
                raise PeerLostError(f"the gathering of {', '.join(names)} cannot be completed: {gathering.error}")
            return gathering.objects
        finally:
            with self._lock:
                self._gatherings.pop(key, None)

    def _tell_leader(self, key: Key, gathering: _Gathering, obj: Any, timeout_s: float) -> None:
        """Take part, unless the leader has given up already and said so, maybe as its last word."""
        try:
            if not gathering.complete.is_set():
                told = _payload(self.remote.contribution(key, self._agent.info.name, obj))
                self._start(key[0][0], told, timeout_s, waited=True).wait()
        except PeerLostError:
            if not gathering.complete.is_set():
                raise

    def contribute(self, key: Key, name: str, obj: Any) -> None:
        """On the leader: `name` takes part with `obj`."""
        with self._lock:
            gathering = self._gatherings[key]
            gathering.objects[name] = obj
            if set(key[0]) == set(gathering.objects):
                gathering.complete.set()
            else:
                self._check_lost(key, gathering)

    def conclude(self, key: Key, objects: dict[str, Any], error: str | None) -> None:
        """On a follower: this is what the leader gathered."""
        with self._lock:
            gathering = self._gatherings[key]  # maybe before this worker has come here
            if not gathering.complete.is_set():
                gathering.objects, gathering.error = objects, error
                gathering.complete.set()

    def _tell_followers(self, key: Key, gathering: _Gathering, names: tuple[str, ...], timeout_s: float) -> None:
        if gathering.error is None:
            news = self.remote.conclusion(key, gathering.objects)
        else:
            news = self.remote.failure(key, gathering.error)
        told = _payload(news)
        calls = []
        for name in names[1:]:
            if name not in self._lost:
                calls.append(self._start(name, told, timeout_s))
                told = _payload(news) if told.passengers else told  # a passenger goes to one worker only
        failed: list[tuple[str, Exception]] = []
        for call in calls:
            try:
                call.wait()
            except RuntimeError as error:
                failed.append((call.peer.name, error))
        if failed and gathering.error is None:
            raise RpcTimeoutError(
                f"Followers {[name for name, _ in failed]} timed out in _all_gather after {timeout_s:.2f} seconds. "
                f"The first exception is {failed[0][1]}"
            )

    def _start(self, name: str, payload: Payload, timeout_s: float, waited: bool = False) -> Call:
        to = self._agent.resolve(name)
        return self._agent.request(to, PythonCall(), payload, timeout_s=timeout_s, waited=waited)

    def _fail(self, gathering: _Gathering, reason: str) -> None:
        with self._lock:
            if not gathering.complete.is_set():
                gathering.error = reason
                gathering.complete.set()

    def _on_peer_lost(self, worker: WorkerInfo, reason: str) -> None:
        with self._lock:
            self._lost[worker.name] = reason
            for key, gathering in self._gatherings.items():
                self._check_lost(key, gathering)

    def _check_lost(self, key: Key, gathering: _Gathering) -> None:
        """End the gathering if somebody whom it waits for is lost. Call it under the lock."""
        leader_here = key[0][0] == self._agent.info.name
        for name, reason in self._lost.items():
            awaited = name in key[0] and name not in gathering.objects if leader_here else name == key[0][0]
            if awaited and not gathering.complete.is_set():
                gathering.error = f"{name} is lost ({reason})"
                gathering.complete.set()


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
        PeerLostError: somebody who should take part is lost, or did not come in time.
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


def barrier(worker_names: Iterable[str] | None = None) -> None:
    """Wait until all of `worker_names` are here; a failure is logged and not raised, as in torch."""
    try:
        all_gather(None, worker_names)
    except RuntimeError:
        log.exception("a barrier was not completed")


def _payload(call: RemoteCall) -> Payload:
    func, args = call
    return pickling.dumps((func, args, {}))


def _contribute(key: Key, name: str, obj: Any) -> None:
    current_agent().extensions[Gatherings].contribute(key, name, obj)


def _conclude(key: Key, objects: dict[str, Any], error: str | None) -> None:
    current_agent().extensions[Gatherings].conclude(key, objects, error)
