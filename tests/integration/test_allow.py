"""What a worker refuses to run or to unpickle, as `RpcBackendOptions(allow=...)` says: with real workers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import zrpc as rpc
import zrpc.autograd as dist_autograd
from tests.integration import allowed_here
from tests.integration.harness import free_port
from zrpc.errors import ConfigError, NotAllowedError, SerializationError
from zrpc.nn import RemoteModule
from zrpc.optim import DistributedOptimizer

if TYPE_CHECKING:
    from tests.integration.harness import Cluster

LISTED = ["tests.integration.allowed_here"]
NOT_LISTED = "tests.integration.test_allow"


def touch(path: str) -> str:
    """Not allowed anywhere: it leaves a trace if it runs."""
    Path(path).touch()
    return path


async def _awaited(future: Any) -> Any:
    return await future


class Touching:
    """A value that runs `touch` where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return touch, (self.path,)


def _refused(call: Any, *needles: str) -> None:
    with pytest.raises(NotAllowedError) as caught:
        call()
    assert all(needle in str(caught.value) for needle in needles), str(caught.value)


# ---- a list of modules -----------------------------------------------------------------------------------------


def _list_refuses(rank: int, trace: str) -> None:
    if rank:
        return
    _refused(lambda: rpc.rpc_sync("worker1", touch, args=(trace,)), "worker1", f"{NOT_LISTED}.touch", "allow")
    _refused(lambda: rpc.rpc_sync("worker1", touch, kwargs={"path": trace}), f"{NOT_LISTED}.touch")
    _refused(lambda: rpc.rpc_async("worker1", touch, args=(trace,)).wait(), f"{NOT_LISTED}.touch")
    _refused(lambda: rpc.rpc_sync("worker1", allowed_here.same, args=(Touching(trace),)), f"{NOT_LISTED}.touch")
    _refused(lambda: rpc.rpc_sync("worker1", allowed_here.same, args=([{1: Touching(trace)}],)), NOT_LISTED)
    _refused(lambda: rpc.rpc_sync("worker1", allowed_here.same, args=(touch,)), f"{NOT_LISTED}.touch")
    made = rpc.remote("worker1", touch, args=(trace,))
    with pytest.raises(RuntimeError, match="refuses"):
        made.to_here()
    _refused(lambda: rpc.broadcast(["worker1"], touch, args=(trace,))[0].wait(), f"{NOT_LISTED}.touch")
    _refused(lambda: rpc.rpc_sync("worker1", os.getpid), "posix.getpid")
    _refused(lambda: rpc.rpc_sync("worker1", eval, args=("1",)), "builtins.eval")
    _refused(lambda: rpc.rpc_sync("worker1", getattr, args=("a", "upper")), "builtins.getattr")


def test_a_list_of_modules_refuses_functions_of_others_before_they_run(
    cluster_in_each_mode: Cluster, tmp_path: Path
) -> None:
    """Called, as an argument, within one, by remote() and by broadcast: the caller is told which worker and name."""
    trace = tmp_path / "trace"
    cluster_in_each_mode.run(_list_refuses, args=(str(trace),), allow=LISTED)
    assert not trace.exists()


