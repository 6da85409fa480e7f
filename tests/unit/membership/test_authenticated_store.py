"""A store that others write to as well: what they can do there is to stop a start, and they are refused by name."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch.distributed as dist

from tests.integration.harness import free_port
from zrpc.errors import RefusedError, RendezvousError
from zrpc.ids import Incarnation, new_incarnation
from zrpc.membership.authenticated_store import MARK, AuthenticatedStore
from zrpc.membership.claims import Claims
from zrpc.membership.store import StoreGroup
from zrpc.membership.store_client import StoreClient
from zrpc.membership.tcp_store import open_tcp_store
from zrpc.secret import Secret

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from zrpc.membership.counter import Store
    from zrpc.membership.group import Member

WAIT_S = 20.0
VALUE = "the secret of this group, which no text shows"
SECRET = Secret(VALUE, "ZRPC_SECRET_FILE (/here)")
OTHER = Secret("the secret of another group", "ZRPC_SECRET")


@pytest.fixture(params=["hash", "file", "tcp"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Makes stores, each of which everybody can write to."""
    alive = []  # a store with a prefix does not keep what is written in Python

    def make() -> Store:
        if request.param == "hash":
            made: dist.Store = dist.HashStore()
        elif request.param == "file":
            made = dist.FileStore(str(tmp_path / new_incarnation().hex()), -1)
        else:
            made = open_tcp_store("127.0.0.1", free_port(), is_host=True, timeout_s=WAIT_S)
            assert isinstance(made, StoreClient)
        made.set_timeout(timedelta(seconds=WAIT_S))
        alive.append(made)
        return cast("Store", dist.PrefixStore("zrpc/0", made))

    yield make
    alive.clear()


@pytest.fixture
def store(fresh: Callable[[], Store]) -> Store:
    return fresh()


class Seat:
    """One worker's membership, and what it was told."""

    def __init__(self, store: Store, name: str, rank: int, secret: Secret | None = SECRET) -> None:
        self.group = StoreGroup(store, secret=secret, look_interval_s=None)
        self.name, self.rank = name, rank
        self.life = new_incarnation()
        self.told: list[str] = []
        self.group.watch(self._on_joined, self._on_left)

    def _on_joined(self, member: Member) -> None:
        self.told.append(f"+{member.info.name}")

    def _on_left(self, _: Incarnation, lost: bool, reason: str) -> None:
        self.told.append("-")

    def join(self, world_size: int | None, timeout_s: float = WAIT_S) -> list[str]:
        """The names of all members."""
        _, members = self.group.join(self.name, self.rank, world_size, self.life, {"address": ""}, timeout_s)
        return [member.info.name for member in members]


def refusal(seat: Seat, world_size: int | None, timeout_s: float = WAIT_S) -> str:
    """What `seat` is refused with. It says nothing of the secret but where it is from."""
    with pytest.raises(RefusedError) as caught:
        seat.join(world_size, timeout_s)
    text = str(caught.value)
    assert VALUE not in text
    assert MARK.decode() not in text
    return text


