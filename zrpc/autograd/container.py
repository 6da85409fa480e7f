"""The autograd contexts of one worker, and which of them is current on a thread."""

from __future__ import annotations

import itertools
import random
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from zrpc.autograd.dist_context import DistAutogradContext
from zrpc.errors import AutogradError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from zrpc.ids import Incarnation, WorkerInfo

RANK_SHIFT = 48
"""A context id has its creator's rank in the upper 16 bits and a counter in the lower 48, as torch's."""

FIRST_MAX = 1 << 46
"""The counter begins anywhere below: the contexts of a worker that comes again under its rank are other ones. Programs
hand the ids around, so that they must differ by themselves: the creator's life is kept beside."""

MAX_RELEASED = 4096
"""How many released contexts of other workers are remembered, so that late messages do not make them again."""


class ContextContainer:
    """The contexts of one worker. Any thread may use it; the lock owns the tables.

    Args:
        me: this worker, which is not known before it joins.
        on_foreign: is called with the context when one of another worker is first heard of. It may remove it.
    """

    def __init__(
        self, me: Callable[[], WorkerInfo], on_foreign: Callable[[DistAutogradContext], None] = lambda _: None
    ) -> None:
        self._me = me
        self._on_foreign = on_foreign
        self._counter = itertools.count(random.SystemRandom().randrange(FIRST_MAX))
        self._lock = threading.Lock()
        self._contexts: dict[int, DistAutogradContext] = {}
        self._released: OrderedDict[int, bool] = OrderedDict()  # whether its creator was lost
        self._here = _Here()

    @property
    def me(self) -> WorkerInfo:
        """This worker."""
        return self._me()

    @property
    def max_id(self) -> int:
        """The largest id that a context of this worker can have."""
        return self._me().id << RANK_SHIFT | (1 << RANK_SHIFT) - 1

    def new(self) -> DistAutogradContext:
        """A context of this worker, current on this thread.

        Raises:
            AutogradError: this thread has a current context already.
        """
        if self._here.context_id is not None:
            raise AutogradError(f"Already have an autograd context id for this thread: {self._here.context_id}")
        me = self._me()
        context = DistAutogradContext(me.id << RANK_SHIFT | next(self._counter), me.incarnation)
        with self._lock:
            self._contexts[context.context_id] = context
        self._here.context_id = context.context_id
        return context

    def get(self, context_id: int) -> DistAutogradContext:
        """The context `context_id`.

        Raises:
            AutogradError: there is none, or it is released.
        """
        context = self._contexts.get(context_id)
        if context is None:
            raise AutogradError(f"Could not find autograd context with id: {context_id}")
        return context

    def find(self, context_id: int) -> DistAutogradContext | None:
        """The context `context_id`, or None."""
        return self._contexts.get(context_id)

    def get_or_create(self, context_id: int, creator: Incarnation) -> DistAutogradContext | None:
        """The context `context_id` of whatever worker, made if it is new here; None if it is released."""
        context = self._contexts.get(context_id)
        if context is not None or creator == self._me().incarnation:
            return context
        with self._lock:
            if context_id in self._released:
                return None
            context = self._contexts.setdefault(context_id, DistAutogradContext(context_id, creator))
        self._on_foreign(context)
        return self._contexts.get(context_id)

    def check(self, context_id: int) -> None:
        """See that a context that is not here was released by its creator: then no pass comes any more.

        Raises:
            AutogradError: it was released because its creator is lost for this worker. Others may not know, and would
                miss gradients.
        """
        if self._released.get(context_id):
            raise AutogradError(
                f"autograd context {context_id} is over on {self._me()}, for which the worker that made it is lost: "
                "gradients would be missing"
            )

    def remove(self, context_id: int, *, is_creator_lost: bool = False) -> DistAutogradContext | None:
        """Take the context out, for good; None if it is not here."""
        if self._here.context_id == context_id:
            self._here.context_id = None
        with self._lock:
            context = self._contexts.pop(context_id, None)
            if context is None or context.creator != self._me().incarnation:
                self._released.setdefault(context_id, is_creator_lost)
                if len(self._released) > MAX_RELEASED:
                    self._released.popitem(last=False)
            return context

    def all(self) -> list[DistAutogradContext]:
        """All contexts."""
        with self._lock:
            return list(self._contexts.values())

    # ---- the current one -------------------------------------------------------------------------------------------

    def current(self) -> DistAutogradContext:
        """The context that is current on this thread.

        Raises:
            AutogradError: there is none, or it is released.
        """
        if self._here.context_id is None:
            raise AutogradError(
                "Current thread doesn't have a valid autograd context. Please wrap your code using: "
                "`with torch.distributed.autograd.context() as context_id` to generate a valid context"
            )
        return self.get(self._here.context_id)

    def find_current(self) -> DistAutogradContext | None:
        """The context that is current on this thread, or None.

        Raises:
            AutogradError: see `check`.
        """
        context_id = self._here.context_id
        if context_id is None:
            return None
        context = self._contexts.get(context_id)
        if context is None:
            self.check(context_id)
        return context

    def activate(self, context: DistAutogradContext) -> AbstractContextManager[None]:
        """Make `context` current on this thread while the body runs."""
        return _Active(self._here, context.context_id)


class _Here(threading.local):
    """What is current on this thread."""

    context_id: int | None = None


class _Active:
    """See `ContextContainer.activate`. It is entered for each call, which a generator makes dearer."""

    __slots__ = ("_context_id", "_here", "_outer")

    def __init__(self, here: _Here, context_id: int) -> None:
        self._here = here
        self._context_id = context_id

    def __enter__(self) -> None:
        self._outer, self._here.context_id = self._here.context_id, self._context_id

    def __exit__(self, *_: object) -> None:
        self._here.context_id = self._outer
