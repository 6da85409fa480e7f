"""`zrpc keys` as it is typed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from zrpc.cli.main import app
from zrpc.keyring import Keyring, find_private_key

if TYPE_CHECKING:
    from pathlib import Path


def keys(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["keys", *args])
    return result.exit_code, result.output


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    """In a folder that is made for them; the private key is in its file, which others cannot read, and nowhere else."""
    folder = tmp_path / "keys"
    code, output = keys(
        "new", "t1", "--workers", "trainer*", "--workers", "eval", "--ranks", "0-3,7", "--folder", str(folder)
    )
    assert code == 0, output
    private = folder / "t1.key"
    assert f"ZRPC_KEY={private}" in output
    assert f"ZRPC_KEYS={folder / 'keyring.json'}" in output
    assert private.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    key = private.read_text().strip()
    assert len(key) == 40
    assert keys("new", "ps", "--folder", str(folder))[0] == 0
    code, listed = keys("list", "--folder", str(folder))
    assert listed == ("t1: valid; the name trainer* or eval and rank 0-3,7\nps: valid; the name ps and any rank\n")
    assert keys("revoke", "t1", "--folder", str(folder))[0] == 0
    code, listed = keys("list", "--json", "--folder", str(folder))
    first, second = json.loads(listed)
    assert (first["label"], first["workers"], first["ranks"]) == ("t1", ["trainer*", "eval"], "0-3,7")
    assert first["revoked"]
    assert second["revoked"] is None
    assert not any(key in text for text in (output, listed, (folder / "keyring.json").read_text()))


def test_what_is_made_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert keys("new", "a")[0] == 0
    monkeypatch.setenv("ZRPC_KEY", str(tmp_path / "zrpc" / "a.key"))
    assert find_private_key() is not None
    assert len(Keyring(tmp_path / "zrpc" / "keyring.json").table.by_public) == 1


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["new", "a"], "has a key 'a' already"),
        (["new", "b"], "b.key is there already"),
        (["new", "../c"], "cannot be the label of a key"),
        (["new", "c", "--ranks", "3-1"], "write them as 0-3,7, or any"),
        (["new", "c", "--workers", ""], "may claim no name"),
        (["revoke", "c"], "has no key 'c'"),
    ],
)
def test_what_cannot_be_done_is_an_error_in_words(tmp_path: Path, args: list[str], text: str) -> None:
    """It exits with 2, and leaves all as it was."""
    assert keys("new", "a", "--folder", str(tmp_path))[0] == 0
    (tmp_path / "b.key").write_text("of somebody")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    code, output = keys(*args, "--folder", str(tmp_path))
    assert code == 2
    assert text in output
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_without_keys_the_list_is_empty(tmp_path: Path) -> None:
    code, output = keys("list", "--folder", str(tmp_path))
    assert code == 0
    assert "there are no keys" in output
    assert keys("revoke", "a", "--folder", str(tmp_path / "absent"))[0] == 2


def test_a_keyring_that_others_can_write_to_is_not_added_to(tmp_path: Path) -> None:
    assert keys("new", "a", "--folder", str(tmp_path))[0] == 0
    (tmp_path / "keyring.json").chmod(0o666)
    code, output = keys("new", "b", "--folder", str(tmp_path))
    assert code == 2
    assert "chmod go-w" in output
    assert not (tmp_path / "b.key").exists()