class KeptStore:
    """A store of which somebody has read along what was ever written."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.kept: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        self.kept[key] = value.encode() if isinstance(value, str) else value
        self._store.set(key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        found = self._store.compare_set(key, expected, desired)
        if found == desired.encode():
            self.kept[key] = found
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def earlier_run(store: Store, world_size: int | None) -> dict[str, bytes]:
    """All records of a group of two that was once: a and b, of the same secret."""
    kept = KeptStore(store)
    seats = [Seat(kept, "a", 0), Seat(kept, "b", 1)]
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda seat: seat.join(world_size), seats))
    return kept.kept


def put(store: Store, records: dict[str, bytes], *keys: str) -> None:
    """Write those of `records` into the store, as somebody who knows no secret can."""
    for key in keys or records:
        store.set(key, records[key])


# ---- one record --------------------------------------------------------------------------------------------------


def test_a_value_is_read_by_workers_with_the_secret(store: Store) -> None:
    """As text and as bytes, also where two of them change it; an empty one is as none."""
    one, other = AuthenticatedStore(store, SECRET), AuthenticatedStore(store, SECRET)
    one.set("bytes", b"\0\xff")
    one.set("text", "grüße")
    assert (other.get("bytes"), other.get("text")) == (b"\0\xff", "grüße".encode())
    assert one.compare_set("key", "", "first") == b"first"
    assert other.compare_set("key", "", "second") == b"first"
    assert other.compare_set("key", "first", "") == b""
    assert one.compare_set("key", "", "third") == b"third"
    assert (one.check(["key"]), one.check(["key", "none"])) == (True, False)
    assert (one.add("count", 2), other.add("count", 1)) == (2, 3)


def test_a_value_is_refused_that_was_written_without_the_secret(store: Store) -> None:
    """By what has none, by what has another, and where a single byte was changed."""
    ours = AuthenticatedStore(store, SECRET)
    ours.set("key", b"value")
    whole = store.get("key")
    strangers = AuthenticatedStore(store, OTHER)
    for raw in (b"value", b"", MARK, whole[:-1], whole + b"x", whole[:-1] + b"X", whole.replace(b":", b":f", 1)):
        store.set("key", raw)
        with pytest.raises(RefusedError, match="the record 'key' in the store of this group"):
            ours.get("key")
    with pytest.raises(RefusedError, match=r"another secret than this one, whose secret is from ZRPC_SECRET: give all"):
        strangers.get("key")


def test_a_value_is_refused_that_was_moved_to_another_key(store: Store) -> None:
    ours = AuthenticatedStore(store, SECRET)
    ours.set("rank/1", b"value")
    store.set("rank/2", store.get("rank/1"))
    with pytest.raises(RefusedError, match=r"the record 'rank/2' .* is that of another key"):
        ours.get("rank/2")
    with pytest.raises(RefusedError, match=r"the record 'rank/2' .* is that of another key"):
        ours.compare_set("rank/2", "", "mine")


def test_a_value_is_refused_that_is_of_an_earlier_run(fresh: Callable[[], Store]) -> None:
    """The secret and the key are the same."""
    earlier, store = fresh(), fresh()
    AuthenticatedStore(earlier, SECRET).set("key", b"value")
    ours = AuthenticatedStore(store, SECRET)
    ours.set("key", b"new")
    store.set("key", earlier.get("key"))
    with pytest.raises(RefusedError, match=r"the record 'key' .* of an earlier run"):
        ours.get("key")


# ---- who has no secret, or another -------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, None])
def test_who_comes_second_with_another_secret_is_told_where_its_own_is_from(
    store: Store, world_size: int | None
) -> None:
    """At once: it waits for nobody."""
    begun = AuthenticatedStore(store, OTHER)
    begun.compare_set("kind", "", "static 2" if world_size else "dynamic")
    text = refusal(Seat(store, "b", 1), world_size)
    assert "has another secret than this one, whose secret is from ZRPC_SECRET_FILE (/here)" in text
    assert "give all workers the same, by ZRPC_SECRET, ZRPC_SECRET_FILE or the file of their user" in text


@pytest.mark.parametrize("world_size", [2, None])
@pytest.mark.parametrize("first_has", [True, False])
def test_a_worker_without_a_secret_and_one_with_one_do_not_meet(
    store: Store, first_has: bool, world_size: int | None
) -> None:
    """Whoever comes second is told, at once, which of the two it is; the first one may be an older zrpc."""
    with contextlib.suppress(RendezvousError):
        Seat(store, "a", 0, SECRET if first_has else None).join(world_size, 0.01)
    text = refusal(Seat(store, "b", 1, None if first_has else SECRET), world_size)
    if first_has:
        assert "the workers of this group have a secret, and this one has none (insecure=True, or" in text
    else:
        assert "the record 'kind' in the store of this group has no authentication code: what wrote it has no" in text
        assert "is an older zrpc" in text
        assert "give the others the same" in text


@pytest.mark.parametrize("world_size", [2, None])
def test_groups_without_a_secret_are_as_they_were(store: Store, world_size: int | None) -> None:
    seats = [Seat(store, "a", 0, None), Seat(store, "b", 1, None)]
    with ThreadPoolExecutor(2) as pool:
        names = list(pool.map(lambda seat: seat.join(world_size), seats))
    assert all(set(found) <= {"a", "b"} for found in names)
    assert ["a", "b"] in [sorted(found) for found in names]


# ---- static groups -----------------------------------------------------------------------------------------------

STATIC_KEYS = [
    ("kind", 0),
    ("rank/0", 0),
    ("member/1", 0),
    ("roster", 0),
    ("end", 0),
    ("kind", 1),
    ("rank/1", 1),
    ("rank/0", 1),
    ("roster", 1),
    ("end", 1),
]


@pytest.mark.parametrize(("key", "rank"), STATIC_KEYS)
@pytest.mark.parametrize("writer", ["stranger", "old secret", "earlier run"])
def test_a_static_group_refuses_a_record_of_others(
    fresh: Callable[[], Store], key: str, rank: int, writer: str
) -> None:
    """Whichever it is, and whichever rank reads it; the error names it."""
    store = fresh()
    if writer == "earlier run":
        raw = earlier_run(fresh(), 2)[key]
    elif writer == "old secret":
        sealing = KeptStore(fresh())
        AuthenticatedStore(sealing, OTHER).set(key, b"value")
        raw = sealing.kept[key]
    else:
        raw = b"value"
    store.set(key, raw)
    text = refusal(Seat(store, "ab"[rank], rank), 2, 0.01 if key == "end" else WAIT_S)
    assert f"the record {key!r} in the store of this group" in text
    assert "give the others the same" in text or "give them the same secret" in text


def test_all_of_a_static_group_end_where_one_record_is_not_its_own(store: Store) -> None:
    """Rank 0 finds it, and the others need not wait until their time is over."""
    store.set("member/2", b"value")
    first, second = Seat(store, "a", 0), Seat(store, "b", 1)
    with ThreadPoolExecutor(2) as pool:
        leading, following = pool.submit(refusal, first, 3), pool.submit(second.join, 3, 10 * WAIT_S)
        assert "'member/2'" in leading.result(WAIT_S)
        with pytest.raises(RendezvousError, match="the record 'member/2' in the store of this group"):
            following.result(WAIT_S)


def test_rank_0_takes_no_record_of_an_earlier_run(fresh: Callable[[], Store]) -> None:
    """Not even where the run itself was put back, so that the record's code is right."""
    earlier, store = earlier_run(fresh(), 2), fresh()
    put(store, earlier, "run", "kind", "member/1", "rank/1")
    assert "the record of rank 1 in the store of this group is of an earlier run" in refusal(Seat(store, "a", 0), 2)


