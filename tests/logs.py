"""Handlers of zrpc's log that run code of a test."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Calling(logging.Handler):
    def __init__(self, on_record: Callable[[logging.LogRecord], object]) -> None:
        super().__init__()
        self.emit = on_record  # type: ignore[assignment, method-assign]


@contextmanager
def handled_by(on_record: Callable[[logging.LogRecord], object]) -> Iterator[None]:
    """Records of zrpc's log are given to `on_record`, on the thread that logs."""
    handler = _Calling(on_record)
    log = logging.getLogger("zrpc")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
