"""Finding the group to look into: by its meeting point, by the address of one worker, or on this host.

What: whichever way, the secret of the group is needed, and the key of this process where workers have keys of their
own: it must be allowed the name `OBSERVER_NAME`.

Failure: `RendezvousError` where there is no such group, `RefusedError` where this process is not let in, `ConfigError`
where more must be said.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from zrpc.config import BROKER_SCHEME, broker_addresses
from zrpc.errors import ConfigError, RefusedError, RendezvousError, ZrpcError
from zrpc.ids import INCARNATION_NBYTES, Incarnation, WorkerInfo, new_incarnation
from zrpc.membership.found import FoundGroup
from zrpc.membership.group import Member
from zrpc.membership.members import members_of
from zrpc.secret import group_secret, says_insecure
from zrpc.sight.observer import Observer
from zrpc.transport import local_socket
from zrpc.transport.credentials import keyring_of, new_life, worker_credentials
from zrpc.transport.peer import PeerEndpoint
from zrpc.transport.sockets import reachable_address, split_address
from zrpc.wire.envelope import Buffer, Envelope, decode, encode
from zrpc.wire.messages import Refused
from zrpc.wire.observing import Attach, Attached

if TYPE_CHECKING:
    from zrpc.transport.brokered import BrokeredEndpoint
    from zrpc.transport.credentials import Credentials

BIND_VARIABLE = "ZRPC_BIND"
GROUP_VARIABLE = "ZRPC_GROUP"
ATTACH_AGAIN_S = 0.2
_LOOPBACK = ("127.", "localhost", "::1")


def observe(
    init_method: str | None = None, address: str | None = None, pid: int | None = None, timeout_s: float = 10.0
) -> Observer:
    """Look into a group. Close what is returned.

    Args:
        init_method: where it meets; None: say one of the others.
        address: where one of its workers listens, `tcp://host:port`.
        pid: the process of one of its workers, on this host; with neither of the others, all on this host are asked.
        timeout_s: how long to look for it.

    Raises:
        ConfigError: a value or the secret cannot be used, or several groups are meant.
        RendezvousError: there is no such group.
        RefusedError: this process is not let in.
    """
    secret = group_secret(None, insecure=says_insecure())
    credentials = worker_credentials(secret)
    if init_method is not None and init_method.startswith(BROKER_SCHEME):
        return _at_broker(init_method, credentials, timeout_s)
    if init_method is not None:
        from zrpc.membership import found
        from zrpc.membership.rendezvous import open_for_looking

        store = open_for_looking(init_method, timeout_s)
        return _at_workers(credentials, found.in_store(store, secret, init_method))
    if address is not None:
        return _by_address(address, credentials, timeout_s)
    return _on_this_host(credentials, pid, timeout_s)


# ---- without a broker ------------------------------------------------------------------------------------------------


def _at_workers(credentials: Credentials | None, group: FoundGroup, *, takes_any: bool = False) -> Observer:
    """An observer to whom workers connect."""
    hosts = [split_address(one)[0] for one in (member.card.get("address") for member in group.members) if one]
    away = next((host for host in hosts if not host.startswith(_LOOPBACK)), None)
    anywhere = "127.0.0.1" if away is None else "[::]" if ":" in away else "0.0.0.0"
    bind = os.environ.get(BIND_VARIABLE, f"tcp://{anywhere}:0")
    endpoint = PeerEndpoint(new_life(credentials), bind, local=True, credentials=credentials)
    return Observer(endpoint, reachable_address(endpoint.address, away), group, takes_any=takes_any)


def _by_address(address: str, credentials: Credentials | None, timeout_s: float) -> Observer:
    if keyring_of(credentials) is not None:
        raise ConfigError(
            "where workers have keys of their own (ZRPC_KEYS), one is not found by its address, as its key is not "
            "known: give the meeting point of the group (--init-method)"
        )
    split_address(address)
    anyone = Member(WorkerInfo("worker", 0), new_incarnation(), {"address": address})
    observer = _at_workers(credentials, FoundGroup([anyone]), takes_any=True)
    try:
        answer = observer.ask([anyone.incarnation], "members", timeout_s=timeout_s)[anyone.incarnation]
        if answer.seen is None:
            raise RendezvousError(
                f"no worker of this group answers at {address} within {timeout_s:g} s{_because(answer.lost)}: give the "
                "address that a worker listens at, as `zrpc status` shows it, and the secret of its group"
            )
        observer.look_into(FoundGroup(_members(answer.seen), 0, "as one worker knows it"))
    except BaseException:
        observer.close()
        raise
    return observer


def _on_this_host(credentials: Credentials | None, pid: int | None, timeout_s: float) -> Observer:
    """The only group that has workers of this user on this host, or the one of a certain process."""
    lives = _lives_here()
    observer = _at_workers(credentials, FoundGroup([Member(WorkerInfo("worker", 0), life) for life in lives]))
    try:
        answers = observer.ask(lives, "members", timeout_s=min(timeout_s, 2.0))
        groups: list[dict[Incarnation, Member]] = []
        for life, answer in answers.items():
            seen = {} if answer.seen is None else {one.incarnation: one for one in _members(answer.seen)}
            if life in seen and not any(life in group for group in groups):
                groups.append(seen)
        if pid is not None:
            groups = [group for group in groups if any(_is_process(one, pid) for one in group.values())]
        if not groups:
            raise RendezvousError(
                f"no worker of this user and secret runs on this host{_others(lives)}: give the meeting point "
                "of the group (--init-method), or the address of a worker (--address)"
            )
        if len(groups) > 1:
            told = "; ".join(", ".join(sorted(one.info.name for one in group.values())[:4]) for group in groups[:8])
            raise ConfigError(
                f"{len(groups)} groups have workers on this host ({told}): say which one, by --init-method, or by "
                "--pid, the process of one of its workers"
            )
        observer.look_into(FoundGroup(list(groups[0].values()), 0, "as workers of this host know it"))
    except BaseException:
        observer.close()
        raise
    return observer


def _lives_here() -> list[Incarnation]:
    found = []
    with suppress(OSError):
        for path in local_socket.directory().iterdir():
            name = path.name
            if name.startswith(local_socket.PREFIX) and name.endswith(local_socket.SUFFIX):
                with suppress(ValueError):
                    life = bytes.fromhex(name.removeprefix(local_socket.PREFIX).removesuffix(local_socket.SUFFIX))
                    if len(life) == INCARNATION_NBYTES and local_socket.is_listening(life):
                        found.append(life)
    return found


def _others(lives: list[Incarnation]) -> str:
    """What is known of workers of this host that do not answer."""
    if not lives:
        return ""
    pids = sorted({pid for life in lives[:32] if (pid := local_socket.process_of(life)) is not None})
    told = (
        f"process{'es' if len(pids) > 1 else ''} {', '.join(map(str, pids[:8]))}" if pids else f"{len(lives)} workers"
    )
    return f" ({told} did not answer: another secret, which --pid takes from that process's environment, or it hangs)"


def _is_process(member: Member, pid: int) -> bool:
    return member.card.get("pid") == pid and member.card.get("host") == socket.gethostname()


def _members(seen: dict[str, object]) -> list[Member]:
    told = seen.get("members")
    return members_of([entry[:4] for entry in told if type(entry) is list]) if type(told) is list else []


def _because(reason: str) -> str:
    return f" ({reason})" if reason else ""


# ---- with a broker ---------------------------------------------------------------------------------------------------


class _BrokerDoor:
    """How an observer is let in by a broker. `_changed` owns the state; `_on_control` runs on the reading thread."""

    def __init__(self, endpoint: BrokeredEndpoint, group: str, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._group = group
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._attached: Attached | None = None
        self._error: ZrpcError | None = None
        endpoint.tell(self._on_control, self._on_lost, _nothing, _nothing, _nothing, group)
        endpoint.tell_breaks(_nothing, _nothing)

    def enter(self) -> FoundGroup:
        """Be let in, also where the group is another one by now.

        Raises:
            RendezvousError: there is no broker, or no such group.
            RefusedError: the broker lets this process not in.
        """
        self._endpoint.open()
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            self._attached = None
        while (attached := self._look()) is None:
            if time.monotonic() >= deadline:
                raise RendezvousError(
                    f"no broker let this process in at {self._endpoint.address} within {self._timeout_s:g} s: check "
                    "the address and the secret, and that `zrpc broker` of this version runs there"
                )
            with suppress(ZrpcError):  # there is no connection yet
                self._endpoint.tell_broker(encode(Envelope(Attach(self._group), 1)))
            with self._changed:
                self._changed.wait_for(lambda: self._attached or self._error, ATTACH_AGAIN_S)
        members = members_of(attached.members)
        for member in members:
            self._endpoint.add_peer(member.incarnation)
        if not members:
            raise RendezvousError(
                f"the broker at {self._endpoint.address} has no group {self._group!r}: check that its workers run, and "
                f"the name of the group ({GROUP_VARIABLE})"
            )
        return FoundGroup(members, attached.world_size, attached.phase)

    def _look(self) -> Attached | None:
        with self._changed:
            if self._error is not None:
                raise self._error
            return self._attached

    def _on_control(self, frames: list[Buffer]) -> None:
        message = decode(frames).message
        with self._changed:
            if isinstance(message, Attached):
                self._attached = message
            elif isinstance(message, Refused) and self._attached is None:
                self._error = RefusedError(message.reason)
            self._changed.notify_all()

    def _on_lost(self, reason: str, is_refused: bool) -> None:
        with self._changed:
            self._error = self._error or (RefusedError if is_refused else RendezvousError)(reason)
            self._changed.notify_all()


def _at_broker(init_method: str, credentials: Credentials | None, timeout_s: float) -> Observer:
    from zrpc.transport.brokered import BrokeredEndpoint

    endpoint = BrokeredEndpoint(
        broker_addresses(init_method), new_life(credentials), local=True, credentials=credentials, grace_s=timeout_s
    )
    door = _BrokerDoor(endpoint, os.environ.get(GROUP_VARIABLE) or "default", timeout_s)
    try:
        group = door.enter()
    except BaseException:
        endpoint.close(0.0)
        raise
    return Observer(endpoint, "", group, door.enter)


def _nothing(*_: object) -> None:
    """Nothing follows from it."""
