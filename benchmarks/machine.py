"""What a result depends on: the machine, the versions, the day."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LOAD = os.getloadavg()[0]
"""Of the last minute before this program began."""


def version_of(distribution: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts(*distributions: str) -> str:
    """The first line of a results file: the command, the day, the cores, the load before, the versions."""
    import zmq

    versions = [f"{name} {version_of(name)}" for name in ("torch", *distributions)]
    parts = [
        f"`{_command()}`",
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        f"{len(os.sched_getaffinity(0))} cores ({_processor()}), load {_LOAD:.1f} before",
        f"Python {platform.python_version()}",
        f"pyzmq {zmq.__version__} (libzmq {zmq.zmq_version()})",
        *versions,
        f"zrpc at {_commit()}",
    ]
    return ", ".join(parts)


def record(text: str, out: Path | None, name: str) -> None:
    """Print the text of a results file and, if there is a folder `out`, write it there."""
    print(f"\n{name}: {text}", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)


def _command() -> str:
    """How this program was started."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [sys.argv[0]]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit that was measured, marked where files of zrpc differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "zrpc", "broker"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"
    return commit.stdout.strip() + (" with changes" if changed else "")
