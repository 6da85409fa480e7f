"""The functions of distributed autograd that programs call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.profiler import record_function

from zrpc import interrupts
from zrpc.autograd.wiring import current_service
from zrpc.errors import AutogradError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from zrpc.autograd.dist_context import DistAutogradContext

_MODES = ("fast", "smart")
_profiler_enabled: Any = torch.autograd._profiler_enabled
_nothing = nullcontext()


class context:  # torch's name
    """An autograd context: what `backward` differentiates, and where gradients are found.

    ```python
    with zrpc.autograd.context() as context_id:
        loss = zrpc.rpc_sync("worker1", forward, args=(x,)).sum()
        zrpc.autograd.backward(context_id, [loss])
        gradients = zrpc.autograd.get_gradients(context_id)
    ```

    Calls made by this thread inside the `with` carry the context to their callees, and calls made there carry it on. It
    ends everywhere with the block. A thread has one context at a time.

    Raises:
        NotInitializedError: this process is no worker.
        AutogradError: this thread is in a context already.
    """

    def __enter__(self) -> int:
        self._service = current_service()  # the worker may have shut down when the block ends
        made: DistAutogradContext | None = None
        try:
            with interrupts.deferred:
                made = self._service.contexts.new()
            self._context_id = made.context_id
            return self._context_id
        except BaseException:
            if made is not None:  # a signal handler raised
                self._service.release(made.context_id)
            raise

    @interrupts.uninterrupted
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with interrupts.held:
            self._service.release(self._context_id)


def backward(context_id: int, roots: list[torch.Tensor], retain_graph: bool = False, mode: str = "fast") -> None:
    """Differentiate `roots` through everything that calls in the context computed, here and on other workers.

    Gradients are added up in the context, on the worker of each leaf; `.grad` is not touched. Returns when all workers
    are done.

    Args:
        context_id: what `context` gave, or its callers handed on.
        roots: tensors of one element each.
        retain_graph: keep what the graph saved, for another pass.
        mode: "fast": every tensor that was sent in the context and requires grad must have contributed to `roots`; if
            one did not, this waits until the context is released, a worker is lost, or a time limit ends. "smart":
            first find out which did, at the price of one more round.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no such mode.
        NotInitializedError: this process is no worker.
        AutogradError: there is no such context, `roots` cannot be differentiated, or something went wrong on another
            worker ("Error on Node <rank>: ..."). Some gradients may have been added to the context.
        PeerLostError: a worker that takes part died.
        RpcTimeoutError: gradients that were sent were not answered within the default time limit (`rpc_timeout`).
        Exception: what a function or hook of the graph raised here.
    """
    if not isinstance(context_id, int) or not isinstance(roots, list | tuple) or not _are_tensors(roots):
        raise TypeError(
            "backward(): incompatible function arguments: it takes an int and a list of tensors, and got "
            f"{type(context_id).__name__} and {type(roots).__name__}"
        )
    if mode not in _MODES:
        raise ValueError(f"mode is one of {_MODES}, not {mode!r}")
    with record_function("torch::distributed::autograd::backward") if _profiler_enabled() else _nothing:
        current_service().backward(context_id, roots, retain_graph, smart=mode == "smart")


def get_gradients(context_id: int) -> dict[torch.Tensor, torch.Tensor]:
    """The gradients of this worker's leaves in the context, by leaf. They alias those of the context.

    Raises:
        AutogradError: there is no such context.
        NotInitializedError: this process is no worker.
    """
    return current_service().contexts.get(context_id).gradients()


def is_available() -> bool:
    """Whether there is distributed autograd: always."""
    return True


# ---- under torch's private names, for programs and tests that look inside ----------------------------------------


def _new_context() -> DistAutogradContext:
    return current_service().contexts.new()


def _release_context(context_id: int) -> None:
    current_service().release(context_id)


def _current_context() -> DistAutogradContext:
    return current_service().contexts.current()


def _retrieve_context(context_id: int) -> DistAutogradContext:
    return current_service().contexts.get(context_id)


def _is_valid_context(context_id: int) -> None:
    """Raises if there is no such context."""
    current_service().contexts.get(context_id)


def _get_max_id() -> int:
    return current_service().contexts.max_id


def _get_debug_info() -> dict[str, int]:
    return current_service().debug_info()


def _init(worker_id: int) -> None:
    """`init_rpc` did it. Programs that bring up torch's backend by hand call this."""
    rank = current_service().rank
    if worker_id != rank:
        raise AutogradError(f"this worker has rank {rank}, not {worker_id}")


def _are_tensors(roots: Sequence[object]) -> bool:
    return all(isinstance(root, torch.Tensor) for root in roots)
