"""The group that a store or this host holds, as a process sees it that joins none.

Failure: what is there and cannot be read is `RefusedError`; that there is nothing is `RendezvousError`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from zrpc.errors import RefusedError, RendezvousError
from zrpc.membership.authenticated_store import with_secret
from zrpc.membership.counter import Counter
from zrpc.membership.records import Failure, Record, unpack_roster

if TYPE_CHECKING:
    from zrpc.membership.counter import Store
    from zrpc.membership.group import Member
    from zrpc.secret import Secret

KIND = re.compile(r"zrpc/(?:restart-(\d+)-of-(\d+)/)?(\d+)/kind")
ROUNDS = re.compile(r"(zrpc/torchrun-.*-of-(\d+)/\d+)/rank/0")
"""Where torchrun may start workers again, each life of rank 0 has a round of its own."""
GENERATIONS_MAX = 256
"""So many are looked for in a store that does not list its keys."""
SIZE_MAX = 1 << 16


@dataclass
class FoundGroup:
    """A group.

    Attributes:
        members: those that have come, as far as it is known.
        world_size: how many there are to be; 0: it grows and shrinks.
        phase: how far it is, for people.
    """

    members: list[Member] = field(default_factory=list)
    world_size: int = 0
    phase: str = ""


def in_store(raw: Any, secret: Secret | None, where: str) -> FoundGroup:
    """The group that came to a store last.

    Args:
        raw: the store, as torch gives it.
        secret: the group's.
        where: what to call the store, for errors.

    Raises:
        RendezvousError: there is none.
        RefusedError: what is there has another secret.
    """
    import torch.distributed as dist

    keys = _keys(raw)
    prefixes = _prefixes(keys)
    rounds = [match for key in sorted(keys) if (match := ROUNDS.fullmatch(key))]
    if rounds:
        prefix, size = rounds[-1].groups()
        store = with_secret(cast("Store", dist.PrefixStore(prefix, raw)), secret)
        return _static(store, min(int(size), SIZE_MAX), f"round/{store.get('rank/0').decode()}/")
    if not prefixes:
        raise RendezvousError(
            f"no group has met at {where}: check the address, and that its workers have called init_rpc"
        )
    store = with_secret(cast("Store", dist.PrefixStore(prefixes[-1], raw)), secret)
    kind, _, said = store.get("kind").decode().partition(" ")
    if kind != "static":
        return FoundGroup(_dynamic(store), 0, "it grows and shrinks")
    if not (said.isascii() and said.isdigit() and int(said) <= SIZE_MAX):
        raise RefusedError(f"the store at {where} says {said[:32]!r} of the size of its group: it is no worker's")
    return _static(store, int(said))


def _keys(raw: Any) -> list[str]:
    """The keys of a store, or of those that matter here the first ones."""
    try:
        return list(raw.list_keys())
    except (RuntimeError, AttributeError):
        return [f"zrpc/{number}/kind" for number in range(GENERATIONS_MAX) if raw.check([f"zrpc/{number}/kind"])]


def _prefixes(keys: list[str]) -> list[str]:
    """Under what the keys of groups lie, the one that came last at the end."""
    found = [match for key in keys if (match := KIND.fullmatch(key))]
    found.sort(key=lambda match: (int(match[1] or -1), int(match[3])))
    return [match[0].removesuffix("/kind") for match in found]


def _static(store: Any, size: int, base: str = "") -> FoundGroup:
    """A group of that size, whose roster and records lie under `base`."""
    if store.check([f"{base}roster"]):
        roster = unpack_roster(store.get(f"{base}roster"))
        if isinstance(roster, Failure):
            return FoundGroup([], size, f"it cannot be: {roster.why}")
        return FoundGroup([Record.unpack(raw).member for raw in roster], size, "complete")
    came = []
    for rank in range(size):
        if store.check([f"{base}member/{rank}"]):
            with suppress(RefusedError):
                came.append(Record.unpack(store.get(f"{base}member/{rank}")).member)
    absent = [str(rank) for rank in range(size) if not store.check([f"rank/{rank}"])]
    return FoundGroup(came, size, f"not all have come: rank(s) {', '.join(absent) or 'none'} are missing")


def _dynamic(store: Any) -> list[Member]:
    found = []
    for index in range(1, Counter(store, "members").read() + 1):
        if not store.check([f"left/{index}"]) and store.check([f"member/{index}"]):
            with suppress(RefusedError):
                found.append(Record.unpack(store.get(f"member/{index}")).member)
    return found