def _list_allows(rank: int) -> None:
    if rank:
        return
    same = allowed_here.same
    values = [1, "a", torch.ones(3), torch.float32, np.arange(3), np.float32(2), {1}, {"a": (1j, None)}]
    arrived = rpc.rpc_sync("worker1", same, args=(values,))
    assert torch.equal(arrived[2], values[2])
    assert arrived[5] == 2
    assert type(rpc.rpc_sync("worker1", same, args=(torch.nn.Parameter(torch.ones(2)),))) is torch.nn.Parameter
    large = b"x" * (1 << 20)
    assert rpc.rpc_sync("worker1", same, args=([large],)) == [large]
    thing = rpc.rpc_sync("worker1", same, args=(allowed_here.Thing(4),))
    assert thing.twice() == 8
    assert rpc.rpc_sync("worker1", same, args=(allowed_here.Colour.RED,)) is allowed_here.Colour.RED
    assert rpc.rpc_sync("worker1", thing.twice) == 8
    assert rpc.rpc_sync("worker1", torch.add, args=(torch.ones(2), 1)).tolist() == [2, 2]
    held = rpc.remote("worker1", allowed_here.Thing, args=(5,))
    assert held.rpc_sync().twice() == 10
    assert held.rpc_async().twice().wait() == 10
    assert held.remote().twice().to_here() == 10
    assert rpc.rpc_sync("worker1", allowed_here.twice_of, args=(held,)) == 10
    for error in (ValueError("x"), allowed_here.ThingError("no", 3)):
        with pytest.raises(type(error)) as caught:
            rpc.rpc_sync("worker1", allowed_here.throw, args=(error,))
        assert str(caught.value) == str(error)
    dictionary = rpc.remote("worker1", allowed_here.same, args=({"a": 1},))
    assert dictionary.rpc_sync().get("a") == 1
    for name in ("_private", "attribute", "__special__"):
        _refused(lambda name=name: getattr(held.rpc_sync(), name)(), "worker1", f"Thing.{name}")
    nothing = rpc.remote("worker1", allowed_here.same, args=(None,))
    assert nothing.to_here() is None
    _optimize()


def _optimize() -> None:
    weight = rpc.remote("worker1", allowed_here.new_parameter)
    optimizer = DistributedOptimizer(torch.optim.SGD, [weight], lr=1.0)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", allowed_here.exposed_sum, args=(weight, torch.ones(2))).sum()
        dist_autograd.backward(context_id, [loss])
        optimizer.step(context_id)
    assert weight.to_here().tolist() == [0, 0]


def test_a_list_of_modules_allows_what_they_define_and_what_tensors_need(cluster_in_each_mode: Cluster) -> None:
    """Functions, classes, enumerations, methods, exceptions of listed modules; tensors, arrays, RRefs, optimizers."""
    cluster_in_each_mode.run(_list_allows, allow=LISTED)


def _answer_is_refused(rank: int, trace: str) -> None:
    if rank:
        return
    _refused(
        lambda: rpc.rpc_sync("worker1", allowed_here.reduced_as, args=(NOT_LISTED, "touch", trace)), "worker0", "touch"
    )
    with pytest.raises(RuntimeError) as caught:
        rpc.rpc_sync("worker1", allowed_here.raise_what_touches, args=(NOT_LISTED, trace))
    assert "it went wrong" in str(caught.value)
    made = rpc.remote("worker1", allowed_here.reduced_as, args=(NOT_LISTED, "touch", trace))
    _refused(lambda: made.to_here(), "worker0", "touch")
    _refused(lambda: asyncio.run(_awaited(made.to_here_async())), "worker0", "touch")


