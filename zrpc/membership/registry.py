"""The table of the group's members, as this worker knows it. Pure: comings and goings in, answers out."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from zrpc.errors import StaleWorkerError, UnknownWorkerError
from zrpc.ids import EndedLives, WorkerInfo

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.membership.group import Member


class Registry:
    """Members by name, by rank and by incarnation.

    Changed under its lock; read without it, since each look-up is one dict access. A life that is over does not come
    again, in whatever order it is told of.

    Attributes:
        ended: the lives that were over last, and why.
        named: the member of a name, or None. Every call asks for one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ended = EndedLives()
        self._by_name: dict[str, Member] = {}
        self.named = self._by_name.get
        self._by_rank: dict[int, Member] = {}
        self._by_incarnation: dict[Incarnation, Member] = {}

    def add(self, member: Member, *, although_ended: bool = False) -> list[Member] | None:
        """Take in `member`. Whoever has its name or rank is taken out: two lives have neither at the same time.

        Args:
            member: who came.
            although_ended: take it in even if it is known to be over.

        Returns:
            Who was taken out; None if `member` was not taken in: it was here already, or is over.
        """
        life = member.incarnation
        with self._lock:
            if life in self._by_incarnation or (life in self.ended and not although_ended):
                return None
            displaced = []
            for old in (self._by_name.get(member.info.name), self._by_rank.get(member.info.id)):
                if old is not None and old not in displaced:
                    displaced.append(old)
                    self._forget(old)
                    self.ended.note(old.incarnation, f"{member.info} came in its place")
            self._by_name[member.info.name] = member
            self._by_rank[member.info.id] = member
            self._by_incarnation[life] = member
            return displaced

    def end(self, incarnation: Incarnation, reason: str, *, keep: bool) -> Member | None:
        """That life is over; one that is not known yet will not be taken in any more.

        Args:
            incarnation: which life.
            reason: why it is over.
            keep: leave it in the table, where calls to it find out what happened.

        Returns:
            The member, if it is here.
        """
        with self._lock:
            self.ended.note(incarnation, reason)
            member = self._by_incarnation.get(incarnation)
            if member is not None and not keep:
                self._forget(member)
            return member

    def _forget(self, member: Member) -> None:
        self._by_incarnation.pop(member.incarnation, None)
        if self._by_name.get(member.info.name) is member:
            del self._by_name[member.info.name]
        if self._by_rank.get(member.info.id) is member:
            del self._by_rank[member.info.id]

    def find(self, to: str | int | WorkerInfo) -> WorkerInfo:
        """The worker that `to` names: by its life if it knows that, else by its rank.

        Raises:
            StaleWorkerError: it knows its life, and that one is not here.
            UnknownWorkerError: there is none.
            ValueError: `to` is none of the three.
        """
        if isinstance(to, WorkerInfo):
            if not to.incarnation:
                return self.by_rank(to.id)
            member = self._by_incarnation.get(to.incarnation)
            if member is None:
                raise self._stale(to)
            return member.info
        if isinstance(to, str):
            return self.by_name(to)
        if isinstance(to, int) and not isinstance(to, bool):
            return self.by_rank(to)
        raise ValueError(f"a worker is addressed by its name, its rank or its WorkerInfo, not by {to!r}")

    def by_name(self, name: str) -> WorkerInfo:
        """The worker of that name.

        Raises:
            UnknownWorkerError: there is none.
        """
        member = self._by_name.get(name)
        if member is None:
            raise self._unknown(f"name {name}")
        return member.info

    def by_rank(self, rank: int) -> WorkerInfo:
        """The worker of that rank.

        Raises:
            UnknownWorkerError: there is none.
        """
        member = self._by_rank.get(rank)
        if member is None:
            raise self._unknown(f"id {rank}")
        return member.info

    def member(self, rank: int) -> Member | None:
        """The member of that rank, or None."""
        return self._by_rank.get(rank)

    def by_incarnation(self, incarnation: Incarnation) -> Member | None:
        """The member of that life, or None."""
        return self._by_incarnation.get(incarnation)

    def all(self) -> list[WorkerInfo]:
        """Every worker here, in the order of ranks."""
        with self._lock:
            return [self._by_rank[rank].info for rank in sorted(self._by_rank)]

    def _stale(self, info: WorkerInfo) -> StaleWorkerError:
        reason = self.ended.get(info.incarnation)
        text = f"the worker that this {info} names is not in the group any more"
        text += f" ({reason})" if reason else " (it has left or died, or was of another group)"
        successor = self._by_name.get(info.name)
        if successor is not None:
            text += f". A new worker of that name is there: get_worker_info({info.name!r}) gives its WorkerInfo"
        else:
            text += ". Once a new worker of that name has come, get_worker_info gives its WorkerInfo"
        return StaleWorkerError(text)

    def _unknown(self, what: str) -> UnknownWorkerError:
        known = ", ".join(f"{info.name} ({info.id})" for info in self.all()[:32])
        return UnknownWorkerError(
            f"could not find destination {what}; the workers of this group are {known or 'none yet'}"
        )
