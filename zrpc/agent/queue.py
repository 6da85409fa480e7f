"""The calls that wait at their callee for a handler thread: how many there may be, and what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zrpc.errors import OverloadedError

if TYPE_CHECKING:
    from zrpc.agent.request import Request
    from zrpc.ids import Incarnation, WorkerInfo


class Queue:
    """The requests that wait. Any thread may use it: each one is taken out by one `dict.pop`, which is atomic.

    Args:
        max_calls: how many may wait before calls of users are refused; 0: no limit.
        refuses: whether they are refused. If not, callers that wait for room in their windows are all that slows them.

    Attributes:
        num_refused: how many calls were refused.
        num_over_limit: how many came while too many waited, refused or not.
        num_cancelled: how many calls were cancelled, begun or not.
        num_expired: how many were not begun because their time was over.
    """

    def __init__(self, max_calls: int, *, refuses: bool) -> None:
        self._max_calls = max_calls
        self._refuses = refuses
        self._waiting: dict[tuple[Incarnation, int], Request[Any]] = {}
        self.num_refused = self.num_over_limit = self.num_cancelled = self.num_expired = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: object) -> bool:
        return getattr(request, "key", None) in self._waiting

    def enter(self, request: Request[Any], me: WorkerInfo) -> OverloadedError | None:
        """`request` is to wait; why it may not, if too many wait at `me` already."""
        if self._max_calls and len(self._waiting) >= self._max_calls and request.is_of_users:
            self.num_over_limit += 1
            if self._refuses:
                self.num_refused += 1
                return OverloadedError(
                    f"{me} refused the call, which certainly did not run: {len(self._waiting)} calls wait there "
                    f"already. Call more slowly or later, or change max_queued_calls ({self._max_calls}) or "
                    "overload ('refuse') of its options"
                )
        self._waiting[request.key] = request
        return None

    def note_cancelled(self) -> None:
        """A call was cancelled, begun or not."""
        self.num_cancelled += 1

    def note_expired(self) -> None:
        """A call is not begun because its time is over."""
        self.num_expired += 1

    def leave(self, request: Request[Any]) -> bool:
        """`request` is begun, or refused; false if it does not wait (any more)."""
        return self._waiting.pop(request.key, None) is not None
