"""One optimizer over parameters of many workers: a local optimizer on each worker that owns some.

Each local optimizer takes its gradients from a distributed autograd context. While it steps, they stand in the `grad`
of its parameters; before and after, what stood there before stands there. Steps on one worker exclude each other
(`zrpc.optim.turns`), since two optimizers (those of two trainers, say) may hold the same parameters. A parameter that
has no gradient in the context is left alone.

A functional optimizer, which a program registers with `torch.distributed.optim.utils.register_functional_optim`, is
given its gradients as a list and leaves `grad` alone.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc.agent.current import current_agent, is_agent_set
from zrpc.api import rpc_async
from zrpc.autograd.interface import get_gradients
from zrpc.exposed import expose
from zrpc.functions import async_execution
from zrpc.optim.turns import Turns
from zrpc.rref.rref import RRef

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from zrpc.ids import WorkerInfo

_turns_of_no_worker = Turns()


class DistributedOptimizer:
    """Optimizes parameters wherever they are.

    Args:
        optimizer_class: a `torch.optim.Optimizer` class, made on each owner for the parameters there; or the key of a
            functional optimizer that the program registered, which is made instead.
        params_rref: references to parameters (tensors that require grad), local or remote.
        args: further positional arguments of `optimizer_class`.
        kwargs: its keyword arguments.

    Attributes:
        remote_optimizers: references to the local optimizers.
        is_functional_optim: whether they are functional optimizers.

    Raises:
        TypeError: one of `params_rref` is no RRef, or `optimizer_class` can make no optimizers.
        Exception: whatever a constructor raised on one of the owners.
    """

    def __init__(
        self, optimizer_class: type[torch.optim.Optimizer], params_rref: Sequence[RRef[Any]], *args: Any, **kwargs: Any
    ) -> None:
        functional = _functional(optimizer_class)
        self.is_functional_optim = functional is not None
        constructor = optimizer_class if functional is None else functional
        if not callable(constructor):
            raise TypeError(
                f"optimizer_class is {optimizer_class!r}: pass a class of torch.optim, or a key that this process has "
                "registered with torch.distributed.optim.utils.register_functional_optim"
            )
        by_owner: defaultdict[WorkerInfo, list[RRef[Any]]] = defaultdict(list)
        for param in params_rref:
            if not isinstance(param, RRef):
                kind = type(param).__name__
                raise TypeError(f"params_rref must be RRefs, as RRef(parameter) makes them, and one is a {kind}")
            by_owner[param.owner()].append(param)
        make = _make if functional is None else _make_functional
        made = [rpc_async(owner, make, args=(constructor, params, args, kwargs)) for owner, params in by_owner.items()]
        self.remote_optimizers: list[RRef[LocalOptimizer]] = all_of(made)

    def step(self, context_id: int) -> None:
        """Step every local optimizer with the gradients of `context_id`, at once, and wait until all have.

        Raises:
            AutogradError: there is no such context here or on an owner.
            Exception: whatever a step raised; the other owners' steps are taken all the same.
        """
        get_gradients(context_id)
        all_of(
            [rpc_async(optimizer.owner(), _step, args=(optimizer, context_id)) for optimizer in self.remote_optimizers]
        )


def _functional(optimizer_class: object) -> Callable[..., Any] | None:
    """The functional optimizer that a program registered under `optimizer_class`, if one did.

    Those that torch itself registers do what the classes do under which they are registered, so these are used.
    """
    utils = sys.modules.get("torch.distributed.optim.utils")  # it is loaded where something was registered
    if utils is None:
        return None
    try:
        found: Callable[..., Any] | None = utils.functional_optim_map.get(optimizer_class)
    except TypeError:  # it cannot be a key
        return None
    is_torchs = getattr(found, "__module__", "").startswith("torch.distributed.optim.functional_")
    return None if is_torchs else found


class LocalOptimizer:
    """The optimizer of one owner's parameters. `optim` is what steps them."""

    def __init__(self, optimizer_class: Callable[..., Any], params: list[torch.Tensor], args: Any, kwargs: Any) -> None:
        self._params = params
        self.optim = optimizer_class(params, *args, **kwargs)

    def step(self, context_id: int) -> None:
        """Step with the gradients of `context_id`, once the steps before are over.

        Raises:
            AutogradError: too many steps run within each other (see `zrpc.optim.turns`).
        """
        turns = current_agent().extensions[Turns] if is_agent_set() else _turns_of_no_worker
        turns.run(partial(self.step_now, get_gradients(context_id)))

    def step_now(self, gradients: dict[torch.Tensor, torch.Tensor]) -> None:
        """Step with `gradients`. No other step may run meanwhile."""
        before = [param.grad for param in self._params]
        try:
            for param in self._params:
                param.grad = gradients.get(param)
            self.optim.step()
        finally:
            for param, grad in zip(self._params, before, strict=True):
                param.grad = grad


class _FunctionalOptimizer(LocalOptimizer):
    """A functional optimizer of one owner's parameters: it is given a list of gradients."""

    def step_now(self, gradients: dict[torch.Tensor, torch.Tensor]) -> None:
        self.optim.step([gradients.get(param) for param in self._params])


@expose
def _make(optimizer_class: Callable[..., Any], params: list[RRef[Any]], args: Any, kwargs: Any) -> RRef[LocalOptimizer]:
    """On the owner: a reference to a new local optimizer."""
    return RRef(LocalOptimizer(optimizer_class, [param.local_value() for param in params], args, kwargs))


@expose
def _make_functional(
    optimizer_class: Callable[..., Any], params: list[RRef[Any]], args: Any, kwargs: Any
) -> RRef[LocalOptimizer]:
    """On the owner: a reference to a new functional optimizer."""
    return RRef(_FunctionalOptimizer(optimizer_class, [param.local_value() for param in params], args, kwargs))


@expose
@async_execution
def _step(optimizer: RRef[LocalOptimizer], context_id: int) -> torch.futures.Future[None]:
    """On the owner: a step, which waits for those before it on no thread."""
    local, agent = optimizer.local_value(), current_agent()
    turns: Turns = agent.extensions[Turns]
    return turns.submit(partial(local.step_now, get_gradients(context_id)), agent)


def all_of(futures: Sequence[torch.futures.Future[Any]]) -> list[Any]:
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
