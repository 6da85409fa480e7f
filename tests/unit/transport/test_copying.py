"""Copies on two threads are the same copies."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from zrpc.transport import copying
from zrpc.transport.copying import SPLIT_MIN_NBYTES, Bytes, Copier


def pattern(nbytes: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def helpers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "zrpc-copier"]


@pytest.mark.parametrize("nbytes", [0, 1, 70_000, SPLIT_MIN_NBYTES - 1, SPLIT_MIN_NBYTES, SPLIT_MIN_NBYTES + 4097])
def test_everything_is_copied_and_nothing_else(nbytes: int) -> None:
    copier = Copier()
    memory = np.zeros(nbytes + 2, np.uint8)
    source = pattern(nbytes, 1)
    copier.copy(memory[1:-1], source)
    assert np.array_equal(memory[1:-1], source)
    assert memory[0] == memory[-1] == 0
    assert bool(helpers()) == (nbytes >= SPLIT_MIN_NBYTES)
    copier.close()
    copier.close()
    assert not helpers()


def test_many_threads_share_one_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "SPLIT_MIN_NBYTES", 1000)
    copier = Copier()
    failed = []

    def copy(seed: int) -> None:
        source = pattern(50_000, seed)
        for _ in range(300):
            target = np.zeros_like(source)
            copier.copy(target, source)
            if not np.array_equal(target, source):
                failed.append(seed)

    threads = [threading.Thread(target=copy, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert helpers() == ["zrpc-copier"]
    copier.close()


def test_a_closed_copier_copies_on_the_callers_thread() -> None:
    copier = Copier()
    copier.close()
    source = pattern(SPLIT_MIN_NBYTES, 3)
    target = np.zeros_like(source)
    copier.copy(target, source)
    assert np.array_equal(target, source)
    assert not helpers()


def test_where_no_thread_is_to_be_had_the_caller_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    copier = Copier()
    source = pattern(SPLIT_MIN_NBYTES, 1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        refused = np.zeros_like(source)
        copier.copy(refused, source)
    later = np.zeros_like(source)
    copier.copy(later, source)  # would wait for ever for a helper that never was
    assert np.array_equal(refused, source)
    assert np.array_equal(later, source)
    assert helpers()
    copier.close()
