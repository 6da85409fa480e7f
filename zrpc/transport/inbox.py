"""Reading one inbound socket, by one thread at a time, and running there what messages ask for.

To hand a message to another thread takes longer than all the rest of a small call. So whoever can, reads for itself:

- A thread that waits for an answer reads (`wait_for`), and hands on what else comes on the way, until its answer is
  there.
- A *reader* (there are `READERS` of them, which `run`) that takes a message which is work to do, does the work itself,
  outside of the lock.

The socket belongs to whoever holds the read lock; messages are handed on under it, so they keep their order. The
other readers are parked. One of them keeps watch, looking up every `PARK_S`, while there is activity: if nobody reads,
and nobody has come to since it last looked, it reads. So when work turns out to take long, or callers stop to read,
messages lie for `PARK_S`, once. Each look takes the interpreter's lock from whoever is at work, so as long as all goes
well it looks half as often each time, down to every `PARK_MAX_S` (measured: autograd steps take 7 % less). When all is
quiet, one reader is blocked in the socket and the others sleep.

A reader leaves the socket to callers after it has read for `STREAK` of them that would have read for themselves, each
within `STREAK_S` of the last, with nobody else blocked. It keeps watch then. Callers that send count as activity too,
since who sends many calls reads their answers after, but for at most `UNREAD_MAX_S` without a read. A caller that is
done calls a reader if another caller is blocked, so an answer that a thread is blocked for never lies unread.

How whoever reads waits for the next message is a matter of its own (`zrpc.transport.polling`).

Workers of one host send small messages on shortcuts (`zrpc.transport.shortcuts`), which are read first, but for one
message of the socket after every `SHORT_RUN`. Its sender may have sent something on its shortcut before, and nothing
since: so that is read before it is handed on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from queue import Empty, Queue
from typing import TYPE_CHECKING, Protocol

from zrpc import threads
from zrpc.exception_text import log_error
from zrpc.transport.polling import Polling
from zrpc.wire.envelope import INLINE_MAX_NBYTES, Buffer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.transport.io_thread import IoThread
    from zrpc.transport.shortcuts import Shortcuts
    from zrpc.transport.sockets import Socket

log = logging.getLogger("zrpc")

READERS = 2
PARK_S, PARK_MAX_S = 0.002, 0.008
STREAK_S = 0.01
UNREAD_MAX_S = 0.02
STREAK = 3
SHORT_RUN = 16
CLOSE_WAIT_S = 5.0

Work = Callable[[], None]
Take = Callable[[bytes, list[Buffer]], Work | None]
"""`take(source, frames)`: a message came. It must not block, and must not raise.

