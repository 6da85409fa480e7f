"""Names, ids and incarnations."""

from __future__ import annotations

import os
import pickle
import threading

import pytest

from zrpc.ids import INCARNATION_NBYTES, GlobalId, IdGenerator, WorkerInfo, new_incarnation


@pytest.mark.parametrize("name", ["a", "worker0", "trainer:1-b_2", "A" * 127, "0"])
def test_names_that_can_be_workers(name: str) -> None:
    assert WorkerInfo(name, 0).name == name


@pytest.mark.parametrize("name", ["", "a b", "a/b", "größe", "A" * 128, "a\n", "\n", "a.b"])
def test_names_that_cannot(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"Worker name must match .* but got"):
        WorkerInfo(name, 0)


def test_worker_infos_are_values() -> None:
    info = WorkerInfo("ps", 1)
    assert info == WorkerInfo("ps", 1)
    assert hash(info) == hash(WorkerInfo("ps", 1))
    assert info not in (WorkerInfo("ps", 2), WorkerInfo("ps2", 1), "ps", None)
    assert repr(info) == "WorkerInfo(id=1, name=ps)"
    assert pickle.loads(pickle.dumps(info)) == info


@pytest.mark.parametrize("attribute", ["name", "id", "other"])
def test_worker_infos_cannot_be_changed(attribute: str) -> None:
    info = WorkerInfo("ps", 1)
    with pytest.raises(AttributeError, match="cannot be changed"):
        setattr(info, attribute, 2)
    assert info == WorkerInfo("ps", 1)


def test_global_ids_are_tuples_with_words() -> None:
    assert GlobalId(1, 2) == (1, 2)
    assert repr(GlobalId(1, 2)) == "GloballyUniqueId(created_on=1, local_id=2)"
    assert pickle.loads(pickle.dumps(GlobalId(1, 2))) == GlobalId(1, 2)


def test_ids_are_unique_over_threads() -> None:
    generator = IdGenerator(3)
    made: list[GlobalId] = []

    def make() -> None:
        made.extend([generator.next() for _ in range(1000)])

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 4000
    assert {one.created_on for one in made} == {3}


def test_incarnations_differ_and_never_begin_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({new_incarnation() for _ in range(100)}) == 100
    monkeypatch.setattr(os, "urandom", bytes)
    assert new_incarnation() == b"\x01" + bytes(INCARNATION_NBYTES - 1)
