"""Calls to a name between two lives, and workers that drain, in each way to meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import zrpc as rpc
from tests.integration.harness import Cluster, is_member
from tests.integration.test_churn import init, meeting
from tests.waiting import until
from zrpc.errors import ConfigError, DrainingError, StaleWorkerError, UnknownWorkerError

__all__ = ["meeting"]

_free = threading.Event()
SEEN_S = 5.0
"""The promise is 1 s; a machine that is busy with other tests may take longer."""


def identity(value: int) -> int:
    return value


def wait_for_it() -> str:
    _free.wait(60)
    return "answered"


def release() -> None:
    _free.set()


def call(method: str, files: dict[str, str]) -> list[float]:
    init("worker0", 0, method, wait_for_worker=60)
    with pytest.raises(UnknownWorkerError, match="guest"):
        rpc.rpc_sync("guest", identity, args=(1,), wait_for_worker=0)
    with pytest.raises(UnknownWorkerError, match=r"within the 0\.2 s of wait_for_worker"):
        rpc.rpc_sync("guest", identity, args=(1,), wait_for_worker=0.2)
    with pytest.raises(ConfigError, match="wait_for_worker"):
        rpc.rpc_sync("guest", identity, args=(1,), wait_for_worker="soon")  # type: ignore[arg-type]
    Path(files["asks0"]).touch()
    assert rpc.rpc_sync("guest", identity, args=(2,)) == 2
    info = rpc.get_worker_info("guest")
    Path(files["kill0"]).touch()
    until(lambda: not is_member("guest"), "the death is noticed")
    waits = [threading.Thread(target=lambda: results.append(rpc.remote("guest", identity, args=(3,)).to_here()))]
    results: list[int] = []
    waits[0].start()
    Path(files["asks1"]).touch()
    assert rpc.rpc_async(1, identity, args=(4,), wait_for_worker=60).wait() == 4
    waits[0].join(60)
    assert results == [3]
    with pytest.raises(StaleWorkerError):
        rpc.rpc_sync(info, identity, args=(1,))
    Path(files["kill1"]).touch()
    rpc.shutdown()
    return []


def visit(_: int, method: str) -> None:
    def join() -> bool:
        try:
            init("guest", 1, method)
        except rpc.errors.RefusedError:
            return False
        return True

    until(join, "the name is free")
    threading.Event().wait(120)


def caller(_: int, method: str, files: dict[str, str]) -> list[float]:
    return call(method, files)


def test_a_call_waits_for_the_next_life_of_a_name_or_fails_at_once(
    meeting: tuple[Cluster, str], tmp_path: Path
) -> None:
    """`wait_for_worker`, as an option and in a call: by name and by rank, before a life and between two."""
    cluster, method = meeting
    files = {name: os.fspath(tmp_path / name) for name in ("asks0", "asks1", "kill0", "kill1")}
    calling = cluster.start(caller, 1, args=(method, files), init=False)
    for life in range(2):
        until(
            lambda life=life: Path(files[f"asks{life}"]).exists() or not calling.processes[0].is_alive(),  # type: ignore[misc]
            "it is called",
            within_s=60,
        )
        guest = cluster.start(visit, 1, args=(method,), init=False)
        until(
            lambda life=life: Path(files[f"kill{life}"]).exists() or not calling.processes[0].is_alive(),  # type: ignore[misc]
            "it has answered",
            within_s=60,
        )
        guest.kill(0)
    (outcome,) = calling.wait(60.0)
    assert outcome.error is None, outcome.error


def draining(rank: int, method: str) -> float | None:
    init(f"worker{rank}", rank, method)
    for name in ("worker0", "worker1"):
        until(lambda name=name: is_member(name), f"{name} is here")  # type: ignore[misc]
    if rank == 1:
        until(lambda: _free.is_set(), "the other one has seen it", within_s=60)
        rpc.shutdown()
        return None
    rref = rpc.remote("worker1", identity, args=(5,))
    assert rref.to_here() == 5
    running = rpc.rpc_async("worker1", wait_for_it)
    released = rpc.rpc_async("worker1", rpc.drain, args=(0.1,))
    assert released.wait() is False, "a call runs, its own and the other one"
    for make in (rpc.rpc_sync, rpc.rpc_async, rpc.remote):
        with pytest.raises(DrainingError, match="did not run"):
            make("worker1", identity, args=(1,))  # type: ignore[operator]
    assert rref.to_here() == 5, "what it owns can still be used"
    assert not running.done()
    began = time.monotonic()
    with pytest.raises(DrainingError, match="wait_for_worker"):
        rpc.rpc_sync("worker1", identity, args=(1,), wait_for_worker=0.2)
    took_s = time.monotonic() - began
    free = rref.rpc_sync  # a proxy's call is a new one, too
    with pytest.raises(DrainingError):
        free().bit_length()
    return took_s


def end_both(rank: int, method: str, over: str) -> float | None:
    if rank == 0:
        took_s = draining(0, method)
        Path(over).touch()
        rpc.shutdown(graceful=False)
        return took_s
    threading.Thread(target=lambda: (until(Path(over).exists, "over", within_s=100), _free.set()), daemon=True).start()
    return draining(1, method)


def test_a_worker_that_drains_takes_no_new_calls_and_finishes_what_runs(
    meeting: tuple[Cluster, str], tmp_path: Path
) -> None:
    """Calls to it fail where they are made: they did not run. What it owns can be fetched until it shuts down."""
    cluster, method = meeting
    (took_s, _) = cluster.run(end_both, 2, args=(method, os.fspath(tmp_path / "over")), init=False)
    assert took_s >= 0.2


def takes_calls(to: str) -> bool:
    try:
        return rpc.rpc_sync(to, identity, args=(1,)) == 1
    except DrainingError:
        return False


def be_drained(rank: int, method: str, here: str) -> None:
    init(f"worker{rank}", rank, method)
    if rank == 1:
        until(lambda: is_member("worker0"), "the other one is here", within_s=60)
        assert takes_calls("worker0")
        Path(here).touch()
        until(lambda: not takes_calls("worker0"), "it takes no new calls", within_s=60)
        assert takes_calls("worker1")
        Path(here + "-seen").touch()
    until(Path(here + "-seen").exists, "it has drained", within_s=60)
    rpc.shutdown()


def test_the_command_drains_a_worker(meeting: tuple[Cluster, str], tmp_path: Path) -> None:
    """`zrpc drain` joins for a moment, with the secret of the group, and leaves; an unknown name is an error."""
    cluster, method = meeting
    here = os.fspath(tmp_path / "here")
    draining = cluster.start(be_drained, 2, args=(method, here), init=False)
    until(Path(here).exists, "it is here", within_s=60)
    environment = dict(os.environ, RANK="", WORLD_SIZE="")
    del environment["RANK"], environment["WORLD_SIZE"]
    if method.startswith("env://"):
        environment["MASTER_ADDR"], environment["MASTER_PORT"] = method.removeprefix("env://").split(":")
        method = "env://"
    command = [sys.executable, "-c", "from zrpc.cli.main import main; main()", "drain", "--init-method", method]
    done = [
        subprocess.run([*command, name], env=environment, capture_output=True, text=True, timeout=60, check=False)
        for name in ("nobody", "worker0")
    ]
    assert [one.returncode for one in done] == [1, 0], done
    assert "could not find destination name nobody" in done[0].stderr
    assert [outcome.error for outcome in draining.wait(60.0)] == [None, None]


SIGTERM_PROGRAM = """
import os, signal, sys, time
import zrpc as rpc

def slow():
    open(sys.argv[1], "w").close()
    time.sleep(5)  # longer than a worker waits that ends without draining
    return "done"

rank = int(os.environ["RANK"])
rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
if rank == 0:
    signal.signal(signal.SIGTERM, lambda *_: None)  # the caller goes on: what a worker asks for that ends is called off
    print("answered:", rpc.rpc_sync("worker1", slow), flush=True)
    sys.exit()
time.sleep(600)
"""


def test_workers_of_the_launcher_finish_what_runs_at_sigterm(tmp_path: Path) -> None:
    """SIGTERM to the launcher: a call that runs is answered, and all end within the grace; the exit code is 143."""
    program, runs = tmp_path / "program.py", tmp_path / "runs"
    program.write_text(SIGTERM_PROGRAM)
    command = [sys.executable, "-c", "from zrpc.cli.main import main; main()", "launch", "-n", "2", "--no-broker"]
    launcher = subprocess.Popen(
        [*command, "--grace", "20", os.fspath(program), os.fspath(runs)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until(runs.exists, "a call runs", within_s=60)
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 143, output
    assert "takes no new calls" in output, output
    assert "answered: done" in output, output
