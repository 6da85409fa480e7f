"""A small world of workers for the property tests: tables, programs that hold RRefs, and a network that misbehaves.

Only the decisions are real (`RRefTable`). The network keeps every message that is under way in a list and delivers
them in any order, repeats and drops control messages and their acknowledgements (the sender repeats what is not
acknowledged), and delivers calls once at most. Workers die: their messages under way may still arrive, until the others
hear of the death. A dead worker may come again under its rank, as another one, while messages of its earlier life are
still under way.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from zrpc.errors import RRefError
from zrpc.ids import ForkId, GlobalId, IdGenerator, Incarnation, RRefId
from zrpc.rref.actions import Action, AskOwner, Orphan, Release, Tell, Unmade
from zrpc.rref.forkdata import ForkData
from zrpc.rref.owners import Availability
from zrpc.rref.states import OwnerState, UserState
from zrpc.rref.table import RRefTable
from zrpc.wire.messages import RRefChildAccept, RRefCreationFailed, RRefForkRequest, RRefUserDelete


@dataclass(frozen=True)
class Unanswered:
    """What `CallsUnanswered` says of one call: the forks of its request, or, if there are none, of its answer."""

    call: int
    forks: tuple[ForkData, ...]


Control = RRefChildAccept | RRefCreationFailed | RRefForkRequest | RRefUserDelete | Unanswered


def life_of(number: int) -> Incarnation:
    """The incarnation of worker `number`."""
    return number.to_bytes(8, "big")


def number_of(life: Incarnation) -> int:
    """The worker of that incarnation."""
    return int.from_bytes(life, "big")


def maker_of(item: GlobalId) -> int:
    """The worker that gave out that id."""
    return number_of(item.life)


SHARABLE = (UserState.CREATING, UserState.FORKING, UserState.CONFIRMED)


@dataclass
class Handle:
    """An RRef object of a worker's program.

    Attributes:
        fork_id: the fork, or None for the owner's own.
        lineage: the workers that the handle came through, this one included.
    """

    rref_id: RRefId
    owner: int
    fork_id: ForkId | None
    lineage: frozenset[int]
    waits: bool = False


@dataclass
class Packet:
    """Something under way."""

    source: int
    to: int


@dataclass
class ControlPacket(Packet):
    """A control message; `number` is what its acknowledgement names; `asks`: the sender's fork waits for it."""

    number: int
    message: Control
    asks: bool


@dataclass
class Ack(Packet):
    number: int


@dataclass
class Carry(Packet):
    """A call or a reply that carries a pickled RRef.

    Attributes:
        call: its number, which names it together with the worker that made it.
        is_answer: it is a reply.
        is_given_up: its caller waits no longer.
    """

    rref_id: RRefId
    owner: int
    fork_id: ForkId
    lineage: frozenset[int]
    announced: bool
    call: int
    is_answer: bool
    is_given_up: bool = False

    @property
    def fork(self) -> ForkData:
        return ForkData(self.owner, life_of(self.owner), self.rref_id, self.fork_id)


@dataclass
class Creation(Packet):
    """remote() on its way to the owner."""

    rref_id: RRefId
    fork_id: ForkId


@dataclass
class Created(Packet):
    """The owner's answer to remote()."""

    fork_id: ForkId


@dataclass
class Fetch(Packet):
    handle: Handle


@dataclass
class Worker:
    """One life of a worker. `rank` is its place in the world: those that come again stand behind the others."""

    rank: int
    table: RRefTable
    handles: list[Handle] = field(default_factory=list)
    unacknowledged: dict[int, ControlPacket] = field(default_factory=dict)
    creating: set[ForkId] = field(default_factory=set)
    values: set[RRefId] = field(default_factory=set)
    waiters: dict[RRefId, list[Handle]] = field(default_factory=lambda: defaultdict(list))


