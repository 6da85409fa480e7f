"""ZeroMQ's I/O thread of one endpoint, and how the kernel schedules it.

A message changes threads three times on its way: the sender wakes its I/O thread, that one the receiver's, and that one
the receiver, unless it polls. A thread that the kernel wakes interrupts what runs on its processor, if it can, and on a
virtual machine that costs the waker 20 µs where it is another processor than its own. Mostly it is for nothing: what
runs there is a thread that polls for messages, which gives the processor away by itself within a microsecond. So while
somebody polls, the I/O thread is of the policy SCHED_BATCH, which waits instead of interrupting. It must not stay so
where the processors are busy with something else (`zrpc.transport.polling` finds that out): it would wait for
milliseconds, until the other's time is over.

Measured on two processors, calls in a row: no-op 104 -> 74 µs, built-in operator 170 -> 118 µs, and 1.4 times as many
asynchronous calls a second. Rejected: an I/O thread for each direction. It was no faster, and where nobody polls or
many workers share the processors up to a fifth slower.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from functools import partial

import zmq

from zrpc import finalizers
from zrpc.transport import sockets

log = logging.getLogger("zrpc")

_THREAD_CPU_CLOCK = 6
"""Of this kind is the clock that a thread's id stands for (clock_getcpuclockid(3), and Linux's posix-timers.h)."""

_numbers = itertools.count(1)


def make_context() -> tuple[sockets.Context, IoThread]:
    """A ZeroMQ context for one endpoint, and its I/O thread, which begins with its first socket.

    Raises:
        LimitError: this process may not open the files that an endpoint needs.
    """
    context = sockets.make_context()
    number = next(_numbers)
    context.set(zmq.THREAD_NAME_PREFIX, number)
    return context, IoThread(f"{number}/ZMQbg/IO/")


class IoThread:
    """The thread of this process whose name begins with `prefix`. Not thread-safe."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.is_polite = False
        self._id: int | None = None  # 0: it cannot be told, or is to be left as it is

    def be_polite(self, is_polite: bool) -> None:
        """Let it wait for a processor that is given away, or else interrupt what runs there.

        Nothing happens where that is not the kernel's way, or not allowed.
        """
        if is_polite == self.is_polite:
            return
        self.is_polite = is_polite
        thread_id = self._known()
        if not thread_id:
            return
        try:
            os.sched_setscheduler(thread_id, os.SCHED_BATCH if is_polite else os.SCHED_OTHER, os.sched_param(0))
        except OSError as error:  # it has ended, or a container forbids it
            finalizers.defer(partial(log.debug, "the policy of ZeroMQ's thread stays as it is: %s", error))
            self._id = 0

    def cpu_s(self) -> float | None:
        """For how long it has run so far, in seconds; None where that is not known."""
        thread_id = self._known()
        try:
            return time.clock_gettime(~thread_id << 3 | _THREAD_CPU_CLOCK) if thread_id else None
        except OSError:  # it has ended
            return None

    def _known(self) -> int | None:
        """Its id; 0: it cannot be told, or is of a policy that somebody wanted; None: it is not there yet."""
        if self._id is None:
            try:
                ids = [int(entry) for entry in os.listdir("/proc/self/task") if _name(entry).startswith(self.prefix)]
                if ids:  # it names itself once it runs
                    self._id = ids[0] if os.sched_getscheduler(ids[0]) == os.SCHED_OTHER else 0
            except (FileNotFoundError, AttributeError):  # not Linux
                self._id = 0
            except OSError as error:  # no more files may be opened, say: it may be told later
                finalizers.defer(partial(log.debug, "ZeroMQ's thread cannot be looked for now: %s", error))
        return self._id


def _name(entry: str) -> str:
    try:
        with open(f"/proc/self/task/{entry}/comm") as comm:
            return comm.read()
    except OSError:  # it has just ended
        return ""
