"""The agent as programs for torch.distributed.rpc see it: a view of zrpc's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from zrpc import ending, lifecycle
from zrpc.agent.current import current_agent, is_agent_set, set_agent
from zrpc.errors import DrainingError
from zrpc.rref.context import RRefContext

if TYPE_CHECKING:
    import torch

    from zrpc.agent.agent import Agent
    from zrpc.config import RpcBackendOptions
    from zrpc.ids import WorkerInfo


class _GilProfiling:
    """Whether waits for the interpreter's lock are measured."""

    TRIES = 100

    def __init__(self) -> None:
        self.enabled = False

    def average_us(self) -> float:
        """How long this thread, having given the lock up, waits to get it again: the average of some tries."""
        start = time.perf_counter()
        for _ in range(self.TRIES):
            time.sleep(0)  # gives the lock up and asks for it again
        return (time.perf_counter() - start) / self.TRIES * 1e6


_gil = _GilProfiling()


def enable_gil_profiling(flag: bool) -> None:
    """Let `get_debug_info` measure how long a thread waits for the interpreter's lock."""
    _gil.enabled = flag


class RpcAgent:
    """Base of agents. `TensorPipeAgent` is the only one that zrpc can make calls with."""

    def get_worker_info(self, worker: str | int | None = None) -> WorkerInfo:
        """This worker, or the one of that name or rank."""
        raise NotImplementedError

    def get_worker_infos(self) -> list[WorkerInfo]:
        """All workers of the group."""
        raise NotImplementedError

    def get_debug_info(self) -> dict[str, str]:
        """Numbers about calls and threads, as text."""
        raise NotImplementedError

    def get_metrics(self) -> dict[str, str]:
        """The same under torch's other name."""
        raise NotImplementedError

    def join(self, shutdown: bool = False, timeout: float = 0.0) -> None:
        """Wait until no call is under way."""
        raise NotImplementedError

    def sync(self) -> None:
        """Wait until no call of this worker is under way."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """End this worker at once."""
        raise NotImplementedError

    def _get_device_map(self, dst: WorkerInfo) -> dict[torch.device, torch.device]:
        raise NotImplementedError


class TensorPipeAgent(RpcAgent):
    """zrpc's agent, under the name of the one that it stands in for. There is one such object for each agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._store: Any = None

    @property
    def is_static_group(self) -> bool:
        """Whether the group has a fixed size."""
        return self._agent.is_static_group

    def set_store(self, store: Any) -> None:
        """The group is kept in `store`. Once, by what starts the worker."""
        self._store = store

    @property
    def store(self) -> Any:
        """The store that the group is kept in.

        Raises:
            RuntimeError: it is kept by a broker.
        """
        if self._store is None:
            raise RuntimeError("this group is kept by a broker and has no store")
        return self._store

    def get_worker_info(self, worker: str | int | None = None) -> WorkerInfo:
        """This worker, or the one of that name or rank."""
        if worker is None:
            return self._agent.info
        try:
            return self._agent.resolve(worker)
        except DrainingError:  # to ask who it is is no call
            return self._agent.members.find(worker)

    def get_worker_infos(self) -> list[WorkerInfo]:
        """Everybody in the group."""
        self._agent.refresh()
        return self._agent.members.all()

    def get_debug_info(self) -> dict[str, str]:
        """Numbers about calls and threads, as text."""
        return {f"agent.{name}": str(value) for name, value in self._numbers().items()}

    def get_metrics(self) -> dict[str, str]:
        """The same as `get_debug_info`, under torch's other name for it."""
        return self.get_debug_info()

    def _numbers(self) -> dict[str, float]:
        numbers: dict[str, float] = dict(self._agent.counts())
        running = numbers["server_active_calls"] - numbers["server_active_async_calls"]
        numbers["thread_pool_size"] = size = self._agent.options.num_worker_threads
        numbers["num_idle_threads"] = max(0, size - running)  # here threads are started when they are needed
        if _gil.enabled:
            numbers["gil_average_wait_time_us"] = _gil.average_us()
        return numbers

    def join(self, shutdown: bool = False, timeout: float = 0.0) -> None:
        """Wait until no call is under way in this worker and, in a static group, in any other."""
        ending.finish_calls(self._agent, timeout)
        if self._agent.is_static_group:
            if shutdown:
                self._agent.extensions[RRefContext].expect_goodbyes()
            ending.wait_for_all(timeout)

    def sync(self) -> None:
        """Wait until no call of this worker is under way."""
        ending.finish_calls(self._agent, 0.0)

    def shutdown(self) -> None:
        """End this worker at once."""
        self._agent.close(lifecycle.FLUSH_S)

    def _get_device_map(self, dst: WorkerInfo) -> dict[torch.device, torch.device]:
        return dict(self._agent.options.device_maps.get(dst.name, {}))

    def _get_backend_options(self) -> RpcBackendOptions:
        return self._agent.options


def get_current_rpc_agent() -> TensorPipeAgent:
    """The agent of this process.

    Raises:
        NotInitializedError: there is none.
    """
    agent = current_agent()
    view: TensorPipeAgent | None = agent.extensions.get(TensorPipeAgent)
    if view is None:
        view = agent.extensions.setdefault(TensorPipeAgent, TensorPipeAgent(agent))
    return view


def set_and_start_rpc_agent(agent: TensorPipeAgent) -> None:
    """Make `agent` this process's.

    Raises:
        TypeError: it is not an agent of this package.
    """
    if not isinstance(agent, TensorPipeAgent):
        raise TypeError(f"{agent!r} is no agent that zrpc can make calls with: it must be a TensorPipeAgent")
    set_agent(agent._agent)


def reset_current_rpc_agent() -> None:
    """This process has no agent any more."""
    if is_agent_set():
        set_agent(None)
