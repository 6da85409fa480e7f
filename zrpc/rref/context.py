"""`RRefContext`: the reference counts of one worker at work. It has the table, the values it keeps, and sends messages.

Every event goes the same way (`decide`): the table decides under the lock, values that nobody uses are taken out under
the same lock (so that a value shared again in that moment is not lost), and messages are sent after it. What `__del__`
of RRefs sees is left to the control thread. Values are let go of on a thread of their own (`Agent.drop`): their
`__del__` is user code.

Any thread may call in. `_lock` owns `_table`, `_cells`, `_num_sending` and `_closed`.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from zrpc import finalizers, interrupts
from zrpc.agent.pool import blocking
from zrpc.errors import PeerLostError, RRefError
from zrpc.rref.actions import Action, AskOwner, Orphan, Release, Tell, Unmade
from zrpc.rref.cell import Cell
from zrpc.rref.forkdata import ForkData
from zrpc.rref.looks import debug_counts
from zrpc.rref.owners import Availability
from zrpc.rref.states import UserState
from zrpc.rref.table import RRefTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from zrpc.agent.agent import Agent
    from zrpc.agent.future import Future
    from zrpc.ids import ForkId, Incarnation, RRefId, WorkerInfo

    Backward = Callable[[int, list[torch.Tensor], bool], None]
    Note = tuple[RRefId | None, ForkId] | ForkData

UNSENT_GRACE_S = 2.0
"""How long a shutdown waits for forks that nobody is known to have. Those in answers are with their readers by then."""

T = TypeVar("T")
_NEW_LIFE = "init_rpc made another one since."
_FORK_PHRASE = "Cannot call fork an UserRRef after deletion."
_UNCONFIRMED = (UserState.CREATING, UserState.FORKING)
_DELETED = (UserState.GONE, UserState.LEAVING, UserState.LEAVING_UNCONFIRMED)


class Invoker(Protocol):
    """How proxies call: `zrpc.api` looks like this, and so does whatever profiles calls."""

    def rpc_sync(
        self, to: WorkerInfo, func: Callable[..., Any], args: tuple[Any, ...], kwargs: None, timeout: float
    ) -> Any:
        """See `zrpc.api.rpc_sync`."""

    def rpc_async(
        self, to: WorkerInfo, func: Callable[..., Any], args: tuple[Any, ...], kwargs: None, timeout: float
    ) -> Future[Any]:
        """See `zrpc.api.rpc_async`."""

    def remote(
        self, to: WorkerInfo, func: Callable[..., Any], args: tuple[Any, ...], kwargs: None, timeout: float
    ) -> Any:
        """See `zrpc.api.remote`."""


class RRefContext:
    """What this worker owns and uses. See torch's class of that name.

    Args:
        agent: the worker.
        invoke: how the proxies of RRefs call.
        backward: runs `(context_id, roots, retain_graph)` as distributed autograd does.
    """

    def __init__(self, agent: Agent, invoke: Invoker, backward: Backward) -> None:
        self.agent = agent
        self.invoke = invoke
        self.backward = backward
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._table_made: RRefTable | None = None
        self._cells: dict[RRefId, Cell] = {}
        self._num_sending = 0
        self._expects_goodbyes = False
        self._closed = False

    # ---- creations, and what users ask

    def begin_remote(self, rref_id: RRefId, fork_id: ForkId, owner: WorkerInfo) -> None:
        """remote() is about to ask `owner` for a new RRef; `answered` follows."""
        with self._lock:
            self._check_open(_NEW_LIFE)
            self._table.create(rref_id, fork_id, owner.incarnation)
        self._watch(owner.incarnation)

    def answered(self, fork_id: ForkId, failed: bool) -> None:
        """The owner has answered what `begin_remote` announced, or asking it failed."""
        self.decide(lambda table: table.failed(fork_id) if failed else table.acknowledged(fork_id))

    def begin_here(self, rref_id: RRefId, cell: Cell) -> None:
        """remote() to this worker itself: the RRef is kept until `finish_here` at least."""
        with self._lock:
            self._check_open(_NEW_LIFE)
            self._table.begin_here(rref_id)
            self._cells[rref_id] = cell

    def finish_here(self, rref_id: RRefId) -> None:
        """The call that `begin_here` announced is over."""
        self.decide(lambda table: table.finish_here(rref_id))

    def creation_arrived(self, rref_id: RRefId, fork_id: ForkId, creator: WorkerInfo) -> Cell:
        """A creation came; the cell for its value. The RRef's life here begins, unless it is over already."""
        self._watch(creator.incarnation)
        found: list[Cell] = []

        def arrive(table: RRefTable) -> list[Action]:
            found.append(self._cells.setdefault(rref_id, Cell()))
            if fork_id == rref_id:  # remote() to this worker itself: `begin_here` counted it
                return []
            return table.creation_arrived(rref_id, fork_id, creator.incarnation)

        self.decide(arrive)
        return found[0] if found else Cell()

    def wanted(self, rref_id: RRefId, fork_id: ForkId, asker: WorkerInfo) -> Cell:
        """Where the value is or will be that `asker` wants.

        Raises:
            RRefError: it is gone.
        """
        self._watch(asker.incarnation, rref_id.life)
        with self._lock:
            if self._closed:
                raise RRefError(f"The value of {rref_id} is gone: its owner {self.agent.info} has shut down")
            if self._table.value_wanted(rref_id, fork_id, asker.incarnation) is not Availability.REFUSED:
                return self._cells.setdefault(rref_id, Cell())
        raise RRefError(
            f"The value of {rref_id} is gone, or was never made: its user {fork_id} was deleted before, or who handed "
            "it on died before the owner counted it, or the call to make it did not come"
        )

    def fork_requested(self, rref_id: RRefId, fork_id: ForkId, holder: WorkerInfo) -> None:
        """Count a new user."""
        self._watch(holder.incarnation, rref_id.life)
        self.decide(lambda table: table.fork_requested(rref_id, fork_id, holder.incarnation))

    def on_peer_lost(self, peer: WorkerInfo, _reason: str) -> None:
        """Everything that `peer` held or owned is gone."""
        if not self._expects_goodbyes:
            self.decide(lambda table: table.peer_lost(peer.incarnation))

    def expect_goodbyes(self) -> None:
        """The others end as this worker does, and may be gone before it: what they have not given up is a leak."""
        self._expects_goodbyes = True

    # ---- RRefs come and go

    def fork(self, owner: WorkerInfo, rref_id: RRefId, fork_id: ForkId | None, cell: Cell | None) -> ForkData:
        """Count a new fork of this worker's own RRef (`cell` holds its value) or of its fork `fork_id`.

        Raises:
            RRefError: it was deleted, or is of a worker's life that is over.
            PeerLostError: its owner is gone.
        """
        with self._lock:
            self._check_open(_FORK_PHRASE)
            child = self.agent.ids.next()
            if cell is not None:
                self._table.share_owned(rref_id, child)
                self._cells.setdefault(rref_id, cell)
            else:
                assert fork_id is not None
                self._check_usable(owner, rref_id, fork_id, _FORK_PHRASE)
                if self._table.user_state(fork_id) is UserState.DOUBTFUL:
                    raise RRefError(f"{rref_id} cannot be shared: asking its owner, {owner}, to count it failed")
                self._table.share_used(fork_id, child)
        return ForkData(owner.id, owner.incarnation, rref_id, child)

    def sent(self, fork: ForkData, holder: WorkerInfo) -> None:
        """`fork` leaves for `holder`: if `holder` is lost, so is the fork."""
        self._watch(holder.incarnation)
        self.decide(lambda table: table.sent(fork.rref_id, fork.fork_id, holder.incarnation))

    def receive_used(self, fork: ForkData, announced: bool) -> None:
        """A fork of another worker's RRef came."""
        self._watch(fork.owner_life)
        self.decide(
            lambda table: table.receive(fork.rref_id, fork.fork_id, fork.owner_life, fork.parent, announced=announced)
        )

    def receive_owned(self, fork: ForkData) -> tuple[Cell, bool]:
        """This worker's own RRef came home.

        Returns:
            Its cell, and whether its creation is still to come: then a note `(rref_id, fork_id)` must follow.

        Raises:
            RRefError: its value is gone.
        """
        self._watch(fork.rref_id.life)
        found: list[tuple[Availability, Cell | None]] = []

        def arrive(table: RRefTable) -> list[Action]:
            cell = self._cells.get(fork.rref_id)
            availability, actions = table.came_home(fork.rref_id, fork.fork_id, fork.parent)
            if availability is Availability.AWAITED:
                cell = self._cells.setdefault(fork.rref_id, Cell())
            found.append((availability, cell))
            return actions

        self.decide(arrive)
        availability, cell = found[0]
        if availability is Availability.REFUSED or cell is None:
            raise RRefError(
                f"The value of the RRef {fork.rref_id} is gone: it was deleted, because those who handed it on died"
            )
        return cell, availability is Availability.AWAITED

    def note_dropped(self, owner_awaited: RRefId | None, fork_id: ForkId) -> None:
        """An RRef object was freed: a fork, or (`owner_awaited`) this worker's own. For `__del__`: from anywhere."""
        self._note((owner_awaited, fork_id))

    def note_unsent(self, fork: ForkData) -> None:
        """`fork` was pickled and will not leave. For `__del__`: from anywhere."""
        self._note(fork)

    def user_state(self, fork_id: ForkId) -> UserState:
        """The state of this worker's fork `fork_id`."""
        with self._lock:
            return UserState.GONE if self._closed else self._table.user_state(fork_id)

    def check_usable(self, owner: WorkerInfo, rref_id: RRefId, fork_id: ForkId, phrase: str) -> None:
        """Raise what keeps the fork `fork_id` from being used; `phrase` says what cannot be done with it.

        Raises:
            RRefError: it was deleted, or is of a worker's life that is over.
            PeerLostError: its owner is gone.
        """
        with self._lock:
            self._check_open(phrase)
            self._check_usable(owner, rref_id, fork_id, phrase)

    def wait_confirmed(self, fork_ids: Iterable[ForkId]) -> None:
        """Wait until the owners of `fork_ids` count them, or cannot any more."""
        unconfirmed = set(fork_ids)

        def settled() -> bool:
            unconfirmed.intersection_update([one for one in unconfirmed if self._table.user_state(one) in _UNCONFIRMED])
            return not unconfirmed or self._closed

        with self._lock:
            if settled():
                return
        with blocking(), self._lock:
            self._changed.wait_for(settled)

    # ---- the end

    def delete_all_user_and_unforked_owner_rrefs(self, timeout_s: float = 100.0) -> None:
        """Give up every RRef here, and wait until the others gave up theirs to what this worker owns.

        For a graceful shutdown: nobody makes or shares RRefs any more. What was pickled and is not known to have left
        (its pickling failed, or `_serialize` was called for nothing) is waited for only shortly. What does not come to
        pass in `timeout_s` is left to `destroy`.
        """
        deadline = time.monotonic() + timeout_s
        self._wait_until(lambda table: not table.num_unconfirmed_users and not table.num_sent_children, deadline)
        self._wait_until(lambda table: not table.num_children, min(deadline, time.monotonic() + UNSENT_GRACE_S))
        self.decide(lambda table: table.drop_all_users())
        self.decide(lambda table: table.drop_unforked_owners())
        self._wait_until(lambda table: not table.num_sent_owned, deadline)
        self._wait_until(lambda table: not table.num_owned, min(deadline, time.monotonic() + UNSENT_GRACE_S))
        self.decide(lambda table: table.drop_unsent())
        self._wait_until(lambda table: not table.num_owned and not self._num_sending, deadline)

    def destroy(self, ignore_leak: bool) -> None:
        """End it: RRefs of this life can not be used any more, and values are let go of. Idempotent.

        Raises:
            RRefError: others still use RRefs of this worker, and `ignore_leak` is false.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            forks = self._table.owned_forks() if self._table_made else {}
            garbage = list(self._cells.values())
            self._cells.clear()
            self._changed.notify_all()
        if garbage:
            self.agent.drop(garbage)
        if forks and not ignore_leak:
            leaks = [(rref_id, fork_id) for rref_id, held in forks.items() for fork_id in held]
            raise RRefError("\n".join(f"Leaking RRef {rref_id} with fork Id {fork_id}" for rref_id, fork_id in leaks))

    def debug_info(self) -> dict[str, str]:
        """Counts, under the names that torch gives them."""
        return self.looked_at(debug_counts)

    def looked_at(self, look: Callable[[RRefTable | None, dict[RRefId, Cell], int], T]) -> T:
        """What `look` makes of the table, the values here and the number of messages under way, under the lock."""
        with self._lock:
            return look(self._table_made, self._cells, self._num_sending)

    # ---- below

    @property
    def _table(self) -> RRefTable:
        """The table; it is made at first use, when the agent has a rank. Call it under the lock."""
        if self._table_made is None:
            self._table_made = RRefTable(self.agent.info.incarnation)
        return self._table_made

    def decide(self, event: Callable[[RRefTable], list[Action]]) -> None:
        """Let the table decide on `event`, and carry out what it asks for."""
        with interrupts.held:
            with self._lock:
                if self._closed:
                    return
                actions = event(self._table)
                garbage: list[Any] = []
                unmade: list[tuple[Cell, RRefError | PeerLostError]] = []
                for action in actions:
                    if isinstance(action, Release):
                        garbage.append(self._cells.pop(action.rref_id, None))
                    elif isinstance(action, Unmade):
                        unmade.append((self._cells.pop(action.rref_id, Cell()), action.error()))
                    elif isinstance(action, Orphan):
                        unmade.append((self._cells.setdefault(action.rref_id, Cell()), action.error()))
                self._num_sending += sum(isinstance(action, Tell | AskOwner) for action in actions)
                self._changed.notify_all()
            if garbage:
                self.agent.drop(garbage)
            for cell, error in unmade:
                cell.set_error(error)
            for action in actions:
                if isinstance(action, Tell | AskOwner):
                    self._send(action)

    def _send(self, action: Tell | AskOwner) -> None:
        def done(error: BaseException | None) -> None:
            with self._lock:
                self._num_sending -= 1
                self._changed.notify_all()
            if isinstance(action, AskOwner):
                fork_id = action.message.fork_id
                self.decide(lambda table: table.failed(fork_id) if error else table.acknowledged(fork_id))

        member = self.agent.members.by_incarnation(action.to)
        if member is None:
            done(PeerLostError("the worker is not in the group any more"))
            return
        self.agent.notify(member.info, action.message, done, inline=isinstance(action, Tell))

    def _note(self, note: Note) -> None:
        if not self._closed:
            finalizers.defer(partial(self._on_note, note))

    def _on_note(self, note: Note) -> None:
        if isinstance(note, ForkData):
            self.decide(lambda table: table.unsent(note.rref_id, note.fork_id))
            return
        owner_awaited, fork_id = note
        if owner_awaited is not None:
            self.decide(lambda table: table.home_dropped(owner_awaited, fork_id))
        else:
            self.decide(lambda table: table.user_dropped(fork_id))

    def _wait_until(self, condition: Callable[[RRefTable], bool], deadline: float) -> bool:
        with blocking(), self._lock:
            return self._changed.wait_for(
                lambda: self._closed or condition(self._table), max(0.0, deadline - time.monotonic())
            )

    def _watch(self, *lives: Incarnation) -> None:
        """Have the end of these lives told to us even if we never call them. One that is over was told of."""
        for life in lives:
            if life in self.agent.watched or life == self.agent.info.incarnation:
                continue
            with self._lock:
                is_lost = self._table_made is not None and self._table_made.is_lost(life)
            if not is_lost:
                self.agent.watch_life(life)

    def _check_open(self, phrase: str) -> None:
        if self._closed:
            raise RRefError(f"This RRef is of a worker that was shut down. {phrase}")

    def _check_usable(self, owner: WorkerInfo, rref_id: RRefId, fork_id: ForkId, phrase: str) -> None:
        state = self._table.user_state(fork_id)
        if state in _DELETED:
            raise RRefError(f"The user of {rref_id} with fork id {fork_id} has been deleted. {phrase}")
        if state is UserState.ORPHANED:
            raise PeerLostError(f"The owner of {rref_id}, {owner}, is lost, and the value with it")
