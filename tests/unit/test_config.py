"""Options: what they take, and in which words they refuse the rest."""

from __future__ import annotations

import math
from datetime import timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from zrpc.config import (
    DEFAULT_NUM_WORKER_THREADS,
    DEFAULT_RPC_TIMEOUT_S,
    RpcBackendOptions,
    broker_addresses,
    check_timeout,
)
from zrpc.errors import ConfigError


def test_defaults() -> None:
    options = RpcBackendOptions()
    assert options.num_worker_threads == DEFAULT_NUM_WORKER_THREADS
    assert options.rpc_timeout == DEFAULT_RPC_TIMEOUT_S
    assert options.init_method == "env://"
    assert options.device_maps == {}
    assert options.devices == []
    assert options.shared_memory
    assert options.bind == "tcp://127.0.0.1:0"
    assert options.max_in_flight_nbytes == 1 << 30
    assert options.max_in_flight_calls == 1 << 18


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, 0.0), (5, 5.0), (1.5, 1.5), (timedelta(minutes=1), 60.0), (np.float32(2), 2.0), (Fraction(1, 2), 0.5)],
)
def test_timeouts(seconds: Any, expected: float) -> None:
    assert RpcBackendOptions(rpc_timeout=seconds).rpc_timeout == expected
    options = RpcBackendOptions()
    options.rpc_timeout = seconds
    assert options.rpc_timeout == expected


@pytest.mark.parametrize("seconds", [math.inf, 1e300, timedelta.max])
def test_a_timeout_beyond_all_clocks_is_no_limit(seconds: Any) -> None:
    assert check_timeout(seconds, "timeout") == 0.0


@pytest.mark.parametrize("seconds", [-1, -0.5, math.nan, "5", None, True, [1], 1j, timedelta(seconds=-1)])
def test_timeouts_that_are_none(seconds: Any) -> None:
    with pytest.raises(ConfigError, match=r"rpc_timeout must be"):
        RpcBackendOptions(rpc_timeout=seconds)
    options = RpcBackendOptions()
    with pytest.raises(ConfigError, match=r"rpc_timeout must be"):
        options.rpc_timeout = seconds
    assert options.rpc_timeout == DEFAULT_RPC_TIMEOUT_S


@pytest.mark.parametrize("count", [0, -1, 1.5, "4", None, True])
def test_thread_counts_that_cannot_be(count: Any) -> None:
    with pytest.raises(ConfigError, match="num_worker_threads must be"):
        RpcBackendOptions(num_worker_threads=count)
    assert RpcBackendOptions(num_worker_threads=np.int64(3)).num_worker_threads == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["env://", "tcp://localhost:5", "file:///tmp/x", "broker://10.0.0.1:5555"])
def test_init_methods(method: str) -> None:
    assert RpcBackendOptions(init_method=method).init_method == method


@pytest.mark.parametrize("method", ["", "env", "http://x", "localhost:5", None, 5, "://"])
def test_init_methods_that_cannot_be(method: Any) -> None:
    with pytest.raises(ConfigError, match="init_method must be env://, tcp://"):
        RpcBackendOptions(init_method=method)


