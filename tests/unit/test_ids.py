"""Names, ids and incarnations."""

from __future__ import annotations

import os
import pickle
import threading

import pytest

from zrpc.ids import INCARNATION_NBYTES, EndedLives, GlobalId, IdGenerator, WorkerInfo, new_incarnation


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


def test_worker_infos_know_the_life_that_they_name_and_are_equal_all_the_same() -> None:
    """It is no part of the value, is not printed, and travels."""
    info = WorkerInfo("ps", 1, b"a life..")
    assert info == WorkerInfo("ps", 1) == WorkerInfo("ps", 1, b"another.")
    assert hash(info) == hash(WorkerInfo("ps", 1))
    assert repr(info) == repr(WorkerInfo("ps", 1))
    assert pickle.loads(pickle.dumps(info)).incarnation == b"a life.."


@pytest.mark.parametrize("attribute", ["name", "id", "other"])
def test_worker_infos_cannot_be_changed(attribute: str) -> None:
    info = WorkerInfo("ps", 1)
    with pytest.raises(AttributeError, match="cannot be changed"):
        setattr(info, attribute, 2)
    assert info == WorkerInfo("ps", 1)


def test_global_ids_are_tuples_with_words() -> None:
    assert GlobalId(1, 2, b"life") == (1, 2, b"life")
    assert repr(GlobalId(1, 2)) == "GloballyUniqueId(created_on=1, local_id=2)"
    assert pickle.loads(pickle.dumps(GlobalId(1, 2, b"life"))) == GlobalId(1, 2, b"life")


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


def test_two_lives_of_one_rank_give_out_no_id_twice() -> None:
    """Both count from the same number."""
    first, second = IdGenerator(3, b"life 1"), IdGenerator(3, b"life 2")
    assert not {first.next() for _ in range(100)} & {second.next() for _ in range(100)}


def test_of_the_lives_that_ended_the_last_are_known_and_why() -> None:
    """Hundreds of departures leave no more behind than the limit says; the first reason that was told stays."""
    ended = EndedLives(limit=10)
    for number in range(500):
        life = number.to_bytes(8, "big")
        assert ended.note(life, f"reason {number}")
        assert not ended.note(life, "told again")
    assert len(ended) == 10
    assert ended[(499).to_bytes(8, "big")] == "reason 499"
    assert (489).to_bytes(8, "big") not in ended


def test_incarnations_differ_and_never_begin_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({new_incarnation() for _ in range(100)}) == 100
    monkeypatch.setattr(os, "urandom", bytes)
    assert new_incarnation() == b"\x01" + bytes(INCARNATION_NBYTES - 1)
