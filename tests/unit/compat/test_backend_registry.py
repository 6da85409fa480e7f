"""Backends by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from zrpc.compat.rpc import backend_registry, initialization
from zrpc.compat.rpc.options import RpcBackendOptions, TensorPipeRpcBackendOptions
from zrpc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def registry() -> Iterator[Any]:
    before = backend_registry.BackendType
    yield backend_registry
    backend_registry.BackendType = before


class OtherOptions(RpcBackendOptions):
    pass


def test_tensorpipe_is_there(registry: Any) -> None:
    assert registry.backend_registered("TENSORPIPE")
    assert not registry.backend_registered("OTHER")
    assert repr(registry.BackendType.TENSORPIPE) == "BackendType.TENSORPIPE"
    options = registry.construct_rpc_backend_options(
        registry.BackendType["TENSORPIPE"], init_method="tcp://host:1", _transports=["uv"]
    )
    assert isinstance(options, TensorPipeRpcBackendOptions)
    assert options.init_method == "tcp://host:1"


def test_a_backend_is_registered_once(registry: Any) -> None:
    old = registry.BackendType.TENSORPIPE
    made = registry.register_backend("OTHER", lambda timeout, init, **rest: (timeout, init), lambda **rest: rest)
    assert made is registry.BackendType.OTHER
    assert registry.is_backend(old)
    assert registry.construct_rpc_backend_options(made, 3.0, "env://") == (3.0, "env://")
    assert registry.init_backend(made, name="x") == {"name": "x"}
    with pytest.raises(RuntimeError, match=r"^RPC backend OTHER: already registered$"):
        registry.register_backend("OTHER", dict, dict)


def test_the_backend_is_told_from_the_options(registry: Any) -> None:
    assert initialization._backend_of(None) is registry.BackendType.TENSORPIPE
    assert initialization._backend_of(TensorPipeRpcBackendOptions()) is registry.BackendType.TENSORPIPE
    made = registry.register_backend("OTHER", lambda timeout, init, **rest: OtherOptions(), dict)
    assert initialization._backend_of(OtherOptions()) is made
    with pytest.raises(TypeError, match="Could not infer backend for options"):
        initialization._backend_of(SimpleNamespace())


def test_init_rpc_checks_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "ZRPC_INIT_METHOD"):
        monkeypatch.delenv(variable, raising=False)
    backend = backend_registry.BackendType.TENSORPIPE
    with pytest.raises(TypeError, match="Argument backend must be a member of BackendType"):
        initialization.init_rpc("a", backend="TENSORPIPE", rank=0, world_size=1)
    with pytest.raises(TypeError, match="must be an instance of RpcBackendOptions"):
        initialization.init_rpc("a", backend=backend, rank=0, world_size=1, rpc_backend_options={})
    with pytest.raises(TypeError, match="must be a `TensorPipeRpcBackendOptions`"):
        initialization.init_rpc("a", backend=backend, rank=0, world_size=1, rpc_backend_options=OtherOptions())
    with pytest.raises(ValueError, match="rank parameter missing"):
        initialization.init_rpc("a", rpc_backend_options=TensorPipeRpcBackendOptions(init_method="file:///tmp/none"))
    with pytest.raises(ConfigError, match="environment variable RANK expected"):
        initialization.init_rpc("a", rpc_backend_options=TensorPipeRpcBackendOptions())
    with pytest.raises(RuntimeError, match="must be of type"):
        initialization._init_rpc_backend(backend, "no store", "a", 0, 1, TensorPipeRpcBackendOptions())
