"""`zrpc doctor` finds what will not work, says what to do, and exits with 1 where something fails."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from tests.integration.harness import free_port
from zrpc.cli import checks, network
from zrpc.cli.findings import Finding, Level, run
from zrpc.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of what zrpc reads is set but a secret."""
    for name in [name for name in os.environ if name.startswith(("ZRPC_", "MASTER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ZRPC_SECRET", "the secret of all groups in tests")
    monkeypatch.setenv("ZRPC_LOCAL_DIR", str(tmp_path / "local"))


def found(check: Any) -> list[tuple[str, Level]]:
    return [(finding.about, finding.level) for finding in check()]


def one(check: Any, about: str) -> Finding:
    return next(finding for finding in check() if finding.about == about)


def doctor(*args: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(app, ["doctor", "--json", *args])
    return result.exit_code, {entry["about"]: entry for entry in json.loads(result.stdout)}


def test_all_is_well_where_tests_run() -> None:
    code, findings = doctor()
    assert code == 0
    assert not [entry for entry in findings.values() if entry["level"] == "FAIL"]
    assert {"python", "torch", "zeromq", "host name", "secret", "open files"} <= findings.keys()


def test_each_finding_is_a_line_and_what_to_do_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRPC_BIND", "nonsense")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    at = lines.index("FAIL  ZRPC_BIND: 'nonsense' is no address")
    assert lines[at + 1] == "      give tcp://HOST:PORT; port 0 takes any free one"
    assert any(line.startswith("OK    python: ") for line in lines)


def test_an_address_of_another_host_cannot_be_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRPC_BIND", "tcp://192.0.2.77:0")
    finding = one(network.ports, "ZRPC_BIND")
    assert finding.level is Level.FAIL
    assert "cannot be listened on: Cannot assign requested address" in finding.text


def test_a_broker_that_does_not_run_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRPC_INIT_METHOD", f"broker://127.0.0.1:{free_port()}")
    code, findings = doctor()
    assert code == 1
    assert "nothing can be reached" in findings["meeting point"]["text"]
    assert "zrpc broker --bind" in findings["meeting point"]["todo"]


def test_a_store_that_is_not_there_yet_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 opens it."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert one(network.ports, "meeting point").level is Level.WARN


def test_a_group_that_does_not_run_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may be about to be started."""
    monkeypatch.setenv("ZRPC_INIT_METHOD", f"file://{tmp_path}/store")
    code, findings = doctor()
    assert (code, findings["group"]["level"]) == (0, "WARN")
    assert "none runs there now" in findings["group"]["text"]


def test_a_folder_that_is_not_there_is_no_meeting_point() -> None:
    (finding,) = network.meeting_point("file:///no/such/folder/store")
    assert finding.level is Level.FAIL


@pytest.mark.skipif(os.geteuid() != 0, reason="others' files can be written to by root alone")
def test_a_folder_of_another_user_holds_no_local_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "others"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    monkeypatch.setenv("ZRPC_LOCAL_DIR", str(folder))
    finding = one(checks.local_sockets, "local sockets")
    assert finding.level is Level.WARN
    assert "ZRPC_LOCAL_DIR" in finding.todo


def test_a_path_that_is_too_long_for_sockets_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZRPC_LOCAL_DIR", str(tmp_path / ("long" * 30)))
    finding = one(checks.local_sockets, "local sockets")
    assert finding.level is Level.WARN
    assert "longer than 107 bytes" in finding.text


def test_a_secret_that_others_can_read_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("a secret of enough characters")
    file.chmod(0o644)
    monkeypatch.delenv("ZRPC_SECRET")
    monkeypatch.setenv("ZRPC_SECRET_FILE", str(file))
    finding = one(checks.secret, "secret")
    assert finding.level is Level.FAIL
    assert "can be read by other users (mode 644)" in finding.text


def test_a_secret_that_is_too_short_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRPC_SECRET", "short")
    assert one(checks.secret, "secret").level is Level.FAIL


def test_no_secret_is_made_by_looking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ZRPC_SECRET")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    finding = one(checks.secret, "secret")
    assert finding.level is Level.OK
    assert "the first worker makes one" in finding.text
    assert not (tmp_path / "config").exists()


def test_to_run_without_authentication_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZRPC_INSECURE", "1")
    assert one(checks.secret, "secret").level is Level.WARN


def test_one_half_of_the_keys_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZRPC_KEYS", str(tmp_path / "keyring.json"))
    assert found(checks.keys) == [("keys", Level.FAIL)]


def test_a_name_that_cannot_be_looked_up_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    finding = one(network.host_name, "host name")
    assert finding.level is Level.WARN
    assert "/etc/hosts" in finding.todo


def test_few_open_files_are_a_failure() -> None:
    """In a process of its own, whose limit is low."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30)); from zrpc.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    levels = {entry["about"]: entry["level"] for entry in json.loads(done.stdout)}
    assert (done.returncode, levels["open files"]) == (1, "FAIL")


def test_a_small_limit_of_threads_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, 10))
    assert one(checks.thread_limit, "threads").level is Level.WARN


def test_libzmq_without_curve_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zrpc.transport.credentials.zmq_versions", lambda: ("27.0", "4.3.5", False))
    finding = one(checks.zeromq, "zeromq")
    assert finding.level is Level.FAIL
    assert "built without CURVE" in finding.text


def test_a_check_that_breaks_is_a_finding_and_the_others_are_made() -> None:
    def breaks() -> Iterator[Finding]:
        raise OSError("no")
        yield

    assert [(one.about, one.level) for one in run({"first": breaks, "clock": checks.clock})] == [
        ("first", Level.WARN), ("clock", Level.OK),
    ]  # fmt: skip
