"""Programs for torch.distributed.rpc on zrpc, in real worker processes."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.integration.harness import Cluster, free_port

if TYPE_CHECKING:
    from collections.abc import Callable


class TwoArgumentsError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def torch_rpc() -> Any:
    """torch.distributed.rpc, replaced."""
    import zrpc.compat

    zrpc.compat.install()
    import torch.distributed.rpc as rpc

    return rpc


def start(rank: int, method: str, world_size: int | None = 2) -> Any:
    rpc = torch_rpc()
    options = rpc.TensorPipeRpcBackendOptions(init_method=method, num_worker_threads=4, _transports=["uv"])
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)
    return rpc


def run(cluster: Cluster, program: Callable[..., Any], n: int = 2, **kwargs: Any) -> list[Any]:
    return cluster.run(program, n, args=(cluster.new_init_method(),), init=False, **kwargs)


def add(x: Any, y: Any) -> Any:
    return x + y


def raise_two_arguments() -> None:
    raise TwoArgumentsError(7, "gone")


# ---- names -----------------------------------------------------------------------------------------------------


def names_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    from torch._C import _distributed_rpc as native
    from torch.distributed.rpc.api import _get_current_rpc_agent

    assert native._is_current_rpc_agent_set()
    assert native._get_current_rpc_agent() is _get_current_rpc_agent()
    agent = rpc._get_current_rpc_agent()
    assert isinstance(agent, rpc.TensorPipeAgent)
    assert isinstance(agent, native.RpcAgent)
    assert agent.is_static_group
    assert {info.name for info in agent.get_worker_infos()} == {"worker0", "worker1"}
    assert agent.get_worker_info("worker1").id == agent.get_worker_info(1).id == 1
    assert int(agent.get_debug_info()["agent.thread_pool_size"]) == 4
    assert agent.get_metrics().keys() == agent.get_debug_info().keys()
    assert agent.store is not None
    other = f"worker{1 - rank}"
    made = rpc.remote(other, add, args=(1, 2))
    assert isinstance(made, native.PyRRef)
    assert isinstance(made, rpc.RRef)
    assert made.to_here() == 3
    for to in (other, 1 - rank, rpc.get_worker_info(other), native.WorkerInfo(other, 1 - rank)):
        assert rpc.rpc_sync(to, torch.add, args=(torch.ones(2), 1)).tolist() == [2, 2]
    assert rpc.rpc_sync(other, rpc.get_worker_info).name == other
    assert rpc.rpc_async(other, rpc.get_worker_info, args=(f"worker{rank}",)).wait().id == rank
    before = time.monotonic()
    with pytest.raises(RuntimeError, match="could not find destination"):
        rpc.get_worker_info("not there yet")
    assert time.monotonic() - before < 1
    with pytest.raises(ValueError, match="addressed by"):
        rpc.rpc_sync(0.5, add, args=(1, 1))
    rpc.shutdown(True, 0)
    assert not native._is_current_rpc_agent_set()
    with pytest.raises(RuntimeError, match=r"^RPC has not been initialized"):
        rpc.rpc_sync(other, add, args=(1, 1))
    with pytest.raises(RuntimeError, match="Current RPC agent is not set! Did you initialize the RPC framework"):
        rpc.RRef(1)


def test_names_lead_to_zrpc(cluster: Cluster) -> None:
    run(cluster, names_program)


def one_call_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    from torch._C import _distributed_rpc as native
    from torch.distributed.rpc.internal import PythonUDF, serialize

    other = rpc.get_worker_info(f"worker{1 - rank}")
    ones = torch.ones(2)
    pickled = serialize(PythonUDF(add, (ones, 1), {}))
    from tests.integration import scripted

    plus = torch._jit_internal._qualified_name(scripted.plus)
    futures = [
        native._invoke_rpc_builtin(other, "aten::add", 5.0, ones, 1),
        native._invoke_rpc_python_udf(other, *pickled, 5.0, False),
        native._invoke_rpc_torchscript(other.name, plus, (ones,), {"n": 1}, 5.0, False),
    ]
    rrefs = [
        native._invoke_remote_builtin(other, "aten::add", 5.0, ones, 1),
        native._invoke_remote_python_udf(other, *pickled, 5.0, False),
        native._invoke_remote_torchscript(other.name, plus, 5.0, False, ones, n=1),
    ]
    for result in [future.wait() for future in futures] + [rref.to_here() for rref in rrefs]:
        assert result.tolist() == [2, 2]
    by_hand = rpc.WorkerInfo(other.name, other.id)  # names whoever has the rank
    assert native._invoke_rpc_builtin(by_hand, "aten::add", 5.0, ones, 1).wait().tolist() == [2, 2]
    assert native._invoke_remote_python_udf(by_hand, *pickled, 5.0, False).to_here().tolist() == [2, 2]
    stale = rpc.WorkerInfo(other.name, other.id, b"earlier.")
    for invoke in (native._invoke_rpc_builtin, native._invoke_remote_builtin):
        with pytest.raises(RuntimeError, match="is not in the group any more"):
            invoke(stale, "aten::add", 5.0, ones, 1)
    del rrefs
    rpc.shutdown()


def test_the_functions_that_send_one_call(cluster: Cluster) -> None:
    run(cluster, one_call_program)


# ---- behaviour -------------------------------------------------------------------------------------------------


def errors_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    other = f"worker{1 - rank}"
    with pytest.raises(RuntimeError, match="Original exception on remote side was") as caught:
        rpc.rpc_sync(other, raise_two_arguments)
    assert isinstance(caught.value, TwoArgumentsError)
    assert caught.value.code == 7
    waiting = rpc.rpc_async(other, time.sleep, args=(1,))
    failing = rpc.rpc_async(other, raise_two_arguments)
    with pytest.raises(TwoArgumentsError):
        torch.futures.wait_all([waiting, failing])
    assert not waiting.done()
    with pytest.raises(RuntimeError, match="Got the following error when running the callback: TypeError"):
        rpc.rpc_async(other, add, args=(1, 1)).then(lambda future: future + 1).wait()
    rpc._set_rpc_timeout(0.05)
    with pytest.raises(RuntimeError, match="RPC ran for more than"):
        rpc.rpc_sync(other, time.sleep, args=(1,))
    rpc._set_rpc_timeout(0)
    assert rpc.get_rpc_timeout() == 0
    waiting.wait()
    rpc.shutdown()


def test_errors_are_those_that_programs_catch(cluster: Cluster) -> None:
    run(cluster, errors_program)


def wait_all_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    other = f"worker{1 - rank}"
    with rpc.api._wait_all():
        futures = [rpc.rpc_async(other, add, args=(n, 1)) for n in range(20)]
    assert [future.value() for future in futures] == list(range(1, 21))
    with pytest.raises(TwoArgumentsError), rpc.api._wait_all():
        rpc.rpc_async(other, raise_two_arguments)
    gathered = rpc.api._all_gather(rank * 10)
    assert gathered == {"worker0": 0, "worker1": 10}
    rpc.api._barrier(["worker0", "worker1"])
    rpc.shutdown()


def test_waiting_and_gathering(cluster: Cluster) -> None:
    run(cluster, wait_all_program)


def pickler_program(rank: int, method: str) -> int:
    rpc = start(rank, method)
    from torch.distributed.rpc.api import _use_rpc_pickler
    from torch.distributed.rpc.internal import _InternalRPCPickler

    class Counting(_InternalRPCPickler):
        calls = 0

        def serialize(self, obj: Any) -> Any:
            self.calls += 1
            return super().serialize(obj)

    pickler = Counting()
    with _use_rpc_pickler(pickler):
        assert rpc.rpc_sync(f"worker{1 - rank}", add, args=(torch.ones(2), 1)).tolist() == [2, 2]
    rpc.rpc_sync(f"worker{1 - rank}", add, args=(1, 1))
    rpc.shutdown()
    return pickler.calls


def test_a_program_may_bring_its_own_pickler(cluster: Cluster) -> None:
    assert run(cluster, pickler_program) == [1, 1]


def leak_program(rank: int, method: str, ignore: bool) -> str:
    rpc = start(rank, method)
    from torch.distributed.rpc import api

    kept = rpc.remote(f"worker{1 - rank}", add, args=(1, 2))
    kept.to_here()
    api._ignore_rref_leak = ignore
    api._delete_all_user_and_unforked_owner_rrefs = lambda timeout=0.0: None
    rpc.api._barrier(["worker0", "worker1"])
    try:
        rpc.shutdown()
    except RuntimeError as error:
        return str(error)
    return "no leak"


@pytest.mark.parametrize("ignore", [True, False])
def test_leaks_are_reported_if_the_program_wants_to_know(cluster: Cluster, ignore: bool) -> None:
    said = cluster.run(leak_program, 2, args=(cluster.new_init_method(), ignore), init=False)
    assert all(("Leaking RRef" in text) != ignore for text in said)


def again_program(rank: int, method: str) -> None:
    for _ in range(3):
        rpc = start(rank, method)
        with pytest.raises(RuntimeError, match="is already initialized"):
            rpc.init_rpc("again", rank=rank, world_size=2)
        assert rpc.rpc_sync(1 - rank, add, args=(1, 2)) == 3
        rpc.shutdown()


@pytest.mark.parametrize("mode", ["file", "tcp", "broker"])
def test_a_worker_may_begin_again(mode: Any, tmp_path: Any) -> None:
    cluster = Cluster(mode, tmp_path)
    try:
        run(cluster, again_program)
    finally:
        cluster.close()


def dynamic_program(rank: int, method: str) -> list[str]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"{method}.pg", rank=rank, world_size=3)
    if rank == 0:
        rpc = start(rank, method, None)
    dist.barrier()
    if rank != 0:
        rpc = start(rank, method, None)
        assert rpc.rpc_sync("worker0", add, args=(rank, 1)) == rank + 1
    dist.barrier()
    there = sorted(info.name for info in rpc._get_current_rpc_agent().get_worker_infos())
    assert [rpc.rpc_sync(name, add, args=(1, 1)) for name in there] == [2, 2, 2]
    dist.barrier()
    if rank == 2:
        rpc.shutdown()
    dist.barrier()
    if rank != 2:
        assert rpc.rpc_sync(f"worker{1 - rank}", add, args=(1, 1)) == 2
    dist.barrier()
    if rank == 2:
        options = rpc.TensorPipeRpcBackendOptions(init_method=method)
        rpc.init_rpc("worker2", rank=rank, rpc_backend_options=options)
    dist.barrier()
    assert [rpc.rpc_sync(name, add, args=(1, 1)) for name in there] == [2, 2, 2]
    dist.barrier()
    rpc.shutdown()
    dist.destroy_process_group()
    return there


def test_workers_come_and_go(cluster: Cluster) -> None:
    assert run(cluster, dynamic_program, 3) == [["worker0", "worker1", "worker2"]] * 3


def one_port_program(rank: int, port: int, rpc_first: bool) -> None:
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    rpc = torch_rpc()
    steps = [
        lambda: rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2),
        lambda: dist.init_process_group("gloo"),
    ]
    for step in steps if rpc_first else reversed(steps):
        step()
    assert rpc.rpc_sync(1 - rank, add, args=(1, 2)) == 3
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    rpc.shutdown()
    dist.destroy_process_group()


@pytest.mark.parametrize("rpc_first", [True, False])
def test_rpc_and_process_groups_share_a_port(cluster: Cluster, rpc_first: bool) -> None:
    cluster.run(one_port_program, 2, args=(free_port(), rpc_first), init=False)


# ---- TorchScript -----------------------------------------------------------------------------------------------


def script_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    from tests.integration import scripted

    other = f"worker{1 - rank}"
    assert rpc.rpc_sync(other, scripted.plus, args=(torch.ones(2),), kwargs={"n": 2}).tolist() == [3, 3]
    assert rpc.remote(other, scripted.plus, args=(torch.ones(2), 2)).to_here().tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="Expected error"):
        rpc.rpc_sync(other, scripted.failing, args=(torch.ones(1),))
    there = rpc.remote(other, torch.add, args=(torch.ones(2), 1))
    assert scripted.value_plus(there, 3).tolist() == [5, 5]
    assert scripted.owner_of(rpc.RRef({"a": 4})) == (f"worker{rank}", True, True, 4)
    del there
    rpc.shutdown()


def test_compiled_functions_are_called_and_take_rrefs(cluster: Cluster) -> None:
    run(cluster, script_program)


# ---- profiles --------------------------------------------------------------------------------------------------


def busy() -> torch.Tensor:
    with torch.autograd.profiler.record_function("##forward##"):
        return torch.ones(3).mul(2).relu()


def nested(to: str) -> torch.Tensor:
    result: torch.Tensor = torch_rpc().rpc_sync(to, busy)
    return result


def profile_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    if rank == 0:
        from torch.autograd.profiler_legacy import profile

        with profile(record_shapes=True) as profiled:
            rpc.rpc_sync("worker1", nested, args=("worker0",))
            rpc.rpc_async("worker1", torch.add, args=(torch.ones(4), 1)).wait()
            rpc.remote("worker1", busy)._get_profiling_future().wait()
        events = {event.name: event for event in profiled.function_events}
        outer = "rpc_sync#nested(worker0 -> worker1)"
        inner = f"{outer}#remote_op: rpc_sync#busy(worker1 -> worker0)"
        assert events[outer].node_id == 0
        assert not events[outer].is_remote
        assert (events[inner].node_id, events[inner].is_remote) == (1, True)
        forward = events[f"{inner}#remote_op: ##forward##"]
        assert (forward.node_id, forward.is_remote) == (0, True)
        added = events["rpc_async#aten::add(worker0 -> worker1)#remote_op: aten::add"]
        assert [4] in added.input_shapes
        assert "rpc_remote#busy(worker0 -> worker1)#remote_op: aten::relu" in events
        for name in (inner, forward.name):
            span = events[name].time_range
            assert events[outer].time_range.start <= span.start <= span.end <= events[outer].time_range.end
    rpc.shutdown()


def test_profiles_see_through_calls(cluster: Cluster) -> None:
    run(cluster, profile_program)


def torch_profiler_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    if rank == 0:
        with torch.profiler.profile(record_shapes=True) as profiled:
            rpc.rpc_sync("worker1", nested, args=("worker0",))
            rpc.rpc_async("worker1", torch.add, args=(torch.ones(4), 1)).wait()
        rpc.rpc_sync("worker1", busy)
        events = {event.name: event for event in profiled.events()}
        outer = "rpc#nested(worker0 -> worker1)"
        inner = f"{outer}#remote_op: rpc_sync#busy(worker1 -> worker0)"
        assert (events[outer].node_id, events[outer].is_remote) == (0, False)
        assert (events[inner].node_id, events[inner].is_remote) == (1, True)
        assert events[f"{inner}#remote_op: ##forward##"].node_id == 0
        added = events["rpc#aten::add(worker0 -> worker1)#remote_op: aten::add"]
        assert [4] in added.input_shapes
        assert "rpc#busy(worker0 -> worker1)" not in events
        assert outer in {event.key for event in profiled.key_averages()}
    rpc.shutdown()


def test_torch_profiler_sees_through_calls_too(cluster: Cluster) -> None:
    run(cluster, torch_profiler_program)


def process_profile_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    if rank == 0:
        profile = rpc.remote("worker1", rpc._server_process_global_profile)
        profile.rpc_sync().__enter__()
        rpc.rpc_sync("worker1", torch.add, args=(torch.ones(1), 1))
        rpc.rpc_sync("worker1", busy)
        profile.rpc_sync().__exit__(None, None, None)
        rpc.rpc_sync("worker1", torch.sub, args=(torch.ones(1), 1))
        names = {event.key for event in profile.rpc_sync().key_averages()}
        assert {"aten::add", "aten::relu"} <= names
        assert "aten::sub" not in names
        del profile
    rpc.shutdown()


def test_a_process_profile_sees_what_others_call(cluster: Cluster) -> None:
    run(cluster, process_profile_program)


def threads_program(rank: int, method: str) -> None:
    rpc = start(rank, method)
    failures: list[BaseException] = []

    def meet() -> None:
        try:
            for _ in range(5):
                rpc.api._barrier(["worker0", "worker1"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=meet) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    rpc.shutdown()


def test_barriers_of_many_threads(cluster: Cluster) -> None:
    run(cluster, threads_program)
