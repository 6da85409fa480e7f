"""PyTorch's TorchScript tests of RPC, imported unmodified from the installed torch. `run.py` runs them."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import preload  # noqa: F401  # first: it puts zrpc in torch's place
import torch.testing._internal.common_distributed as common_distributed
from torch.testing._internal.distributed import rpc_utils
from torch.testing._internal.distributed.rpc.tensorpipe_rpc_agent_test_fixture import TensorPipeRpcAgentTestFixture

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preload"])


def _spawn_from_fork_server(self: Any) -> None:
    self._start_processes(_context.Process)


common_distributed.MultiProcessTestCase._spawn_processes = _spawn_from_fork_server
common_distributed.TIMEOUT_DEFAULT = 50
_suites = [rpc_utils.JitRpcTest, rpc_utils.JitDistAutogradTest]
vars(sys.modules[__name__]).update(
    rpc_utils.generate_tests("", TensorPipeRpcAgentTestFixture, _suites, __name__),
)
