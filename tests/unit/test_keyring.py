"""Keyrings: what a key may claim, and which files are taken for one."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest

from tests.keys import Keys
from zrpc import keyring_file
from zrpc.errors import ConfigError
from zrpc.ids import INCARNATION_NBYTES, new_incarnation
from zrpc.keyring import Keyring, check_pair, find_keyring, find_private_key
from zrpc.keyring_file import Entry
from zrpc.transport.credentials import make_pair

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def public() -> str:
    return make_pair().public.decode()


# ---- what a key may claim -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "ranks", "name", "rank", "may"),
    [
        (["trainer*"], "any", "trainer7", 7, True),
        (["trainer*"], "any", "ps", 7, False),
        (["a", "b"], "any", "b", 0, True),
        (["a"], "0-3,7", "a", 3, True),
        (["a"], "0-3,7", "a", 7, True),
        (["a"], "0-3,7", "a", 5, False),
        (["a"], "0-3,7", "b", 7, False),
        (["A"], "any", "a", 0, False),
        (["a?"], "0", "ab", 0, True),
        (["a?"], "0", "abc", 0, False),
    ],
)
def test_a_key_may_claim_its_names_and_ranks_alone(
    keys: Keys, workers: list[str], ranks: str, name: str, rank: int, may: bool
) -> None:
    life = keys.new("one", *workers, ranks=ranks).new_life()
    keyring = Keyring(keys.path)
    entry = keyring.entry_of(life)
    assert entry is not None
    assert keyring.permits(entry.public, name, rank) == may
    reason = keyring.refusal(life, name, rank)
    assert (reason is None) == may
    assert reason is None or ("'one'" in reason and "zrpc keys new" in reason and "ZRPC_KEY" in reason)


def test_a_key_of_some_ranks_leaves_none_to_others(keys: Keys) -> None:
    """A rank that the group gives might be any."""
    some, all_ranks = keys.new("some", ranks="0-1").new_life(), keys.new("all").new_life()
    keyring = Keyring(keys.path)
    assert "start it with its rank" in str(keyring.refusal(some, "some", -1))
    assert keyring.refusal(all_ranks, "all", -1) is None


def test_the_incarnations_of_a_worker_say_which_key_it_has(keys: Keys) -> None:
    """And are as many as there are lives."""
    one, other = keys.new("one"), keys.new("other")
    keyring = Keyring(keys.path)
    lives = {one.new_life() for _ in range(100)}
    assert len(lives) == 100
    assert {len(life) for life in lives} == {INCARNATION_NBYTES}
    labels = {entry.label for life in lives if (entry := keyring.entry_of(life)) is not None}
    assert labels == {"one"}
    entry = keyring.entry_of(other.new_life())
    assert entry is not None
    assert entry.label == "other"
    assert keyring.entry_of(new_incarnation(b"\0\0\0")) is None


def test_two_keys_that_cannot_be_told_apart_are_not_in_one_keyring(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them could speak for the other; also where it is revoked by now."""
    keys.new("one")
    monkeypatch.setattr(keyring_file, "sha256", lambda _: Same())
    with pytest.raises(ConfigError, match="'one' and 'two' cannot be told apart"):
        keys.new("two")
    told = json.loads(keys.path.read_text())
    told["keys"].append({**told["keys"][0], "label": "two", "public": public(), "revoked": "long ago"})
    keys.path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="cannot be told apart"):
        Keyring(keys.path)


class Same:
    """A digest that all have."""

    def digest(self) -> bytes:
        return b"same for all"


# ---- revoking, and reading again ------------------------------------------------------------------------------------


def test_what_is_revoked_or_new_is_seen_when_the_keyring_is_read_again(keys: Keys) -> None:
    life = keys.new("one").new_life()
    keyring = Keyring(keys.path)
    entry = keyring.entry_of(life)
    assert entry is not None
    keyring.reload()
    table = keyring.table
    keyring.reload()
    assert keyring.table is table, "it is not read again where it did not change"
    keys.revoke("one")
    new = keys.new("two").new_life()
    assert keyring.is_valid(entry.public)
    keyring.reload()
    assert not keyring.is_valid(entry.public)
    assert not keyring.permits(entry.public, "one", 0)
    assert "was revoked" in str(keyring.why_not(life))
    assert keyring.why_not(new) is None
    assert "not in the keyring" in str(keyring.why_not(new_incarnation(b"\0\0\0")))


def test_revoking_twice_leaves_the_first_time(keys: Keys) -> None:
    keys.new("one")
    first = keyring_file.revoke(keys.path, "one")
    assert keyring_file.revoke(keys.path, "one") == first
    with pytest.raises(ConfigError, match="no key 'two'"):
        keys.revoke("two")


