"""The table of the group's members, as this worker knows it. Pure: comings and goings in, answers out."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from zrpc.errors import UnknownWorkerError

if TYPE_CHECKING:
    from zrpc.ids import Incarnation, WorkerInfo
    from zrpc.membership.group import Member


class Registry:
    """Members by name, by rank and by incarnation.

    Changed under its lock; read without it, since each look-up is one dict access.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_name: dict[str, Member] = {}
        self._by_rank: dict[int, Member] = {}
        self._by_incarnation: dict[Incarnation, Member] = {}

    def add(self, member: Member) -> bool:
        """Take in `member`; a new life of a known name or rank replaces the old one. False: it was here already."""
        with self._lock:
            if member.incarnation in self._by_incarnation:
                return False
            for old in (self._by_name.get(member.info.name), self._by_rank.get(member.info.id)):
                if old is not None:
                    self._forget(old)
            self._by_name[member.info.name] = member
            self._by_rank[member.info.id] = member
            self._by_incarnation[member.incarnation] = member
            return True

    def remove(self, incarnation: Incarnation) -> Member | None:
        """Take out the member of that life; it, if it was here."""
        with self._lock:
            member = self._by_incarnation.get(incarnation)
            if member is not None:
                self._forget(member)
            return member

    def _forget(self, member: Member) -> None:
        self._by_incarnation.pop(member.incarnation, None)
        if self._by_name.get(member.info.name) is member:
            del self._by_name[member.info.name]
        if self._by_rank.get(member.info.id) is member:
            del self._by_rank[member.info.id]

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

    def _unknown(self, what: str) -> UnknownWorkerError:
        known = ", ".join(f"{info.name} ({info.id})" for info in self.all()[:32])
        return UnknownWorkerError(
            f"could not find destination {what}; the workers of this group are {known or 'none yet'}"
        )
