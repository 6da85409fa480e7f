"""One optimizer over parameters of many workers: a local optimizer on each worker that owns some.

Each local optimizer takes its gradients from a distributed autograd context. While it steps, they stand in the `grad`
of its parameters; before and after, what stood there before stands there. Steps on one worker exclude each other, since
two optimizers (those of two trainers, say) may hold the same parameters. A parameter that has no gradient in the
context is left alone.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from zrpc.api import rpc_async
from zrpc.autograd.interface import get_gradients
from zrpc.rref.rref import RRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from zrpc.ids import WorkerInfo

_stepping = threading.Lock()


class DistributedOptimizer:
    """Optimizes parameters wherever they are.

    Args:
        optimizer_class: a `torch.optim.Optimizer` class, made on each owner for the parameters there.
        params_rref: references to parameters (tensors that require grad), local or remote.
        args: further positional arguments of `optimizer_class`.
        kwargs: its keyword arguments.

    Raises:
        TypeError: one of `params_rref` is no RRef.
        Exception: whatever a constructor raised on one of the owners.
    """

    def __init__(
        self, optimizer_class: type[torch.optim.Optimizer], params_rref: Sequence[RRef[Any]], *args: Any, **kwargs: Any
    ) -> None:
        by_owner: defaultdict[WorkerInfo, list[RRef[Any]]] = defaultdict(list)
        for param in params_rref:
            if not isinstance(param, RRef):
                kind = type(param).__name__
                raise TypeError(f"params_rref must be RRefs, as RRef(parameter) makes them, and one is a {kind}")
            by_owner[param.owner()].append(param)
        made = [
            rpc_async(owner, _make, args=(optimizer_class, params, args, kwargs)) for owner, params in by_owner.items()
        ]
        self.remote_optimizers: list[RRef[_LocalOptimizer]] = _all_of(made)

    def step(self, context_id: int) -> None:
        """Step every local optimizer with the gradients of `context_id`, at once, and wait until all have.

        Raises:
            AutogradError: there is no such context here or on an owner.
            Exception: whatever a step raised; the other owners' steps are taken all the same.
        """
        get_gradients(context_id)
        _all_of(
            [rpc_async(optimizer.owner(), _step, args=(optimizer, context_id)) for optimizer in self.remote_optimizers]
        )


class _LocalOptimizer:
    """The optimizer of one owner's parameters."""

    def __init__(
        self, optimizer_class: type[torch.optim.Optimizer], params: list[torch.Tensor], args: Any, kwargs: Any
    ) -> None:
        self._params = params
        self._optimizer = optimizer_class(params, *args, **kwargs)

    def step(self, context_id: int) -> None:
        gradients = get_gradients(context_id)
        with _stepping:
            before = [param.grad for param in self._params]
            try:
                for param in self._params:
                    param.grad = gradients.get(param)
                self._optimizer.step()
            finally:
                for param, grad in zip(self._params, before, strict=True):
                    param.grad = grad


def _make(
    optimizer_class: type[torch.optim.Optimizer], params: list[RRef[Any]], args: Any, kwargs: Any
) -> RRef[_LocalOptimizer]:
    """On the owner: a reference to a new local optimizer."""
    return RRef(_LocalOptimizer(optimizer_class, [param.local_value() for param in params], args, kwargs))


def _step(optimizer: RRef[_LocalOptimizer], context_id: int) -> None:
    optimizer.local_value().step(context_id)


def _all_of(futures: Sequence[torch.futures.Future[Any]]) -> list[Any]:
    """The values of `futures`, once all are done; raises the first error then."""
    values, errors = [], []
    for future in futures:
        try:
            values.append(future.wait())
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return values
