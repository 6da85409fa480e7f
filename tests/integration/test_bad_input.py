"""Bad input ends in a clear, typed error on the caller, within its timeout, and leaves both workers usable."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import zrpc as rpc
from tests.integration.harness import Cluster, free_port
from zrpc import errors
from zrpc.nn import RemoteModule
from zrpc.optim import DistributedOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Unpicklable:
    """What a result must not hold."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Missing:
    """Pickles as a function that no module has."""

    def __call__(self) -> None:
        raise AssertionError("the callee cannot have this")

    def __reduce__(self) -> Any:
        return _lookup, ("no_such_function",)


def _lookup(name: str) -> Any:
    import tests.integration.test_bad_input as here

    return getattr(here, name)


def outlast_the_limit() -> None:
    threading.Event().wait(1.5)


def double(n: int) -> int:
    return 2 * n


def calls_that_cannot_work(rank: int) -> list[str]:
    to = f"worker{1 - rank}"
    cases: list[tuple[type[BaseException], str, Callable[[], Any]]] = [
        (errors.UnknownWorkerError, "nobody.*worker0", lambda: rpc.rpc_sync("nobody", double, args=(1,))),
        (errors.UnknownWorkerError, "id 17", lambda: rpc.rpc_async(17, double, args=(1,))),
        (errors.UnknownWorkerError, "id 3", lambda: rpc.remote(rpc.WorkerInfo("ghost", 3), double, args=(1,))),
        (ValueError, "name, its rank or its WorkerInfo", lambda: rpc.rpc_sync(1.5, double, args=(1,))),  # type: ignore[arg-type]
        (TypeError, "callable", lambda: rpc.rpc_sync(to, 5)),  # type: ignore[arg-type]
        (errors.SerializationError, "lock", lambda: rpc.rpc_sync(to, double, args=(threading.Lock(),))),
        (errors.SerializationError, "lock", lambda: rpc.rpc_sync(to, (lambda lock: lambda: lock)(threading.Lock()))),
        (errors.SerializationError, "lock", lambda: rpc.rpc_sync(to, Unpicklable)),
        (errors.SerializationError, "no_such_function", lambda: rpc.rpc_sync(to, Missing())),
        (errors.SerializationError, "lock", lambda: rpc.rpc_async(to, Unpicklable).wait()),
        (errors.RpcTimeoutError, "500 ms", lambda: rpc.rpc_sync(to, outlast_the_limit, timeout=0.5)),
        (errors.RpcTimeoutError, "500 ms", lambda: rpc.rpc_async(to, outlast_the_limit, timeout=0.5).wait()),
        (errors.ConfigError, "seconds", lambda: rpc.rpc_sync(to, double, args=(1,), timeout=-3)),
        (errors.ConfigError, "seconds", lambda: rpc.rpc_sync(to, double, args=(1,), timeout="1")),  # type: ignore[arg-type]
        (TypeError, "double", lambda: rpc.rpc_sync(to, double, args=(1, 2, 3))),
        (TypeError, r"as in args=\(x,\), not a Tensor", lambda: rpc.rpc_sync(to, double, args=torch.zeros(1))),  # type: ignore[arg-type]
        (TypeError, r"as in args=\(x,\), not a str", lambda: rpc.remote(to, double, args="ab")),
        (TypeError, r"as in args=\(x,\), not a int", lambda: rpc.rpc_async(to, double, args=0)),  # type: ignore[arg-type]
        (TypeError, "kwargs must be a dict", lambda: rpc.rpc_sync(to, double, kwargs=[("n", 1)])),  # type: ignore[arg-type]
        (errors.ConfigError, "seconds", lambda: rpc.RRef(1).to_here(timeout=-2)),
        (errors.ConfigError, "seconds", lambda: rpc.RRef(1).to_here("soon")),  # type: ignore[arg-type]
        (TypeError, "must be RRefs", lambda: DistributedOptimizer(torch.optim.SGD, [torch.ones(1)], lr=0.1)),  # type: ignore[list-item]
        (TypeError, "must be an RRef", lambda: RemoteModule.init_from_module_rref(to, 3)),  # type: ignore[arg-type]
        (RuntimeError, "aten::add", lambda: rpc.rpc_sync(to, torch.add, args=(1, "x", 2))),
        (RuntimeError, "local_value|to_here", lambda: rpc.remote(to, double, args=(1,)).local_value()),
        (errors.AlreadyInitializedError, "already initialized", lambda: rpc.init_rpc("again", rank=rank, world_size=2)),
    ]
    for expected, words, call in cases:
        with pytest.raises(expected, match=words):
            call()
        assert rpc.rpc_sync(to, double, args=(rank,)) == 2 * rank, f"not usable after {words}"
    return [words for _, words, _ in cases]


def test_calls_that_cannot_work(cluster_in_each_mode: Cluster) -> None:
    mine, theirs = cluster_in_each_mode.run(calls_that_cannot_work, 2, timeout_s=90)
    assert mine == theirs
    assert len(mine) == 26


def before_and_after(rank: int, init_method: str) -> None:
    for use in (rpc.get_worker_info, rpc.shutdown, lambda: rpc.rpc_sync("worker0", double, args=(1,))):
        with pytest.raises(errors.NotInitializedError, match="RPC has not been initialized"):
            use()  # type: ignore[operator]
    options = rpc.RpcBackendOptions(init_method=init_method)
    rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=options)
    future = rpc.rpc_async("alone", double, args=(2,))
    assert future.wait() == 4
    rpc.shutdown()
    for use in (rpc.get_worker_info, rpc.shutdown, lambda: rpc.rpc_sync("alone", double, args=(1,))):
        with pytest.raises(errors.NotInitializedError, match="RPC has not been initialized"):
            use()  # type: ignore[operator]


