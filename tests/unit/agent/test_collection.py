"""torch.futures.wait_all and collect_all, as torch has them, on zrpc's futures."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch.futures import collect_all, wait_all  # before zrpc is imported

from zrpc import Future


def of(value: int) -> Future[int]:
    future: Future[int] = Future()
    future.set_result(value)
    return future


def failed(error: Exception) -> Future[int]:
    future: Future[int] = Future()
    future.set_exception(error)  # type: ignore[arg-type]  # torch types it as the value
    return future


def test_values_come_in_the_order_of_the_futures() -> None:
    late: Future[int] = Future()
    plain: torch.futures.Future[int] = torch.futures.Future()
    thread = threading.Thread(target=lambda: (plain.set_result(3), late.set_result(1)))
    thread.start()
    assert wait_all([late, of(2), plain]) == [1, 2, 3]
    thread.join()


def test_nothing_is_waited_for_if_there_is_nothing() -> None:
    assert wait_all([]) == []
    assert collect_all([]).wait() == []


def test_the_first_error_does_not_wait_for_the_others() -> None:
    never: Future[int] = Future()
    with pytest.raises(ValueError, match="first"):
        wait_all([never, failed(ValueError("first")), failed(KeyError("second"))])
    never.set_result(0)


def test_an_error_that_is_no_exception_ends_it_too() -> None:
    origin: Future[int] = Future()
    never: Future[int] = Future()
    collected = collect_all([never, origin.then(lambda _: sys.exit(3))])
    thread = threading.Thread(target=origin.set_result, args=(1,))
    thread.start()
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        collected.wait()
    thread.join()
    never.set_result(0)


def test_futures_of_torch_alone_are_torchs_business() -> None:
    plain: torch.futures.Future[int] = torch.futures.Future()
    plain.set_result(3)
    assert wait_all([plain]) == [3]
    assert wait_all(future for future in [plain]) == [3]  # type: ignore[arg-type]  # torch takes it
    assert not isinstance(collect_all([plain]), Future)


def test_what_comes_after_an_error_changes_nothing() -> None:
    late: Future[int] = Future()
    collected = collect_all([late, failed(ValueError("first"))])
    late.set_result(1)
    with pytest.raises(ValueError, match="first"):
        collected.wait()


def test_collect_all_gives_the_futures_themselves() -> None:
    futures = [of(1), of(2)]
    assert collect_all(futures).wait() == futures