def test_no_other_rank_takes_the_roster_of_an_earlier_run(fresh: Callable[[], Store]) -> None:
    """Where all of that run was put back, but for its own claim, all codes are right."""
    earlier, store = earlier_run(fresh(), 2), fresh()
    put(store, earlier, *(earlier.keys() - {"rank/1", "member/1"}))
    text = refusal(Seat(store, "b", 1), 2)
    assert "the roster in the store of this group was made without this worker, rank 1: it is of an earlier" in text


def test_a_whole_earlier_run_stops_a_start_at_once(fresh: Callable[[], Store]) -> None:
    """Its ranks are taken."""
    earlier, store = earlier_run(fresh(), 2), fresh()
    put(store, earlier)
    for rank, name in enumerate("ab"):
        assert f"rank {rank} is taken" in refusal(Seat(store, name, rank), 2)


def test_a_roster_that_is_replaced_while_workers_wait_is_refused(fresh: Callable[[], Store]) -> None:
    """By one of an earlier run with the same workers."""
    earlier, store = earlier_run(fresh(), 2), fresh()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(refusal, Seat(store, "b", 1), 2)
        while not store.check(["rank/1"]):
            assert not waiting.done()
        put(store, earlier, "roster")
        AuthenticatedStore(store, SECRET).compare_set("rank/0", "", new_incarnation().hex())
        assert "the record 'roster' in the store of this group is not as" in waiting.result(WAIT_S)


@pytest.mark.parametrize("amount", [-(10**9), 10**9])
def test_a_counter_that_others_change_makes_no_worker_wait(store: Store, amount: int) -> None:
    """Workers of a group that cannot be wait for each other, for so long and no longer."""
    store.add("lingering", amount)
    store.add("arrived", amount)
    with pytest.raises(RendezvousError, match=r"rank\(s\) 1 did not join within 0.01 s"):
        Seat(store, "a", 0).join(2, 0.01)


# ---- dynamic groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["kind", "name/c", "rank/2", "members", "member/1", "left/1"])
@pytest.mark.parametrize("writer", ["stranger", "earlier run"])
def test_a_newcomer_refuses_a_record_of_others(fresh: Callable[[], Store], key: str, writer: str) -> None:
    """It leaves nothing behind: the name and the rank are free again."""
    store = fresh()
    raw = b"1"
    if writer == "earlier run":
        earlier = earlier_run(fresh(), None)
        raw = earlier.get(key, earlier["name/b"])
    a = Seat(store, "a", 0)
    a.join(None)
    was = store.get(key) if store.check([key]) else b""
    store.set(key, raw)
    assert f"the record {key!r} in the store of this group" in refusal(Seat(store, "c", 2), None)
    if key != "left/1":
        store.set(key, was)
        assert sorted(Seat(store, "c", 2).join(None)) == ["a", "c"]
    a.group.refresh()
    assert a.told in ([], ["+c"])