@pytest.mark.parametrize("harm", ["gone", "no JSON", "writable"])
def test_a_keyring_that_was_damaged_says_what_it_said_before(keys: Keys, harm: str) -> None:
    """And why; what is mended is read."""
    keys.new("one")
    content = keys.path.read_text()
    keyring = Keyring(keys.path)
    if harm == "gone":
        keys.path.unlink()
    elif harm == "no JSON":
        keys.path.write_text(content[:-10])
    else:
        keys.path.chmod(0o666)
    keyring.reload()
    assert len(keyring.table.by_public) == 1
    assert str(keys.path) in str(keyring.complaint)
    keys.path.touch(mode=0o600)
    keys.path.chmod(0o600)
    keys.path.write_text(content.replace('"any"', '"0-1"'))
    keyring.reload()
    assert keyring.complaint is None
    assert [entry.ranks for entry in keyring.table.by_public.values()] == ["0-1"]


def test_keys_that_are_made_at_once_are_all_there(keys: Keys) -> None:
    """Each change is made to what the others have written."""
    threads = [threading.Thread(target=keys.new, args=(f"key{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Keyring(keys.path).table.by_public) == 8
    assert [path.name for path in keys.folder.iterdir() if path.name.startswith(".")] == []


# ---- files that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_keyring_that_others_can_write_to_is_refused(keys: Keys, mode: int) -> None:
    keys.new("one")
    keys.path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod go-w"):
        Keyring(keys.path)


def test_a_keyring_in_a_folder_that_others_can_write_to_is_refused(keys: Keys) -> None:
    """They could put another file in its place; not where each may remove its own files alone."""
    keys.new("one")
    keys.folder.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod go-w"):
        Keyring(keys.path)
    keys.folder.chmod(0o1777)
    Keyring(keys.path)
    keys.folder.chmod(0o700)


def entry_with(**changes: object) -> dict[str, object]:
    good: dict[str, object] = {"label": "a", "public": "0" * 40, "workers": ["a"], "ranks": "any", "revoked": None}
    return {**good, **changes}


@pytest.mark.parametrize(
    "told",
    [
        [],
        {},
        {"version": 2, "keys": []},
        {"version": 1},
        {"version": 1, "keys": 7},
        {"version": 1, "keys": [7]},
        {"version": 1, "keys": [{}]},
        *(
            {"version": 1, "keys": [entry_with(**change)]}
            for change in (
                {"label": "../a"},
                {"label": 7},
                {"public": "short"},
                {"public": "#" * 40},
                {"public": "\u00e9" * 40},
                {"public": None},
                {"workers": []},
                {"workers": "a"},
                {"workers": [7]},
                {"ranks": "3-1"},
                {"ranks": "-1"},
                {"ranks": ""},
                {"ranks": 3},
                {"ranks": None},
                {"revoked": False},
            )
        ),
        {"version": 1, "keys": [entry_with(), entry_with()]},
    ],
    ids=repr,
)
def test_a_file_that_is_no_keyring_is_refused_in_words(keys: Keys, told: object) -> None:
    keys.path.touch(mode=0o600)
    keys.path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="is no keyring"):
        Keyring(keys.path)


def test_a_private_key_that_others_can_read_is_refused(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.new("one")
    monkeypatch.setenv("ZRPC_KEY", str(keys.key_file("one")))
    assert find_private_key() == keys.key_file("one").read_text()
    keys.key_file("one").chmod(0o640)
    with pytest.raises(ConfigError, match=r"can be read by other users.*chmod 600"):
        find_private_key()
    keys.key_file("one").chmod(0o600)
    keys.key_file("one").write_text("no key")
    with pytest.raises(ConfigError, match="holds no key"):
        find_private_key()
    keys.key_file("one").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        find_private_key()


def test_a_worker_needs_its_key_and_the_keyring(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.new("one")
    check_pair(None, None)
    keyring, private = Keyring(keys.path), keys.key_file("one").read_text()
    check_pair(keyring, private)
    with pytest.raises(ConfigError, match="ZRPC_KEYS is set, and ZRPC_KEY is not"):
        check_pair(keyring, None)
    with pytest.raises(ConfigError, match="ZRPC_KEY is set, and ZRPC_KEYS is not"):
        check_pair(None, private)
    assert find_keyring() is None
    monkeypatch.setenv("ZRPC_KEYS", str(keys.path.with_name("absent")))
    with pytest.raises(ConfigError, match="cannot be read"):
        find_keyring()


def test_an_entry_says_nothing_of_a_private_key(keys: Keys) -> None:
    credentials = keys.new("one")
    private = keys.key_file("one").read_text()
    assert private not in keys.path.read_text()
    assert private not in repr(vars(credentials))
    assert private not in repr(Entry("one", public(), ("one",)))
