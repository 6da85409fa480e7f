"""The other workers, as the agent deals with them: who is meant, how to reach them, and who is gone."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from zrpc.errors import ConfigError, PeerLostError, UnknownWorkerError
from zrpc.ids import WorkerInfo
from zrpc.membership.device_maps import Placement, Routes, check, devices_of, routes
from zrpc.membership.registry import Registry
from zrpc.staging.note import NOTE_NBYTES
from zrpc.staging.process import Process
from zrpc.wire.route import Route

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.membership.group import Group, Member
    from zrpc.staging.stager import Staging
    from zrpc.transport.carrier import Carrier
    from zrpc.wire.envelope import Envelope
    from zrpc.wire.route import Exporter

LINGER_S = 5.0
"""How long a worker of a group that cannot be stays for the others to see why."""

log = logging.getLogger("zrpc")


class PeerRoutes(NamedTuple):
    """The ways of tensors to one peer: in requests to it, and in answers."""

    requests: Route
    replies: Route


class Peers:
    """The members of the group. Any thread may call it; the lock keeps a loss from slipping by while a member comes.

    Args:
        carrier: sends to the members.
        staging: brings tensors to and from devices; it is told which ones this worker uses.
        group: the membership.
        connect: tells the transport of a member's address (nothing, with a broker).
        disconnect: tells the transport that a member is gone for good.
        on_gone: called with a member that left or is lost, and why. Any thread; it must not block.
        submit: runs on the control thread, in order, what would keep the reading thread for long.
        hold: keeps requests back, as often as it is called; `resume` ends that.
        resume: see `hold`.
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
        self._unwatched: dict[Incarnation, None] = {}  # owned by the control thread
        self._using = threading.Lock()  # taken while devices are prepared
        self._lock = threading.Lock()
        self._gone_early: dict[Incarnation, str] = {}
        self._routes: dict[int, tuple[Member | None, PeerRoutes]] = {}  # by rank; an entry is replaced as a whole
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

    def resolve(self, to: str | int | WorkerInfo) -> WorkerInfo:
        """The worker that `to` names; in a dynamic group newcomers are looked for.

        Raises:
            UnknownWorkerError: there is none.
            RendezvousError: it is not known here, and the store of a dynamic group is unreachable.
            ValueError: `to` is none of the three.
        """
        try:
            return self._lookup(to)
        except UnknownWorkerError:
            if self.is_static:
                raise
        self._group.refresh()
        return self._lookup(to)

    def send(self, to: WorkerInfo, envelope: Envelope, *, may_lie: bool = False) -> None:
        """Send `envelope`; see `Carrier.send`.

        Raises:
            PeerLostError: `to` is not in the group any more, or lost.
        """
        member = self.registry.member(to.id)
        if member is None:
            raise PeerLostError(f"{to} is not in the group any more")
        try:
            self._carrier.send(member.incarnation, envelope, may_lie=may_lie)
        except PeerLostError as error:
            raise PeerLostError(f"{to} is lost: {error}. It is gone for good; check its log") from error

    def queued_nbytes(self, to: WorkerInfo) -> int:
        """How much waits here because `to` has not read what was sent before, in bytes."""
        member = self.registry.member(to.id)
        return 0 if member is None else self._carrier.queued_nbytes(member.incarnation)

    def watch(self, to: WorkerInfo) -> None:
        """See to it that the loss of `to` is noticed even if nothing is ever sent to it.

        The thread that reads leaves it to the control thread, since it takes sockets.

        Raises:
            LimitError: no socket can be made. On the control thread that is logged, and tried again the next time.
        """
        member = self.registry.member(to.id)
        if member is None:
            return
        if self._carrier.inbox.is_read_here:
            self._submit(partial(self._watch_now, member.incarnation))
        else:
            self._carrier.watch(member.incarnation)

    def _watch_now(self, incarnation: Incarnation) -> None:
        self._unwatched[incarnation] = None
        for each in list(self._unwatched):
            if self.registry.by_incarnation(each) is not None:
                self._carrier.watch(each)
            del self._unwatched[each]

    def routes(self, to: WorkerInfo) -> PeerRoutes:
        """Where tensors arrive that are sent to `to`."""
        member = self.registry.member(to.id)
        known = self._routes.get(to.id)
        if known is not None and known[0] is member:
            return known[1]
        made = self._make_routes(to, member)
        self._routes[to.id] = (member, made)
        return made

    def _make_routes(self, to: WorkerInfo, member: Member | None) -> PeerRoutes:
        maps = Routes({}, {}) if member is None else routes(Placement.of(self._me), Placement.of(member))
        exporter = None if member is None else self._exporter(member)
        return PeerRoutes(
            Route(maps.requests, self._staging, "Request", to.name, exporter),
            Route(maps.replies, self._staging, "Response", to.name, exporter),
        )

    def _exporter(self, member: Member) -> Exporter | None:
        """What puts bytes of devices where `member` can copy them from, if both want that and share memory."""
        memory = member.card.get("memory")
        if member.incarnation == self._me.incarnation or not member.card.get("cuda_ipc") or not memory:
            return None
        make_note = partial(self._carrier.note, member.incarnation, NOTE_NBYTES)
        return self._staging.exporter(member.incarnation, member.info.name, make_note, partial(Process, memory[0]))

    def says_goodbye(self, worker: WorkerInfo) -> None:
        """`worker` told us that it leaves."""
        member = self.registry.member(worker.id)
        if member is not None:
            self._forget(member.incarnation, "it left the group")

    def lose(self, incarnation: Incarnation, reason: str) -> None:
        """That member cannot be reached any more."""
        self._forget(incarnation, reason)

    def _lookup(self, to: str | int | WorkerInfo) -> WorkerInfo:
        if isinstance(to, WorkerInfo):
            return self.registry.by_rank(to.id)
        if isinstance(to, str):
            return self.registry.by_name(to)
        if isinstance(to, int) and not isinstance(to, bool):
            return self.registry.by_rank(to)
        raise ValueError(f"a worker is addressed by its name, its rank or its WorkerInfo, not by {to!r}")

    def _on_joined(self, member: Member) -> None:
        self._connect(member)
        self._carrier.meet(member.incarnation, member.card.get("memory"))
        with self._lock:
            self.registry.add(member)
            reason = self._gone_early.pop(member.incarnation, None)
        if not self.is_static and member.card.get("device_maps"):
            self._hold()  # its requests may need them
            self._submit(partial(self._use_devices_of, member))
        if reason is not None:
            self._forget(member.incarnation, reason)

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
        self._forget(incarnation, reason)
        if not lost:
            self._disconnect(incarnation)

    def _forget(self, incarnation: Incarnation, reason: str) -> None:
        """A member is gone. In a static group its name stays known: calls to it say what happened."""
        with self._lock:
            member = self.registry.by_incarnation(incarnation)
            if member is None:  # while this worker joins, one may be lost before it is known here
                self._gone_early[incarnation] = reason
                return
        self._carrier.forget(incarnation)
        self._staging.forget(incarnation)
        if not self.is_static:
            self.registry.remove(incarnation)
        self._on_gone(member.info, reason)


def _by_rank(members: Sequence[Member]) -> list[Member]:
    return sorted(members, key=lambda member: member.info.id)