class World:
    """Some workers and everything under way between them."""

    def __init__(self, size: int) -> None:
        self.current = [0] * size  # the worker that has that rank now, or had it last
        self.workers: list[Worker] = []
        self.ids: list[IdGenerator] = []
        for rank in range(size):
            self._add(rank)
        self.dead: set[int] = set()
        self.told: dict[int, set[int]] = defaultdict(set)
        self.packets: list[Packet] = []
        self.late: list[Packet] = []
        self.next_number = 0
        self.undeliverable: set[RRefId] = set()
        self.given_up: set[RRefId] = set()
        """RRefs whose creation was lost for good: their users exist and their value never will."""

    def _add(self, rank: int) -> None:
        """A worker comes; it gives out ids under `rank`, from 0 on."""
        number = self.current[rank] = len(self.workers)
        self.workers.append(Worker(number, RRefTable(life_of(number))))
        self.ids.append(IdGenerator(rank, life_of(number)))

    def come_again(self, choice: int) -> None:
        """A worker that has died comes again under its rank, whether or not all have heard of its death."""
        free = [rank for rank, number in enumerate(self.current) if number in self.dead]
        if free:
            self._add(free[choice % len(free)])

    # ---- what programs do --------------------------------------------------------------------------------------

    def make_local(self, rank: int) -> None:
        """RRef(value) on `rank`."""
        rank = self.current[rank]
        self.workers[rank].handles.append(Handle(self.ids[rank].next(), rank, None, frozenset({rank})))

    def make_remote(self, rank: int, owner: int) -> None:
        """remote() from `rank` to `owner`."""
        rank, owner = self.current[rank], self.current[owner]
        worker = self.workers[rank]
        if owner == rank:
            rref_id = self.ids[rank].next()
            worker.table.begin_here(rref_id)
            worker.values.add(rref_id)
            worker.handles.append(Handle(rref_id, rank, None, frozenset({rank})))
            self.packets.append(Creation(rank, rank, rref_id, rref_id))
            return
        rref_id, fork_id = self.ids[rank].next(), self.ids[rank].next()
        worker.table.create(rref_id, fork_id, life_of(owner))
        worker.creating.add(fork_id)
        worker.handles.append(Handle(rref_id, owner, fork_id, frozenset({rank})))
        self.packets.append(Creation(rank, owner, rref_id, fork_id))

    def give_up_creating(self, choice: int) -> None:
        """A remote() times out; its message and its answer may still be under way."""
        creating = [(w, fork) for w in self.workers if w.rank not in self.dead for fork in sorted(w.creating)]
        if creating:
            worker, fork_id = creating[choice % len(creating)]
            worker.creating.discard(fork_id)
            self.act(worker.rank, worker.table.failed(fork_id))

    def share_unannounced(self, choice: int, to: int) -> None:
        """As `share`, but whoever pickles it does not know for whom."""
        self.share(choice, to, announced=False)

    def share(self, choice: int, to: int, announced: bool = True) -> None:
        """A worker sends one of its RRefs to `to`."""
        picked = self._pick(choice)
        if picked is None:
            return
        worker, handle = picked
        rank, to = worker.rank, self.current[to]
        if handle.fork_id is not None and worker.table.user_state(handle.fork_id) not in SHARABLE:
            return
        child = self.ids[rank].next()
        if handle.fork_id is None:
            worker.table.share_owned(handle.rref_id, child)
            if worker.table.owner_state(handle.rref_id) is OwnerState.LIVE:
                worker.values.add(handle.rref_id)
        else:
            worker.table.share_used(handle.fork_id, child)
        is_answer, lineage = bool(choice & 32), handle.lineage | {to}
        carry = Carry(rank, to, handle.rref_id, handle.owner, child, lineage, announced, self.next_number, is_answer)
        self.next_number += 1
        self.packets.append(carry)
        if announced:
            self.act(rank, worker.table.sent(handle.rref_id, child, life_of(to)))
        if is_answer:
            self.act(rank, worker.table.answering(life_of(to), carry.call, [carry.fork]))

    def give_up_call(self, choice: int) -> None:
        """A caller has waited long enough for an answer: the request or the answer is lost, or late."""
        under_way = [p for p in (*self.packets, *self.late) if isinstance(p, Carry) and not p.is_given_up]
        if not under_way:
            return
        carry = under_way[choice % len(under_way)]
        caller, callee = (carry.to, carry.source) if carry.is_answer else (carry.source, carry.to)
        if caller in self.dead:
            return
        carry.is_given_up = True
        if choice & 32:
            self.packets = [p for p in self.packets if p is not carry]
            self.late = [p for p in self.late if p is not carry]
        self._tell(caller, callee, Unanswered(carry.call, () if carry.is_answer else (carry.fork,)), asks=False)

    def fetch(self, choice: int) -> None:
        """to_here() on a user's RRef."""
        picked = self._pick(choice)
        if picked and picked[1].owner != picked[0].rank:
            worker, handle = picked
            self.packets.append(Fetch(worker.rank, handle.owner, handle))

    def drop(self, choice: int) -> None:
        """A program lets go of one of its RRefs."""
        picked = self._pick(choice)
        if picked is None:
            return
        self.let_go(*picked)

    def let_go(self, worker: Worker, handle: Handle) -> None:
        """A program lets go of that one."""
        rank = worker.rank
        worker.handles.remove(handle)
        if handle.owner != rank and handle.fork_id is not None:
            self.act(rank, worker.table.user_dropped(handle.fork_id))
        elif handle.waits and handle.fork_id is not None:
            self.act(rank, worker.table.home_dropped(handle.rref_id, handle.fork_id))

    def die(self, rank: int) -> None:
        """Worker `rank` dies; nobody knows yet."""
        self.dead.add(self.current[rank])

    def tell_deaths(self, rank: int) -> None:
        """Worker `rank` hears who died."""
        self.tell_all_deaths(self.current[rank])

    def tell_all_deaths(self, number: int) -> None:
        """Worker `number` hears who died."""
        for dead in sorted(self.dead):
            self.tell_death(number, dead)

    def tell_death(self, rank: int, dead: int) -> None:
        """Worker `rank` hears that `dead` died. Its own requests to `dead` fail with it."""
        if dead not in self.dead or rank in self.dead or dead in self.told[rank]:
            return
        self.told[rank].add(dead)
        worker = self.workers[rank]
        self.act(rank, worker.table.peer_lost(life_of(dead)))
        assert not any(maker_of(rref_id) == dead for rref_id in worker.waiters), "somebody waits for a dead creator"
        for number, packet in list(worker.unacknowledged.items()):
            if packet.to == dead:
                del worker.unacknowledged[number]
                if packet.asks:
                    self.act(rank, worker.table.failed(packet.message.fork_id))

    # ---- what the network does ---------------------------------------------------------------------------------

    def deliver(self, choice: int) -> None:
        """One packet arrives."""
        if self.packets:
            self._arrive(self.packets.pop(choice % len(self.packets)))

    def delay(self, choice: int) -> None:
        """One packet stays under way until `arrive_late` or the end."""
        if self.packets:
            self.late.append(self.packets.pop(choice % len(self.packets)))

    def arrive_late(self, choice: int) -> None:
        """A delayed packet arrives."""
        if self.late:
            self._arrive(self.late.pop(choice % len(self.late)))

    def repeat_late(self, choice: int) -> None:
        """A control message arrives twice, the second time much later."""
        repeatable = [p for p in self.packets if isinstance(p, ControlPacket)]
        if repeatable:
            self.late.append(repeatable[choice % len(repeatable)])

    def calm(self) -> None:
        """Everything under way arrives, the oldest first, but what is delayed."""
        while self.packets:
            self.deliver(0)

    def repeat(self, choice: int) -> None:
        """A control message or an acknowledgement is on its way twice."""
        repeatable = [p for p in self.packets if isinstance(p, ControlPacket | Ack)]
        if repeatable:
            self.packets.append(repeatable[choice % len(repeatable)])

    def lose(self, choice: int) -> None:
        """A packet is lost: a control message, its acknowledgement, a fetch, or a remote() whose caller gave up."""
        losable = [
            p
            for p in self.packets
            if isinstance(p, ControlPacket | Ack | Fetch) or (isinstance(p, Creation | Created) and self._given_up(p))
        ]
        if losable:
            packet = losable[choice % len(losable)]
            self.packets.remove(packet)
            if isinstance(packet, Creation):
                self.undeliverable.add(packet.rref_id)

    def retry(self, rank: int) -> None:
        """Worker `rank` repeats what is not acknowledged."""
        self.repeat_all(self.current[rank])

    def repeat_all(self, number: int) -> None:
        """Worker `number` repeats what is not acknowledged."""
        if number not in self.dead:
            self.packets.extend(self.workers[number].unacknowledged.values())

    def act(self, rank: int, actions: list[Action]) -> None:
        """Carry out what a table asked for."""
        worker = self.workers[rank]
        for action in actions:
            if isinstance(action, Tell | AskOwner):
                asks = isinstance(action, AskOwner)
                if not self._tell(rank, number_of(action.to), action.message, asks=asks) and asks:
                    self.act(rank, worker.table.failed(action.message.fork_id))
            elif isinstance(action, Release):
                worker.values.discard(action.rref_id)
                unanswered = worker.waiters.pop(action.rref_id, None)
                assert not unanswered, f"nobody answers {unanswered}"
            elif isinstance(action, Unmade):
                worker.waiters.pop(action.rref_id, None)
            elif isinstance(action, Orphan):
                assert maker_of(action.rref_id) in self.told[rank]
                worker.waiters.pop(action.rref_id, None)

    def _tell(self, rank: int, to: int, message: Control, *, asks: bool) -> bool:
        """Send a control message; false if that worker is known to be dead."""
        packet = ControlPacket(rank, to, self.next_number, message, asks)
        self.next_number += 1
        if to in self.told[rank]:
            return False
        self.workers[rank].unacknowledged[packet.number] = packet
        self.packets.append(packet)
        return True

    # ---- what must hold ----------------------------------------------------------------------------------------

    def check(self) -> None:
        """No early delete: a handle that came through living workers only keeps a value that exists."""
        for worker in self.workers:
            if worker.rank not in self.dead:
                for handle in worker.handles:
                    self._check_handle(worker, handle)
        for packet in self.packets + self.late:
            if isinstance(packet, Carry) and not packet.is_given_up:
                self._check_value(packet.rref_id, packet.owner, packet.lineage | {packet.source})

    def settle(self) -> None:
        """Every death is told and everything arrives but what is delayed; then every living user asks once more.

        Then every handle is dropped, what was delayed arrives, and remote() that got no answer times out, until nothing
        is under way.
        """
        for worker in self.workers:
            self.tell_all_deaths(worker.rank)
        self._exhaust()
        for worker in self.workers:
            if worker.rank not in self.dead:
                for handle in worker.handles:
                    self._check_answer(worker, handle)
        while self._pick(0):
            self.drop(0)
        self._exhaust()
        while self.late or any(self._busy(worker) for worker in self.workers):
            self.packets += self.late
            self.late.clear()
            self._exhaust()
            while self._pick(0):
                self.drop(0)
            self.give_up_creating(0)

    def _exhaust(self) -> None:
        """Everything arrives, and is repeated until it is acknowledged, but what is delayed."""
        self.calm()
        for _ in range(2):
            for worker in self.workers:
                self.repeat_all(worker.rank)
            self.calm()

    def _check_answer(self, worker: Worker, handle: Handle) -> None:
        """A fetch is answered or refused, and waits only for a creation that is under way or lost."""
        if handle.owner in self.dead or handle.owner == worker.rank or handle.fork_id is None:
            return
        owner = self.workers[handle.owner]
        availability = owner.table.value_wanted(handle.rref_id, handle.fork_id, life_of(worker.rank))
        is_unmade = handle.rref_id in self.given_up and handle.rref_id not in owner.values
        if availability is Availability.AWAITED:
            assert maker_of(handle.rref_id) not in self.dead, handle
            assert not is_unmade, f"{handle} waits for what its creator has given up"
            assert handle.rref_id in self.undeliverable or self._creation_under_way(handle.rref_id), handle
        if not handle.lineage & self.dead and maker_of(handle.rref_id) not in self.dead:
            assert is_unmade or availability is not Availability.REFUSED, handle

    def check_empty(self) -> None:
        """No leak: no living worker's table holds anything."""
        for worker in self.workers:
            if worker.rank not in self.dead:
                table = worker.table
                assert table.owned_forks() == {}, f"worker {worker.rank} leaks {table.owned_forks()}"
                assert worker.values == set(), f"worker {worker.rank} keeps the values {worker.values}"
                assert table.num_users == 0, f"worker {worker.rank} keeps {table.num_users} forks"
                assert table.num_children == 0, f"worker {worker.rank} waits for {table.num_children} children"
                assert table.num_unconfirmed_users == 0

    # ---- below -------------------------------------------------------------------------------------------------

    def _busy(self, worker: Worker) -> bool:
        return worker.rank not in self.dead and bool(worker.handles or worker.unacknowledged or worker.creating)

    def _given_up(self, packet: Creation | Created) -> bool:
        creator = packet.source if isinstance(packet, Creation) else packet.to
        return creator in self.dead or packet.fork_id not in self.workers[creator].creating | {self._self_fork(packet)}

    @staticmethod
    def _self_fork(packet: Creation | Created) -> GlobalId | None:
        return packet.fork_id if isinstance(packet, Creation) and packet.source == packet.to else None

    def _pick(self, choice: int) -> tuple[Worker, Handle] | None:
        held = [(w, handle) for w in self.workers if w.rank not in self.dead for handle in w.handles]
        return held[choice % len(held)] if held else None

    def _check_handle(self, worker: Worker, handle: Handle) -> None:
        if handle.fork_id is None or handle.owner == worker.rank:
            return
        if handle.lineage & self.dead or handle.owner in self.dead:
            return
        assert worker.table.user_state(handle.fork_id) in (*SHARABLE, UserState.DOUBTFUL)
        self._check_value(handle.rref_id, handle.owner, handle.lineage)

    def _check_value(self, rref_id: RRefId, owner: int, lineage: frozenset[int]) -> None:
        """A value that somebody can ask for exists, unless its creation is under way, or lost, or its maker dead."""
        if lineage & self.dead or owner in self.dead or maker_of(rref_id) in self.dead:
            return
        if rref_id in self.undeliverable or self._creation_under_way(rref_id):
            return
        owning = self.workers[owner]
        local = any(h.rref_id == rref_id for h in owning.handles)
        assert rref_id in owning.values or local, (
            f"the value of {rref_id} is gone, and {sorted(lineage)} can ask for it"
        )

    def _creation_under_way(self, rref_id: RRefId) -> bool:
        return any(isinstance(p, Creation) and p.rref_id == rref_id for p in self.packets + self.late)

    def _arrive(self, packet: Packet) -> None:
        if packet.to in self.dead:
            return
        worker, table = self.workers[packet.to], self.workers[packet.to].table
        if isinstance(packet, Ack):
            sent = worker.unacknowledged.pop(packet.number, None)
            if sent and sent.asks:
                assert isinstance(sent.message, RRefForkRequest)
                self.act(worker.rank, table.acknowledged(sent.message.fork_id))
        elif isinstance(packet, ControlPacket):
            self._control(worker, packet)
        elif isinstance(packet, Carry):
            self._carried(worker, packet)
        elif isinstance(packet, Creation):
            self._creation(worker, packet)
        elif isinstance(packet, Created):
            if packet.fork_id in worker.creating:
                worker.creating.discard(packet.fork_id)
                self.act(worker.rank, table.acknowledged(packet.fork_id))
        elif isinstance(packet, Fetch):
            self._fetched(worker, packet)

    def _control(self, worker: Worker, packet: ControlPacket) -> None:
        message, table = packet.message, worker.table
        if isinstance(message, RRefForkRequest):
            table.fork_requested(message.rref_id, message.fork_id, life_of(packet.source))
        elif isinstance(message, RRefCreationFailed):
            self.given_up.add(message.rref_id)
            self.act(worker.rank, table.creation_failed(message.rref_id))
        elif isinstance(message, RRefChildAccept):
            self.act(worker.rank, table.child_accepted(message.fork_id))
        elif isinstance(message, Unanswered):
            self.act(worker.rank, table.unanswered(life_of(packet.source), message.call, message.forks))
        else:
            self.act(worker.rank, table.user_deleted(message.rref_id, message.fork_id))
        self.packets.append(Ack(worker.rank, packet.source, packet.number))

    def _carried(self, worker: Worker, packet: Carry) -> None:
        if packet.owner != worker.rank:
            life, parent = life_of(packet.owner), life_of(packet.source)
            try:
                actions = worker.table.receive(packet.rref_id, packet.fork_id, life, parent, announced=packet.announced)
            except RRefError:
                assert packet.is_given_up
                return
            self.act(worker.rank, actions)
            worker.handles.append(Handle(packet.rref_id, packet.owner, packet.fork_id, packet.lineage))
            if packet.is_given_up and packet.is_answer:
                self.let_go(worker, worker.handles[-1])
            return
        availability, actions = worker.table.came_home(packet.rref_id, packet.fork_id, life_of(packet.source))
        self.act(worker.rank, actions)
        if availability is not Availability.REFUSED:
            waits = availability is Availability.AWAITED
            worker.handles.append(Handle(packet.rref_id, packet.owner, packet.fork_id, packet.lineage, waits))
            if packet.is_given_up and packet.is_answer:
                self.let_go(worker, worker.handles[-1])
        elif not packet.is_given_up:
            alive = not packet.lineage & self.dead and maker_of(packet.rref_id) not in self.dead
            is_known = any(h.rref_id == packet.rref_id for h in worker.handles) or packet.rref_id in self.given_up
            assert not alive or is_known, "the owner lost its own RRef"

    def _creation(self, worker: Worker, packet: Creation) -> None:
        if packet.source == packet.to:
            self.act(worker.rank, worker.table.finish_here(packet.rref_id))
            return
        worker.values.add(packet.rref_id)
        worker.waiters.pop(packet.rref_id, None)
        self.act(worker.rank, worker.table.creation_arrived(packet.rref_id, packet.fork_id, life_of(packet.source)))
        self.packets.append(Created(worker.rank, packet.source, packet.fork_id))

    def _fetched(self, worker: Worker, packet: Fetch) -> None:
        handle = packet.handle
        assert handle.fork_id is not None
        holder = self.workers[packet.source]
        availability = worker.table.value_wanted(handle.rref_id, handle.fork_id, life_of(packet.source))
        interested = handle in holder.handles and not (handle.lineage | {packet.source}) & self.dead
        if availability is Availability.REFUSED and interested:
            is_unmade = handle.rref_id in self.given_up and handle.rref_id not in worker.values
            assert maker_of(handle.rref_id) in self.dead or is_unmade, f"{handle} was refused"
        if availability is Availability.AWAITED:
            worker.waiters[handle.rref_id].append(handle)
