"""A process that joins no group reads of it in the store, and writes nothing that others would see."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from zrpc.errors import ConfigError, RefusedError, RendezvousError
from zrpc.ids import WorkerInfo, new_incarnation
from zrpc.membership import found
from zrpc.membership.authenticated_store import with_secret
from zrpc.membership.group import Member
from zrpc.membership.records import Record, pack_roster
from zrpc.membership.rendezvous import open_for_looking
from zrpc.membership.store import StoreGroup
from zrpc.secret import Secret

if TYPE_CHECKING:
    from pathlib import Path

SECRET = Secret("the secret of this group")


def join(raw: Any, prefix: str, name: str, rank: int, size: int | None) -> StoreGroup:
    group = StoreGroup(dist.PrefixStore(prefix, raw), secret=SECRET, look_interval_s=None)  # type: ignore[arg-type]
    group.join(name, rank, size, new_incarnation(), {"address": "tcp://127.0.0.1:1"}, 20.0)
    return group


def names(raw: Any) -> tuple[list[str], int]:
    group = found.in_store(raw, SECRET, "the store")
    return sorted(member.info.name for member in group.members), group.world_size


def test_a_complete_static_group_has_its_roster() -> None:
    raw = dist.HashStore()
    threads = [threading.Thread(target=join, args=(raw, "zrpc/0", f"w{rank}", rank, 2)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(raw) == (["w0", "w1"], 2)


def test_those_that_left_a_dynamic_group_are_no_members() -> None:
    raw = dist.HashStore()
    first, second = join(raw, "zrpc/0", "w0", 0, None), join(raw, "zrpc/0", "w1", 1, None)
    assert names(raw) == (["w0", "w1"], 0)
    first.leave(1.0)
    assert names(raw) == (["w1"], 0)
    second.leave(1.0)


def test_the_group_that_came_last_is_meant() -> None:
    """Of two generations, and of torchrun's restarts."""
    raw = dist.HashStore()
    join(raw, "zrpc/0", "old", 0, 1)
    join(raw, "zrpc/10", "new", 0, 1)
    join(raw, "zrpc/2", "between", 0, 1)
    assert names(raw) == (["new"], 1)
    join(raw, "zrpc/restart-0-of-1/0", "started", 0, 1)
    join(raw, "zrpc/restart-1-of-1/0", "again", 0, 1)
    assert names(raw) == (["again"], 1)


def test_of_the_rounds_of_torchrun_that_of_the_newest_rank_0_is_meant() -> None:
    """Each life of it has a round of its own, whose roster names the members."""
    raw = dist.HashStore()
    prefix = "zrpc/torchrun-none-of-1/0"
    store = with_secret(dist.PrefixStore(prefix, raw), SECRET)  # type: ignore[arg-type]
    for name in ("before", "now"):
        life = new_incarnation()
        record = Record(Member(WorkerInfo(name, 0), life, {}), 1, life.hex()).pack()
        store.set("rank/0", life.hex())
        store.set(f"round/{life.hex()}/kind", "static 1")
        store.set(f"round/{life.hex()}/roster", pack_roster([record]))
    assert names(raw) == (["now"], 1)


def test_an_empty_store_has_no_group() -> None:
    with pytest.raises(RendezvousError, match="no group has met at the store"):
        names(dist.HashStore())


def test_a_group_with_another_secret_is_refused() -> None:
    raw = dist.HashStore()
    join(raw, "zrpc/0", "w0", 0, 1)
    with pytest.raises(RefusedError, match="has another secret"):
        found.in_store(raw, Secret("the secret of another group"), "the store")


def test_the_file_of_a_group_is_read_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = dist.FileStore(str(path), -1)
    join(store, "zrpc/0", "w0", 0, 1)
    before = path.read_bytes()
    assert names(open_for_looking(f"file://{path}", 1.0)) == (["w0"], 1)
    assert path.read_bytes() == before


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(RendezvousError, match="cannot be read: No such file"):
        open_for_looking(f"file://{tmp_path}/store", 1.0)
    assert not list(tmp_path.iterdir())


def test_a_meeting_point_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="file, tcp, env and broker can"):
        open_for_looking("mine://there", 1.0)
