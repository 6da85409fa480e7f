"""One optimizer step at a time on a worker, as in torch, without a thread that is kept waiting for it.

What: `Turns` holds the steps that are under way and a queue of those that wait. A step that comes by a call waits in
the queue as data; it is run on a handler thread when the one before it is over.

Invariants: of the steps under way only the last runs; every other one waits, in a remote call of its own (of a hook,
say), for the next. Only a step that was called from within the one that runs may begin while that one waits, and that
one goes on only when the other is over. So a step never waits for itself, however the call came back, over other
workers too, and no two steps run at once.

Threads: any. No user code runs under the lock. A thread that user code starts in a step does not belong to it.

Failure: a hook that calls `step` without end is stopped at `MAX_DEPTH` steps within each other. Two steps on two
workers whose hooks call each other's worker wait for each other, until the time limits of their calls are over.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from zrpc.agent.pool import blocking, watching_waits
from zrpc.errors import AutogradError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zrpc.agent.agent import Agent
    from zrpc.ids import WorkerInfo
    from zrpc.wire.messages import Message
    from zrpc.wire.payload import Payload

MAX_DEPTH = 8
"""How many steps may run within each other, on all workers together."""


class _Here(threading.local):
    """The numbers of the steps that this thread works for, the outermost first."""

    chain: tuple[int, ...] = ()


_here = _Here()


@dataclass(eq=False)
class _Step:
    """One step. Owned by the lock of its `Turns`."""

    chain: tuple[int, ...]
    begin: Callable[[], None]
    number: int = field(default_factory=partial(random.getrandbits, 63))
    thread: int | None = None
    num_waits: int = 0  # within each other


class Turns:
    """The steps of one worker. Any thread may call it; what changes is owned by the lock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way: list[_Step] = []
        self._queue: deque[_Step] = deque()

    def run(self, work: Callable[[], None]) -> None:
        """Run `work` on this thread, which waits for its turn.

        Raises:
            AutogradError: there are `MAX_DEPTH` steps within each other already.
            Exception: whatever `work` raises.
        """
        begun = threading.Event()
        step = _Step(_here.chain, begun.set)
        if not self._may_begin(step):
            try:
                with blocking():
                    begun.wait()
            except BaseException:
                self._withdraw(step)
                raise
        self._run(step, work)

    def submit(self, work: Callable[[], None], agent: Agent) -> torch.futures.Future[None]:
        """Run `work`: at once, on this thread, if it is its turn, or else later, on a handler thread of `agent`.

        Returns:
            A future that is done when `work` is.

        Raises:
            AutogradError: there are `MAX_DEPTH` steps within each other already.
            Exception: whatever `work` raises, if it is run at once.
        """
        future: torch.futures.Future[None] = torch.futures.Future()
        contexts: list[AbstractContextManager[None]] = []

        def run_later() -> None:
            with agent.hooks.carried_over(contexts):
                try:
                    self._run(step, work)
                except BaseException as error:  # the future takes no others
                    plain: Any = error if isinstance(error, Exception) else RuntimeError(repr(error))
                    future.set_exception(plain)
                else:
                    future.set_result(None)

        step = _Step(_here.chain, partial(agent.submit, run_later))
        contexts += agent.hooks.carry_over()
        if self._may_begin(step):
            self._run(step, work)
            future.set_result(None)
        return future

    def _may_begin(self, step: _Step) -> bool:
        """Whether `step` has its turn; else it is in the queue now."""
        if len(step.chain) >= MAX_DEPTH:
            raise AutogradError(
                f"{MAX_DEPTH} optimizer steps run within each other: a hook of an optimizer, or its step itself, calls "
                "step of a DistributedOptimizer each time that it runs. Call it once the step is over"
            )
        with self._changed:
            if self._is_next(step):
                self._under_way.append(step)
                return True
            self._queue.append(step)
            return False

    def _is_next(self, step: _Step) -> bool:
        if not self._under_way:
            return True
        last = self._under_way[-1]
        return last.number in step.chain and (last.num_waits > 0 or last.thread == threading.get_ident())

    def _run(self, step: _Step, work: Callable[[], None]) -> None:
        """Run `work`, whose turn it is."""
        StepHook.is_idle = False
        step.thread = threading.get_ident()
        outer, _here.chain = _here.chain, (*step.chain, step.number)
        try:
            with watching_waits(partial(self._on_wait, step)):
                work()
        finally:
            _here.chain = outer
            self._end(step)

    def _on_wait(self, step: _Step, is_waiting: bool) -> None:
        """The thread of `step` begins to wait for a call, or is about to go on."""
        if is_waiting:
            with self._changed:
                step.num_waits += 1
                begin = self._take_next()
            if begin is not None:
                begin()
            return
        with self._changed:
            try:
                self._changed.wait_for(lambda: self._under_way[-1] is step)
            finally:
                step.num_waits -= 1

    def _end(self, step: _Step) -> None:
        with self._changed:
            self._under_way.remove(step)
            begin = self._take_next()
            self._changed.notify_all()
        if begin is not None:
            begin()

    def _withdraw(self, step: _Step) -> None:
        """`step` will not be run."""
        with self._changed:
            if step in self._queue:
                self._queue.remove(step)
                return
        self._end(step)

    def _take_next(self) -> Callable[[], None] | None:
        """Let the first step begin whose turn it is. Call it under the lock, and what it returns outside of it."""
        for step in self._queue:
            if self._is_next(step):
                self._queue.remove(step)
                self._under_way.append(step)
                return step.begin
        return None


class StepHook:
    """A call hook: calls that are made within a step say so, and so do those that are made to serve them.

    It is idle until a step runs in this process, or serves one.
    """

    key = "step"
    is_idle = True

    def send(self, to: WorkerInfo, message: Message, payload: Payload, request_meta: object | None) -> object | None:
        """See `CallHook.send`."""
        chain = _here.chain
        return list(chain) if chain and request_meta is None else None

    def receive(self, source: WorkerInfo, meta: Any, payload: Payload, is_reply: bool) -> AbstractContextManager[None]:
        """See `CallHook.receive`."""
        return _within(tuple(meta))

    def carry_over(self) -> AbstractContextManager[None] | None:
        """See `CallHook.carry_over`."""
        return _within(_here.chain) if _here.chain else None


@contextmanager
def _within(chain: tuple[int, ...]) -> Iterator[None]:
    StepHook.is_idle = False
    outer, _here.chain = _here.chain, chain
    try:
        yield
    finally:
        _here.chain = outer


def install(agent: Agent) -> None:
    """Let steps on `agent` follow one another. To be called before it joins."""
    agent.extensions[Turns] = Turns()
    agent.add_hook(StepHook())
