"""Where the secret of a group comes from, and that it shows itself to nobody."""

from __future__ import annotations

import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from zrpc import secret
from zrpc.errors import ConfigError
from zrpc.secret import FILE_VARIABLE, VARIABLE, Secret, find_secret, make_secret, user_file

if TYPE_CHECKING:
    from pathlib import Path

VALUE = "correct horse battery staple"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def written(path: Path, text: str = VALUE, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_option_comes_first_then_the_variables_then_the_file_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_the_user = find_secret()
    assert of_the_user.source == str(user_file())
    monkeypatch.setenv(FILE_VARIABLE, str(written(tmp_path / "secret", "secret of the file")))
    assert find_secret().derive("x") == Secret("secret of the file").derive("x")
    monkeypatch.setenv(VARIABLE, "secret of the variable")
    assert find_secret().derive("x") == Secret("secret of the variable").derive("x")
    assert find_secret(VALUE).derive("x") == Secret(VALUE).derive("x")


def test_the_file_of_the_user_is_made_once_and_is_for_its_user_alone() -> None:
    with ThreadPoolExecutor(8) as threads:
        made = {one.derive("x") for one in threads.map(lambda _: find_secret(), range(32))}
    assert len(made) == 1
    assert stat.S_IMODE(user_file().stat().st_mode) == 0o600
    assert os.listdir(user_file().parent) == ["secret"], "nothing else is left"


def test_where_no_file_can_be_made_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(written(tmp_path / "no-folder")))
    with pytest.raises(ConfigError, match=f"set {VARIABLE} or {FILE_VARIABLE}"):
        find_secret()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606, 0o660])
def test_a_file_that_others_could_read_or_change_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int
) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(written(tmp_path / "secret", mode=mode)))
    with pytest.raises(ConfigError, match="chmod 600"):
        find_secret()


def test_a_file_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(written(tmp_path / "secret")))
    own = tmp_path.stat().st_uid
    monkeypatch.setattr(secret.os, "geteuid", lambda: own + 1)
    if own:  # what root owns may be anybody's secret: a container mounts them so
        with pytest.raises(ConfigError, match="belongs to another user"):
            find_secret()
    else:
        assert find_secret().source.startswith(FILE_VARIABLE)


@pytest.mark.parametrize("value", ["", "short", "   padded with  "])
def test_a_short_secret_is_refused_with_a_way_to_make_one(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=r"ZRPC_SECRET has \d+ characters, and needs 16 or more: make one"):
        find_secret()


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="nothing"):
        find_secret()


def test_it_shows_itself_to_nobody() -> None:
    one = Secret(VALUE)
    assert VALUE not in repr(one) + str(one) + f"{one}"
    with pytest.raises(TypeError):
        pickle.dumps(one)
    with pytest.raises(ConfigError) as refused:
        Secret("tooshort-secret")
    assert "tooshort" not in str(refused.value)


def test_what_is_derived_depends_on_secret_purpose_and_parts() -> None:
    one = Secret(VALUE)
    different = {
        one.derive("a"),
        one.derive("b"),
        one.derive("a", b""),
        one.derive("a", b"xy"),
        one.derive("a", b"x", b"y"),
        Secret(make_secret()).derive("a"),
    }
    assert len(different) == 6
    assert one.derive("a", b"x") == Secret(VALUE + "\n").derive("a", b"x")


def test_a_tag_is_that_of_its_parts_alone() -> None:
    one = Secret(VALUE)
    tag = one.tag("record", b"key", b"value")
    assert one.is_tag(tag, "record", b"key", b"value")
    for wrong in (b"", tag[:-1], bytes(len(tag)), tag + b"x"):
        assert not one.is_tag(wrong, "record", b"key", b"value")
    assert not one.is_tag(tag, "record", b"key", b"other")
    assert not one.is_tag(tag, "other", b"key", b"value")
    assert not Secret(make_secret()).is_tag(tag, "record", b"key", b"value")
