"""TorchScript that takes RRefs, makes calls and is marked as asynchronous: import it in worker processes only."""

# TorchScript reads annotations when it compiles: no `from __future__ import annotations` here.

from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch.distributed.rpc import RRef
from torch.futures import Future

from tests.slow_lookup import SlowLookup

# ---- values behind RRefs


@torch.jit.script
class Box:
    def __init__(self, n: int) -> None:
        self.n = n
        self.parts = [n]

    def grow(self) -> None:
        self.n = self.n + 1
        self.parts.append(self.n)


@torch.jit.script
def list_made_here() -> list[int]:
    return [1, 2]


@torch.jit.script
def empty_list() -> list[int]:
    made: list[int] = []
    return made


@torch.jit.script
def dict_made_here(key: str = "a") -> dict[str, list[int]]:
    return {key: [1]}


@torch.jit.script
def box_made_here() -> Box:
    return Box(1)


@torch.jit.script
def append(ref: RRef[list[int]]) -> None:
    ref.local_value().append(3)
    ref.to_here().append(4)


@torch.jit.script
def append_to_both(first: RRef[list[int]], second: RRef[list[int]]) -> None:
    first.local_value().append(1)
    second.local_value().append(2)


@torch.jit.script
def total(ref: RRef[list[int]]) -> int:
    n = 0
    for one in ref.to_here():
        n += one
    return n


@torch.jit.script
def put(ref: RRef[dict[str, list[int]]]) -> None:
    ref.local_value()["a"].append(2)
    ref.local_value()["b"] = [5]


@torch.jit.script
def grow(ref: RRef[Box]) -> None:
    ref.local_value().grow()


@torch.jit.script
def the_same(ref: RRef[list[int]]) -> list[int]:
    return ref.local_value()


@torch.jit.script
def save(ref: RRef[torch.Tensor], path: str) -> None:
    torch.save(ref, path)


@torch.jit.script
def give_back(ref: RRef[torch.Tensor]) -> RRef[torch.Tensor]:
    return ref


# ---- calls


@torch.jit.script
def add(x: torch.Tensor, y: torch.Tensor, n: int = 0) -> torch.Tensor:
    return x + y + n


@torch.jit.script
def sync_and_async(to: str, x: torch.Tensor) -> torch.Tensor:
    named: dict[str, Any] = {"n": 10}
    begun = rpc.rpc_async(to, add, (x, x), named)
    here = rpc.rpc_sync(to, add, (x, x))
    return begun.wait() + here


@torch.jit.script
def stays_there(to: str, x: torch.Tensor) -> torch.Tensor:
    ref = rpc.remote(to, add, (x, x))
    assert ref.owner_name() == to
    return ref.to_here()


@torch.jit.script
def list_there(to: str) -> list[int]:
    ref = rpc.remote(to, list_made_here)
    return ref.to_here()


@torch.jit.script
def many_there(to: str, x: torch.Tensor) -> torch.Tensor:
    refs = [rpc.remote(to, add, (x, x)) for i in range(3)]
    named = {"a": rpc.remote(to, add, (x, x))}
    pair = (refs[0], x)
    made = named["a"].to_here() + pair[0].to_here()
    for ref in refs:
        if not ref.is_owner():
            made = made + ref.to_here()
    return made


@torch.jit.script
def left_there(to: str, x: torch.Tensor):  # noqa: ANN201  # the compiler has its own type for it
    return rpc.remote(to, add, (x, x))


@torch.jit.script
def sizes_differ(to: str) -> torch.Tensor:
    return rpc.rpc_async(to, add, (torch.ones(2), torch.ones(3))).wait()


@torch.jit.script
def second(to: str, back: str, x: torch.Tensor) -> torch.Tensor:
    return rpc.rpc_async(to, add, (x, x)).wait()


@torch.jit.script
def first(to: str, back: str, x: torch.Tensor) -> torch.Tensor:
    begun = rpc.rpc_async(back, second, (to, back, x)).wait()
    return rpc.rpc_sync(back, second, (to, back, begun))


lookup = SlowLookup()


def slow_to_compile(to: str, x: torch.Tensor) -> torch.Tensor:
    return rpc.rpc_sync(to, add, (lookup.relu(x), x))


def let_the_compiler_go_on() -> None:
    lookup.answer.set()


class Caller(torch.nn.Module):
    def __init__(self, to: str, refs: list[Any]) -> None:
        super().__init__()
        self.to_worker = to
        self.refs = refs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = rpc.rpc_sync(self.to_worker, add, (x, x))
        for ref in self.refs:
            made = made + ref.to_here()
        return made


# ---- distributed autograd


@torch.jit.script
def after_a_wait(to: str, x: torch.Tensor) -> torch.Tensor:
    once = rpc.rpc_async(to, add, (x, x)).wait()
    return rpc.rpc_async(to, add, (once, x)).wait().sum()


@torch.jit.script
def forked(to: str, x: torch.Tensor) -> torch.Tensor:
    return torch.jit.fork(after_a_wait, to, x).wait()


@torch.jit.script
def differentiate(context_id: int, loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    dist_autograd.backward(context_id, [loss])
    return dist_autograd.get_gradients(context_id)[leaf]


# ---- asynchronous functions


def plain_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y


@rpc.functions.async_execution
@torch.jit.script
def forking(x: torch.Tensor, y: torch.Tensor) -> Future[torch.Tensor]:
    return torch.jit.fork(plain_add, x, y)


@rpc.functions.async_execution
@rpc.functions.async_execution
@torch.jit.script
def marked_twice(x: torch.Tensor, y: torch.Tensor) -> Future[torch.Tensor]:
    return torch.jit.fork(plain_add, x, y)


@rpc.functions.async_execution
@torch.jit.script
def no_future(x: torch.Tensor) -> torch.Tensor:
    return x


@rpc.functions.async_execution
@torch.jit.script
def calling(to: str, x: torch.Tensor) -> Future[torch.Tensor]:
    return rpc.rpc_async(to, add, (x, x))


@rpc.functions.async_execution
@torch.jit.script
def forking_dict(key: str) -> Future[dict[str, list[int]]]:
    return torch.jit.fork(dict_made_here, key)


class Holder:
    @staticmethod
    @rpc.functions.async_execution
    def forking(x: torch.Tensor) -> Any:
        return torch.jit.fork(plain_add, x, x)
