"""The launcher with real processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from zrpc.cli.plan import SECRET_QUESTION

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]
CLUSTER = [sys.executable, str(ROOT / "scripts" / "zrpc-cluster")]
PEERS = [sys.executable, str(ROOT / "scripts" / "zrpc-peers")]
LAUNCH = [sys.executable, "-c", "from zrpc.cli import main; main()", "launch"]
TIMEOUT_S = 200.0

SHOW = """
import os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ZRPC_BROKER", "ZRPC_INIT_METHOD", "MASTER_ADDR", "MASTER_PORT")
print(*(f"{name}={os.environ.get(name)}" for name in names), sys.argv[1:])
"""
DIGEST = """
import glob, hashlib, os
secret = os.environ["ZRPC_SECRET"]
shown = 0
for path in glob.glob("/proc/[0-9]*/cmdline"):
    try:
        shown += secret.encode() in open(path, "rb").read()
    except OSError:
        pass
print("digest", hashlib.sha256(secret.encode()).hexdigest())
print("on", shown, "command lines")
"""
NO_SECRET = {"ZRPC_SECRET": ""}
FAIL = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("about to fail")
    sys.stderr.write("for this reason\\n")
    sys.exit(7)
time.sleep(600)
"""
STAY = """
import os, signal, subprocess, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", os.getpid(), child.pid)
time.sleep(600)
"""
MEET = """
import os
from tests.integration.broker_harness import Worker
worker = Worker(os.environ["ZRPC_BROKER"])
me = worker.join("worker" + os.environ["RANK"], int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
worker.start()
for member in worker.members:
    worker.endpoint.send(member.incarnation, [b"hello"])
worker.seen.wait(lambda: len(worker.seen.frames) == len(worker.members))
print(me.info, "heard everybody")
worker.group.leave(5)
worker.endpoint.close(1)
"""


