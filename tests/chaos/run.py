"""Makes workers, their broker and their network fail while they work, and counts what came of every call.

    make chaos                                           10 minutes, half of it without a broker
    python -m tests.chaos.run --seconds 60 --seed 7 --mode broker
    python -m tests.chaos.run --seconds 60 --only kill,stop

Workers call each other all the time: calls, nested ones, many at once, broadcasts, references, gradients; half of them
over TCP alone, each on a host of its own (a network namespace) where that is permitted. Every second or so something is
done to one of them, by chance and as the seed says: `kill` (and start again), `stop` for up to 6 s, `cut` its network
for up to 3 s, `broker`: kill that and start it again. Some messages are lost, repeated and late (`--lossy`).

Exit status: 0 if nothing was lost, run twice, left hanging or kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.chaos import network
from tests.chaos.journal import read

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.journal import Tally

MODES = ("file", "broker")
FAULTS = ("kill", "stop", "cut", "broker")
START_S = 60.0
END_S = 180.0
PORT = 29555


@dataclass
class Worker:
    """One name, and the process that has it now."""

    number: int
    process: subprocess.Popen[bytes]
    is_stopped: bool = False

    @property
    def name(self) -> str:
        return f"w{self.number}"


@dataclass
class Chaos:
    """One run.

    Attributes:
        events: (when, what) that are still to be done: things go on, come again and are mended.
        killed: process ids that were killed.
        done: how often each fault was done.
    """

    args: argparse.Namespace
    mode: str
    folder: Path
    rng: random.Random
    has_network: bool
    environment: dict[str, str]
    workers: list[Worker] = field(default_factory=list)
    broker: subprocess.Popen[bytes] | None = None
    events: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    killed: set[int] = field(default_factory=set)
    done: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    # ---- processes ---------------------------------------------------------------------------------------------

    @property
    def init_method(self) -> str:
        host = network.BRIDGE if self.has_network else "127.0.0.1"
        return f"file://{self.folder}/store" if self.mode == "file" else f"broker://{host}:{self.args.port}"

    def start_broker(self) -> None:
        address = self.init_method.replace("broker://", "tcp://")
        command = [sys.executable, "-m", "zrpc_broker", "--bind", address]
        with (self.folder / "broker.txt").open("ab") as log:
            self.broker = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def start_worker(self, number: int) -> subprocess.Popen[bytes]:
        names = [f"w{other}" for other in range(self.args.workers) if other != number]
        command = [sys.executable, "-m", "tests.chaos.worker", f"w{number}", f"--peers={','.join(names)}"]
        command += [f"--folder={self.folder}", f"--init-method={self.init_method}", f"--seed={self.args.seed}"]
        command += [f"--lossy={self.args.lossy}", *(["--tcp"] if number % 2 else [])]
        if self.has_network:
            command += [f"--bind=tcp://{network.address(number)}:0"]
            command = ["unshare", "-n", "sh", "-c", 'read go; exec "$0" "$@"', *command]
        with (self.folder / f"w{number}.txt").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self.environment)
        if self.has_network:
            self._plug(number, process)
        return process

    def _plug(self, number: int, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{process.pid}/ns/net") == own:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        network.plug(number, process.pid)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()

    def start(self) -> None:
        """Start all, and wait until they are there."""
        if self.mode == "broker":
            self.start_broker()
        self.workers = [Worker(number, self.start_worker(number)) for number in range(self.args.workers)]
        deadline = time.monotonic() + START_S
        while len(list(self.folder.glob("*.here"))) < len(self.workers):
            assert time.monotonic() < deadline, f"not all workers came: see {self.folder}"
            time.sleep(0.1)

    # ---- faults ------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        """Do something, and say when it is to be undone."""
        kind = self.rng.choice(self.args.only)
        idle = [one for one in self.workers if not one.is_stopped and one.process.poll() is None]
        if not idle or (kind == "broker" and self.broker is None) or (kind == "cut" and not self.has_network):
            return
        self.done[kind] = self.done.get(kind, 0) + 1
        getattr(self, f"do_{kind}")(self.rng.choice(idle))

    def later(self, seconds: float, do: Callable[[], None]) -> None:
        self.events.append((time.monotonic() + seconds, do))

    def do_kill(self, worker: Worker) -> None:
        self.killed.add(worker.process.pid)
        worker.process.kill()
        worker.process.wait()
        self.later(self.rng.uniform(0.1, 3.0), lambda: self.come_again(worker))

    def come_again(self, worker: Worker) -> None:
        worker.process = self.start_worker(worker.number)

    def do_stop(self, worker: Worker) -> None:
        worker.process.send_signal(signal.SIGSTOP)
        worker.is_stopped = True

        def go_on() -> None:
            worker.is_stopped = False
            worker.process.send_signal(signal.SIGCONT)

        self.later(self.rng.uniform(0.2, 6.0), go_on)

    def do_cut(self, worker: Worker) -> None:
        network.cut(worker.number, is_cut=True)
        self.later(self.rng.uniform(0.2, 3.0), lambda: network.cut(worker.number, is_cut=False))

    def do_broker(self, _: Worker) -> None:
        assert self.broker is not None
        self.broker.kill()
        self.broker.wait()
        self.broker = None
        self.later(self.rng.uniform(0.1, 3.0), self.start_broker)

    def undo(self, *, everything: bool = False) -> None:
        """Do what is due."""
        now = time.monotonic()
        due = [event for event in self.events if everything or event[0] <= now]
        self.events = [event for event in self.events if event not in due]
        for _, do in sorted(due, key=lambda event: event[0]):
            do()

    def watch(self) -> None:
        """A worker that ended by itself has a report that says why."""
        for worker in self.workers:
            code = worker.process.poll()
            if code is None or worker.process.pid in self.killed:
                continue
            self.killed.add(worker.process.pid)
            self.problems.append(f"{worker.name} ended by itself ({code}): {self.error_of(worker)}")
            self.come_again(worker)

    def error_of(self, worker: Worker) -> str:
        path = self.folder / f"{worker.name}.report"
        report = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)
        return str(report.get("error", f"no report, see {self.folder}/{worker.name}.txt"))

    # ---- the run -----------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Start, make fail, let all come to their end, and read their reports."""
        self.start()
        over = time.monotonic() + seconds
        next_fault = time.monotonic() + 1.0
        while time.monotonic() < over:
            self.undo()
            self.watch()
            if time.monotonic() >= next_fault:
                self.fault()
                next_fault = time.monotonic() + self.rng.uniform(0.3, 2.0)
            time.sleep(0.05)
        self.undo(everything=True)
        for worker in self.workers:
            self.await_here(worker)
        time.sleep(2.0)
        (self.folder / "stop").touch()
        deadline = time.monotonic() + END_S
        for worker in self.workers:
            try:
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.problems.append(f"{worker.name} does not end")
                worker.process.send_signal(signal.SIGABRT)  # its stacks go to its text
                worker.process.wait()
        for worker in self.workers:
            self.read_report(worker)

    def await_here(self, worker: Worker) -> None:
        """The last life of each is to be there for the end."""
        deadline = time.monotonic() + START_S
        while not (self.folder / f"{worker.name}.{worker.process.pid}.here").exists():
            if time.monotonic() > deadline:
                self.problems.append(f"{worker.name} does not come in again")
                return
            self.watch()
            time.sleep(0.1)

    def read_report(self, worker: Worker) -> None:
        path = self.folder / f"{worker.name}.report"
        report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"error": "it left no report"}
        for key in ("error", "hanging", "leaked"):
            if report.get(key):
                self.problems.append(f"{worker.name}: {key}: {report[key]}")

    def close(self) -> None:
        for process in [*(worker.process for worker in self.workers), self.broker]:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