def test_a_caller_refuses_what_an_answer_or_an_exception_names(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    """The list of the caller holds for results, values of RRefs and exceptions; the exception's text arrives."""
    trace = tmp_path / "trace"
    cluster_in_each_mode.run(_answer_is_refused, args=(str(trace),), allow=LISTED)
    assert not trace.exists()


# ---- registered ------------------------------------------------------------------------------------------------


def _registered(rank: int, trace: str) -> None:
    if rank:
        return
    same = allowed_here.exposed_same
    values = [None, 1, -2.5, "a", b"b", 1j, (1, [2]), {"a": {1: 2}}, torch.float32, torch.device("cpu")]
    assert rpc.rpc_sync("worker1", same, args=(values,)) == values
    table = np.arange(6).reshape(2, 3)
    for array in (
        table, table.T, np.ones((3, 0)), np.array(3.5), np.arange(8)[::2], np.array(["2020-01-01"], dtype="M8[D]"),
        np.zeros(2, dtype=[("a", "i4")]),
    ):  # fmt: skip
        arrived = rpc.rpc_sync("worker1", same, args=([array],))[0]
        assert arrived.dtype == array.dtype
        assert arrived.shape == array.shape
        assert np.array_equal(arrived, array)
    scalar = rpc.rpc_sync("worker1", same, args=(np.float32(2.5),))
    assert type(scalar) is np.float32
    assert torch.equal(rpc.rpc_sync("worker1", same, args=(torch.ones(3),)), torch.ones(3))
    assert rpc.rpc_sync("worker1", torch.add, args=(torch.ones(2), 1)).tolist() == [2, 2]
    assert rpc.remote("worker1", torch.add, args=(torch.ones(2), 1)).to_here().tolist() == [2, 2]
    assert rpc.rpc_async("worker1", allowed_here.exposed_later, args=(3,)).wait() == 3
    assert [future.wait() for future in rpc.broadcast(["worker0", "worker1"], same, args=(7,))] == [7, 7]
    assert rpc.rpc_sync("worker1", same, args=(rpc.get_worker_info(),)) == rpc.get_worker_info()
    assert rpc.rpc_sync("worker1", same, args=(same,)) is same


def _registered_objects(rank: int) -> None:
    if rank:
        return
    held = rpc.remote("worker1", allowed_here.Counter, args=(5,))
    assert held.rpc_sync().add(2) == 7
    assert held.rpc_async().add(1).wait() == 8
    assert held.remote().add(1).to_here() == 9
    assert held.rpc_sync().add_later(1) == 10
    assert held.rpc_async().add_later(1).wait() == 11
    assert rpc.rpc_sync("worker1", allowed_here.Counter.made_of) == "Counter"
    inner = held.rpc_sync().share()
    assert rpc.rpc_sync("worker1", allowed_here.exposed_value, args=([inner],)) == 11
    mine = rpc.RRef(allowed_here.Counter(1))
    assert rpc.rpc_sync("worker1", allowed_here.exposed_add, args=({"counter": mine},)) == 2
    for name in ("_private", "inherited", "attribute", "__special__"):
        _refused(lambda name=name: getattr(held.rpc_sync(), name)(), "worker1", "Counter")
    _refused(lambda: rpc.remote("worker1", torch.ones, args=(2,)).rpc_sync().size(), "Tensor.size")
    with pytest.raises(SerializationError, match="values are made of"):
        rpc.rpc_sync("worker1", allowed_here.Counter, args=(5,))
    with pytest.raises(SerializationError, match="Thing"):
        rpc.rpc_sync("worker1", allowed_here.exposed_same, args=(allowed_here.Thing(1),))


def _registered_errors(rank: int) -> None:
    if rank:
        return
    for kind, text, cls in (
        ("builtin", "'key'", KeyError), ("own", "it went wrong", RuntimeError), ("os", "[Errno 2] no: 'file'", OSError),
        ("unpacked", "(<object>,)", ValueError), ("stop", "over", StopIteration),
    ):  # fmt: skip
        with pytest.raises(cls) as caught:
            rpc.rpc_sync("worker1", allowed_here.exposed_throw, args=(kind,))
        assert text in str(caught.value) or kind == "unpacked"
        assert "exposed_throw" in str(caught.value.__cause__) + str(caught.value)
        assert kind != "own" or type(caught.value).__name__ == "ThingError"
    made = rpc.remote("worker1", allowed_here.exposed_throw, args=("own",))
    with pytest.raises(RuntimeError, match="it went wrong"):
        made.to_here()


def _registered_refuses(rank: int, trace: str) -> None:
    if rank:
        return
    rpc.expose(allowed_here.exposed_only_here)
    _refused(lambda: rpc.rpc_sync("worker1", touch, args=(trace,)), "touch", "expose")
    _refused(lambda: rpc.remote("worker1", touch, args=(trace,)), "touch")
    _refused(lambda: rpc.rpc_sync("worker1", allowed_here.same, args=(1,)), "same")
    _refused(lambda: rpc.rpc_sync("worker1", allowed_here.exposed_only_here, args=(trace,)), "worker1", "only_here")
    with pytest.raises(SerializationError):
        rpc.rpc_sync("worker1", allowed_here.exposed_same, args=(Touching(trace),))


def _registered_optimizes(rank: int) -> None:
    if rank:
        return
    weight = rpc.remote("worker1", allowed_here.exposed_parameter)
    optimizer = DistributedOptimizer(torch.optim.SGD, [weight], lr=1.0)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", allowed_here.exposed_sum, args=(weight, torch.ones(2))).sum()
        dist_autograd.backward(context_id, [loss])
        optimizer.step(context_id)
    assert weight.to_here().tolist() == [0, 0]
    module = RemoteModule("worker1/cpu", allowed_here.ExposedLinear, args=(2,))
    assert module.forward(torch.ones(1, 2)).shape == (1, 2)
    assert len(module.remote_parameters()) == 2


def test_registered_workers_exchange_values(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    """Plain values, tensors and arrays of any layout; operators; asynchronous functions; broadcast."""
    cluster_in_each_mode.run(_registered, args=(str(tmp_path / "trace"),), allow="registered")


def test_registered_classes_are_made_and_called_through_rrefs(cluster_in_each_mode: Cluster) -> None:
    """Exposed methods alone may be called, and RRefs are passed in lists and dicts."""
    cluster_in_each_mode.run(_registered_objects, allow="registered")


def test_exceptions_of_registered_workers_arrive_as_builtin_classes_with_text(cluster_in_each_mode: Cluster) -> None:
    """As the class of the interpreter that they are of, or as a RemoteError of the nearest one."""
    cluster_in_each_mode.run(_registered_errors, allow="registered")


def test_registered_workers_refuse_what_is_not_exposed(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    """On the caller, and on a callee that has not exposed the name. Nothing of it runs."""
    trace = tmp_path / "trace"
    cluster_in_each_mode.run(_registered_refuses, args=(str(trace),), allow="registered")
    assert not trace.exists()


def test_registered_workers_train(cluster_in_each_mode: Cluster) -> None:
    """Distributed autograd, optimizers and modules of exposed classes need no pickle."""
    cluster_in_each_mode.run(_registered_optimizes, allow="registered")


def _disagrees(rank: int, init_method: str) -> str:
    options = rpc.RpcBackendOptions(init_method=init_method, allow="registered" if rank else "any")
    with pytest.raises(ConfigError) as caught:
        rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    return str(caught.value)


def test_workers_that_differ_in_whether_they_unpickle_say_so_at_the_start(cluster_in_each_mode: Cluster) -> None:
    """They could exchange little. Each worker is told which ones differ."""
    method = cluster_in_each_mode.new_init_method()
    for said in cluster_in_each_mode.run(_disagrees, args=(method,), init=False):
        assert "worker1 have allow='registered', and worker0 have not" in said


# ---- programs that are not changed -----------------------------------------------------------------------------

PROGRAM = """
import os
import sys
from pathlib import Path

import torch
import torch.distributed.rpc as rpc
from allowed_by_name import allowed

assert rpc.__name__.startswith("zrpc")
rank = int(os.environ["RANK"])
rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
if rank == 0:
    assert rpc.rpc_sync("worker1", allowed, args=(torch.ones(2), 1)).tolist() == [2, 2]
    held = rpc.remote("worker1", allowed, args=([1], [2]))
    assert held.to_here() == [1, 2]
    try:
        rpc.rpc_sync("worker1", Path.touch, args=(Path(sys.argv[1]),))
    except RuntimeError as error:
        assert "worker1 refuses pathlib." in str(error), error
        assert "ZRPC_ALLOW" in str(error), error
        print("was refused")
rpc.shutdown()
"""


def test_a_program_for_torch_is_told_by_its_environment_what_may_be_called(tmp_path: Path) -> None:
    """ZRPC_ALLOW holds for unchanged programs that run by `zrpc run`."""
    trace = tmp_path / "trace"
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "allowed_by_name.py").write_text("def allowed(a, b):\n    return a + b\n")
    port = str(free_port())
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ZRPC_ALLOW": "allowed_by_name"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "zrpc", "run", str(tmp_path / "program.py"), str(trace)]
    running = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "was refused" in printed[0]
    assert not trace.exists()
