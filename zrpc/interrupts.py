"""Signal handlers on the main thread run where zrpc holds nothing.

What: Python runs signal handlers on the main thread, between any two bytecodes, and what a handler raises (Ctrl-C
raises KeyboardInterrupt) ends whatever was under way there. pyzmq even loses a message that it has just received so. A
handler may also make a call, or shut the worker down, which needs the locks that its thread holds. So on the main
thread zrpc does its work in *deferred* sections. A handler whose signal comes meanwhile runs at the end of the section,
or as soon as the section waits for something. What a handler raises in a destructor is ignored by Python, and what the
destructor was to do is left undone: in zrpc's own (`uninterrupted`) the signal is put off.

Invariants: within `deferred` no handler runs, but in `wait`, which ends with `Interrupted`, and in `run_handlers`.
Neither does so within `held`, which is for sections that must not be left in the middle.

Threads: on all threads but the main one all of this does nothing: Python runs no signal handlers there.

Failure: Python calls a handler where `signal.signal` has put one. So `install` puts a `_Deferrable` around it, before
the thread waits the next time, or the next section begins; `uninstall` takes it away. A handler that
is written in C is not deferred.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from zrpc import finalizers

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType, TracebackType

    Handler = Callable[[int, FrameType | None], Any]

T = TypeVar("T")
F = TypeVar("F", bound=Any)

INSISTS, INSISTS_S = 2, 1.0
"""Who has pressed Ctrl-C so often, for so long, within one section, and does so again, is obeyed at once."""
MAX_FRAMES = 8
"""What is `uninterrupted` calls no further than this, but in a section."""

_get_ident = threading.get_ident
_getsignal: Any = getattr(signal, "_signal").getsignal  # noqa: B009  # the one of C: that of `signal` makes enums
_main = threading.main_thread().ident


class Interrupted(BaseException):
    """A signal came while `wait` waited. Let go of everything, then call `run_handlers`."""


class _Main:
    """The state of the main thread, which alone changes it.

    Attributes:
        depth: how many sections it is in.
        held: how many of them must not be left in the middle.
        is_waiting: it is in `wait`, and may be interrupted.
        pending: handlers that are to run, with the arguments that Python gave them.
        first_at: when the first Ctrl-C of those came (`time.monotonic`).
    """

    def __init__(self) -> None:
        self.depth = 0
        self.held = 0
        self.is_waiting = False
        self.pending: list[tuple[Handler, int, FrameType | None]] = []
        self.first_at = 0.0

    def insists(self, signum: int) -> bool:
        """Whether the user presses Ctrl-C again and again, and the section may never end: code of users may run in it.

        What is interrupted then may be left in the middle.
        """
        if signum != signal.SIGINT or self.held:
            return False
        now, count = time.monotonic(), sum(number == signum for _, number, _ in self.pending)
        if not count:
            self.first_at = now
        if count < INSISTS or now - self.first_at < INSISTS_S:
            return False
        self.pending = [one for one in self.pending if one[1] != signum]  # they are heard at last
        return True

    def run_pending(self) -> None:
        """Run the handlers that were deferred. Call it where `depth` is 0. What the first one raises is raised."""
        while self.pending:
            handler, signum, frame = self.pending.pop(0)
            handler(signum, frame)


_state = _Main()


class _Deferrable:
    """A signal handler that waits for the end of the section that it would have interrupted."""

    __slots__ = ("__wrapped__",)

    def __init__(self, handler: Handler) -> None:
        self.__wrapped__ = handler

    def __call__(self, signum: int, frame: FrameType | None) -> Any:
        if _is_put_off(frame):
            finalizers.defer(partial(_thread.interrupt_main, signal.Signals(signum)))  # the signal comes once more
            return None
        if not _state.depth or _state.insists(signum):
            return self.__wrapped__(signum, frame)
        _state.pending.append((self.__wrapped__, signum, frame))
        if _state.is_waiting:
            _state.is_waiting = False
            raise Interrupted
        return None


class _Deferred:
    """See `deferred`. It has no state of its own: one serves all."""

    __slots__ = ()

    def __enter__(self) -> None:
        if _get_ident() == _main:
            if not _state.depth and list(map(_getsignal, _SIGNALS)) != _seen:
                install()
            _state.depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if _get_ident() == _main:
            _state.depth -= 1
            if _state.pending and not _state.depth:
                _state.run_pending()


class _Held:
    """See `held`."""

    __slots__ = ()

    def __enter__(self) -> None:
        if _get_ident() == _main:
            _state.depth += 1
            _state.held += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if _get_ident() == _main:
            _state.held -= 1
            _state.depth -= 1
            if _state.pending and not _state.depth:
                _state.run_pending()


deferred = _Deferred()
"""A section in which no signal handler runs on this thread, but where it waits (`wait`)."""
held = _Held()
"""The same, and waiting in it is not interrupted either. It is entered a little quicker: see `install`."""


_uninterrupted: set[CodeType] = {weakref.finalize.__call__.__code__}


def uninterrupted(function: F) -> F:
    """Decorates `__del__`, weakref callbacks and `__exit__`: no signal handler runs in them, nor where they begin."""
    _uninterrupted.add(function.__code__)
    return function


def _is_put_off(frame: FrameType | None) -> bool:
    for _ in range(MAX_FRAMES):
        if frame is None:
            break
        if frame.f_code in _uninterrupted:
            return True
        frame = frame.f_back
    return False


def wait(waiting: Callable[[], T]) -> T:
    """What `waiting()` returns, which blocks; a signal ends it, unless this thread holds something.

    Raises:
        Interrupted: handlers are to be run. What `waiting` did, if it was done in that moment, is not told.
    """
    if _get_ident() != _main or not _state.depth or _state.held:
        return waiting()
    if list(map(_getsignal, _SIGNALS)) != _seen:
        install()
    _state.is_waiting = True
    try:
        if _state.pending:
            raise Interrupted
        return waiting()
    finally:
        _state.is_waiting = False


def check() -> None:
    """Within a loop that waits for something: end it, as `wait` does, if a signal came."""
    if _state.pending and not _state.held and _get_ident() == _main:
        raise Interrupted


def restart(waiting: Callable[..., T], *args: Any) -> T:
    """What `waiting(*args)` returns, in a deferred section; handlers run when signals come, then it begins again.

    Within a section that is held it is not interrupted. What a handler raises is raised here.
    """
    if _get_ident() != _main:
        return waiting(*args)
    if not _state.depth:
        with deferred:
            return restart(waiting, *args)
    while True:
        try:
            return waiting(*args)
        except Interrupted:
            run_handlers()


def run_handlers() -> None:
    """Run the handlers that were deferred, within a deferred section that holds nothing."""
    if _get_ident() != _main or _state.held or not _state.pending:
        return
    depth = _state.depth
    try:
        _state.depth = 0
        _state.run_pending()
    finally:
        _state.depth = depth  # no handler runs between the call and this


def install() -> None:
    """Put a `_Deferrable` around each handler that is written in Python. For the main thread; else it does nothing."""
    global _seen
    if _get_ident() != _main:
        return
    for signum in _SIGNALS:
        handler = _getsignal(signum)
        if type(handler) is not _Deferrable and callable(handler):
            signal.signal(signum, _Deferrable(handler))
    _seen = list(map(_getsignal, _SIGNALS))


def uninstall() -> None:
    """Put the handlers back as they were. On another thread than the main one it does nothing."""
    if _get_ident() == _main:
        for signum in _SIGNALS:
            handler = _getsignal(signum)
            if type(handler) is _Deferrable:
                signal.signal(signum, handler.__wrapped__)


def _catchable() -> tuple[int, ...]:
    """The signals that programs have handlers for which call or raise."""
    names = ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP")
    return tuple(int(getattr(signal, name)) for name in names if hasattr(signal, name))


_SIGNALS = _catchable()
_seen: list[Any] = []
"""Their handlers, as `install` last left them. To look whether they still are takes 0.3 us."""


def _begin_child() -> None:
    """This process was forked: the thread that did it is the main one here, and in no section."""
    global _main, _state
    _main, _state = _get_ident(), _Main()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)