def show(mode: str, chaos: Chaos, tally: Tally) -> bool:
    """Print what became of all calls; whether all was well."""
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(chaos.done.items())) or "none"
    failed = ", ".join(f"{count} {kind}" for kind, count in tally.failed.most_common()) or "none"
    bad = {
        "run twice": tally.run_twice,
        "answered but not run": tally.answered_but_not_run,
        "run though said not to have": tally.unsent_but_run,
        "hanging": tally.unended,
        "wrong": tally.wrong,
        "leaked, or not ended": chaos.problems,
    }
    print(f"{mode}, seed {chaos.args.seed}: faults: {faults}")
    print(f"  calls made {len(tally.made)}, answered {len(tally.answered)}; failed: {failed}")
    print("  " + ", ".join(f"{what} {len(found)}" for what, found in bad.items()), flush=True)
    for what, found in bad.items():
        for one in itertools.islice(sorted(found), 10):
            print(f"    {what}: {one}", flush=True)
    return not any(bad.values()) and bool(tally.answered)


def run(args: argparse.Namespace, mode: str, seconds: float, *, has_network: bool) -> bool:
    """One mode."""
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{mode}-"))
    environment = {**os.environ, "ZRPC_SECRET": secrets.token_hex(16), "ZRPC_LOCAL_DIR": str(folder / "local")}
    environment["OMP_NUM_THREADS"] = "1"
    chaos = Chaos(args, mode, folder, random.Random(args.seed), has_network, environment)
    try:
        chaos.run(seconds)
    finally:
        chaos.close()
    is_well = show(mode, chaos, read(folder, chaos.killed))
    if is_well:
        shutil.rmtree(folder)
    else:
        print(f"  what they wrote: {folder}", flush=True)
    return is_well


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAULTS))
    parser.add_argument("--lossy", type=float, default=0.02, help="the share of messages that something happens to")
    parser.add_argument("--port", type=int, default=PORT)
    args = parser.parse_args()
    has_network = network.enter()
    if not has_network:
        print("network namespaces are not permitted here: no network is cut")
    modes = MODES if args.mode == "both" else (args.mode,)
    well = [run(args, mode, args.seconds / len(modes), has_network=has_network) for mode in modes]
    sys.exit(not all(well))


if __name__ == "__main__":
    main()
