"""The broker at work: the hub's events go to the directory and the liveness watch, and what they decide is carried out.

One thread runs all of it.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from zrpc import protocol_errors
from zrpc.errors import ProtocolError
from zrpc.transport.hub import Hub
from zrpc.transport.hub_events import Control, Event, Hello, Hint, Question, Replaced, Undelivered, Unreachable
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.messages import Heartbeat, Leave, Left, Message, Refused, Register
from zrpc.wire.observing import Attach
from zrpc.wire.rejoining import Locate, Located, Rejoin
from zrpc_broker import defaults
from zrpc_broker.actions import Action, Admit, Dismiss, Expect, Release, Tell
from zrpc_broker.directory import Directory
from zrpc_broker.liveness import LOOKS, Liveness, Standing
from zrpc_broker.observers import attach
from zrpc_broker.runs import UNGIVEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.keyring import Keyring
    from zrpc.transport.credentials import Credentials
    from zrpc.wire.envelope import Buffer

KEYS_INTERVAL_S = 1.0
"""How often the keyring is looked at."""

STOOD_STILL_S = 8.0
"""A broker that did not run for so long begins anew, as if it had been started again: workers, which may have taken it
for dead (`sockets.HEARTBEAT_TIMEOUT_MS`), are all members again, or none of them is."""

_log = logging.getLogger(__name__)


class Broker:
    """Listens once made; serves while `run` runs.

    Args:
        address: where to listen, `tcp://host:port`; port 0 takes any free one.
        heartbeat_interval_s: how often workers must say that they are alive.
        missed_max: how many intervals of silence make a worker lost.
        credentials: who may connect, and under which names where workers have keys of their own; None: anybody.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self,
        address: str,
        heartbeat_interval_s: float = defaults.HEARTBEAT_INTERVAL_S,
        missed_max: int = defaults.MISSED_MAX,
        *,
        credentials: Credentials | None,
    ) -> None:
        self._credentials = credentials
        self._interval_s = heartbeat_interval_s
        self._missed_max = missed_max
        self._begin(address)
        self._keyring = None if credentials is None else credentials.keyring
        self._complaint: str | None = None  # of the keyring, that was logged
        self._keys_due = 0.0
        self._stopped = False

    def run(self) -> None:
        """Serve until `stop`, then close every socket."""
        try:
            while not self._stopped:
                self._serve_once()
        finally:
            self._hub.close()

    def stop(self) -> None:
        """End `run` soon. Any thread, or a signal handler."""
        self._stopped = True
        self._hub.wake()

    def _begin(self, address: str) -> None:
        """Listen at `address`, and know of no worker."""
        self._hub = Hub(address, self._credentials)
        self.address = self._hub.address
        now = time.monotonic()
        self._directory = Directory(self._interval_s, now, defaults.SETTLE_S, defaults.REJOIN_WAIT_S)
        self._liveness = Liveness(self._interval_s, self._missed_max, now)
        self._unanswerable: dict[Incarnation, tuple[int, Register | Rejoin]] = {}
        self._ran_at = self._look_due = now

    def _serve_once(self) -> None:
        wait_s = self._liveness.wait_s(time.monotonic())
        events = self._hub.pump(int(min(wait_s, KEYS_INTERVAL_S) * 1000) + 1)
        now = time.monotonic()
        stood_still_s, self._ran_at = now - self._ran_at, now
        if stood_still_s > STOOD_STILL_S:
            _log.warning("this broker did not run for %.0f s: it begins anew, and workers come back", stood_still_s)
            self._hub.close()
            self._begin(self.address)
            return
        if self._keyring is not None and now >= self._keys_due:
            self._keys_due = now + KEYS_INTERVAL_S
            self._look_at_keys(self._keyring)
        for source in self._hub.take_active():
            self._liveness.heard(source, now)
        for event in events:
            try:
                self._on_event(event, now)
            except Exception:  # whatever one message does, the others are served
                _log.exception("an event was not carried out")
        lost, probe = self._liveness.tick(now)
        for member in lost:
            self._lose(member, "it has said nothing for too long: its process hangs")
        if now >= self._look_due:
            self._look_due = now + self._interval_s / LOOKS
            self._look_at_silent(now)
        if probe:
            for member in self._liveness.members():
                if self._hub.has_said_hello(member):  # else it cannot be told yet, and is not lost for that
                    self._tell(member, Heartbeat())
        self._perform(self._directory.tick(now), b"", 0)

    def _on_event(self, event: Event, now: float) -> None:
        if isinstance(event, Control):
            self._on_control(event, now)
        elif isinstance(event, Hello):
            self._liveness.heard(event.source, now)
            waiting = self._unanswerable.pop(event.source, None)
            if waiting is not None:
                self._register(event.source, *waiting, now)
        elif isinstance(event, Replaced):
            self._lose(event.source, "its connection to the broker broke", is_forgotten=True)
        elif isinstance(event, Question):
            self._on_question(event)
        elif isinstance(event, Undelivered):
            self._on_undelivered(event)
        elif isinstance(event, Unreachable):
            self._lose(event.peer, event.reason, is_forgotten=True)
        elif isinstance(event, Hint):
            self._liveness.hint(now)

    def _on_control(self, event: Control, now: float) -> None:
        source = event.source
        try:
            envelope = decode(event.frames)
        except ProtocolError as error:
            protocol_errors.received.note("message", source.hex(), error, at_once=True)
            self._tell(source, Refused(str(error)))
            return
        message = envelope.message
        if isinstance(message, Register | Rejoin):
            if self._hub.has_said_hello(source):
                self._register(source, envelope.call_id, message, now)
            else:
                self._unanswerable[source] = (envelope.call_id, message)
        elif isinstance(message, Heartbeat):
            if source not in self._unanswerable:
                self._perform(self._directory.heartbeat(source), source, envelope.call_id)
        elif isinstance(message, Attach):  # sent again until it is answered
            if not self._hub.has_said_hello(source):
                return
            self._perform(attach(self._directory, self._keyring, source, message), source, envelope.call_id)
        elif isinstance(message, Leave):
            self._unanswerable.pop(source, None)
            _log.info("%s leaves", self._describe(source))
            self._perform(self._directory.leave(source), source, envelope.call_id)
        else:
            name = type(message).__name__
            self._tell(source, Refused(f"a {name} is not for the broker: install the same zrpc on both"))

    def _on_question(self, event: Question) -> None:
        try:
            message = decode(event.frames).message
        except ProtocolError as error:
            protocol_errors.received.note("question", event.asker.hex(), error, at_once=True)
            message = None
        if isinstance(message, Locate):
            answer: Message = Located(self._directory.count(message.group))
        else:
            answer = Refused("the broker does not know this question: install the same zrpc on both")
        self._hub.answer(event.asker, encode(Envelope(answer, 0)))

    def _look_at_silent(self, now: float) -> None:
        """See what those that say nothing are about."""
        for member, standing in self._liveness.look(now, self._hub.is_host_gone):
            if standing is Standing.ASKED:
                if self._hub.has_said_hello(member):
                    self._tell(member, Heartbeat())
            elif standing is Standing.GONE:
                self._lose(member, "its host, or the way to it, is gone: nothing that it is sent is acknowledged")
            else:
                _log.warning("%s: %s", self._describe(member), standing.value)

    def _look_at_keys(self, keyring: Keyring) -> None:
        """Read the keyring again if it has changed; members that it does not let in any more are lost."""
        keyring.reload()
        if keyring.complaint != self._complaint and keyring.complaint is not None:
            _log.warning("the keyring has changed, and what it said before holds: %s", keyring.complaint)
        self._complaint = keyring.complaint
        for member in self._liveness.members():
            reason = keyring.why_not(member)
            if reason is not None:
                self._tell(member, Refused(f"the broker lets this worker in no more: {reason}"))
                self._lose(member, reason)

    def _why_not(self, source: Incarnation, wanted: Register | Rejoin) -> str | None:
        """Why a worker may not have the name and rank that it wants, by its key."""
        if self._keyring is None:
            return None
        self._keyring.reload()
        return self._keyring.refusal(source, str(wanted.name), wanted.rank if isinstance(wanted.rank, int) else -1)

    def _register(self, source: Incarnation, call_id: int, message: Register | Rejoin, now: float) -> None:
        reason = self._why_not(source, message)
        if reason is not None:
            self._perform([Tell(source, Refused(reason))], source, call_id)
            return
        if isinstance(message, Register):
            actions, verb = self._directory.register(source, message, now), "came"
        else:
            actions, verb = self._directory.rejoin(source, message, now), "came back"
        self._perform(actions, source, call_id)
        if source in self._directory:
            _log.info("%s %s", self._describe(source), verb)

    def _on_undelivered(self, event: Undelivered) -> None:
        if event.source in self._directory:
            self._tell(event.source, Left(event.destination, True, "it is not in this group, or no longer"))
        else:
            self._perform(self._directory.heartbeat(event.source), event.source, 0)

    def _lose(self, member: Incarnation, reason: str, *, is_forgotten: bool = False) -> None:
        """A worker is lost; `is_forgotten`: the hub knows that. What it knows now is of a newer connection."""
        if member in self._directory:
            _log.warning("%s is lost: %s", self._describe(member), reason)
        self._unanswerable.pop(member, None)
        self._liveness.forget(member)
        actions = self._directory.lose(member, reason)
        if not is_forgotten:
            self._hub.forget(member)
        self._perform(actions, member, 0)

    def _perform(self, actions: Iterable[Action], source: Incarnation, call_id: int) -> None:
        """Carry out `actions`; what is told to `source` answers its message `call_id`.

        A message that many are told is encoded once.
        """
        last: Message | None = None
        frames: Sequence[Buffer] = ()
        for action in actions:
            if isinstance(action, Tell):
                if isinstance(action.message, Refused):
                    _log.warning("%s is refused: %s", action.to.hex(), action.message.reason)
                if action.to == source:
                    self._tell(source, action.message, call_id)
                    continue
                if action.message is not last:
                    last, frames = action.message, encode(Envelope(action.message, 0))
                self._hub.send(action.to, frames)
            elif isinstance(action, Admit):
                self._hub.admit(action.incarnation, action.room)
            elif isinstance(action, Dismiss):
                self._hub.dismiss(action.incarnation)
            elif isinstance(action, Expect):
                self._hub.expect(action.incarnation, action.room)
            elif isinstance(action, Release):
                self._hub.release(action.incarnation)

    def _tell(self, to: Incarnation, message: Message, call_id: int = 0) -> None:
        self._hub.send(to, encode(Envelope(message, call_id)))

    def _describe(self, member: Incarnation) -> str:
        run = self._directory.run_of(member)
        if run is None:
            return f"worker {member.hex()}"
        seat = run.seats[member]
        rank = "no rank yet" if seat.rank == UNGIVEN else f"rank {seat.rank}"
        return f"{seat.name!r} ({rank}) of group {run.key!r}"
