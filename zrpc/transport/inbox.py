"""Reading one inbound socket, by one thread at a time, and running there what messages ask for.

What: `zrpc.transport.turns` decides which thread reads; here it does. A caller that waits for an outcome reads until it
is there (`wait_for`). A *reader* (there are `READERS` of them, which `run`) that takes a message which is work to do,
does the work itself, when another thread may read. For how it waits for one see `zrpc.transport.polling`.

Workers of one host send on Unix sockets (`zrpc.transport.local_links`), which are read first, but for one message of
the socket after every `LOCAL_RUN`.

Invariants: the socket belongs to the thread that reads. Messages are handed on by it, one after the other, so they keep
their order. A caller runs nothing but `take`; what must be done in order but not on its thread is left to a reader
(`hand_on`).

Threads: any may call `wait_for`. `_lock` owns `_turns`, and nothing waits under it.

Failure: on the main thread signal handlers run while this thread waits for a message and does not read
(`zrpc.interrupts`): what they raise is raised by `wait_for`, and no message is lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from zrpc import finalizers, interrupts, threads
from zrpc.exception_text import log_error
from zrpc.transport.multipart import Messages
from zrpc.transport.polling import Polling
from zrpc.transport.turns import Place, Turns
from zrpc.wakeups import WakeUp
from zrpc.wire.envelope import Buffer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zrpc.transport.local_links import LocalLinks
    from zrpc.transport.multipart import Check
    from zrpc.transport.sockets import Socket
    from zrpc.transport.turns import Awaited

log = logging.getLogger("zrpc")

READERS = 2
LOCAL_RUN = 16
CLOSE_WAIT_S = 5.0

Work = Callable[[], None]
Take = Callable[[bytes, list[Buffer]], Work | None]
"""`take(source, frames)`: a message came. It must not block, and must not raise.