AGAIN = """
import os, time
from tests.integration.broker_harness import Worker
from zrpc.errors import NotConnectedError
worker = Worker(os.environ["ZRPC_BROKER"], local=False)
me = worker.join("worker" + os.environ["RANK"], 2, int(os.environ["RANK"]))
worker.start()
print("pids", os.getpid(), os.getpid())
(other,) = [member.incarnation for member in worker.members if member.incarnation != worker.incarnation]
while worker.endpoint.is_resumed():
    time.sleep(0.01)
while not worker.endpoint.is_resumed():
    time.sleep(0.01)
worker.endpoint.send(other, [b"hello"])
worker.seen.wait(lambda: worker.seen.frames)
print(me.info, "heard of the other again")
worker.group.leave(5)
worker.endpoint.close(1)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def run(command: list[str], *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize("command", [CLUSTER, [*LAUNCH, "--broker"], LAUNCH])
def test_workers_are_told_their_place_and_the_broker(command: list[str], script: Path) -> None:
    script.write_text(SHOW)
    done = run(command, "-n", 2, script, "--flag", "-n", "two words", ZRPC_INIT_METHOD="broker://elsewhere:1")
    assert done.returncode == 0, done.stderr
    lines = dict(line.strip().split(" | ") for line in done.stdout.splitlines())
    assert lines["broker"].startswith("zrpc broker listens on tcp://127.0.0.1:")
    address = "broker://" + lines["broker"].rpartition("/")[2]
    for rank in (0, 1):
        assert lines[f"worker {rank}"] == (
            f"RANK={rank} WORLD_SIZE=2 LOCAL_RANK={rank} ZRPC_BROKER={address} ZRPC_INIT_METHOD={address} "
            "MASTER_ADDR=None MASTER_PORT=None ['--flag', '-n', 'two words']"
        )


@pytest.mark.parametrize("command", [PEERS, [*LAUNCH, "--no-broker"]])
def test_without_a_broker_they_are_told_where_rank_0_is(command: list[str], script: Path) -> None:
    script.write_text(SHOW)
    done = run(command, "-n", 2, script)
    assert done.returncode == 0, done.stderr
    assert "broker |" not in done.stdout
    assert "ZRPC_BROKER=None ZRPC_INIT_METHOD=env:// MASTER_ADDR=127.0.0.1 MASTER_PORT=" in done.stdout


def test_a_module_can_be_launched() -> None:
    done = run(PEERS, "-n", 1, "-m", "json.tool", "--help")
    assert done.returncode == 0
    assert "worker 0 | usage:" in done.stdout


def test_workers_meet_through_the_broker(script: Path) -> None:
    script.write_text(MEET)
    done = run(CLUSTER, "-n", 3, script)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(3):
        assert f"worker {rank} | WorkerInfo(id={rank}, name=worker{rank}) heard everybody" in done.stdout


@pytest.mark.parametrize("command", [CLUSTER, PEERS])
def test_one_workers_failure_ends_the_cluster(command: list[str], script: Path) -> None:
    script.write_text(FAIL)
    done = run(command, "-n", 3, script)
    assert done.returncode == 7
    assert "worker 1 (pid" in done.stderr
    assert "exit code 7" in done.stderr
    assert done.stderr.endswith("Its last lines:\n    about to fail\n    for this reason\n")


def test_a_killed_worker_is_said_to_be(script: Path) -> None:
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = run(PEERS, "-n", 1, script)
    assert done.returncode == 128 + signal.SIGKILL
    assert "was killed by SIGKILL" in done.stderr


class Running:
    """A launched cluster of two workers with a child each."""

    def __init__(self, script: Path, *args: str, options: Sequence[str] = (), text: str = STAY) -> None:
        script.write_text(text)
        command = [*CLUSTER, "-n", "2", "--grace", "1", *options, str(script), *args]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.pids: list[int] = []
        while len(self.pids) < 4:
            line = self.process.stdout.readline()
            assert line, "ended before its workers had said who they are"
            _name, _, text = line.partition(" | ")
            if text.startswith("pids"):
                self.pids += map(int, text.split()[1:])
        self.everybody = [psutil.Process(pid) for pid in self.pids]
        self.everybody += psutil.Process(self.process.pid).children(recursive=True)

    def wait_gone(self) -> None:
        _, alive = psutil.wait_procs(self.everybody, timeout=60)
        assert alive == []

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        for process in self.everybody:
            if process.is_running():
                process.kill()


@pytest.fixture
def running(script: Path) -> Iterator[Running]:
    started = Running(script)
    yield started
    started.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupt_leaves_no_process_behind(running: Running, number: int, code: int) -> None:
    running.process.send_signal(number)
    assert running.process.wait(TIMEOUT_S) == code
    running.wait_gone()


def test_those_who_ignore_a_request_to_end_are_killed(script: Path) -> None:
    running = Running(script, "stubborn")
    try:
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(TIMEOUT_S) == 130
        running.wait_gone()
    finally:
        running.close()


def broker_of(running: Running) -> psutil.Process:
    (broker,) = [p for p in running.everybody if p.is_running() and "zrpc_broker" in p.cmdline()]
    return broker


def test_a_dead_broker_is_started_again_where_it_was(script: Path) -> None:
    """The workers come back to it, and the run ends well."""
    running = Running(script, text=AGAIN)
    try:
        broker_of(running).kill()
        output, errors = running.process.communicate(timeout=TIMEOUT_S)
        assert running.process.returncode == 0, errors
        assert "the broker was killed by SIGKILL: it is started again, as it may be 2 times more" in errors
        assert output.count("heard of the other again") == 2
        running.wait_gone()
    finally:
        running.close()


def test_a_dead_broker_that_is_not_to_be_started_again_ends_the_cluster(script: Path) -> None:
    running = Running(script, options=["--broker-restarts", "0"])
    try:
        broker_of(running).kill()
        _, errors = running.process.communicate(timeout=TIMEOUT_S)
        assert running.process.returncode == 128 + signal.SIGKILL
        assert "broker (pid" in errors
        running.wait_gone()
    finally:
        running.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_launcher_takes_its_workers_along(running: Running) -> None:
    workers = [psutil.Process(pid) for pid in running.pids[::2]]
    running.process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-n", "2", "missing.py"], "there is no script 'missing.py'"),
        (["-n", "0", "SCRIPT"], "it must be 1 or more"),
        (["-n", "2", "--hosts", "a,b", "SCRIPT"], "--ssh or --srun"),
        (["-n", "2", "--ssh", "SCRIPT"], "need --hosts"),
        (["-n", "2", "--hosts", "a,b", "--ssh", "--srun", "SCRIPT"], "exclude each other"),
        (["-n", "1", "--hosts", "a,b", "--ssh", "SCRIPT"], "cannot be spread over 2 hosts"),
        (["-n", "2", "--hosts", "a,b;c", "--ssh", "SCRIPT"], "'b;c' is not the name of a host"),
        (["-n", "2", "--hosts", "a,b", "--srun", "SCRIPT"], "there is no srun"),
        (["SCRIPT"], "--workers"),
        (["-n", "two", "SCRIPT"], "-n"),
    ],
)
@pytest.mark.parametrize("command", [CLUSTER, PEERS])
def test_bad_input_is_said_and_exits_with_2(command: list[str], args: list[str], words: str, script: Path) -> None:
    script.write_text("")
    path = {"PATH": str(script.parent)} if "--srun" in args and "--ssh" not in args else {}
    if "--ssh" in args:
        (script.parent / "ssh").write_text("#!/bin/sh\n")
        (script.parent / "ssh").chmod(0o755)
        path = {"PATH": f"{script.parent}:{os.environ['PATH']}"}
    done = run(command, *[str(script) if arg == "SCRIPT" else arg for arg in args], **path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broker_that_cannot_listen_ends_it(script: Path) -> None:
    script.write_text(SHOW)
    done = run(CLUSTER, "-n", 2, "--bind", "tcp://192.0.2.1:5555", script)
    assert done.returncode == 2
    assert "cannot listen on tcp://192.0.2.1:5555" in done.stderr
    assert "RANK" not in done.stdout


def test_an_interpreter_that_is_not_there_ends_it(script: Path) -> None:
    script.write_text(SHOW)
    done = run(PEERS, "-n", 1, "--python", "/no/such/python", script)
    assert done.returncode == 127
    assert "worker 0 cannot be started" in done.stderr


def test_other_hosts_are_reached_through_ssh(script: Path) -> None:
    """A stand-in for ssh runs the line here: what a real one gets is the command alone."""
    script.write_text(SHOW)
    ssh = script.parent / "ssh"
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != "--" ]; do shift; done\necho "on $2"\nexec sh -c "$3"\n')
    ssh.chmod(0o755)
    path = f"{script.parent}:{os.environ['PATH']}"
    options = ["--hosts", "a,b", "--ssh", "--bind", "tcp://127.0.0.1:0", "--advertise", "127.0.0.1"]
    done = run(CLUSTER, "-n", 3, *options, script, PATH=path)
    assert done.returncode == 0, done.stderr
    assert "worker 1 | on a" in done.stdout
    assert "worker 2 | on b" in done.stdout
    assert "worker 2 | RANK=2 WORLD_SIZE=3 LOCAL_RANK=0 ZRPC_BROKER=broker://127.0.0.1:" in done.stdout


def check_secrets(done: subprocess.CompletedProcess[str], workers: int) -> set[str]:
    """All workers had one secret, which is nowhere to be seen; its digest."""
    assert done.returncode == 0, done.stderr
    digests = {line.split("digest ")[1] for line in done.stdout.splitlines() if "digest" in line}
    assert done.stdout.count("digest") == workers, done.stdout
    assert len(digests) == 1
    assert done.stdout.count("on 0 command lines") == workers, done.stdout
    assert SECRET_QUESTION not in done.stdout
    for word in (done.stdout + done.stderr).split():
        assert hashlib.sha256(word.encode()).hexdigest() not in digests, "it was shown"
    return digests


@pytest.mark.parametrize("command", [CLUSTER, PEERS], ids=["broker", "peers"])
def test_the_workers_of_a_run_have_a_secret_of_their_own_that_nobody_sees(script: Path, command: list[str]) -> None:
    script.write_text(DIGEST)
    first, second = (check_secrets(run(command, "-n", 2, script, **NO_SECRET), 2) for _ in range(2))
    assert first != second


def test_other_hosts_get_the_secret_through_ssh_and_not_on_its_command_line(script: Path) -> None:
    """The stand-in hands nothing on but the command and the standard streams, as a real one."""
    script.write_text(DIGEST)
    ssh = script.parent / "ssh"
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != "--" ]; do shift; done\nexec env -i PATH="$PATH" sh -c "$3"\n')
    ssh.chmod(0o755)
    path = f"{script.parent}:{os.environ['PATH']}"
    options = ["--hosts", "a,b", "--ssh", "--bind", "tcp://127.0.0.1:0", "--advertise", "127.0.0.1"]
    check_secrets(run(CLUSTER, "-n", 3, *options, script, PATH=path, **NO_SECRET), 3)


def test_a_host_that_ssh_cannot_reach_is_named(script: Path) -> None:
    script.write_text(SHOW)
    ssh = script.parent / "ssh"
    ssh.write_text("#!/bin/sh\necho no route >&2\nexit 255\n")
    ssh.chmod(0o755)
    done = run(PEERS, "-n", 1, "--hosts", "far", "--ssh", script, PATH=f"{script.parent}:{os.environ['PATH']}")
    assert done.returncode == 255
    assert "ssh could not reach far" in done.stderr
    assert "    no route\n" in done.stderr
