"""What importing costs: the broker, and `import zrpc` alone, do without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

TORCH_FREE = (
    "zrpc",
    "zrpc.errors",
    "zrpc.ids",
    "zrpc.config",
    "zrpc.wire.messages",
    "zrpc.wire.envelope",
    "zrpc.transport.sockets",
    "zrpc_broker",
    "zrpc_broker.__main__",
)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_every_public_name_is_there() -> None:
    code = "import zrpc; print([name for name in zrpc.__all__ if getattr(zrpc, name, None) is None])"
    missing = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert missing.strip() == "[]"


def test_public_names_are_listed() -> None:
    import zrpc

    assert set(zrpc.__all__) <= set(dir(zrpc))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = zrpc.no_such_name


def test_a_worker_at_rest_makes_no_tensor(tmp_path: Path) -> None:
    """torch's first tensor takes 0.6 MB of a process: neither an import nor `init_rpc` makes one."""
    code = f"""
import torch
from torch.overrides import TorchFunctionMode

class Record(TorchFunctionMode):
    called = []
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.called.append(function.__name__)
        return function(*args, **kwargs or {{}})

with Record():
    import zrpc as rpc
    rpc.init_rpc("alone", rank=0, world_size=1,
                 rpc_backend_options=rpc.RpcBackendOptions(init_method="file://{tmp_path}/store"))
    rpc.shutdown()
print(Record.called)
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert made.strip() == "[]"