@pytest.mark.parametrize(
    ("name", "value"), [("shared_memory", 1), ("shared_memory", None), ("bind", 5), ("bind", "127.0.0.1:5")]
)
def test_other_options_of_a_wrong_kind(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be"):
        RpcBackendOptions(**{name: value})


def test_device_maps_add_up() -> None:
    options = RpcBackendOptions(device_maps={"ps": {"cuda:0": 1}})
    options.set_device_map("ps", {1: "cuda:0", torch.device("cuda:0"): "cuda:1"})
    options.set_device_map("other", {"cpu": "cuda:0"})
    assert options.device_maps == {
        "ps": {torch.device("cuda:0"): torch.device("cuda:1"), torch.device("cuda:1"): torch.device("cuda:0")},
        "other": {torch.device("cpu"): torch.device("cuda:0")},
    }


def test_device_maps_are_one_to_one() -> None:
    options = RpcBackendOptions(device_maps={"ps": {0: 1}})
    with pytest.raises(ValueError, match="`device_map` only supports 1-to-1 mapping"):
        options.set_device_map("ps", {2: 3, 4: 3})
    with pytest.raises(ValueError, match="1-to-1 mapping: cuda:0 is mapped to cuda:1 on 'ps' already, not to cuda:2"):
        options.set_device_map("ps", {0: 2})
    with pytest.raises(ValueError, match="1-to-1"):
        RpcBackendOptions(device_maps={"ps": {0: 0, 1: 0}})
    assert options.device_maps == {"ps": {torch.device("cuda:0"): torch.device("cuda:1")}}


def test_maps_that_were_added_up_are_checked_by_init_rpc() -> None:
    options = RpcBackendOptions(device_maps={"ps": {1: 0}})
    options.set_device_map("ps", {0: 0})
    assert options.device_maps["ps"] == {
        torch.device("cuda:1"): torch.device("cuda:0"),
        torch.device("cuda:0"): torch.device("cuda:0"),
    }


@pytest.mark.parametrize("device_map", [{-1: 0}, {0: -1}])
def test_devices_count_from_zero(device_map: dict[Any, Any]) -> None:
    with pytest.raises(RuntimeError, match="Device index must not be negative"):
        RpcBackendOptions().set_device_map("ps", device_map)


def test_devices_are_cuda_devices() -> None:
    assert RpcBackendOptions(devices=["cuda:0", 1]).devices == [torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(ValueError, match=r"`set_devices` expect a list of CUDA devices, but got device type cpu\."):
        RpcBackendOptions(devices=["cpu"])


@pytest.mark.parametrize("name", ["max_in_flight_nbytes", "max_in_flight_calls"])
@pytest.mark.parametrize("value", [-1, 1.5, "4", None, True])
def test_windows_that_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        RpcBackendOptions(**{name: value})
    assert getattr(RpcBackendOptions(**{name: 0}), name) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["shared_memory", "propagate_grad_mode"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be True or False, not "):
        RpcBackendOptions(**{name: value})
    assert getattr(RpcBackendOptions(**{name: True}), name) is True  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("any", "any"),
        ("registered", "registered"),
        (["a", "b.c"], ("a", "b.c")),
        (("__main__",), ("__main__",)),
        ([], ()),
    ],
)
def test_what_may_be_named(given: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode, or modules; the environment says it where the program does not."""
    monkeypatch.setenv("ZRPC_ALLOW", "elsewhere")
    options = RpcBackendOptions(allow=given)
    assert options.allow == expected
    assert RpcBackendOptions().allow == ("elsewhere",)
    options.allow = "any"
    assert options.allow == "any"


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("", "any"), ("any", "any"), ("registered", "registered"), (" a , b.c", ("a", "b.c"))],
)
def test_the_environment_names_modes_and_modules(variable: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With commas between modules."""
    monkeypatch.setenv("ZRPC_ALLOW", variable)
    assert RpcBackendOptions().allow == expected


@pytest.mark.parametrize("given", ["some", "a,b", 1, {"a"}, [1], ["a b"], [""], ["a..b"], ["registered", "x/y"], True])
def test_what_names_no_modules_is_refused(given: Any) -> None:
    """The error says what to write."""
    with pytest.raises(ConfigError, match="module"):
        RpcBackendOptions(allow=given)


def test_an_environment_that_names_no_modules_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable."""
    monkeypatch.setenv("ZRPC_ALLOW", "a,,b")
    with pytest.raises(ConfigError, match="ZRPC_ALLOW"):
        RpcBackendOptions()


def test_several_brokers_are_listed_with_commas() -> None:
    assert broker_addresses("broker://a:5555,b:5556") == ["tcp://a:5555", "tcp://b:5556"]
    assert RpcBackendOptions(init_method="broker://a:5555, b:5555").init_method == "broker://a:5555, b:5555"


@pytest.mark.parametrize("listed", ["a:1,", ",a:1", "a:1,,b:1", "a:1,a:1", ""])
def test_a_list_of_brokers_that_cannot_be_one_is_refused(listed: str) -> None:
    with pytest.raises(ConfigError, match="must list each broker once"):
        RpcBackendOptions(init_method=f"broker://{listed}")
