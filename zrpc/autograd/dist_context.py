"""One autograd context on one worker: what of its graph begins and ends here, and its gradients.

One lock owns the gradients, another one all else that changes. Neither is held while user code, torch's engine or a
send runs. Tensors are added under that of the gradients alone, which no thread that reads messages takes.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from zrpc.autograd.accumulate import Sum, Taken, add_all
from zrpc.errors import AutogradError
from zrpc.staging import handover

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import torch
    from torch.autograd.graph import Node

    from zrpc.autograd.functions import SendFunction
    from zrpc.ids import GlobalId, Incarnation, WorkerInfo
    from zrpc.staging.streams import Mark

MAX_ENDED = 64
"""How many passes that are over a context remembers, to refuse what comes late for them."""


class Pass(Protocol):
    """What a context needs of a backward pass."""

    pass_id: GlobalId
    began_here: bool

    def fail(self, error: BaseException) -> None:
        """End it with `error`, unless it is over."""

    def lose(self, life: Incarnation, text: str) -> None:
        """The worker of that life is gone."""


P = TypeVar("P", bound=Pass)


class DistAutogradContext:
    """What this worker knows of the context `context_id`, whose creator's rank is in the upper 16 bits of its id.

    Args:
        context_id: its id.
        creator: the life of the worker that made it.
    """

    def __init__(self, context_id: int, creator: Incarnation = b"") -> None:
        self.context_id = context_id
        self.creator = creator
        self._lock = threading.Lock()
        self._sends: dict[GlobalId, SendFunction] = {}
        self._recvs: dict[GlobalId, weakref.ref[Node]] = {}
        self._known_workers: dict[Incarnation, int] = {}  # with their ranks
        self._active: Pass | None = None
        self._ended: deque[GlobalId] = deque(maxlen=MAX_ENDED)
        self._aborted: deque[GlobalId] = deque(maxlen=MAX_ENDED)
        self._released = False
        self.whole_models: set[Any] = set()
        self._summing = threading.Lock()  # owns what follows
        self._sums: dict[torch.Tensor, Sum] = {}
        self._mark: Mark | None = None  # in the streams of the thread that changed `_sums` last; who sees them joins it

    # ---- the graph -------------------------------------------------------------------------------------------------

    def add_send(self, message_id: GlobalId, function: SendFunction) -> None:
        """Tensors that require grad leave in a message."""
        with self._lock:
            self._sends[message_id] = function

    def add_recv(self, message_id: GlobalId, function: Node) -> None:
        """Tensors that require grad came with a message. The graph keeps `function` as long as it leads there."""
        with self._lock:
            self._recvs[message_id] = weakref.ref(function)

    def add_known_worker(self, worker: WorkerInfo) -> None:
        """`worker` was told of this context."""
        with self._lock:
            self._known_workers[worker.incarnation] = worker.id

    def is_known_beyond(self, lives: Collection[Incarnation | None]) -> bool:
        """Whether a worker whose life is not among `lives` was told of this context from here."""
        with self._lock:
            return any(life not in lives for life in self._known_workers)

    def sends(self) -> dict[GlobalId, SendFunction]:
        """The send functions, in the order in which they were made."""
        with self._lock:
            return dict(self._sends)

    def known_workers(self) -> list[Incarnation]:
        """The lives that were told of this context from here."""
        with self._lock:
            return list(self._known_workers)

    # ---- gradients -------------------------------------------------------------------------------------------------

    def add_gradients(self, taken: Sequence[Taken]) -> None:
        """Add gradients of leaves."""
        with self._summing:
            if self._mark is not None:
                self._mark.join()
            add_all(self._sums, taken)
            if handover.streams is not None:
                self._mark = handover.streams.mark()

    def gradient(self, leaf: torch.Tensor) -> torch.Tensor | None:
        """The gradient of `leaf` so far."""
        with self._summing:
            if self._mark is not None:
                self._mark.join()
            found = self._sums.get(leaf)
            return None if found is None else found.value

    def set_gradient(self, leaf: torch.Tensor, gradient: torch.Tensor) -> None:
        """Replace the gradient of `leaf`."""
        with self._summing:
            if self._mark is not None:
                self._mark.join()
            self._sums[leaf] = Sum(gradient, is_ours=False)
            if handover.streams is not None:
                self._mark = handover.streams.mark()

    def gradients(self) -> dict[torch.Tensor, torch.Tensor]:
        """The gradients so far, by leaf. The tensors are those of the context, not copies."""
        with self._summing:
            if self._mark is not None:
                self._mark.join()
            return {leaf: total.value for leaf, total in self._sums.items()}

    # ---- passes ----------------------------------------------------------------------------------------------------

    @property
    def active(self) -> Pass | None:
        """The backward pass under way here."""
        return self._active

    def join_pass(self, pass_id: GlobalId, make: Callable[[], P]) -> tuple[P, Pass | None]:
        """The pass `pass_id`: the one under way, or a new one by `make`, which is cheap.

        Returns:
            The pass, and one under way until now that it replaces: it must have failed elsewhere.

        Raises:
            AutogradError: the pass is over, or the context is.
        """
        with self._lock:
            active = self._active
            if active is not None and active.pass_id == pass_id:
                return cast("P", active), None  # they are all of one kind
            if self._released:
                raise AutogradError(f"autograd context {self.context_id} is released")
            if pass_id in self._ended:
                raise AutogradError(f"the backward pass {pass_id} of autograd context {self.context_id} is over here")
            self._active = made = make()
            return made, active

    def end_pass(self, pass_id: GlobalId) -> None:
        """The pass is over, well or not; whatever comes late for it is refused."""
        with self._lock:
            if pass_id not in self._ended:
                self._ended.append(pass_id)
            if self._active is not None and self._active.pass_id == pass_id:
                self._active = None

    def note_abort(self, pass_id: GlobalId) -> bool:
        """The pass was called off; False if that was known."""
        with self._lock:
            if pass_id in self._aborted:
                return False
            self._aborted.append(pass_id)
            self._ended.append(pass_id)
            return True

    def release(self) -> None:
        """The context is over: a pass under way fails, and none begins any more."""
        with self._lock:
            self._released = True
            active = self._active
        if active is not None:
            active.fail(AutogradError(f"autograd context {self.context_id} was released during a backward pass"))

    # ---- for people and tests, under torch's names -----------------------------------------------------------------

    def _context_id(self) -> int:
        return self.context_id

    def _send_functions(self) -> dict[GlobalId, SendFunction]:
        return self.sends()

    def _recv_functions(self) -> dict[GlobalId, Node]:
        with self._lock:
            return {message_id: node for message_id, ref in self._recvs.items() if (node := ref()) is not None}

    def _known_worker_ids(self) -> set[int]:
        with self._lock:
            return set(self._known_workers.values())
