"""Looking into running groups from the command line, by a process that is no member of them. Real processes."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import zrpc as rpc
from tests.integration.harness import MODES, Cluster, free_port
from tests.keys import Keys
from tests.waiting import until
from zrpc.agent.current import current_agent
from zrpc.sight.serving import Sight

if TYPE_CHECKING:
    from collections.abc import Iterator

WAYS = (*MODES, "env")
WITHIN_S = "20"
"""How long commands wait for answers: beside other load."""


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[dict[str, Cluster]]:
    """Workers that meet in each way; those of the environment are the ones over a file, which have a port, too."""
    made = {way: Cluster("file" if way == "env" else way, tmp_path) for way in WAYS}
    yield made
    for cluster in made.values():
        cluster.close()


def meeting(clusters: dict[str, Cluster], way: str) -> tuple[str, dict[str, str]]:
    """An `init_method`, and the environment that it needs."""
    if way == "env":
        return "env://", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return clusters[way].new_init_method(), {}


def zrpc(*args: str, **environment: str) -> tuple[int, str, str]:
    """What a command gives: exit code, output, errors."""
    done = subprocess.run(
        [sys.executable, "-m", "zrpc", *args],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def seen(method: str, *args: str, **environment: str) -> dict[str, Any]:
    """What `zrpc status --json` shows; nothing, while there is no such group."""
    _, output, _ = zrpc("status", "--init-method", method, "--timeout", WITHIN_S, "--json", *args, **environment)
    return json.loads(output) if output else {"calls": [], "workers": [], "silent": []}


# ---- what workers do -------------------------------------------------------------------------------------------------


def stuck_here(folder: str) -> str:
    """A call that does not end before a test says so."""
    until(lambda: Path(folder, "go-on").exists(), "the test lets calls go on", within_s=120)
    return "done"


def names() -> list[str]:
    return [info.name for info in current_agent().members.all()]


def worker(rank: int, folder: str, method: str, environment: dict[str, str], is_dynamic: bool, allow: str) -> Any:
    """Worker 0 makes four calls to worker 1, which has one thread for them; what members it has seen meanwhile."""
    os.environ.update(environment)
    options = rpc.RpcBackendOptions(
        init_method=method, num_worker_threads=1, rpc_timeout=0, allow=allow, wait_for_worker=30
    )
    size = None if is_dynamic else 2
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=size, rpc_backend_options=options)
    known = {*names()}
    if rank == 0:
        if allow == "registered":
            rpc.expose(stuck_here)
        calls = [rpc.rpc_async("worker1", stuck_here, args=(folder,)) for _ in range(3)]
        assert rpc.rpc_sync("worker1", stuck_here, args=(folder,)) == "done"
        assert [call.wait() for call in calls] == ["done"] * 3
        known |= {*names()}
        Path(folder, "over").touch()
    else:
        until(lambda: known.update(names()) or Path(folder, "over").exists(), "worker 0 is done", within_s=120)
    rpc.shutdown()
    return sorted(known | {f"worker{rank}"})


rpc.expose(stuck_here)


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "is_dynamic"), [*((way, False) for way in WAYS), ("tcp", True), ("broker", True)],
    ids=[*WAYS, "tcp-dynamic", "broker-dynamic"],
)  # fmt: skip
def test_a_stuck_call_is_found_with_status_and_stacks(
    clusters: dict[str, Cluster], tmp_path: Path, way: str, is_dynamic: bool
) -> None:
    """Its callee has one handler thread: questions are answered all the same, and no member is told of who asks."""
    method, environment = meeting(clusters, way)
    cluster = clusters[way]
    allow = "registered" if way == "file" else "any"
    running = cluster.start(
        worker, args=(str(tmp_path), method, environment, is_dynamic, allow), init=False, init_method=method
    )
    found: dict[str, Any] = {}

    def is_stuck() -> bool:
        found.update(seen(method, **environment))
        return len(found["calls"]) == 4 and {call["state"] for call in found["calls"]} >= {"runs", "queued"}

    until(is_stuck, "four calls are seen", lambda: found, within_s=90)
    assert all(call["function"].endswith("stuck_here") for call in found["calls"])
    assert all((call["caller"], call["callee"]) == ("worker0", "worker1") for call in found["calls"])
    assert found["calls"][0]["age_s"] >= found["calls"][-1]["age_s"] > 0
    assert [row["name"] for row in found["workers"]] == ["worker0", "worker1"]
    assert found["silent"] == []

    code, told, errors = zrpc("stacks", "worker1", "--init-method", method, "--timeout", WITHIN_S, **environment)
    assert (code, errors) == (0, "")
    assert re.search(r"serves \S*stuck_here of worker0\n(.*\n)*?  .*test_sight.py:\d+ in stuck_here", told)
    _, told, _ = zrpc("stacks", "0", "--init-method", method, "--timeout", WITHIN_S, **environment)
    assert re.search(r"MainThread .* waits for \S*stuck_here at worker1", told)
    code, _, errors = zrpc("status", "--init-method", method, "--stuck-after", "0.0001", **environment)
    assert code == 4
    assert "calls are older than" in errors

    Path(tmp_path, "go-on").touch()
    outcomes = running.wait(120)
    assert [(outcome.error, outcome.result) for outcome in outcomes] == [(None, ["worker0", "worker1"])] * 2


def wait_here(rank: int, folder: str) -> list[str]:
    """Be a member until a test says that it is over; the members that there are then."""
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    until(lambda: Path(folder, "go-on").exists(), "the test is over", within_s=120)
    return names()


def started(folder: Path, count: int) -> list[int]:
    """The processes of the workers, once all are members."""
    files = [folder / f"pid{rank}" for rank in range(count)]
    until(lambda: all(file.exists() and file.read_text() for file in files), "all have started", within_s=90)
    return [int(file.read_text()) for file in files]


def test_a_stopped_worker_is_named_with_the_reason(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    """The others answer, and the exit code says that one does not."""
    method = cluster_in_each_mode.new_init_method()
    cluster_in_each_mode.start(wait_here, args=(str(tmp_path),), init_method=method)
    pids = started(tmp_path, 2)
    os.kill(pids[1], signal.SIGSTOP)
    try:
        code, output, _ = zrpc("status", "--init-method", method, "--timeout", "2")
        pinged, told, _ = zrpc("ping", "--init-method", method, "--timeout", "2", "-n", "1")
    finally:
        os.kill(pids[1], signal.SIGCONT)
    assert code == pinged == 3
    assert f"worker1: its process is stopped (SIGSTOP): `kill -CONT {pids[1]}` has it go on" in output
    assert re.search(r"^worker0: least ", told, re.MULTILINE)
    assert re.search(r"^worker1: no answer. its process is stopped", told, re.MULTILINE)


def hold_the_lock(rank: int, folder: str) -> None:
    """Worker 1 calls code in C that keeps Python's lock, until it is killed."""
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    if rank == 1:
        ctypes.PyDLL(None).sleep(100)
    until(lambda: False, "it is killed", within_s=100)