def test_a_member_passes_over_what_others_wrote_and_the_group_goes_on(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """No look fails, no member is taken for gone and none for there; each thing is logged once."""
    a, b = Seat(store, "a", 0), Seat(store, "b", 1)
    a.join(None)
    b.join(None)
    a.group.refresh()
    counter, own = store.get("members"), store.get("member/2")
    with caplog.at_level(logging.WARNING, "zrpc"):
        for _ in range(3):
            store.set("members", "1000000000")
            store.set("left/2", "it left the group")
            store.set(f"index/{b.life.hex()}", "1000000")
            a.group.note_lost(b.life)
            a.group.refresh()
            store.set("members", counter)
            a.group.refresh()
    assert a.told == ["+b"]
    assert sorted(key for key in ("members", "left/2") if f"{key!r}" in caplog.text) == ["left/2", "members"]
    assert len(caplog.records) == 2
    store.set("left/2", "")
    Seat(store, "c", 2)
    store.set("member/3", own)  # moved
    assert store.get("members") == counter
    a.group.refresh()
    assert a.told == ["+b"]


@pytest.mark.parametrize("said", ["1000000000 of none", "9999999", "-5", "1.5", "many", "²"])
@pytest.mark.parametrize("secret", [SECRET, None])
def test_no_counter_makes_a_newcomer_read_without_end(store: Store, said: str, secret: Secret | None) -> None:
    """Neither where it has no code, nor where a group has no secret at all."""
    Seat(store, "a", 0, secret).join(None)
    store.set("members", said)
    assert "'members' in the store of this group" in refusal(Seat(store, "b", 1, secret), None)


def test_a_handler_of_the_log_may_look_for_members_itself(store: Store) -> None:
    """It is called where a look has found a record of others."""
    a = Seat(store, "a", 0)
    a.join(None)
    looked = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            a.group.refresh()
            looked.append(record.getMessage())

    handler = Handler()
    logging.getLogger("zrpc").addHandler(handler)
    try:
        store.set("members", "of a stranger")
        a.group.refresh()
    finally:
        logging.getLogger("zrpc").removeHandler(handler)
    assert ["'members'" in text for text in looked] == [True]


class NeverTheSame:
    """A store in which another value lies at each look."""

    def __init__(self) -> None:
        self.looks = 0

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self.looks += 1
        if key == "kind" or key.startswith(("name", "rank")):
            return desired.encode()
        other = f"{self.looks % 9} other" if key == "members" else f"{self.looks:016x} other"
        return b"" if self.looks % 2 else other.encode()

    def check(self, keys: list[str]) -> bool:
        return False

    def set(self, key: str, value: str | bytes) -> None:
        assert key.startswith("left/")


def test_a_claim_that_others_go_on_changing_is_given_up() -> None:
    store = NeverTheSame()
    assert not Claims(cast("Store", store), new_incarnation(), "", lambda *_: True).take("claim")
    assert store.looks < 1000


def test_a_counter_that_others_go_on_changing_is_given_up() -> None:
    store = NeverTheSame()
    with pytest.raises(RefusedError, match="the counter 'members' in the store of this group never stays"):
        Seat(cast("Store", store), "a", 0, None).join(None)
    assert store.looks < 10_000


def test_the_run_of_a_replay_hides_the_group_from_a_newcomer_and_does_no_more(fresh: Callable[[], Store]) -> None:
    """It meets the workers of that run, which do not answer; the members of this run stay as they are."""
    earlier, store = earlier_run(fresh(), None), fresh()
    a = Seat(store, "x", 5)
    a.join(None)
    put(store, earlier)
    assert sorted(Seat(store, "c", 2).join(None)) == ["a", "b", "c"]
    a.group.refresh()
    assert a.told == []


# ---- cost --------------------------------------------------------------------------------------------------------


class CountingStore:
    """A store that counts its uses, but for looks whether something is there yet."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.uses: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def use(*arguments: Any) -> Any:
            if name != "check":
                self.uses.append(f"{name} {arguments[0]}")
            return getattr(self._store, name)(*arguments)

        return use


def test_a_start_costs_each_worker_a_handful_of_uses_of_the_store() -> None:
    """However many there are; rank 0 reads the records of all."""
    count, store = 64, cast("Store", dist.HashStore())
    counting = [CountingStore(store) for _ in range(count)]
    seats = [Seat(cast("Store", own), f"w{rank}", rank) for rank, own in enumerate(counting)]
    with ThreadPoolExecutor(count) as pool:
        assert all(len(names) == count for names in pool.map(lambda seat: seat.join(count), seats))
    assert {len(own.uses) for own in counting[1:]} == {6}, counting[1].uses
    assert len(counting[0].uses) == 7 + count, counting[0].uses
