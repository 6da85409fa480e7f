"""Functions that the callee cannot import: of another script, of `python -c`, of notebook cells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0
SERVER = """
import sys
import zrpc as rpc

def mine():
    return "the server's"

options = rpc.RpcBackendOptions(init_method=sys.argv[1], **eval(sys.argv[2]))
rpc.init_rpc("server", rank=0, world_size=None, rpc_backend_options=options)
open(sys.argv[3], "w").close()
sys.stdin.read()
rpc.shutdown(graceful=False)
"""
DRIVER = """
import sys
import torch
import zrpc as rpc

STEP = 3

class Point:
    def __init__(self, x):
        self.x = x

def plus(point, tensor):
    return Point(point.x + STEP), tensor + STEP

def call():
    point, tensor = rpc.rpc_sync("server", plus, args=(Point(1), torch.ones(2)))
    made = rpc.remote("server", plus, args=(Point(5), torch.zeros(2)))
    return [point.x, tensor.tolist(), made.rpc_sync().__getitem__(0).x, rpc.rpc_async("server", lambda: STEP).wait(),
            rpc.broadcast(["server"], plus, args=(Point(2), torch.ones(1)))[0].wait()[0].x]
"""
JOIN = """
options = rpc.RpcBackendOptions(init_method=METHOD)
rpc.init_rpc("driver", rank=1, world_size=None, rpc_backend_options=options)
"""
NOTEBOOK = """
import json, sys
import nbformat
from nbclient import NotebookClient

cells = [nbformat.v4.new_code_cell(cell) for cell in json.loads(sys.argv[1])]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
told = [[out.text for out in cell.outputs if out.get("name") == "stdout"] for cell in notebook.cells]
print(json.dumps(["".join(texts).strip() for texts in told]))
"""
EXPECTED = "[4, [4.0, 4.0], 8, 3, 5]"


class Server:
    """A worker that runs a script of its own."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.method = f"file://{folder}/store"
        script, here = folder / "server.py", folder / "here"
        script.write_text(SERVER)
        self._process = subprocess.Popen(
            [sys.executable, str(script), self.method, repr(options), str(here)],
            stdin=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        until(here.exists, "the server is there", within_s=LIMIT_S)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT_S)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.end()


def run(args: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )


def driver(method: str, last: str = "print(call())") -> str:
    return f"{DRIVER}\nMETHOD = {method!r}\n{JOIN}\n{last}\nrpc.shutdown(graceful=False)\n"


def test_functions_and_classes_of_another_script(server: Server, tmp_path: Path) -> None:
    """Both have a `__main__`, and not the same."""
    script = tmp_path / "driver.py"
    script.write_text(driver(server.method))
    done = run([str(script)])
    assert done.stdout.strip() == EXPECTED, done.stderr


def test_functions_of_code_on_the_command_line(server: Server) -> None:
    done = run(["-c", driver(server.method)])
    assert done.stdout.strip() == EXPECTED, done.stderr


def test_a_name_of_the_callees_own_script_is_not_taken_for_the_callers(server: Server, tmp_path: Path) -> None:
    """`mine` is in both; what runs is the caller's."""
    script = tmp_path / "driver.py"
    mine = "def mine():\n    return \"the driver's\"\nprint(rpc.rpc_sync('server', mine))"
    script.write_text(driver(server.method, mine))
    done = run([str(script)])
    assert done.stdout.strip() == "the driver's", done.stderr


@pytest.mark.parametrize("allow", [["math"], "registered"])
def test_code_is_refused_where_not_everything_may_run(allow: object, tmp_path: Path) -> None:
    """A callee that lets modules of a list be named, or registered functions alone, runs none that came."""
    restricted = Server(tmp_path, allow=allow)
    try:
        attempt = (
            "try:\n    rpc.rpc_sync('server', lambda: 1)\nexcept Exception as error:\n    print(type(error).__name__)"
        )
        join = JOIN.replace("METHOD)", f"METHOD, allow={allow!r})")
        script = f"{DRIVER}\nMETHOD = {restricted.method!r}\n{join}\n{attempt}\nrpc.shutdown(graceful=False)\n"
        done = run(["-c", script])
        assert done.stdout.strip() in ("NotAllowedError", "SerializationError"), done.stderr
    finally:
        restricted.end()


def test_notebook_cells_are_called_and_a_notebook_joins_again(server: Server, tmp_path: Path) -> None:
    """In a real kernel: init, calls, shutdown, and init again; a cell that is run again is the new one."""
    again = "\nimport zrpc as rpc\nrpc.shutdown(graceful=False)"
    cells = [
        DRIVER,
        f"METHOD = {server.method!r}{JOIN}",
        "print(call())",
        "def mine():\n    return 1\nprint(rpc.rpc_sync('server', mine))",
        "def mine():\n    return 2\nprint(rpc.rpc_sync('server', mine))",
        again,
        JOIN,
        "print(call())",
        "future = rpc.rpc_async('server', lambda: STEP + 1)\nprint(await future)",
        again,
    ]
    done = run(["-c", NOTEBOOK, json.dumps(cells), str(ROOT)])
    assert done.returncode == 0, done.stderr
    assert [text for text in json.loads(done.stdout) if text] == [EXPECTED, "1", "2", EXPECTED, "4"]
