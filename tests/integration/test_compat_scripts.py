"""TorchScript on zrpc: functions that take RRefs, make calls and are asynchronous, in real worker processes."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.integration.test_compat import run, start
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.integration.harness import Cluster


def run_in_each_mode(cluster: Cluster, program: Callable[..., Any], *args: Any) -> list[Any]:
    return cluster.run(program, 2, args=(cluster.new_init_method(), *args), init=False)


def python_list() -> list[int]:
    return [1, 2]


def python_dict() -> dict[str, list[int]]:
    return {"a": [1]}


# ---- values behind RRefs ------------------------------------------------------------------------------------------


def owned_list() -> Any:
    import torch.distributed.rpc as rpc

    return rpc.RRef([1, 2])


def mutating_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    from tests.integration import scripted_calls as scripts

    if rank == 0:
        lists = [
            rpc.remote("worker1", scripts.list_made_here),
            rpc.remote("worker1", python_list),
            rpc.rpc_sync("worker1", owned_list),
            rpc.remote("worker0", scripts.list_made_here),
            rpc.RRef([1, 2]),
        ]
        for ref in lists:
            rpc.rpc_sync(ref.owner(), scripts.append, args=(ref,))
            assert ref.to_here() == [1, 2, 3, 4]
            assert rpc.rpc_sync(ref.owner(), scripts.total, args=(ref,)) == 10
        empty = rpc.remote("worker1", scripts.empty_list)
        rpc.rpc_async("worker1", scripts.append, args=(empty,)).wait()
        assert empty.to_here() == [3, 4]
        for make in (scripts.dict_made_here, python_dict):
            ref = rpc.remote("worker1", make)
            rpc.remote("worker1", scripts.put, args=(ref,)).to_here()
            assert ref.to_here() == {"a": [1, 2], "b": [5]}
        for make, args in ((scripts.box_made_here, ()), (scripts.Box, (1,))):
            ref = rpc.remote("worker1", make, args=args)
            rpc.rpc_sync("worker1", scripts.grow, args=(ref,))
            assert (ref.to_here().n, ref.to_here().parts) == (2, [1, 2])
    rpc.shutdown()


def test_compiled_functions_act_on_the_value_behind_an_rref(cluster_in_each_mode: Cluster) -> None:
    """Lists, dicts and instances of TorchScript classes are changed in place, whoever made them."""
    run_in_each_mode(cluster_in_each_mode, mutating_program)


def sharing_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    from tests.integration import scripted_calls as scripts

    if rank == 0:
        ref = rpc.remote("worker1", scripts.list_made_here)
        second = rpc.remote("worker1", scripts.the_same, args=(ref,))
        rpc.rpc_sync("worker1", scripts.append, args=(second,))
        assert ref.to_here() == second.to_here() == [1, 2, 3, 4]
        value = [1, 2]
        mine = rpc.RRef(value)
        scripts.append(mine)
        assert value == [1, 2, 3, 4]
        assert mine.local_value() is value
        assert scripts.total(mine) == 10
        value.append(5)
        assert scripts.total(mine) == 15
        assert mine.to_here() == value == [1, 2, 3, 4, 5]
        shared = [0]
        scripts.append_to_both(rpc.RRef(shared), rpc.RRef(shared))
        assert shared == [0, 1, 2]
        with pytest.raises(RuntimeError, match=r"Can't call RRef\.local_value\(\) on a non-owner RRef"):
            scripts.append(ref)
    rpc.shutdown()


def test_a_value_of_python_stays_the_programs_object(cluster: Cluster) -> None:
    """Two RRefs to one TorchScript value share it; a Python list keeps its identity, and what Python changes in it."""
    run(cluster, sharing_program)


def returning_program(rank: int, method: str, path: str) -> None:
    rpc = start(rank, method)
    from tests.integration import scripted_calls as scripts

    if rank == 0:
        ref = rpc.remote("worker1", torch.add, args=(torch.ones(2), 1))
        for returned in (scripts.give_back(ref), rpc.rpc_sync("worker1", scripts.give_back, args=(ref,))):
            assert isinstance(returned, rpc.RRef)
            assert returned.owner_name() == "worker1"
            assert returned.to_here().tolist() == [2, 2]
        again = rpc.rpc_sync("worker1", scripts.give_back, args=(scripts.give_back(ref),))
        assert again.to_here().tolist() == [2, 2]
        assert rpc.remote("worker1", scripts.give_back, args=(ref,)).to_here().to_here().tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="RRef jit pickling is only allowed inside RPC calls"):
            scripts.save(ref, path)
        module = torch.jit.script(scripts.Caller("worker1", [ref, again]))
        assert module(torch.ones(2)).tolist() == [6, 6]
        with pytest.raises(RuntimeError, match=r"add\(\) expected at most 3 argument\(s\) but received 4"):
            rpc.remote("worker1", scripts.add, args=(1, 2, 3, 4))
    rpc.shutdown()


def test_compiled_code_returns_rrefs_and_holds_them(cluster: Cluster, tmp_path: Path) -> None:
    """An RRef that compiled code returns is one; modules may have RRefs for attributes; none is saved to a file."""
    cluster.run(returning_program, 2, args=(cluster.new_init_method(), str(tmp_path / "saved")), init=False)


# ---- calls --------------------------------------------------------------------------------------------------------


def calling_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    from tests.integration import scripted_calls as scripts

    if rank == 0:
        x = torch.ones(2)
        assert scripts.sync_and_async("worker1", x).tolist() == [14, 14]
        assert rpc.rpc_sync("worker1", scripts.sync_and_async, args=("worker0", x)).tolist() == [14, 14]
        assert scripts.stays_there("worker1", x).tolist() == [2, 2]
        assert scripts.list_there("worker1") == [1, 2]
        assert scripts.many_there("worker1", x).tolist() == [10, 10]
        assert scripts.left_there("worker1", x).to_here().tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="must match the size"):
            scripts.sizes_differ("worker1")
        with pytest.raises(RuntimeError, match="nobody"):
            scripts.stays_there("nobody", x)
    rpc.shutdown()


def test_compiled_code_makes_calls(cluster_in_each_mode: Cluster) -> None:
    """rpc_sync, rpc_async and remote inside compiled functions; their errors are RuntimeErrors with the text."""
    run_in_each_mode(cluster_in_each_mode, calling_program)


def compiling_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    from tests.integration import scripted_calls as scripts

    compilation = threading.Thread(target=torch.jit.script, args=(scripts.slow_to_compile,))
    if rank == 1:
        scripts.let_the_compiler_go_on()
    compilation.start()
    scripts.lookup.asked.wait()
    rpc.api._barrier(["worker0", "worker1"])
    if rank == 1:
        compilation.join()
        begun = rpc.rpc_async("worker0", torch.jit.script(scripts.slow_to_compile), args=("worker1", torch.ones(2)))
        rpc.rpc_sync("worker0", scripts.let_the_compiler_go_on)
        assert begun.wait().tolist() == [2, 2]
    compilation.join()
    rpc.shutdown()


def test_a_function_that_the_callee_compiles_is_called_afterwards(cluster: Cluster) -> None:
    """A worker that compiled a function sooner calls it: the other one runs it once it can run, with its calls."""
    run(cluster, compiling_program)


def deep_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    from tests.integration import scripted_calls as scripts

    if rank == 0:
        args = ("worker1", "worker0", torch.ones(1))
        begun = [rpc.rpc_async("worker1", scripts.first, args=args) for _ in range(40)]
        assert {future.wait().item() for future in begun} == {4}
    rpc.shutdown()


def test_compiled_code_that_waits_keeps_no_threads(cluster: Cluster) -> None:
    """Many more nested calls than there are handler threads, or threads of TorchScript, come to an end."""
    run(cluster, deep_program)


def gradients_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    import torch.distributed.autograd as dist_autograd

    from tests.integration import scripted_calls as scripts

    if rank == 0:
        for function in (scripts.after_a_wait, scripts.forked):
            x = torch.ones(2, requires_grad=True)
            with dist_autograd.context() as context_id:
                loss = function("worker1", x)
                assert scripts.differentiate(context_id, loss, x).tolist() == [3, 3]
    rpc.shutdown()


def test_compiled_code_is_differentiated(cluster: Cluster) -> None:
    """Calls after a wait and in forks belong to the context of the thread where the compiled code began."""
    run(cluster, gradients_program)


# ---- asynchronous functions ---------------------------------------------------------------------------------------


def async_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    from tests.integration import scripted_calls as scripts

    x, other = torch.ones(2), f"worker{1 - rank}"
    for to in (other, f"worker{rank}"):
        for function in (scripts.forking, scripts.marked_twice):
            assert rpc.rpc_sync(to, function, args=(x, x)).tolist() == [2, 2]
            assert rpc.rpc_async(to, function, args=(x,), kwargs={"y": x}).wait().tolist() == [2, 2]
            assert rpc.remote(to, function, args=(x, x)).to_here().tolist() == [2, 2]
        assert rpc.rpc_sync(to, scripts.calling, args=(f"worker{rank}", x)).tolist() == [2, 2]
        assert rpc.remote(to, scripts.forking_dict, args=("k",)).to_here() == {"k": [1]}
        with pytest.raises(RuntimeError, match="must match the size"):
            rpc.rpc_sync(to, scripts.forking, args=(x, torch.ones(3)))
        with pytest.raises(RuntimeError, match="Async functions must return an IValue of Future type, but got Tensor"):
            rpc.rpc_sync(to, scripts.no_future, args=(x,))
        holder = rpc.remote(to, scripts.Holder)
        assert holder.rpc_sync().forking(x).tolist() == [2, 2]
    rpc.shutdown()


def test_compiled_functions_may_be_asynchronous(cluster: Cluster) -> None:
    """async_execution around a TorchScript function that returns a future, in every form of call."""
    run(cluster, async_program)


_release = threading.Event()


def later() -> Any:
    done: torch.futures.Future[int] = torch.futures.Future()

    def end() -> None:
        _release.wait()
        done.set_result(7)

    threading.Thread(target=end).start()
    return done


def release() -> None:
    _release.set()


def metrics() -> dict[str, str]:
    from torch.distributed.rpc.api import _get_current_rpc_agent

    return dict(_get_current_rpc_agent().get_metrics())


def metrics_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    marked = rpc.functions.async_execution(later)
    globals()["later"] = marked  # it travels by its name
    rpc.api._barrier(["worker0", "worker1"])
    if rank == 0:
        begun, there = rpc.rpc_async("worker1", marked), rpc.remote("worker1", marked)
        until(lambda: rpc.rpc_sync("worker1", metrics)["agent.server_active_async_calls"] == "2", "both are under way")
        numbers = rpc.rpc_sync("worker1", metrics)
        own = {"queued", "refused", "over_limit", "cancelled", "expired"}
        own_names = {"agent.protocol_errors", *(f"agent.server_{name}_calls" for name in own)}
        assert set(numbers) - own_names == {
            f"agent.{name}"
            for name in (
                "client_active_calls",
                "num_idle_threads",
                "server_active_async_calls",
                "server_active_calls",
                "thread_pool_size",
            )
        }
        assert numbers["agent.thread_pool_size"] == "4"
        # The one that is missing runs `metrics`; the one that ran it before may not have come back yet.
        until(lambda: rpc.rpc_sync("worker1", metrics)["agent.num_idle_threads"] == "3", "three are idle")
        rpc.rpc_sync("worker1", release)
        assert (begun.wait(), there.to_here()) == (7, 7)
        until(lambda: rpc.rpc_sync("worker1", metrics)["agent.server_active_async_calls"] == "0", "both are over")
    rpc.shutdown()


def test_metrics_have_the_names_of_torchs(cluster: Cluster) -> None:
    """get_metrics has TensorPipe's names, asynchronous calls that are not done among them."""
    run(cluster, metrics_program)