It may return work, which may block, but only if `Inbox.can_work` is true.
"""


class Inbox:
    """The receiving side of a socket whose messages begin with a source frame.

    Args:
        sock: the socket; the inbox closes it.
        take: is given each message, by whichever thread reads.
        is_over: whether reading is over. Looked at after each message: send the socket one when it comes true.
        interrupt: sends the socket a message that says nothing.
        links: where messages come too, if it is not None; the inbox closes it.
        busy_poll_s: see `Polling`.
        check: see `Messages`.

    Attributes:
        on_queue_empty: called by a reader before it waits or stays away, and every few ms by the one that keeps watch.
        on_callers_left: called by a reader when callers that read may have left something to do.
        polling: how to wait for the next message.
        num_sent: callers that send count it up; being only a hint, it may miss some.
    """

    def __init__(
        self,
        sock: Socket,
        take: Take,
        is_over: Callable[[], bool],
        interrupt: Callable[[], None],
        links: LocalLinks | None = None,
        busy_poll_s: float = 0.0,
        check: Check | None = None,
    ) -> None:
        self.tell(_nothing, _nothing)
        self.polling = Polling(sock, links, busy_poll_s)
        self.num_sent = 0
        self._sock = sock
        self._links = links
        self._take = take
        self._is_over = is_over
        self._interrupt = interrupt
        self._lock = threading.Lock()
        self._turns = Turns()
        self._wakes: dict[int, WakeUp] = {}  # of the readers; each adds its own
        self._serves_queue = 0  # the reader at work that had not to wait for it
        self._messages = Messages(sock, check)
        self._local_run = 0
        self._takes_several = False
        self._handed_on: deque[Work] = deque()
        self._num_handed_on = 0  # and not done yet
        self._doing = threading.Lock()  # held by the reader that does what was handed on

    def tell(self, on_queue_empty: Callable[[], None], on_callers_left: Callable[[], None]) -> None:
        """Say what readers are to call; once, before there are any. See "Attributes"."""
        self.on_queue_empty, self.on_callers_left = on_queue_empty, on_callers_left

    @property
    def can_work(self) -> bool:
        """Whether the thread that reads now may be given work: it is a reader, and another is there to take over."""
        turns = self._turns
        return not turns.reading_for and not self._takes_several and turns.num_parked > 0

    @property
    def is_read_by_caller(self) -> bool:
        """Whether the thread that reads now waits for an outcome of its own."""
        return bool(self._turns.reading_for)

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
        return self._turns.is_reader(threading.get_ident())

    @property
    def is_read_here(self) -> bool:
        """Whether this thread reads."""
        return self._turns.holder == threading.get_ident()

    @property
    def serves_queue_here(self) -> bool:
        """Whether this thread is a reader at work that had not to wait for it, so that more may lie there."""
        return self._serves_queue == threading.get_ident()

    @property
    def is_on_link(self) -> bool:
        """Whether what `take` is given now came on a local link."""
        return self._local_run > 0

    @property
    def must_hand_on(self) -> bool:
        """Whether what must be done in order is not to be done by the thread that reads now, but handed on."""
        return bool(self._turns.reading_for) or self._num_handed_on > 0

    def hand_on(self, work: Work) -> None:
        """Have a reader do `work` soon, after all that was handed on before. For the thread that reads."""
        self._handed_on.append(work)
        with self._lock:
            self._num_handed_on += 1
            reader = self._turns.call_for_work()
        self._wake(reader)

    def wake(self, wanted: Awaited) -> None:
        """`wanted` is done otherwise than by a message: wake the caller that reads for it, if one does."""
        if self._turns.is_read_for(wanted) and not self.is_read_here:
            self._interrupt()

    def describe(self) -> str:
        """Who reads and who does not, for the log."""
        with self._lock:
            return self._turns.describe()

    # ---- readers

    def run(self) -> None:
        """Be a reader, until `is_over`."""
        me = threading.get_ident()
        self._wakes[me] = WakeUp()
        with self._lock:
            self._turns.reader_comes(me)
        threads.keep_running(partial(self._be_reader, me), self._is_over)
        self.on_queue_empty()
        with self._lock:
            self._turns.reader_goes(me)
        self._do_handed_on()
        for wake in list(self._wakes.values()):  # the others end too
            wake.set()

    def _be_reader(self, me: int) -> None:
        if self._handed_on:
            with self._lock:
                self._turns.reader_works(me)
            self._do_handed_on()
        with self._lock:
            if self._handed_on and not self._doing.locked():
                return
            place = self._turns.next_step(me, self.num_sent)
        if place is Place.READING:
            self._read_and_work(me)
            return
        self.on_queue_empty()
        self._wakes[me].wait(self._turns.pause_s(me))
        if place is Place.WATCHING:
            self.on_queue_empty()
            self.on_callers_left()

    def _read_and_work(self, me: int) -> None:
        work = None
        try:
            work = self._read(me)
        finally:
            with self._lock:
                reader = self._turns.reader_leaves(me, has_work=work is not None)
            if reader:
                self._wake(reader)
        if work is None:
            self.on_queue_empty()
            return
        try:
            work()
        except BaseException as error:  # this thread has more to do
            log_error(log, "a request failed in an unexpected way", error=error)
            del error

    def _read(self, me: int) -> Work | None:
        """Read until there is work to do or the socket is left to callers."""
        if self._serves_queue != me:
            self._take_over()
        self.on_callers_left()
        while not self._is_over():
            if self._handed_on:
                self._do_handed_on()
            is_ready = self.polling.is_ready()
            if not is_ready:
                self.on_queue_empty()
                self.polling.wait(None)
            work = self._hand_on()
            if work is not None:
                self._serves_queue = me if is_ready else 0
                return work
            if self._turns.is_awaited:
                with self._lock:
                    if self._turns.follows_closely(time.monotonic()):
                        break
        return None

    def _do_handed_on(self) -> None:
        """Do what was handed on, unless another reader does."""
        while self._handed_on and self._doing.acquire(blocking=False):
            try:
                while self._handed_on:
                    work = self._handed_on.popleft()
                    try:
                        work()
                    except BaseException as error:  # the others are of other calls
                        finalizers.defer(partial(log_error, log, "a request failed in an unexpected way", error=error))
                    finally:
                        with self._lock:
                            self._num_handed_on -= 1
            finally:
                self._doing.release()

    def _wake(self, reader: int) -> None:
        wake = self._wakes.get(reader)
        if wake is not None:
            wake.set()

    # ---- callers

    def wait_for(self, wanted: Awaited, deadline: float | None, is_serving: Callable[[], bool] = lambda: False) -> None:
        """Wait for `wanted`; this thread reads meanwhile, unless another one does.

        Args:
            wanted: what it waits for. If it comes otherwise than by a message, call `wake` after.
            deadline: when to give up (`time.monotonic`); None: never.
            is_serving: whether this thread serves a request.
        """
        interrupts.restart(self._wait_for, wanted, deadline, is_serving)

    def _wait_for(self, wanted: Awaited, deadline: float | None, is_serving: Callable[[], bool]) -> None:
        me = threading.get_ident()
        if self._serves_queue == me:
            self._take_over()
        with self._lock:
            reads = self._turns.caller_waits(me, wanted)
            if not reads and is_serving():
                self._turns.caller_serves()
        if not reads:
            try:
                if not wanted.done():
                    wanted.block(deadline)
            finally:
                with self._lock:
                    self._turns.caller_unblocked(wanted)
            return
        try:
            self._take_over()
            while not wanted.done() and not self._is_over():
                if not self.polling.is_ready() and not self.polling.wait(deadline):
                    break
                self._hand_on()
                if wanted.done():
                    break
                interrupts.check()
                if deadline is not None and time.monotonic() >= deadline:
                    break
        finally:
            with self._lock:
                reader = self._turns.caller_leaves(me)
                is_nested = self._turns.holder == me
            if reader:
                self._wakes[reader].set()
            elif is_nested:  # the outer wait may be over, and not know
                self._interrupt()

    # ---- the end

    def end(self) -> None:
        """Reading has come to an end: close the links that are received on, so that nothing more is sent there."""
        if self._links is not None:
            self._await_unread()
            self._links.close()

    def close(self) -> None:
        """Close the socket once nobody reads it. What `take` calls may call it too."""
        self.end()
        self._await_unread()
        self._sock.close()

    def _await_unread(self) -> None:
        """Reading is over: wait until the thread that reads has seen that."""
        deadline = time.monotonic() + CLOSE_WAIT_S
        while self._turns.holder not in (0, threading.get_ident()) and time.monotonic() < deadline:
            time.sleep(0.001)

    # ---- messages

    def _hand_on(self) -> Work | None:
        """Take a message and hand it on: small frames as bytes, large ones as views. For the thread that reads.

        There may be none after all.
        """
        if self._links is not None and (self._local_run < LOCAL_RUN or not self.polling.is_on_socket()):
            message = self._links.receive()
            if message is not None:
                self._local_run += 1
                return self._take(*message)
            if not self.polling.is_on_socket():
                return None
        self._local_run = 0
        received = self._messages.receive()
        if not received:
            return None
        source, *frames = received
        return self._take(source, frames)  # type: ignore[arg-type]  # a source is bytes

    def _take_over(self) -> None:
        """This thread reads now, or waits: the reader at work that left something lying may not come back for long."""
        self._serves_queue = 0
        self.on_queue_empty()


def _nothing() -> None:
    """Nobody is interested."""
