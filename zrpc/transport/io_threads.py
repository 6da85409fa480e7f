"""ZeroMQ's I/O threads of one endpoint, and how the kernel schedules them.

An endpoint has two: one for what goes out, one for what comes in. So a message is carried by the sender's outbound and
the receiver's inbound thread, and the kernel, which leaves threads where they were, may keep the two of them together
beside the one that sends.

A thread that the kernel wakes up interrupts what runs on its processor, if it can. On a virtual machine the interrupt
costs the sender 20 µs where that is another processor than its own. And mostly it is for nothing: what runs there is a
thread that polls for messages, which gives the processor away by itself within a microsecond. So while threads poll,
I/O threads are of the policy SCHED_BATCH, which waits instead of interrupting. It must not stay so where the
processors are busy with something else (`zrpc.transport.polling` finds that out): an I/O thread would wait for
milliseconds, until the other's time is over.

Measured on two processors, calls in a row: no-op 104 -> 76 µs, built-in operator 170 -> 117 µs, and 1.5 times as many
asynchronous calls a second.
"""

from __future__ import annotations

import itertools
import logging
import os
import time

import zmq

from zrpc.transport import sockets

log = logging.getLogger("zrpc")

OUTBOUND, INBOUND = 1, 2
"""Which of the two is to see to a socket: values of `zmq.AFFINITY`."""
COUNT = 2
_THREAD_CPU_CLOCK = 6
"""Of this kind is the clock that a thread's id stands for (clock_getcpuclockid(3), and Linux's posix-timers.h)."""

_numbers = itertools.count(1)


def make_context() -> tuple[sockets.Context, IoThreads]:
    """A ZeroMQ context for one endpoint, and its I/O threads, which begin with its first socket.

    Raises:
        LimitError: this process may not open the files that an endpoint needs.
    """
    context = sockets.make_context()
    number = next(_numbers)
    context.set(zmq.IO_THREADS, COUNT)
    context.set(zmq.THREAD_NAME_PREFIX, number)
    return context, IoThreads(f"{number}/ZMQbg/IO/")


class IoThreads:
    """The threads of this process whose names begin with `prefix`. Not thread-safe."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._ids: list[int] | None = None
        self.is_polite = False

    def be_polite(self, is_polite: bool) -> None:
        """Let them wait for a processor that is given away, or else interrupt what runs there.

        Nothing happens where that is not the kernel's way, or not allowed.
        """
        if is_polite == self.is_polite:
            return
        self.is_polite = is_polite
        try:
            for thread_id in self._known():
                os.sched_setscheduler(thread_id, os.SCHED_BATCH if is_polite else os.SCHED_OTHER, os.sched_param(0))
        except OSError as error:  # they have ended, or a container forbids it
            log.debug("the policy of ZeroMQ's threads stays as it is: %s", error)
            self._ids = []

    def cpu_s(self) -> float:
        """For how long they have run so far, in seconds; 0.0 where that is not known."""
        try:
            return sum(time.clock_gettime(~thread_id << 3 | _THREAD_CPU_CLOCK) for thread_id in self._known())
        except OSError:  # they have ended
            return 0.0

    def _known(self) -> list[int]:
        """Their ids; none where they cannot be told, or are of a policy that somebody must have wanted."""
        if self._ids is None:
            try:
                ids = [int(entry) for entry in os.listdir("/proc/self/task") if _name(entry).startswith(self.prefix)]
                usual = all(os.sched_getscheduler(thread_id) == os.SCHED_OTHER for thread_id in ids)
            except (OSError, AttributeError):  # not Linux
                ids, usual = [], False
            if usual and len(ids) < COUNT:  # they name themselves once they run
                return ids
            self._ids = ids if usual else []
        return self._ids


def _name(entry: str) -> str:
    try:
        with open(f"/proc/self/task/{entry}/comm") as comm:
            return comm.read()
    except OSError:  # it has just ended
        return ""
