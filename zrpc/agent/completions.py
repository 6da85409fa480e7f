"""Who completes the futures of asynchronous calls, and so runs what users hang on them.

An answer that the reading thread brings is completed by a completer thread, at once. One that a caller brings, reading
for itself, is left lying for a moment: as a rule that caller waits for it next (it sent many calls and waits for one
after the other), and then completes it itself, without waking anybody.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from zrpc.agent.pool import HandlerPool

if TYPE_CHECKING:
    from collections.abc import Callable


class Completion(Protocol):
    """Something to complete, once, by whoever comes first."""

    @property
    def is_taken(self) -> bool:
        """Whether somebody has come."""

    def complete(self) -> None:
        """Do it, unless somebody has come before."""


class Completions:
    """The completer threads, and what lies before them. Any thread may call it; `deque`'s operations are atomic.

    Args:
        is_read_by_caller: whether the thread that reads now is a caller.
    """

    def __init__(self, is_read_by_caller: Callable[[], bool]) -> None:
        self._is_read_by_caller = is_read_by_caller
        self._pool = HandlerPool(1, "zrpc-completer")
        self._left: deque[Completion] = deque()

    def run_with(self, around: Callable[[Callable[[], None]], None] | None) -> None:
        """From now on `around` runs each task; None: nothing does."""
        self._pool.run_with(around)

    def is_here(self) -> bool:
        """Whether this is a completer thread."""
        return self._pool.is_here()

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task` soon on a completer thread."""
        self._pool.submit(task)

    def add(self, completion: Completion, *, soon: bool) -> None:
        """Its answer is here. Called by the reading thread.

        Args:
            completion: what is to be completed.
            soon: somebody is known to wait for it who will not complete it.
        """
        if soon or not self._is_read_by_caller():
            self._pool.submit(completion.complete)
        else:
            self._left.append(completion)

    def catch_up(self) -> None:
        """See to what callers left lying."""
        while self._left:
            try:
                completion = self._left.popleft()
            except IndexError:
                return
            if not completion.is_taken:
                self._pool.submit(completion.complete)

    def close(self, timeout_s: float) -> None:
        """Complete what is there, then end the threads; see `HandlerPool.close`."""
        self.catch_up()
        self._pool.close(timeout_s)