def test_before_init_and_after_shutdown(cluster: Cluster) -> None:
    cluster.run(before_and_after, 1, args=(cluster.new_init_method(),), init=False)


def refused(rank: int, init_method: str, name: str, world_size: int) -> tuple[str, str]:
    options = rpc.RpcBackendOptions(init_method=init_method, rpc_timeout=5)
    try:
        rpc.init_rpc(name.format(rank=rank), rank=rank, world_size=world_size, rpc_backend_options=options)
    except errors.ZrpcError as error:
        return type(error).__name__, str(error)
    rpc.shutdown()
    return "", ""


def test_a_name_taken_twice(cluster_in_each_mode: Cluster) -> None:
    method = cluster_in_each_mode.new_init_method()
    outcomes = cluster_in_each_mode.run(refused, 2, args=(method, "same", 2), init=False)
    kinds = {kind for kind, _ in outcomes}
    assert "RefusedError" in kinds
    assert kinds <= {"RefusedError", "RendezvousError"}
    assert any("is not unique" in text and "same" in text for _, text in outcomes)


def test_somebody_does_not_come(cluster_in_each_mode: Cluster) -> None:
    method = cluster_in_each_mode.new_init_method()
    ((kind, text),) = cluster_in_each_mode.run(refused, 1, args=(method, "worker{rank}", 2), init=False)
    assert kind == "RendezvousError"
    assert "1" in text


@pytest.mark.parametrize("scheme", ["tcp", "broker"])
def test_nobody_at_the_address(cluster: Cluster, scheme: str) -> None:
    method = f"{scheme}://127.0.0.1:{free_port()}"
    _, (kind, text) = cluster.run(at_rank_one, 2, args=(method,), init=False)
    assert kind == "RendezvousError"
    assert method.split("//")[1] in text or method in text


def at_rank_one(rank: int, init_method: str) -> tuple[str, str]:
    return refused(1, init_method, "worker1", 2) if rank else ("", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_worker_threads": "many"}, "num_worker_threads must be a whole number"),
        ({"num_worker_threads": 0}, "1 or more"),
        ({"rpc_timeout": "soon"}, "rpc_timeout must be a number of seconds"),
        ({"rpc_timeout": -1}, "0 \\(no limit\\) or more"),
        ({"init_method": "carrier-pigeon://x"}, "init_method must be"),
        ({"shared_memory": "yes"}, "shared_memory must be True or False"),
        ({"bind": "localhost"}, "bind must be an address"),
        ({"busy_poll_s": -1}, "0 \\(never poll\\) or more"),
        ({"device_maps": [1]}, "device_maps must be a dict"),
        ({"device_maps": {"ps": [1]}}, "a device map must be"),
        ({"device_maps": {"ps": {"tpu:x": 0}}}, "'tpu:x' is not a device"),
        ({"devices": "cuda:0"}, "devices must be a list"),
        ({"devices": 3}, "devices must be a list"),
        ({"devices": [1.5]}, "1.5 is not a device"),
    ],
)
def test_options_of_the_wrong_type(options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.ConfigError, match=words):
        rpc.RpcBackendOptions(**options)


def test_a_python_without_its_lock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are changed by operations that the interpreter's lock makes whole: without it they would be damaged."""
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(errors.ConfigError, match="PYTHON_GIL=1"):
        rpc.init_rpc("alone", rank=0, world_size=1)
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True, raising=False)
    with pytest.raises(errors.ConfigError, match="rpc_backend_options"):
        rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=5)  # type: ignore[arg-type]


def test_a_rank_without_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(errors.ConfigError, match="rank 5 is not one of 0 to 1"):
        rpc.init_rpc("worker5", rank=5, world_size=2)
    with pytest.raises(errors.ConfigError, match="rank -1"):
        rpc.init_rpc("worker", world_size=2)
    with pytest.raises(RuntimeError, match="Worker name must match"):
        rpc.init_rpc("no good name", rank=0, world_size=2)
    with pytest.raises(errors.ConfigError, match="name must be a str"):
        rpc.init_rpc(3, rank=0, world_size=2)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match="rank must be a whole number, not '0'"):
        rpc.init_rpc("worker", rank="0", world_size=2)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match=r"world_size must be a whole number, not 2\.0"):
        rpc.init_rpc("worker", rank=0, world_size=2.0)  # type: ignore[arg-type]
    monkeypatch.setitem(os.environ, "RANK", "first")
    with pytest.raises(errors.ConfigError, match="RANK must be a whole number"):
        rpc.init_rpc("worker", world_size=2)


def test_a_place_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = rpc.RpcBackendOptions(init_method=f"file://{tmp_path}/missing/store")
    with pytest.raises(errors.ConfigError, match=r"there is no folder .*missing"):
        rpc.init_rpc("worker", rank=0, world_size=1, rpc_backend_options=options)
    monkeypatch.setenv("ZRPC_INIT_METHOD", "nowhere")
    with pytest.raises(errors.ConfigError, match="ZRPC_INIT_METHOD cannot be used: init_method must be"):
        rpc.init_rpc("worker", rank=0, world_size=1)
