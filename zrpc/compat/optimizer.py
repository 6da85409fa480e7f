"""torch.distributed.optim.optimizer: the distributed optimizer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from zrpc.compat.missing import explaining
from zrpc.optim import DistributedOptimizer
from zrpc.optim.distributed_optimizer import LocalOptimizer as _Local
from zrpc.optim.distributed_optimizer import all_of
from zrpc.rref.rref import RRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["DistributedOptimizer"]

logger = logging.getLogger(__name__)
_explain = explaining("torch.distributed.optim.optimizer")


def __getattr__(name: str) -> Any:
    if name != "functional_optim_map":
        return _explain(name)
    from torch.distributed.optim.utils import functional_optim_map

    return functional_optim_map


class _LocalOptimizer(_Local):
    """The optimizer of one owner's parameters, made as torch makes it: of RRefs."""

    def __init__(self, optim_cls: Any, local_params_rref: Sequence[RRef[Any]], *args: Any, **kwargs: Any) -> None:
        super().__init__(optim_cls, [rref.local_value() for rref in local_params_rref], args, kwargs)


def _new_local_optimizer(
    optim_cls: Any, local_params_rref: Sequence[RRef[Any]], *args: Any, **kwargs: Any
) -> RRef[_LocalOptimizer]:
    """On the owner: a reference to a new local optimizer."""
    return RRef(_LocalOptimizer(optim_cls, local_params_rref, *args, **kwargs))


def _local_optimizer_step(local_optim_rref: RRef[_LocalOptimizer], autograd_ctx_id: int) -> None:
    """On the owner: a step with the gradients of the context."""
    local_optim_rref.local_value().step(autograd_ctx_id)


def _wait_for_all(rpc_futs: Sequence[torch.futures.Future[Any]]) -> list[Any]:
    """The values of the futures, once all are done; raises the first error then."""
    return all_of(rpc_futs)
