"""What every test is held to: it leaves no thread, child process, socket or shared memory behind."""

from __future__ import annotations

import gc
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests import leaks
from zrpc import finalizers, protocol_errors

if TYPE_CHECKING:
    from collections.abc import Iterator


os.environ["ZRPC_SECRET"] = "the secret of all groups in tests"  # no test touches the user's own


@pytest.fixture(scope="session", autouse=True)
def _frame_collector() -> None:
    leaks.start_frame_collector()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves something running or open."""
    finalizers.run_pending()  # what earlier tests left to be logged
    with leaks.nothing_left():
        yield
        request.node.funcargs.clear()  # what fixtures gave the test would be kept until the check is over


@pytest.fixture(autouse=True)
def own_tally() -> Iterator[None]:
    """What earlier tests sent that cannot be read keeps nothing of this one's out of the log."""
    before, protocol_errors.received = protocol_errors.received, protocol_errors.Tally()
    yield
    protocol_errors.received = before


def pytest_configure() -> None:
    """Let Ctrl-C be raised, also where a shell has started pytest in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Spare the collector of garbage what is there for good: many tests call it, and torch and the tests are large."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no GPU."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
