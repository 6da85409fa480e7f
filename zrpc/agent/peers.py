"""The other workers, as the agent deals with them: who is meant, how to reach them, and who is gone."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from zrpc import interrupts
from zrpc.agent.pool import blocking
from zrpc.errors import ConfigError, DrainingError, PeerLostError, StaleWorkerError, UnknownWorkerError
from zrpc.membership.agreement import check_agreement
from zrpc.membership.device_maps import Placement, Routes, check, devices_of, routes
from zrpc.membership.registry import Registry
from zrpc.wire.route import Route

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation, WorkerInfo
    from zrpc.membership.group import Group, Member
    from zrpc.staging.stager import Staging
    from zrpc.transport.carrier import Carrier
    from zrpc.wire.envelope import Envelope

LOOK_S = 1.0
"""How often who waits for a newcomer looks for it, beside being told."""
LINGER_S = 5.0
"""How long a worker of a group that cannot be stays for the others to see why."""

log = logging.getLogger("zrpc")


class PeerRoutes(NamedTuple):
    """The ways of tensors to one peer: in requests to it, and in answers."""

    requests: Route
    replies: Route


class Peers:
    """The members of the group. Any thread may call it; the lock owns `_routes`.

    A life that is over is taken out of the group at once. What follows is done on the control thread, in the order in
    which the lives ended.

    Args:
        carrier: sends to the members.
        staging: brings tensors to and from devices; it is told which ones this worker uses.
        group: the membership.
        connect: tells the transport of a member's address (nothing, with a broker).
        disconnect: tells the transport that a member is gone for good.
        on_gone: called with a member that left or is lost, and why, on the control thread: it must not wait.
        submit: runs on the control thread, in order, what would keep the reading thread for long.
        hold: keeps requests back, as often as it is called; `resume` ends that.
        resume: see `hold`.

    Attributes:
        watched: the lives whose loss will be noticed, come what may.
        draining: those that take no new calls.
    """

    def __init__(
        self,
        carrier: Carrier,
        staging: Staging,
        group: Group,
        connect: Callable[[Member], None],
        disconnect: Callable[[Incarnation], None],
        on_gone: Callable[[WorkerInfo, str], None],
        submit: Callable[[Callable[[], object]], None],
        hold: Callable[[], None],
        resume: Callable[[], None],
    ) -> None:
        self.registry = Registry()
        self.is_static = True
        self._carrier = carrier
        self._staging = staging
        self._group = group
        self._connect = connect
        self._disconnect = disconnect
        self._on_gone = on_gone
        self._submit = submit
        self._hold = hold
        self._resume = resume
        self.watched: set[Incarnation] = set()
        self.draining: set[Incarnation] = set()
        self._awaiting: list[threading.Event] = []  # of threads that wait for a newcomer
        self._unwatched: dict[Incarnation, None] = {}  # owned by the control thread
        self._using = threading.Lock()  # taken while devices are prepared
        self._lock = threading.Lock()
        self._routes: dict[Incarnation, PeerRoutes] = {}
        self._me: Member

    def join(self, name: str, rank: int, world_size: int | None, card: dict[str, Any], timeout_s: float) -> Member:
        """Come into the group, as `Group.join`; this worker's own member.

        Raises:
            ConfigError: the device maps of this worker and the others do not fit together. In a group that grows only
                the newcomer finds out, as in torch.
        """
        self.is_static = bool(world_size)
        self._group.watch(self._on_joined, self._on_left)
        self._me, members = self._group.join(name, rank, world_size, self._carrier.incarnation, card, timeout_s)
        try:
            check_agreement(members)
            check([Placement.of(member) for member in _by_rank(members)], is_complete=self.is_static)
        except ConfigError:
            if self.is_static:
                self._group.linger(LINGER_S)
            raise
        for member in members:
            self._on_joined(member)
        self._use_devices()
        return self._me

    @property
    def me(self) -> WorkerInfo:
        """This worker."""
        return self._me.info

    def is_here(self, incarnation: Incarnation) -> bool:
        """Whether that life is in the group."""
        return self.registry.by_incarnation(incarnation) is not None

    def resolve(self, to: str | int | WorkerInfo) -> WorkerInfo:
        """The worker that `to` names; in a dynamic group newcomers are looked for.

        Raises:
            UnknownWorkerError: there is none.
            StaleWorkerError: it is a `WorkerInfo` of a worker that has left or died.
            DrainingError: it takes no new calls.
            RendezvousError: it is not known here, and the store of a dynamic group is unreachable.
            ValueError: `to` is none of the three.
        """
        try:
            found = self.registry.find(to)
        except UnknownWorkerError:
            if self.is_static:
                raise
            self._group.refresh()
            found = self.registry.find(to)
        if found.incarnation in self.draining:
            raise DrainingError(f"{found} takes no new calls, as it is about to end. This call did not run there")
        return found

    def resolve_in_time(self, to: str | int | WorkerInfo, wait_s: float) -> WorkerInfo:
        """The same; waits for a newcomer where there is no such worker, or it drains."""
        deadline = time.monotonic() + wait_s
        came = threading.Event()
        self._awaiting.append(came)
        try:
            while True:
                came.clear()
                try:
                    return self.resolve(to)
                except StaleWorkerError:
                    raise
                except (UnknownWorkerError, DrainingError) as error:
                    left_s = deadline - time.monotonic()
                    if self.is_static or left_s <= 0:
                        text = f"{error}. None came within the {wait_s:g} s of wait_for_worker"
                        raise type(error)(text) from None
                with blocking():
                    interrupts.restart(partial(interrupts.wait, partial(came.wait, min(left_s, LOOK_S))))
        finally:
            self._awaiting.remove(came)

    def note_draining(self, incarnation: Incarnation) -> None:
        """That worker takes no new calls from now on."""
        if self.is_here(incarnation):
            self.draining.add(incarnation)

    def resolve_life(self, rank: int, incarnation: Incarnation) -> WorkerInfo:
        """See `Agent.resolve_life`."""
        member = self.registry.by_incarnation(incarnation)
        if member is None and not self.is_static:
            self._group.refresh()
            member = self.registry.by_incarnation(incarnation)
        if member is None:
            reason = self.registry.ended.get(incarnation, "it has left or died, or is of another group")
            raise PeerLostError(f"the worker of rank {rank} that is meant is not in the group any more: {reason}")
        return member.info

    def send(self, to: WorkerInfo, envelope: Envelope, *, may_lie: bool = False) -> None:
        """Send `envelope`; see `Carrier.send`.

        Raises:
            PeerLostError: `to` is not in the group any more, or lost.
        """
        if self.registry.by_incarnation(to.incarnation) is None:
            raise PeerLostError(f"{to} is not in the group any more")
        try:
            self._carrier.send(to.incarnation, envelope, may_lie=may_lie)
        except PeerLostError as error:
            raise PeerLostError(f"{to} is lost: {error}. It is gone for good; check its log") from error

    def queued_nbytes(self, to: WorkerInfo) -> int:
        """How much waits here because `to` has not read what was sent before, in bytes."""
        return self._carrier.queued_nbytes(to.incarnation) if self.is_here(to.incarnation) else 0

    def watch(self, to: WorkerInfo) -> None:
        """See to it that the loss of `to` is noticed even if nothing is ever sent to it.

        The thread that reads leaves it to the control thread, since it takes sockets.

        Raises:
            LimitError: no socket can be made. On the control thread that is logged, and tried again the next time.
        """
        if to.incarnation in self.watched or not self.is_here(to.incarnation):
            return
        if self._carrier.inbox.is_read_here:
            self._submit(partial(self._watch_now, to.incarnation))
        else:
            self._watch(to.incarnation)

    def _watch_now(self, incarnation: Incarnation) -> None:
        self._unwatched[incarnation] = None
        for each in list(self._unwatched):
            if self.is_here(each):
                self._watch(each)
            del self._unwatched[each]

    def _watch(self, incarnation: Incarnation) -> None:
        self._carrier.watch(incarnation)
        self.watched.add(incarnation)
        if not self.is_here(incarnation):  # it was forgotten meanwhile
            self.watched.discard(incarnation)

    def routes(self, to: WorkerInfo) -> PeerRoutes:
        """Where tensors arrive that are sent to `to`."""
        known = self._routes.get(to.incarnation)
        if known is not None:
            return known
        member = self.registry.by_incarnation(to.incarnation)
        made = self._make_routes(to, member)
        with self._lock:
            if member is not None and self.registry.by_incarnation(to.incarnation) is member:
                self._routes[to.incarnation] = made
        return made

    def _make_routes(self, to: WorkerInfo, member: Member | None) -> PeerRoutes:
        maps = Routes({}, {}) if member is None else routes(Placement.of(self._me), Placement.of(member))
        return PeerRoutes(
            Route(maps.requests, self._staging, "Request", to.name),
            Route(maps.replies, self._staging, "Response", to.name),
        )

    def says_goodbye(self, worker: WorkerInfo) -> None:
        """`worker` told us that it leaves."""
        self._forget(worker.incarnation, "it left the group")

    def lose(self, incarnation: Incarnation, reason: str) -> None:
        """That member cannot be reached any more."""
        self._forget(incarnation, reason)
        if not self.is_static:
            self._group.note_lost(incarnation)

    def _on_joined(self, member: Member) -> None:
        self._connect(member)
        self._carrier.meet(member.incarnation)
        displaced = self.registry.add(member, although_ended=self.is_static)
        if displaced is None:
            if not self.is_here(member.incarnation):  # it was over before it was told of
                self._carrier.forget(member.incarnation)
                self._disconnect(member.incarnation)
            return
        for came in list(self._awaiting):
            came.set()
        for old in displaced:
            self._submit(partial(self._end, old, self.registry.ended.get(old.incarnation, "")))
        if self.is_static and (reason := self.registry.ended.get(member.incarnation)) is not None:
            self._submit(partial(self._end, member, reason))  # lost while this worker joins
        if not self.is_static and member.card.get("device_maps"):
            self._hold()  # its requests may need them
            self._submit(partial(self._use_devices_of, member))

    def _use_devices_of(self, newcomer: Member) -> None:
        """On the control thread: it may initialize CUDA, which takes seconds."""
        try:
            self._use_devices()
        except Exception as error:  # it will be refused, or finds out by itself
            log.warning("what the device maps of %s ask for is not there: %s", newcomer.info, error)
        finally:
            self._resume()

    def _use_devices(self) -> None:
        """Be ready for the devices that maps of the members name. In a group that grows they may become more."""
        me = getattr(self, "_me", None)
        if me is not None:
            with self._using:
                others = (self.registry.member(info.id) for info in self.registry.all())
                self._staging.use(devices_of(Placement.of(me), [Placement.of(other) for other in others if other]))

    def _on_left(self, incarnation: Incarnation, lost: bool, reason: str) -> None:
        del lost
        self._forget(incarnation, reason)

    def _forget(self, incarnation: Incarnation, reason: str) -> None:
        """A life is over. In a static group its name stays known: calls to it say what happened."""
        with self._lock:
            member = self.registry.end(incarnation, reason, keep=self.is_static)
            if not self.is_static:
                self._routes.pop(incarnation, None)
        self.watched.discard(incarnation)
        self.draining.discard(incarnation)
        if member is not None:
            self._submit(partial(self._end, member, reason))

    def _end(self, member: Member, reason: str) -> None:
        """What follows from the end of a life. Runs on the control thread."""
        self._carrier.forget(member.incarnation)
        self._on_gone(member.info, reason)
        if not self.is_static:
            self._disconnect(member.incarnation)


def _by_rank(members: Sequence[Member]) -> list[Member]:
    return sorted(members, key=lambda member: member.info.id)
