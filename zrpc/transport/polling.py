"""How a thread waits for the next message on a socket: it polls while that pays, and sleeps else.

A processor that goes idle between two messages takes longer to wake up than the message to travel, and its caches are
cold then: on two cores a bare round trip over loopback TCP takes 140 µs if both ends sleep, and 60-85 if one does not.
So who waits polls, and yields its processor in between, for up to `busy_poll_s`, if the last message came that soon.
Where messages are further apart nobody polls.

Nor does anybody where processors are short: who yields then comes back after the others have had their time, which is
milliseconds, while the kernel lets one that wakes up go first. A yield that takes `TAKEN_S` tells that somebody else
wants the processor, or the interpreter's lock. Where such yields take more than `TAKEN_MAX_S` within `WINDOW_S` nobody
polls here for `CALM_S`. Measured with two processes that compute on two processors: yields of 3 ms, which take 40-70 %
of the time; a no-op call takes 160-1,500 µs if its ends poll, and 130 if they sleep. No three yields are enough,
however long they take: a library that keeps the interpreter's lock for once tells nothing. A few shorter ones in a row,
up to 5 ms within 20, come where both ends of a call were put on one processor, and the kernel soon parts them.

Who sends gives way too, once for each message that it has polled for: whoever carries or receives it can then begin at
once (`compare.py --only builtin_add_us` is 1.6 times as fast). In a series of messages that would only be in the way.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import zmq
from zmq.backend import zmq_poll

from zrpc import interrupts

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.transport.local_links import LocalLinks
    from zrpc.transport.sockets import Socket

TAKEN_S = 0.001
"""ZeroMQ's thread takes the processor for up to 0.1 ms at a time, but for large messages over TCP; a peer that copies
16 MiB on two threads, for 0.6."""
TAKEN_MAX_S = 0.012
WINDOW_S = 0.05
CALM_S = 1.0


class Polling:
    """Waits for messages on `sock`. Belongs to whoever reads the socket, but for `give_way`, which any thread may call.

    Args:
        sock: where they come.
        links: where they come too, if it is not None.
        busy_poll_s: how long to poll before to sleep, in seconds; 0: never poll.
    """

    def __init__(self, sock: Socket, links: LocalLinks | None, busy_poll_s: float) -> None:
        self.busy_poll_s = busy_poll_s
        self._links = links
        self._on_socket: list[tuple[Any, int]] = [(sock, int(zmq.POLLIN))]
        self._on_any = self._on_socket if links is None else [*self._on_socket, (links, int(zmq.POLLIN))]
        self._last_wait_s = 0.0
        self._no_poll_until = 0.0
        self._taken_s = 0.0
        self._window_began = 0.0
        self._owes_way = False

    def is_ready(self) -> bool:
        """Whether there is a message that need not be waited for."""
        if not self._is_there():
            return False
        self._last_wait_s = 0.0
        return True

    def wait(self, deadline: float | None) -> bool:
        """Wait for a message, which is not there yet; false if the deadline (`time.monotonic`) has passed."""
        began = time.monotonic()
        pays = self._last_wait_s < self.busy_poll_s and began > self._no_poll_until
        came = (pays and self._poll(began)) or self._sleep(deadline)
        self._last_wait_s = time.monotonic() - began
        return came

    def give_way(self) -> None:
        """A message was sent: let the thread that carries it have the processor, where that pays."""
        if self._owes_way:
            self._owes_way = False
            _yield_here()

    def is_on_socket(self) -> bool:
        """Whether there is a message on the socket."""
        return bool(zmq_poll(self._on_socket, 0))

    def _is_there(self) -> bool:
        return (self._links is not None and self._links.is_ready()) or self.is_on_socket()

    def _poll(self, began: float) -> bool:
        now = began
        while now - began < self.busy_poll_s:
            let_others_run()
            last, now = now, time.monotonic()
            came = self._is_there()
            if now - last > TAKEN_S:
                self._note_taken(now - last, now)
                return came
            if came:
                self._owes_way = True
                return True
        return False

    def _note_taken(self, took_s: float, now: float) -> None:
        """A yield took long: are such yields too much by now?"""
        if now - self._window_began > WINDOW_S:
            self._window_began, self._taken_s = now, 0.0
        self._taken_s += min(took_s, TAKEN_MAX_S / 3)
        if self._taken_s > TAKEN_MAX_S:
            self._window_began, self._no_poll_until = 0.0, now + CALM_S

    def _sleep(self, deadline: float | None) -> bool:
        timeout_ms = -1 if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)
        return bool(interrupts.wait(partial(zmq_poll, self._on_any, timeout_ms)))


def _nothing() -> None:
    """This system cannot yield."""


_yield_here: Any = getattr(os, "sched_yield", _nothing)
"""Gives up the processor, and keeps the interpreter's lock: for a moment in the middle of something."""


def _make_yield() -> Callable[[], object]:
    """The same, but it lets go of the interpreter's lock meanwhile."""
    try:
        import ctypes

        yield_: Callable[[], object] = ctypes.CDLL(None).sched_yield
    except (OSError, TypeError, AttributeError):  # not a POSIX system
        return lambda: time.sleep(0)
    return yield_


let_others_run = _make_yield()
