"""The options classes with torch's constructors."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from zrpc.compat.rpc.options import RpcBackendOptions, TensorPipeRpcBackendOptions


def test_the_base_class_takes_what_torchs_takes() -> None:
    options = RpcBackendOptions(5.0, "tcp://host:1")
    assert (options.rpc_timeout, options.init_method) == (5.0, "tcp://host:1")
    assert (RpcBackendOptions().rpc_timeout, RpcBackendOptions().init_method) == (60.0, "env://")


def test_transports_and_channels_are_accepted() -> None:
    options = TensorPipeRpcBackendOptions(num_worker_threads=3, _transports=["uv"], _channels=["basic"])
    assert options.num_worker_threads == 3


def test_options_may_be_changed_after_they_were_made() -> None:
    options = TensorPipeRpcBackendOptions()
    options.num_worker_threads = 4
    options.rpc_timeout = 0.5
    options.init_method = "file:///tmp/x"
    options.init_method += "y"
    options.set_device_map("worker1", {0: 1})
    options.set_devices(["cuda:0"])
    assert options.init_method == "file:///tmp/xy"
    assert options.device_maps == {"worker1": {torch.device("cuda:0"): torch.device("cuda:1")}}
    assert options.devices == [torch.device("cuda:0")]


def test_a_timedelta_is_refused_as_in_torch() -> None:
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        TensorPipeRpcBackendOptions(rpc_timeout=timedelta())  # type: ignore[arg-type]


def test_devices_are_cuda_devices() -> None:
    with pytest.raises(ValueError, match="expect a list of CUDA devices"):
        TensorPipeRpcBackendOptions(devices=["cpu"])
    with pytest.raises(ValueError, match="1-to-1"):
        TensorPipeRpcBackendOptions(device_maps={"worker1": {0: 1, 1: 1}})