def test_a_worker_whose_lock_is_held_by_code_in_c_is_told_from_one_that_is_stopped(
    cluster: Cluster, tmp_path: Path
) -> None:
    """It cannot answer, and what to do is said: py-spy needs no lock."""
    method = cluster.new_init_method()
    cluster.start(hold_the_lock, args=(str(tmp_path),), init_method=method)
    pids = started(tmp_path, 2)
    code, output, errors = zrpc("stacks", "worker1", "--init-method", method, "--timeout", "2")
    assert (code, output) == (3, "")
    assert "code in C, or in another language, holds Python's lock" in errors
    assert f"py-spy dump --native --pid {pids[1]}" in errors


def test_workers_are_found_on_this_host_and_by_the_address_of_one(cluster: Cluster, tmp_path: Path) -> None:
    """By the process of one of them, or where one listens: the workers know the others."""
    method = cluster.new_init_method()
    running = cluster.start(wait_here, args=(str(tmp_path),), init_method=method)
    pids = started(tmp_path, 2)
    code, output, _ = zrpc("status", "--pid", str(pids[0]), "--json", "--timeout", WITHIN_S)
    found = json.loads(output)
    assert (code, [row["pid"] for row in found["workers"]]) == (0, pids)
    address = found["workers"][1]["address"]
    code, output, _ = zrpc("status", "--address", address, "--json", "--timeout", WITHIN_S)
    assert (code, [row["pid"] for row in json.loads(output)["workers"]]) == (0, pids)
    code, output, _ = zrpc("doctor", "--pid", str(pids[0]), "--timeout", WITHIN_S)
    assert code == 0
    assert re.search(
        r"^OK    group: 2 workers.*\nOK    worker0: it answers.*\nOK    worker1: it answers", output, re.MULTILINE
    )
    Path(tmp_path, "go-on").touch()
    assert [outcome.result for outcome in running.wait(120)] == [["worker0", "worker1"]] * 2


