"""Membership kept by a broker: it tells of every coming and going, and both sides listen for each other's heartbeats.

Nothing is decided here: the broker gives ranks, refuses duplicates and says who is lost. A broker that dies loses what
it knew; when its workers are connected to one again, each says who it is and what it knows (`Rejoin`), and is welcomed
once the others have, too. Only where no broker is found in time everybody is lost.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

from zrpc import protocol_errors, remote_text, threads
from zrpc.errors import ProtocolError, RefusedError, RendezvousError, ZrpcError
from zrpc.ids import EndedLives
from zrpc.membership import members as told
from zrpc.wire.envelope import Buffer, Envelope, decode, encode
from zrpc.wire.messages import (
    Forming,
    Heartbeat,
    Joined,
    Leave,
    Left,
    Message,
    Refused,
    Register,
    Welcome,
)
from zrpc.wire.rejoining import Rejoin

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.membership.group import Member, OnJoined, OnLeft
    from zrpc.transport.brokered import BrokeredEndpoint

log = logging.getLogger("zrpc")

GROUP_VARIABLE = "ZRPC_GROUP"
DEFAULT_GROUP = "default"
FIRST_HEARTBEAT_INTERVAL_S = 1.0
"""Until the broker says which interval it wants."""
SILENCE_MAX = 15
"""Intervals without a word from the broker after which it is taken for dead. A broker that died is noticed at once, by
its broken connection; this is for one that hangs, or a network that swallows everything."""
LOOKS = 8
"""How often in an interval this side looks whether the broker is there; the first time it sends a heartbeat."""
GONE_AFTER = 1.75
"""Intervals of silence after which a broker is given up whose host acknowledges nothing."""
ENDED_MAX = 256
"""So many of the lives that were last told to be over are told to a broker that does not know of them."""
NOT_BACK = "it did not come back when the broker was lost and found"
REFRESH_TIMEOUT_S = 5.0


class _State(Enum):
    OUTSIDE = "not registered yet"
    JOINING = "registered; waiting for the welcome"
    JOINED = "welcomed"
    REJOINING = "a member, whose connection to the broker broke; waiting to be welcomed again"
    LEAVING = "said goodbye; waiting for the broker to have taken note"
    ENDED = "left, refused or cut off"


_BEATING = (_State.JOINING, _State.JOINED, _State.REJOINING)
"""While heartbeats are sent."""


class BrokerGroup:
    """One worker's membership in a group that a broker keeps.

    The state is owned by `_changed`; its functions run on the reading thread, on the heartbeat thread and on callers'.

    Args:
        endpoint: this worker's connection to the broker.
        group: which of the broker's groups; None: the environment's `ZRPC_GROUP`, or "default".
    """

    def __init__(self, endpoint: BrokeredEndpoint, group: str | None = None) -> None:
        self._endpoint = endpoint
        self._group = group or os.environ.get(GROUP_VARIABLE) or DEFAULT_GROUP
        self._on_joined: OnJoined = _ignore
        self._on_left: OnLeft = _ignore
        self._changed = threading.Condition()
        self._state = _State.OUTSIDE
        self._ended_by: ZrpcError | None = None
        self._members: dict[Incarnation, Member] = {}
        self._welcomed: list[Member] = []  # also those who left since: who watches was told of that
        self._forming: Forming | None = None
        self._came: dict[str, None] = {}  # names, in the order of arrival; also of those that have given up since
        self._interval_s = FIRST_HEARTBEAT_INTERVAL_S
        self._probes = itertools.count(1)
        self._looks = 1  # of the heartbeat thread
        self._answered_probe = 0
        self._heartbeats: threading.Thread | None = None
        self._registration: Register
        self._is_introduced = False  # on this connection
        self._run = b""
        self._ended = EndedLives(ENDED_MAX)
        endpoint.tell(
            self._on_control, self._on_broker_lost, self._on_broken, self._introduce, self._on_local_lost,
            self._group,
        )  # fmt: skip

    # ---- Group ------------------------------------------------------------------------------------------------------

    def watch(self, on_joined: OnJoined, on_left: OnLeft) -> None:
        """See `Group.watch`. `on_left` is told of goodbyes only; of a loss, the endpoint's `on_lost` is, once."""
        self._on_joined, self._on_left = on_joined, on_left

    def join(
        self,
        name: str,
        rank: int,
        world_size: int | None,
        incarnation: Incarnation,
        card: dict[str, Any],
        timeout_s: float,
    ) -> tuple[Member, list[Member]]:
        """See `Group.join`."""
        with self._changed:
            if self._ended_by is not None:  # the transport was refused before this
                raise self._ended_by
            if self._state is not _State.OUTSIDE:
                raise ProtocolError(f"{name!r} cannot join group {self._group!r} again: it is {self._state.value}")
            self._state = _State.JOINING
            self._registration = Register(name, rank, world_size or 0, card, self._group)
        try:
            self._endpoint.open()
            self._heartbeats = threads.start(self._heartbeat_loop, "zrpc-heartbeat")  # they wait for an interval first
            if self._endpoint.is_resumed():  # else when there is a connection
                self._introduce()
        except BaseException:
            with self._changed:
                self._set_state(_State.ENDED)
            self._join_heartbeats()
            raise
        with self._changed:
            self._changed.wait_for(lambda: self._state is not _State.JOINING, timeout_s)
            if self._welcomed:
                return next(one for one in self._welcomed if one.incarnation == incarnation), self._welcomed
            error = self._ended_by or self._late(name, timeout_s)
            self._set_state(_State.ENDED)
        self._join_heartbeats()
        with contextlib.suppress(ZrpcError):
            self._tell(Leave())
        raise error

    def refresh(self) -> None:
        """See `Group.refresh`: the broker's answer comes after all that it said before. Not on the reading thread."""
        probe = next(self._probes)
        if not self._is_introduced:
            return
        with contextlib.suppress(ZrpcError):
            self._tell(Heartbeat(), probe)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._answered_probe >= probe or self._state is not _State.JOINED, REFRESH_TIMEOUT_S
                )

    def note_lost(self, incarnation: Incarnation) -> None:
        """See `Group.note_lost`. The broker says who is lost."""

    def linger(self, timeout_s: float) -> None:
        """See `Group.linger`. The broker has told everybody at once, and does not end with a worker."""

    def leave(self, timeout_s: float, *, at_exit: bool = False) -> None:
        """See `Group.leave`. Waits for the broker's answer: all that this worker sent before has passed it then.

        At exit nothing is said: the broker sees the connection break, and makes name and rank free again.
        """
        with self._changed:
            was = self._state
            self._set_state(_State.LEAVING)
        self._join_heartbeats()  # the broker takes one that comes after a goodbye for a stranger's
        if was in (_State.JOINED, _State.REJOINING) and not at_exit:
            with contextlib.suppress(ZrpcError):  # there is no broker: the others are told when there is one
                self._tell(Leave())
                with self._changed:
                    self._changed.wait_for(lambda: self._state is _State.ENDED, timeout_s)
        with self._changed:
            self._set_state(_State.ENDED)

    # ---- what the broker says ---------------------------------------------------------------------------------------

    def _on_control(self, frames: list[Buffer]) -> None:
        try:
            envelope = decode(frames)
        except ProtocolError as error:
            protocol_errors.received.note("message", "the broker", error)
            self._end(error)
            return
        try:
            self._carry_out(envelope.message, envelope.call_id)
        except ProtocolError as error:
            protocol_errors.received.note("message", "the broker", error)
            self._end(error)

    def _carry_out(self, message: Message, call_id: int) -> None:
        """Do what a message of the broker's asks for.

        Raises:
            ProtocolError: it says what cannot be.
        """
        if isinstance(message, Heartbeat):
            self._on_answer(call_id)
        elif isinstance(message, Left):
            self._on_gone(message)
        elif isinstance(message, Joined):
            self._on_newcomer(message)
        elif isinstance(message, Forming):
            interval_s = told.interval_s(message.heartbeat_interval_s)
            with self._changed:
                self._forming = message
                self._came |= dict.fromkeys(map(remote_text.line, message.names))
                self._interval_s = interval_s
                self._changed.notify_all()
        elif isinstance(message, Welcome):
            self._on_welcome(message)
        elif isinstance(message, Refused):
            self._end(RefusedError(message.reason))
        else:
            self._end(ProtocolError(f"the broker sent a {type(message).__name__}, which is not for workers"))

    def _on_answer(self, probe: int) -> None:
        with self._changed:
            self._answered_probe = max(self._answered_probe, probe)
            self._changed.notify_all()

    def _on_welcome(self, message: Welcome) -> None:
        members = told.members_of(message.members)
        interval_s = told.interval_s(message.heartbeat_interval_s)
        if self._endpoint.incarnation not in {member.incarnation for member in members}:
            raise ProtocolError("the broker welcomed others, and not this worker")
        for member in members:
            self._endpoint.add_peer(member.incarnation)
        with self._changed:
            self._interval_s = interval_s
            self._run = message.run
            was, before = self._state, self._members
            if was not in (_State.JOINING, _State.REJOINING):
                return
            self._members = {one.incarnation: before.get(one.incarnation, one) for one in members}
            self._welcomed = self._welcomed or members
            self._set_state(_State.JOINED)
        if was is _State.REJOINING:
            for life in before.keys() - self._members.keys():  # first: another one may have its name
                self._on_gone(Left(life, True, NOT_BACK))
            for member in members:
                if member.incarnation not in before:
                    self._on_joined(member)
        self._endpoint.resume()

    def _on_newcomer(self, message: Joined) -> None:
        member = told.member_of(message.name, message.rank, message.incarnation, message.card)
        self._endpoint.add_peer(member.incarnation)
        with self._changed:
            is_known = member.incarnation in self._members
            self._members[member.incarnation] = member
        if not is_known:
            self._on_joined(member)

    def _on_gone(self, message: Left) -> None:
        if message.incarnation == self._endpoint.incarnation:
            with self._changed:
                self._set_state(_State.ENDED)
            return
        self._note_ended(message.incarnation, message.reason)
        if message.lost:
            self._endpoint.lose_peer(message.incarnation, message.reason)
        elif self._endpoint.remove_peer(message.incarnation, message.reason):
            self._on_left(message.incarnation, False, message.reason)

    def _note_ended(self, life: Incarnation, reason: str) -> None:
        with self._changed:
            if self._members.pop(life, None) is not None:
                self._ended.note(life, reason)

    # ---- the broker's own loss --------------------------------------------------------------------------------------

    def _on_broken(self) -> None:
        with self._changed:
            self._is_introduced = False
            if self._state is _State.JOINED:
                self._set_state(_State.REJOINING)
            elif self._state is _State.LEAVING:  # it is not known whether the broker took note
                self._set_state(_State.ENDED)

    def _on_local_lost(self, life: Incarnation, reason: str) -> None:
        self._note_ended(life, reason)

    def _introduce(self) -> None:
        """Say who this is, as the first message on a connection. The broker may know nothing of this worker."""
        with self._changed:
            if self._is_introduced or self._state not in (_State.JOINING, _State.REJOINING):
                return
            with contextlib.suppress(ZrpcError):  # there is no connection: when there is; or `_end` says why
                self._tell(self._registration if self._state is _State.JOINING else self._rejoin())
                self._is_introduced = True

    def _rejoin(self) -> Rejoin:
        wanted, me = self._registration, self._endpoint.incarnation
        info = self._members[me].info
        others = [[one.incarnation, one.info.name, one.info.id] for one in self._members.values()]
        return Rejoin(
            info.name, info.id, wanted.world_size, wanted.card, wanted.group, self._run,
            [entry for entry in others if entry[0] != me], list(self._ended),
        )  # fmt: skip

    def _on_broker_lost(self, reason: str, is_refused: bool) -> None:
        if is_refused:
            self._end(RefusedError(reason))
            return
        self._end(RendezvousError(f"{reason}. Look whether the broker still runs, and at what it said last"))

    def _end(self, error: ZrpcError) -> None:
        """The broker is gone, or does not want this worker: a join under way fails, a member loses everybody."""
        with self._changed:
            was = self._state
            if was is _State.ENDED:
                return
            self._ended_by = error
            self._set_state(_State.ENDED)
        if was in (_State.JOINED, _State.REJOINING):
            self._endpoint.lose_broker(str(error))

    def _heartbeat_loop(self) -> None:
        threads.keep_running(self._beat, lambda: self._state not in _BEATING)

    def _beat(self) -> None:
        """Wait until it is time to look; send a heartbeat if one is due, or have another broker looked for."""
        if not self._wait_interval():
            return
        endpoint = self._endpoint
        silent_s = time.monotonic() - endpoint.heard_at
        if endpoint.is_connected() and silent_s > SILENCE_MAX * self._interval_s:
            log.warning("nothing came from the broker for %.0f s; here %s", silent_s, endpoint.inbox.describe())
            endpoint.break_off(f"the broker at {endpoint.address} has said nothing for {silent_s:.0f} s")
        elif (
            endpoint.is_connected()
            and silent_s > GONE_AFTER * self._interval_s
            and endpoint.is_host_gone(self._interval_s)
        ):
            endpoint.break_off(f"the host of the broker at {endpoint.address}, or the way to it, is gone")
        elif self._looks % LOOKS == 0 and self._is_introduced:
            with contextlib.suppress(ZrpcError):
                self._tell(Heartbeat())
        self._looks += 1

    def _wait_interval(self) -> bool:
        """Wait for a part of the interval, or until the broker asks for another one; false: no more are wanted."""
        with self._changed:
            interval_s = self._interval_s
            self._changed.wait_for(
                lambda: self._state not in _BEATING or self._interval_s != interval_s, timeout=interval_s / LOOKS
            )
            return self._state in _BEATING

    def _join_heartbeats(self) -> None:
        if self._heartbeats is not None and self._heartbeats is not threading.current_thread():
            threads.join(self._heartbeats)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _set_state(self, state: _State) -> None:
        """Go to `state`, under the lock, and tell whoever waits for it."""
        self._state = state
        self._changed.notify_all()

    def _tell(self, message: Message, call_id: int = 0) -> None:
        self._endpoint.tell_broker(encode(Envelope(message, call_id)))

    def _late(self, name: str, timeout_s: float) -> RendezvousError:
        """Why `name` was not welcomed in time."""
        address, forming = self._endpoint.address, self._forming
        if forming is not None and forming.world_size:
            return RendezvousError(
                f"{len(self._came)} of {forming.world_size} workers came to group {self._group!r} of the broker at "
                f"{address} within {timeout_s:g} s ({', '.join(self._came)}): check that the others were started, "
                "with the same world_size"
            )
        if self._endpoint.is_connected():
            return RendezvousError(
                f"something listens at {address}, but it did not answer {name!r} within {timeout_s:g} s: "
                "check that it is a zrpc broker"
            )
        return RendezvousError(
            f"no broker could be reached at {address} within {timeout_s:g} s: check the address, and that "
            f"`zrpc broker --bind tcp://HOST:PORT` runs there"
        )


def _ignore(*_: object) -> None:
    """Nobody watches yet."""
