"""The command line as it is typed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from zrpc.cli.main import app


def zrpc(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.output


def test_the_version_is_the_installed_one() -> None:
    assert zrpc("--version") == (0, f"zrpc {importlib.metadata.version('zrpc')}\n")


@pytest.mark.parametrize("command", [["--help"], ["broker", "--help"], ["launch", "--help"]])
def test_every_command_explains_itself(command: list[str]) -> None:
    code, output = zrpc(*command)
    assert code == 0
    assert "Usage:" in output


def test_it_is_a_module_too() -> None:
    command = [sys.executable, "-m", "zrpc", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"zrpc {importlib.metadata.version('zrpc')}\n"


@pytest.mark.parametrize("args", [["nonsense"], ["broker", "--missed", "x"], ["launch"], ["launch", "-n", "0", "x.py"]])
def test_bad_input_exits_with_2(args: list[str]) -> None:
    assert zrpc(*args)[0] == 2


def test_the_commands_are_there_without_torch() -> None:
    code = "import sys, zrpc.cli, zrpc.cli.launch; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