def test_workers_without_local_links_are_looked_at_through_the_network(
    cluster_in_each_mode: Cluster, tmp_path: Path
) -> None:
    """They connect to where the command listens, or the broker relays; bytes are counted there."""
    method = cluster_in_each_mode.new_init_method()
    running = cluster_in_each_mode.start(wait_here, args=(str(tmp_path),), init_method=method, shared_memory=False)
    started(tmp_path, 2)
    found = seen(method)
    assert [(row["answers"], row["received_nbytes"] > 0) for row in found["workers"]] == [(True, True)] * 2
    Path(tmp_path, "go-on").touch()
    assert [outcome.result for outcome in running.wait(120)] == [["worker0", "worker1"]] * 2


def test_without_the_secret_nothing_is_told(cluster_in_each_mode: Cluster, tmp_path: Path) -> None:
    """Neither by the meeting point nor by workers of this host; the group goes on."""
    method = cluster_in_each_mode.new_init_method()
    running = cluster_in_each_mode.start(wait_here, args=(str(tmp_path),), init_method=method)
    started(tmp_path, 2)
    other = {"ZRPC_SECRET": "another secret, of another group"}
    for how in (["--init-method", method], []):
        code, output, errors = zrpc("status", *how, "--timeout", "1", **other)
        assert (code, output) == (1, "")
        assert "secret" in errors
    Path(tmp_path, "go-on").touch()
    assert [outcome.error for outcome in running.wait(120)] == [None, None]


def test_a_worker_that_is_not_there_is_said_to_be_unknown(cluster: Cluster, tmp_path: Path) -> None:
    """The error names the workers that there are. No group at all is another error."""
    method = cluster.new_init_method()
    code, _, errors = zrpc("status", "--init-method", method, "--timeout", "1")
    assert code == 1
    assert "cannot be read: No such file or directory" in errors
    running = cluster.start(wait_here, args=(str(tmp_path),), init_method=method)
    started(tmp_path, 2)
    code, _, errors = zrpc("stacks", "worker7", "--init-method", method)
    assert code == 1
    assert "there is no worker 'worker7': the workers of this group are worker0, worker1" in errors
    Path(tmp_path, "go-on").touch()
    assert [outcome.error for outcome in running.wait(120)] == [None, None]


def incomplete(rank: int, method: str) -> None:
    del rank
    options = rpc.RpcBackendOptions(init_method=method, rpc_timeout=60)
    rpc.init_rpc("worker0", rank=0, world_size=2, rpc_backend_options=options)


def test_a_group_that_is_not_complete_shows_who_is_missing(cluster_in_each_mode: Cluster) -> None:
    """Those that have come answer before the group is complete."""
    method = cluster_in_each_mode.new_init_method()
    cluster_in_each_mode.start(incomplete, n=1, args=(method,), init=False)
    found: dict[str, Any] = {}

    def has_come() -> bool:
        code, output, _ = zrpc("status", "--init-method", method, "--json", "--timeout", "5")
        found.update(json.loads(output) if output else {}, code=code)
        return any(row["answers"] for row in found.get("workers", []))

    until(has_come, "worker0 is seen", lambda: found, within_s=60)
    assert found["code"] == 3
    assert found["group"]["here"] == 1
    assert found["group"]["world_size"] == 2


TORCHRUN = """
import os, sys
from pathlib import Path
import zrpc as rpc
from tests.integration.test_sight import wait_here

rank = int(os.environ["RANK"])
rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2)
wait_here(rank, sys.argv[1])
rpc.shutdown()
"""