# ---- functional optimizers ----------------------------------------------------------------------------------------


class SignedDescent:
    """A functional optimizer: its step takes a list of gradients."""

    def __init__(self, params: list[torch.Tensor], lr: float = 1.0) -> None:
        self.params = params
        self.lr = lr

    def step(self, gradients: list[torch.Tensor | None]) -> None:
        with torch.no_grad():
            for param, gradient in zip(self.params, gradients, strict=True):
                if gradient is not None:
                    param.sub_(self.lr * gradient.sign())


def weight() -> torch.Tensor:
    return torch.zeros(2, requires_grad=True)


def functional_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    import torch.distributed.autograd as dist_autograd
    from torch.distributed.optim import DistributedOptimizer
    from torch.distributed.optim.utils import register_functional_optim

    if rank == 0:
        register_functional_optim("signed descent", SignedDescent)
        used, unused = rpc.remote("worker1", weight), rpc.remote("worker1", weight)
        optimizer = DistributedOptimizer("signed descent", [used, unused], lr=0.5)
        assert optimizer.is_functional_optim
        with dist_autograd.context() as context_id:
            loss = rpc.rpc_sync("worker1", torch.mul, args=(used.to_here(), torch.tensor([3.0, -7.0]))).sum()
            dist_autograd.backward(context_id, [loss])
            optimizer.step(context_id)
        assert used.to_here().tolist() == [-0.5, 0.5]
        assert unused.to_here().tolist() == [0, 0]
        assert not DistributedOptimizer(torch.optim.SGD, [used], lr=0.1).is_functional_optim
        with pytest.raises(TypeError, match="register_functional_optim"):
            DistributedOptimizer("nothing", [used])
    rpc.shutdown()


def test_functional_optimizers_of_the_program_are_used(cluster: Cluster) -> None:
    """What was registered with register_functional_optim is made on the owner and given its list of gradients."""
    run(cluster, functional_program)
