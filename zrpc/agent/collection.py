"""`torch.futures.wait_all` and `collect_all` that end at the first failure of a zrpc future.

torch's own end at once only for errors that were set in C++; one that was set from Python is a value there, and they
wait for all other futures first. Both reach C++ through `torch._C._collect_all`, which they look up when they are
called. It is replaced here, so it does not matter when a program imported them.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from zrpc.agent.future import Future
from zrpc.errors import ZrpcError
from zrpc.exception_text import describe

AnyFuture = torch.futures.Future[Any]

_torchs_own: Any = torch._C._collect_all


class Collection:
    """Futures that are waited for together. Any thread may complete them; the lock owns the counter.

    Attributes:
        result: a future for `futures` themselves; it fails as soon as one of them does.
    """

    def __init__(self, futures: list[AnyFuture]) -> None:
        self.result: Future[list[AnyFuture]] = Future()
        self.result.set_origin("torch.futures.collect_all")
        self.result.cancel_by(self._cancel)
        self._futures = futures
        self._lock = threading.Lock()
        self._num_left = len(futures)
        for future in futures:
            future.add_done_callback(self._on_done)

    def _cancel(self) -> bool:
        return any([future.cancel() for future in self._futures if isinstance(future, Future)])

    def _on_done(self, future: AnyFuture) -> None:
        failure: Exception | None = None
        try:
            future.value()
        except Exception as error:
            failure = error
        except BaseException as error:
            failure = ZrpcError(describe(error))
        with self._lock:
            is_ended = self._num_left <= 0
            self._num_left = 0 if failure is not None else self._num_left - 1
            is_last = self._num_left == 0
        if failure is not None and not is_ended:
            self.result.set_exception(failure)
        elif is_last and not is_ended:
            self.result.set_result(self._futures)


def _collect_all(futures: list[AnyFuture]) -> torch.futures.Future[list[AnyFuture]]:
    """As torch's, and a failure of one of zrpc's futures ends it at once."""
    listed = list(futures)
    if any(isinstance(future, Future) for future in listed):
        return Collection(listed).result
    found: torch.futures.Future[list[AnyFuture]] = _torchs_own(listed)
    return found


torch._C._collect_all = _collect_all  # type: ignore[assignment]
