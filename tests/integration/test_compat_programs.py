"""Whole programs, each a Python process of its own, that find zrpc where they look for torch's RPC."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from tests.integration.harness import free_port

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 200


def python(*args: str) -> str:
    """What a Python process prints; it must end well."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), environment.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


EARLIER = """
    import torch
    import torch.distributed as dist
    import torch.distributed.autograd as dist_autograd
    import torch.distributed.rpc as rpc
    from torch._C._distributed_rpc import PyRRef
    from torch.distributed.optim import DistributedOptimizer
    from torch.distributed.nn import RemoteModule
    from torch.distributed.rpc import RRef, rpc_sync
    from torch.distributed.rpc.api import _all_gather, shutdown
"""

LATER = """
    def homes():
        return [
            rpc.__name__,
            dist.rpc.__name__,
            dist_autograd.__name__,
            dist.autograd.__name__,
            *(name.__module__ for name in (DistributedOptimizer, PyRRef, RRef, RemoteModule)),
            *(name.__module__ for name in (_all_gather, rpc_sync, shutdown)),
        ]

    assert all(home.startswith("zrpc.") for home in homes()), homes()
    assert torch.nn.parallel.distributed.RRef is RRef
    print("all lead to zrpc")
"""

INSTALL = """
    import zrpc.compat

    zrpc.compat.install()
    zrpc.compat.install()
    assert zrpc.compat.is_installed()
"""


@pytest.mark.parametrize("parts", [(EARLIER, INSTALL, LATER), (INSTALL, EARLIER, LATER)], ids=["before", "after"])
def test_it_does_not_matter_what_is_imported_first(tmp_path: Path, parts: tuple[str, ...]) -> None:
    assert python(program(tmp_path, "".join(parts))) == "all lead to zrpc\n"


HIDE = """
    import importlib.abc
    import sys


    class Hiding(importlib.abc.MetaPathFinder):
        # torch without its RPC: the C++ modules go before torch.distributed looks for them
        def find_spec(self, name, path, target=None):
            if name == "torch.distributed":
                for attribute in list(vars(sys.modules["torch._C"])):
                    if "rpc" in attribute or "dist_autograd" in attribute or "distributed_autograd" in attribute:
                        delattr(sys.modules["torch._C"], attribute)
                for module in list(sys.modules):
                    if module.startswith(("torch._C._distributed_rpc", "torch._C._distributed_autograd")):
                        del sys.modules[module]
            return None


    sys.meta_path.insert(0, Hiding())
    import torch

    assert not hasattr(torch._C, "_distributed_rpc")
    assert not hasattr(torch._C, "_rpc_init")
    assert not torch.distributed.rpc.is_available()
"""

USE = """
    import sys
    import torch.distributed.autograd as dist_autograd
    import torch.distributed.rpc as rpc
    from torch.autograd.profiler_legacy import profile
    from torch.distributed.nn import RemoteModule
    from torch.distributed.optim import DistributedOptimizer
    from torch.distributed.rpc import RRef

    assert rpc.is_available()
    assert dist_autograd.is_available()


    @torch.jit.script
    def plus_value(ref: RRef[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return ref.to_here() + x


    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{sys.argv[1]}")
    rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=options)
    rref = rpc.remote("me", torch.add, args=(torch.ones(2), 1))
    assert rpc.rpc_sync("me", plus_value, args=(rref, torch.ones(2))).tolist() == [3, 3]
    module = RemoteModule("me/cpu", torch.nn.Linear, args=(2, 1))
    optimizer = DistributedOptimizer(torch.optim.SGD, module.remote_parameters(), lr=0.1)
    with profile() as profiled, dist_autograd.context() as context_id:
        dist_autograd.backward(context_id, [module(torch.ones(2)).sum()])
        optimizer.step(context_id)
    assert any(event.is_remote for event in profiled.function_events)
    del rref, module, optimizer
    rpc.shutdown()
    print("done")
"""


def test_a_torch_without_rpc_is_enough(tmp_path: Path) -> None:
    path = program(tmp_path, HIDE + INSTALL + USE)
    assert python(path, str(free_port())) == "done\n"


