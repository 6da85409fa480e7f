"""Who is here: the interface behind which a torch Store or a broker keeps names, ranks and incarnations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from zrpc.ids import Incarnation, WorkerInfo


@dataclass(frozen=True, slots=True)
class Member:
    """One worker of the group in one of its lives.

    Attributes:
        info: its name and rank; it knows the life too.
        incarnation: this life's id, and its identity on the transport.
        card: what it tells the others about itself (msgpack values): `address` where it listens (none with a broker),
            `host` it runs on, `pid` of its process there, `devices` and device maps.
    """

    info: WorkerInfo
    incarnation: Incarnation
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.info.incarnation != self.incarnation:
            object.__setattr__(self, "info", WorkerInfo(self.info.name, self.info.id, self.incarnation))


OnJoined = Callable[[Member], None]
OnLeft = Callable[[Incarnation, bool, str], None]
"""`on_left(incarnation, lost, reason)`: `lost` is false where the worker said goodbye."""


class Group(Protocol):
    """Membership of one worker in one group."""

    def join(
        self,
        name: str,
        rank: int,
        world_size: int | None,
        incarnation: Incarnation,
        card: dict[str, Any],
        timeout_s: float,
    ) -> tuple[Member, list[Member]]:
        """Come in and wait until all `world_size` workers have (None: the group may grow and shrink; wait for nobody).

        Returns:
            This worker's own member (its rank given out by the group if it was -1) and all members, this one included.

        Raises:
            RendezvousError: the store or broker is unreachable, or somebody did not come within `timeout_s`.
            RefusedError: the name or the rank is taken, or the world sizes differ.
        """

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        """Tell of later comings and goings, on any thread; the functions must not block. Called once, before `join`."""

    def refresh(self) -> None:
        """Look for newcomers now, and tell `watch`'s functions of them before returning.

        Raises:
            RendezvousError: the store is unreachable.
        """

    def note_lost(self, incarnation: Incarnation) -> None:
        """This worker cannot reach that life any more. Any thread; it does not block."""

    def linger(self, timeout_s: float) -> None:
        """All of a static group see that it cannot be and end at once: wait until they do, up to `timeout_s`."""

    def leave(self, timeout_s: float, *, at_exit: bool = False) -> None:
        """Say goodbye, so that the others do not take this worker for lost.

        Idempotent; never raises for a dead store or broker. With `at_exit` the process is about to end without
        `shutdown`: nothing is left behind that only a goodbye takes away, and the others learn of it by themselves
        once the process is gone.
        """
