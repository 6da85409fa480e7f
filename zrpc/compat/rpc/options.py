"""torch.distributed.rpc.options: the options classes with torch's constructors."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import torch

from zrpc import config
from zrpc.compat.rpc.constants import DEFAULT_INIT_METHOD, DEFAULT_NUM_WORKER_THREADS, DEFAULT_RPC_TIMEOUT_SEC

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DeviceType = int | str | torch.device
_is_tensorpipe_available = True

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


_TensorPipeRpcBackendOptionsBase = TensorPipeRpcBackendOptions


def _to_device(device: DeviceType) -> torch.device:
    """`device`, which must be a CUDA device."""
    made = torch.device(device)
    if made.type != "cuda":
        raise ValueError(f"`set_devices` expect a list of CUDA devices, but got device type {made.type}.")
    return made


def _to_device_map(device_map: Mapping[DeviceType, DeviceType]) -> dict[torch.device, torch.device]:
    """`device_map` with devices for keys and values, each there once."""
    made = {torch.device(here): torch.device(there) for here, there in device_map.items()}
    if len(set(made.values())) < len(device_map):
        raise ValueError(f"`device_map` only supports 1-to-1 mapping, and this maps two devices to one: {device_map}")
    return made


def _to_device_list(devices: Sequence[DeviceType]) -> list[torch.device]:
    """`devices`, which must be CUDA devices."""
    return [_to_device(device) for device in devices]
