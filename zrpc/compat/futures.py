"""torch.futures.wait_all and collect_all that see errors of zrpc's futures as soon as they come.

torch's own let the first error through at once only if it was set in C++. An error set from Python is a value there, so
they would wait for all the other futures first: for ever, if one of them waits for the error to be handled.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from zrpc.agent.future import Future

AnyFuture = torch.futures.Future[Any]


class _Collection:
    """Futures that are waited for together. The lock owns the counter."""

    def __init__(self, futures: list[AnyFuture]) -> None:
        self.result: Future[list[AnyFuture]] = Future()
        self._futures = futures
        self._lock = threading.Lock()
        self._left = len(futures)
        if not futures:
            self.result.set_result([])
        for future in futures:
            future.add_done_callback(self._one_is_done)

    def _one_is_done(self, future: AnyFuture) -> None:
        try:
            future.value()
        except Exception as error:
            with self._lock:
                first, self._left = self._left > 0, 0
            if first:
                self.result.set_exception(error)
            return
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self.result.set_result(self._futures)


def collect_all(futures: list[AnyFuture]) -> Future[list[AnyFuture]]:
    """A future for `futures` themselves, once all are done or one has failed."""
    return _Collection(list(futures)).result


def wait_all(futures: list[AnyFuture]) -> list[Any]:
    """The values of `futures`, once all are done; raises the first error as soon as there is one."""
    return [future.wait() for future in collect_all(futures).wait()]
