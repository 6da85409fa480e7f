"""torch.distributed.rpc.options: the options classes with torch's constructors."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from zrpc import config
from zrpc.compat.rpc.constants import DEFAULT_INIT_METHOD, DEFAULT_NUM_WORKER_THREADS, DEFAULT_RPC_TIMEOUT_SEC

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    DeviceType = int | str | torch.device

__all__ = ["RpcBackendOptions", "TensorPipeRpcBackendOptions"]


class RpcBackendOptions(config.RpcBackendOptions):
    """What options of every backend have."""

    def __init__(self, rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC, init_method: str = DEFAULT_INIT_METHOD) -> None:
        super().__init__(rpc_timeout=rpc_timeout, init_method=init_method)


class TensorPipeRpcBackendOptions(RpcBackendOptions):
    """The options of a worker, by the name of the backend that zrpc stands in for.

    Args:
        num_worker_threads: see `zrpc.RpcBackendOptions`.
        rpc_timeout: default time limit of a call in seconds; 0: none.
        init_method: where the workers find each other; beside torch's, `broker://host:port`.
        device_maps: see `zrpc.RpcBackendOptions`.
        devices: see `zrpc.RpcBackendOptions`.
        _transports: accepted and not used: there is one transport here.
        _channels: accepted and not used.
    """

    def __init__(
        self,
        *,
        num_worker_threads: int = DEFAULT_NUM_WORKER_THREADS,
        rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC,
        init_method: str = DEFAULT_INIT_METHOD,
        device_maps: Mapping[str, Mapping[DeviceType, DeviceType]] | None = None,
        devices: Sequence[DeviceType] | None = None,
        _transports: Sequence[Any] | None = None,
        _channels: Sequence[Any] | None = None,
    ) -> None:
        if isinstance(rpc_timeout, bool) or not isinstance(rpc_timeout, numbers.Real):
            raise TypeError(
                "TensorPipeRpcBackendOptions: incompatible constructor arguments: rpc_timeout is a number of seconds, "
                f"not a {type(rpc_timeout).__name__}"
            )
        config.RpcBackendOptions.__init__(
            self,
            num_worker_threads=num_worker_threads,
            rpc_timeout=rpc_timeout,
            init_method=init_method,
            device_maps=device_maps,
            devices=devices,
        )