It may return work, which may block, but only if `Inbox.can_work` is true.
"""


class Awaited(Protocol):
    """What a thread waits for."""

    def done(self) -> bool:
        """Whether it has come."""

    def block(self, deadline: float | None) -> None:
        """Wait for it, up to `deadline` (`time.monotonic`), while another thread reads."""


class Inbox:
    """The receiving side of a socket whose messages begin with a source frame.

    Args:
        sock: the socket; the inbox closes it.
        take: is given each message, by whichever thread reads, under the read lock.
        is_over: whether reading has come to an end. Looked at after each message: to end reading, make it true and
            send the socket a message.
        io_thread: brings the messages.
        shortcuts: where messages come too, if it is not None; the inbox closes it.

    Attributes:
        on_queue_empty: called by a reader before it waits for something or stays away, and every few ms by the one that
            keeps watch.
        on_callers_left: called by a reader when callers that read may have left something to do.
        is_read_by_caller: whether the thread that reads now waits for an answer of its own.
        polling: how to wait for the next message.
        num_sent: callers that send count it up; being only a hint, it may miss some.
    """

    def __init__(
        self,
        sock: Socket,
        take: Take,
        is_over: Callable[[], bool],
        io_thread: IoThread,
        shortcuts: Shortcuts | None = None,
    ) -> None:
        self.on_queue_empty: Callable[[], None] = _nothing
        self.on_callers_left: Callable[[], None] = _nothing
        self.is_read_by_caller = False
        self.polling = Polling(sock, io_thread, shortcuts)
        self.num_sent = 0
        self._sock = sock
        self._shortcuts = shortcuts
        self._take = take
        self._is_over = is_over
        self._lock = threading.Lock()
        self._readers: set[int] = set()  # each reader adds itself
        self._reader = 0  # the thread that holds the lock to read
        self._serves_queue = 0  # the reader at work that had not to wait for it
        self._close_wait_s = CLOSE_WAIT_S
        self._begun: list[Buffer] = []  # of a message whose reader was interrupted
        self._held: list[Buffer] = []  # a message of the socket, before which others are handed on
        self._short_run = 0
        self._takes_several = False
        # To the parked readers: true, read now; false, keep watch. A SimpleQueue of Python 3.11 would not do: where
        # several threads take from it, one with a time limit may wait for ever [`unit/transport/test_inbox.py`].
        self._calls = Queue[bool]()
        self._parked: set[int] = set()  # each reader changes its own entry
        self._is_watched = False
        self._activity = 0  # by readers and callers; a hint, like `num_sent`
        self._blocked: set[Awaited] = set()  # what threads wait for that were turned away; each changes its own entry
        self._streak = 0
        self._served_at = 0.0

    @property
    def can_work(self) -> bool:
        """Whether the thread that reads now may be given work: it is a reader, and another is there to take over."""
        return bool(self._parked) and not self.is_read_by_caller and not self._takes_several

    @contextmanager
    def taking_several(self) -> Iterator[None]:
        """Messages are taken one after the other within the take of another one: none may give this thread work."""
        self._takes_several = True
        try:
            yield
        finally:
            self._takes_several = False

    @property
    def is_reader_here(self) -> bool:
        """Whether this thread is one of the readers."""
        return threading.get_ident() in self._readers

    @property
    def is_read_here(self) -> bool:
        """Whether this thread holds the read lock."""
        return self._reader == threading.get_ident()

    @property
    def serves_queue_here(self) -> bool:
        """Whether this thread is a reader at work that had not to wait for it, so that more may lie there."""
        return self._serves_queue == threading.get_ident()

    @property
    def is_on_shortcut(self) -> bool:
        """Whether what `take` is given now came on a shortcut, and no message of the socket lies behind it."""
        return self._short_run > 0

    def describe(self) -> str:
        """Who reads and who does not, for the log."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return (
            f"{names.get(self._reader, 'nobody')} reads, {len(self._parked)} of {len(self._readers)} readers are parked"
            f"{' and keep watch' if self._is_watched else ''}, {len(self._blocked)} callers are blocked"
        )

    def run(self) -> None:
        """Be a reader, until `is_over`."""
        self._readers.add(threading.get_ident())
        threads.keep_running(self._read_and_work, self._is_over)
        self.on_queue_empty()
        self._calls.put(True)  # the others end too

    def _read_and_work(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._park(watch=False)
            return
        work = self._read()
        if work is None:
            self._park(watch=True)
            return
        self._activity += 1
        if not self._is_watched:
            self._calls.put(False)
        try:
            work()
        except BaseException as error:  # this thread has more to do
            log_error(log, "a request failed in an unexpected way", error=error)
            del error

    def _read(self) -> Work | None:
        """Read under the lock, which is held, until there is work to do or the socket is left to callers."""
        self._reader = threading.get_ident()
        try:
            if self._serves_queue != self._reader:
                self._take_over()
            self.on_callers_left()
            while not self._is_over():
                is_ready = self._is_ready()
                if not is_ready:
                    self.on_queue_empty()
                    self.polling.wait(None)
                work = self._hand_on()
                if work is not None:
                    self._serves_queue = self._reader if is_ready else 0
                    return work
                if self._blocked and self._all_served() and self._is_streak():
                    break
            return None
        finally:
            self._reader = 0
            self._lock.release()

    def wait_for(self, wanted: Awaited, deadline: float | None) -> None:
        """Wait for `wanted`; this thread reads meanwhile, unless another one does.

        Args:
            wanted: what it waits for. If it comes otherwise than by a message, send the socket one after.
            deadline: when to give up (`time.monotonic`); None: never.
        """
        if self.serves_queue_here:
            self._take_over()
        if not self._lock.acquire(blocking=False):
            self._blocked.add(wanted)
            try:
                if not self._lock.acquire(blocking=False):  # who had it may have looked for the blocked before
                    wanted.block(deadline)
                    return
            finally:
                self._blocked.discard(wanted)
        self._reader = threading.get_ident()
        try:
            self._take_over()
            self.is_read_by_caller = True
            self._activity += 1
            while not wanted.done() and not self._is_over():
                if not self._is_ready() and not self.polling.wait(deadline):
                    break
                self._hand_on()
                if deadline is not None and time.monotonic() >= deadline:
                    break
        finally:
            self.is_read_by_caller = False
            self._reader = 0
            self._lock.release()
            needs_reader = bool(self._blocked) and not self._all_served()
            if needs_reader or not self._is_watched:
                self._calls.put(needs_reader)

    def end(self) -> None:
        """Reading has come to an end: close the shortcuts, so that nobody waits for what is sent on them to be read."""
        if self._shortcuts is not None:
            with self._nobody_reading():
                self._shortcuts.close()

    def close(self) -> None:
        """Close the socket once nobody reads it. What `take` calls may call it too."""
        self.end()
        with self._nobody_reading():
            self._sock.close()

    @contextmanager
    def _nobody_reading(self) -> Iterator[None]:
        """Nobody else reads meanwhile. In vain, once, if Ctrl-C struck where a caller had just taken the lock."""
        if self.is_read_here:
            yield
        elif self._lock.acquire(timeout=self._close_wait_s):
            try:
                yield
            finally:
                self._lock.release()
        else:
            self._close_wait_s = 0.0
            yield

    def _is_ready(self) -> bool:
        return bool(self._held) or self.polling.is_ready()

    def _hand_on(self) -> Work | None:
        """Take a message and hand it on: small frames as bytes, large ones as views. Call it under the lock.

        There may be none after all, if a shortcut was ready.
        """
        shortcuts = self._shortcuts
        if shortcuts is None:
            source, *frames = self._receive()
            return self._take(source, frames)  # type: ignore[arg-type]  # a source is bytes
        if not self._held:
            if self._short_run < SHORT_RUN or not self.polling.is_on_socket():
                message = shortcuts.receive()
                if message is not None:
                    self._short_run += 1
                    return self._take(message[0], [message[1]])
                if not self.polling.is_on_socket():
                    return None
            self._short_run = 0
            self._held = self._receive()
        before = shortcuts.receive_from(self._held[0])  # type: ignore[arg-type]
        if before is not None:
            return self._take(self._held[0], [before])  # type: ignore[arg-type]
        (source, *frames), self._held = self._held, []
        return self._take(source, frames)  # type: ignore[arg-type]

    def _receive(self) -> list[Buffer]:
        """A message of the socket, which must be there: its source and frames."""
        begun = self._begun
        if not begun:
            begun.append(self._sock.recv())  # the source, which is short, and never alone
        while True:
            part = self._sock.recv(copy=False)
            begun.append(part.bytes if len(part) <= INLINE_MAX_NBYTES else part.buffer)
            if not part.more:
                break
        self._begun = []
        return begun

    def _take_over(self) -> None:
        """This thread reads now, or waits: the reader at work that left something lying may not come back for long."""
        self._serves_queue = 0
        self.on_queue_empty()

    def _all_served(self) -> bool:
        """Whether all that threads are blocked for has come."""
        return all(wanted.done() for wanted in tuple(self._blocked))

    def _is_streak(self) -> bool:
        """Whether callers that would read for themselves follow each other closely."""
        now = time.monotonic()
        self._streak = self._streak + 1 if now - self._served_at < STREAK_S else 0
        self._served_at = now
        return self._streak >= STREAK

    def _park(self, watch: bool) -> None:
        """Stay away from the socket until it needs a reader. `watch`: there is activity."""
        me = threading.get_ident()
        self.on_queue_empty()
        self._parked.add(me)
        try:
            while not self._is_over():
                if not watch:
                    if self._calls.get() and not self._lock.locked():
                        return
                    watch = True
                elif self._watch():
                    return
                else:  # who let go of the lock before `_is_watched` became false has called nobody
                    watch = not self._lock.locked()
        finally:
            self._parked.discard(me)

    def _watch(self) -> bool:
        """Look up every now and then while there is activity; whether the socket needs a reader now."""
        self._is_watched = True
        try:
            activity, sent, unread_s, pause_s = self._activity, self.num_sent, 0.0, PARK_S
            while not self._is_over():
                try:
                    if self._calls.get(timeout=pause_s) and not self._lock.locked():
                        return True
                except Empty:
                    pass
                self.on_queue_empty()
                if self._activity != activity:
                    unread_s = 0.0
                    pause_s = min(2 * pause_s, PARK_MAX_S)
                elif self._lock.locked():
                    return False
                else:
                    unread_s += pause_s
                    pause_s = PARK_S
                    if self.num_sent == sent or unread_s > UNREAD_MAX_S:
                        return True
                activity, sent = self._activity, self.num_sent
                self.on_callers_left()
            return True
        finally:
            self._is_watched = False


def _nothing() -> None:
    """Nobody is interested."""
