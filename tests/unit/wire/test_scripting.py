"""TorchScript functions found by their names, while other threads compile."""

# TorchScript reads annotations when it compiles: no `from __future__ import annotations` here.

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch

from tests.slow_lookup import SlowLookup
from zrpc.errors import SerializationError
from zrpc.wire.scripting import find_function, qualified_name

SHORT_S = 0.2

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


lookup = SlowLookup()


def slow(x: torch.Tensor) -> torch.Tensor:
    return lookup.relu(x)


def slow_again(x: torch.Tensor) -> torch.Tensor:
    return lookup.relu(x)


def broken(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x, x)


def find_and_call(function: Any) -> torch.Tensor:
    return find_function(qualified_name(function))(torch.tensor([-1.0, 2.0]))


@pytest.fixture
def compiling() -> Any:
    """Compile a function on another thread; yields what begins it, and ends every compilation."""
    lookup.asked.clear()
    lookup.answer.clear()
    with ThreadPoolExecutor() as threads:

        def begin(function: Any) -> Future[Any]:
            compiled = threads.submit(torch.jit.script, function)
            compiled.add_done_callback(lambda _: lookup.asked.set())
            lookup.asked.wait()
            assert not compiled.done(), compiled.exception()
            return compiled

        yield begin
        lookup.answer.set()


def test_a_function_that_is_being_compiled_is_found_once_it_can_run(compiling: Any) -> None:
    """Looking it up waits for the other thread's compilation."""
    compiled = compiling(slow)
    with ThreadPoolExecutor() as threads:
        called = threads.submit(find_and_call, slow)
        assert not wait([called], SHORT_S).done
        lookup.answer.set()
        assert called.result().tolist() == [0, 2]
    assert compiled.result().qualified_name == qualified_name(slow)


def test_a_function_is_found_while_others_are_being_compiled(compiling: Any) -> None:
    """A compilation under way delays only those that look for its function."""
    compiling(slow_again)
    assert find_and_call(torch.jit.script(plain)).tolist() == [0, 2]


def plain(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


def test_a_function_that_could_not_be_compiled_is_not_found() -> None:
    """What TorchScript keeps of it under its name cannot be called."""
    with pytest.raises(RuntimeError, match=r"relu\(Tensor self\)"):
        torch.jit.script(broken)
    with pytest.raises(SerializationError, match="attempted to get undefined function broken"):
        find_and_call(broken)
