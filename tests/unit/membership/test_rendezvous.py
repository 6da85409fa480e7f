"""From init methods and the environment to ranks and stores."""

from __future__ import annotations

import socket
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest

from zrpc.errors import ConfigError, RendezvousError
from zrpc.membership import rendezvous
from zrpc.membership.rendezvous import open_store, resolve_rank

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def be_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on as if this process had opened no store yet."""
    monkeypatch.setattr(rendezvous, "_generations", defaultdict(rendezvous._Generations))


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variables of a launcher, and no store that outlives the test."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    be_another_process(monkeypatch)
    kept: list[object] = []
    monkeypatch.setattr(rendezvous, "_kept_alive", kept)
    yield
    kept.clear()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ((0, 1), {}, (0, 1)),
        ((2, 4), {"RANK": "1", "WORLD_SIZE": "9"}, (2, 4)),
        ((-1, None), {"RANK": "1", "WORLD_SIZE": "3"}, (1, 3)),
        ((-1, 5), {"RANK": "1", "WORLD_SIZE": "3"}, (1, 5)),
        ((-1, None), {"RANK": "4"}, (4, None)),
        ((-1, None), {}, (-1, None)),
        ((3, None), {"WORLD_SIZE": "4"}, (3, None)),
    ],
)
def test_ranks_come_from_the_call_or_else_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[int, int | None],
    environment: dict[str, str],
    expected: tuple[int, int | None],
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert resolve_rank(*given, "env://") == expected


@pytest.mark.parametrize(
    ("given", "environment", "words"),
    [
        ((-1, 2), {}, r"rank -1 is not one of 0 to 1: pass rank=, or set RANK"),
        ((2, 2), {}, r"rank 2 is not one of 0 to 1"),
        ((0, 0), {}, r"world_size must be 1 or more, or None"),
        ((0, -3), {}, r"world_size must be 1 or more"),
        ((-1, None), {"RANK": "one"}, r"environment variable RANK must be a whole number, not 'one'"),
        ((-1, None), {"RANK": "0", "WORLD_SIZE": "2.5"}, r"WORLD_SIZE must be a whole number"),
        ((-1, None), {"RANK": "3", "WORLD_SIZE": "2"}, r"rank 3 is not one of 0 to 1"),
    ],
)
def test_ranks_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, given: tuple[int, int | None], environment: dict[str, str], words: str
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=words):
        resolve_rank(*given, "env://")


def test_a_broker_gives_out_ranks() -> None:
    assert resolve_rank(-1, 4, "broker://127.0.0.1:5") == (-1, 4)


def test_a_file_brings_workers_together(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    for world_size in (1, None):
        store = open_store(url, 0, world_size, 5.0)
        store.set("key", "value")
        assert store.get("key") == b"value"


def test_a_port_brings_the_workers_of_a_static_group_together() -> None:
    store = open_store(f"tcp://127.0.0.1:{free_port()}", 0, 1, 5.0)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_a_port_brings_the_workers_of_a_dynamic_group_together(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    store = open_store(f"tcp://127.0.0.1:{port}", 0, None, 5.0)
    store.set("key", "value")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert open_store("env://", 1, None, 5.0).get("key") == b"value"


def test_groups_one_after_the_other_do_not_see_each_other(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    stores = [open_store(url, 0, size, 5.0) for size in (1, 1, None, None, 1)]
    for number, store in enumerate(stores):
        store.set("key", str(number))
    assert [store.get("key") for store in stores] == [b"0", b"1", b"3", b"3", b"4"], (
        "a dynamic group can be come back to"
    )


@pytest.mark.parametrize("world_size", [1, None])
@pytest.mark.parametrize(
    ("method", "environment", "words"),
    [
        ("env://", {}, "MASTER_ADDR"),
        ("env://", {"MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
        ("tcp://127.0.0.1", {}, "port"),
    ],
)
def test_an_address_that_is_not_whole_is_refused(
    monkeypatch: pytest.MonkeyPatch, method: str, environment: dict[str, str], words: str, world_size: int | None
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=words):
        open_store(method, 0, world_size, 5.0)


def test_a_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(ConfigError, match="MASTER_PORT must be a whole number, not 'http'"):
        open_store("env://", 0, None, 5.0)


@pytest.mark.parametrize("world_size", [2, None])
def test_a_store_that_nobody_hosts_is_named(world_size: int | None) -> None:
    with pytest.raises(RendezvousError, match=r"init_method 'tcp://127.0.0.1:\d+' .* cannot be reached"):
        open_store(f"tcp://127.0.0.1:{free_port()}", 1, world_size, 0.2)


def test_a_start_elsewhere_that_came_to_nothing_keeps_no_group_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process opened another store before, where nobody came; the other did not, and they meet all the same."""
    first, second = (f"file://{tmp_path}/{name}" for name in ("first", "second"))
    elsewhere = open_store(first, 0, 2, 5.0)
    one = open_store(second, 0, 2, 5.0)
    one.set("key", b"value")
    be_another_process(monkeypatch)
    assert open_store(second, 1, 2, 5.0).get("key") == b"value"
    del elsewhere