CHILDREN = """
    import multiprocessing
    import sys


    def look(results):
        import torch
        import torch.distributed.rpc as rpc

        options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{sys.argv[1]}")
        rpc.init_rpc("me", rank=0, world_size=1, rpc_backend_options=options)
        results.put((rpc.__name__, rpc.rpc_sync("me", max, args=(1, 2))))
        rpc.shutdown()


    def in_worker(_):
        import torch.distributed.rpc as rpc

        return rpc.__name__


    class Names:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return len(in_worker(index))


    if __name__ == "__main__":
        for method in ("spawn", "forkserver", "fork"):
            context = multiprocessing.get_context(method)
            results = context.Queue()
            child = context.Process(target=look, args=(results,))
            child.start()
            assert results.get(timeout=100) == ("zrpc.compat.rpc", 2), method
            child.join()
            assert child.exitcode == 0, method
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.map(in_worker, range(1)) == ["zrpc.compat.rpc"]
        from torch.utils.data import DataLoader

        for method in ("spawn", "fork"):
            loader = DataLoader(Names(), num_workers=1, multiprocessing_context=method)
            assert [int(batch) for batch in loader] == [len("zrpc.compat.rpc")] * 2, method
        print("all children have it")
"""


@pytest.mark.parametrize("how", ["zrpc run", "install"])
def test_children_have_it_however_they_are_started(tmp_path: Path, how: str) -> None:
    if how == "zrpc run":
        path = program(tmp_path, CHILDREN)
        said = python("-c", "from zrpc.cli.main import main; main()", "run", path, str(free_port()))
    else:
        path = program(
            tmp_path, CHILDREN.replace('if __name__ == "__main__":', f'if __name__ == "__main__":{_in_main()}')
        )
        said = python(path, str(free_port()))
    assert said == "all children have it\n"


def _in_main() -> str:
    return "\n        import zrpc.compat\n\n        zrpc.compat.install()"


SPAWNED = """
    import os
    import sys

    import torch
    import torch.distributed.rpc as rpc


    def main(rank, port):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
        if rank == 0:
            print(rpc.__name__, rpc.rpc_sync("worker1", torch.add, args=(torch.ones(2), 1)).tolist(), sys.argv[2:])
        rpc.shutdown()


    if __name__ == "__main__":
        torch.multiprocessing.spawn(main, args=(sys.argv[1],), nprocs=2)
"""

TORCHRUN = """
    import os

    import torch
    import torch.distributed.rpc as rpc

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=size)
    if rank == 0:
        print(rpc.__name__, rpc.rpc_sync("worker1", torch.add, args=(torch.ones(2), 1)).tolist(), [])
    rpc.shutdown()
"""


def test_torch_multiprocessing_spawn(tmp_path: Path) -> None:
    path = program(tmp_path, SPAWNED)
    said = python("-c", "from zrpc.cli.main import main; main()", "run", path, str(free_port()), "--flag", "x")
    assert said == "zrpc.compat.rpc [2.0, 2.0] ['--flag', 'x']\n"


def test_torchrun(tmp_path: Path) -> None:
    path = program(tmp_path, TORCHRUN)
    launcher = ("run", "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", path)
    said = python("-c", "from zrpc.cli.main import main; main()", *launcher)
    assert "zrpc.compat.rpc [2.0, 2.0] []\n" in said


FORKED_WORKER = """
    import multiprocessing
    import sys

    import zrpc.compat

    zrpc.compat.install()
    import torch.distributed.rpc as rpc


    def start(port, name):
        options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}")
        rpc.init_rpc(name, rank=0, world_size=1, rpc_backend_options=options)


    def child(results):
        results.put(rpc._is_current_rpc_agent_set())
        start(sys.argv[2], "child")
        results.put(rpc.rpc_sync("child", max, args=(1, 2)))
        rpc.shutdown()


    start(sys.argv[1], "parent")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    forked = context.Process(target=child, args=(results,))
    forked.start()
    assert results.get(timeout=100) is False
    assert results.get(timeout=100) == 2
    forked.join()
    assert forked.exitcode == 0
    assert rpc.rpc_sync("parent", max, args=(1, 2)) == 2
    rpc.shutdown()
    print("both were workers")
"""


def test_a_forked_child_of_a_worker_is_none_and_may_become_one(tmp_path: Path) -> None:
    path = program(tmp_path, FORKED_WORKER)
    assert python(path, str(free_port()), str(free_port())) == "both were workers\n"