def test_workers_of_torchrun_are_found_in_its_store(tmp_path: Path) -> None:
    """It keeps the store itself, and may start its workers again: their keys lie elsewhere."""
    program, port = tmp_path / "program.py", str(free_port())
    program.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([*command, str(program), str(tmp_path)], env=environment) as torchrun:
        try:
            pids = started(tmp_path, 2)
            found = seen("env://", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            assert [(row["pid"], row["answers"]) for row in found["workers"]] == [(pid, True) for pid in pids]
            Path(tmp_path, "go-on").touch()
            assert torchrun.wait(120) == 0
        finally:
            torchrun.terminate()


# ---- traces ----------------------------------------------------------------------------------------------------------


def double(x: int) -> int:
    return 2 * x


def refuse(x: int) -> int:
    raise ValueError(x)


def call_on(rank: int, folder: str) -> bool:
    """Worker 0 calls until a test says that it is over; whether its trace is off soon after."""
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    sight = current_agent().extensions[Sight]
    pause = threading.Event()
    while rank == 0 and not Path(folder, "go-on").exists():
        assert rpc.rpc_sync("worker1", double, args=(2,)) == 4
        with pytest.raises(ValueError, match="3"):
            rpc.rpc_sync("worker1", refuse, args=(3,))
        pause.wait(0.05)
    until(lambda: Path(folder, "go-on").exists(), "the test is over", within_s=120)
    until(lambda: not sight.is_tracing, "the trace is off", within_s=60)
    return not sight.is_tracing


def test_a_trace_shows_calls_at_both_ends_and_is_off_when_its_observer_is_gone(
    cluster_in_each_mode: Cluster, tmp_path: Path
) -> None:
    """One observer leaves, and another is killed, which says nothing."""
    method = cluster_in_each_mode.new_init_method()
    running = cluster_in_each_mode.start(call_on, args=(str(tmp_path),), init_method=method)
    started(tmp_path, 2)
    for name, way, peer in (("worker0", "out", "worker1"), ("worker1", "in", "worker0")):
        code, output, errors = zrpc(
            "trace", name, "--init-method", method, "--json", "--seconds", "2", "--timeout", WITHIN_S
        )
        assert (code, errors) == (0, "")
        events = [json.loads(line) for line in output.splitlines()]
        calls = {
            (event["way"], event["peer"], event["function"].rpartition(".")[2], event["outcome"]) for event in events
        }
        assert (way, peer, "double", "ok") in calls
        assert (way, peer, "refuse", "failed" if way == "out" else "ValueError") in calls
        assert all(event["took_s"] > 0 for event in events)
    command = [sys.executable, "-m", "zrpc", "trace", "worker0", "--init-method", method, "--seconds", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as observer:
        assert observer.stdout is not None
        assert "double" in observer.stdout.readline() + observer.stdout.readline()
        observer.kill()
    Path(tmp_path, "go-on").touch()
    assert [(outcome.error, outcome.result) for outcome in running.wait(120)] == [(None, True)] * 2


# ---- keys of workers -------------------------------------------------------------------------------------------------


def keyed(rank: int, folder: str, environments: list[dict[str, str]], method: str) -> list[str]:
    os.environ.update(environments[rank])
    options = rpc.RpcBackendOptions(init_method=method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    found = wait_here(rank, folder)
    rpc.shutdown()
    return found


def test_with_keys_of_workers_only_the_key_of_an_observer_may_look(
    cluster_in_each_mode: Cluster, tmp_path: Path
) -> None:
    """A key that may claim the names of workers alone is a member's, and none of an observer's."""
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    keys = Keys(folder)
    for label in ("worker0", "worker1"):
        keys.new(label)
    keys.new("operator", "zrpc-observer")
    method = cluster_in_each_mode.new_init_method(ZRPC_KEYS=str(keys.path))
    environments = [keys.environment(label) for label in ("worker0", "worker1")]
    running = cluster_in_each_mode.start(keyed, args=(str(tmp_path), environments, method), init=False)
    started(tmp_path, 2)
    code, output, errors = zrpc(
        "status", "--init-method", method, "--json", "--timeout", WITHIN_S, **keys.environment("operator")
    )
    assert (code, errors) == (0, "")
    assert [row["answers"] for row in json.loads(output)["workers"]] == [True, True]
    code, output, errors = zrpc("status", "--init-method", method, "--timeout", "2", **keys.environment("worker0"))
    assert code != 0
    assert "refused" in errors if cluster_in_each_mode.mode == "broker" else "none" in output
    Path(tmp_path, "go-on").touch()
    assert [outcome.result for outcome in running.wait(120)] == [["worker0", "worker1"]] * 2
