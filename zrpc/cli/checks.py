"""What of this machine and its environment a worker needs, looked at one by one. Nothing is changed by it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from zrpc.cli.findings import Check, Finding, fail, ok, warn
from zrpc.cli.network import host_name, interfaces, ports
from zrpc.errors import ConfigError, LimitError
from zrpc.secret import FILE_VARIABLE, VARIABLE, find_secret, says_insecure, user_file

if TYPE_CHECKING:
    from collections.abc import Iterator

SHM_MIN_NBYTES = 64 << 20
MEMORY_MIN_NBYTES = 512 << 20
THREADS_MIN = 64


# ---- software --------------------------------------------------------------------------------------------------------


def python() -> Iterator[Finding]:
    """The interpreter."""
    version = platform.python_version()
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        yield fail("python", f"{version}, without its global interpreter lock", "set PYTHON_GIL=1 in the environment")
    else:
        yield ok("python", f"{version} at {sys.executable}")


def packages() -> Iterator[Finding]:
    """What zrpc needs, and the versions that its metadata asks for."""
    for line in importlib.metadata.requires("zrpc") or ():
        match = re.fullmatch(r"([A-Za-z0-9_-]+)\s*>=\s*([0-9.]+)", line)
        if match is None:  # of an extra
            continue
        name, least = match[1], match[2]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield fail(name, "it is not installed", f"pip install '{name}>={least}'")
            continue
        if _numbers(version) < _numbers(least):
            yield warn(name, f"{version}, and zrpc is tested with {least} or later", f"pip install '{name}>={least}'")
        else:
            yield ok(name, version)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3]]


def torch_build() -> Iterator[Finding]:
    """What the installed torch can do."""
    try:
        torch = importlib.import_module("torch")
        distributed = importlib.import_module("torch.distributed")
    except Exception as error:  # a damaged installation raises anything
        yield fail("torch build", f"it cannot be imported: {type(error).__name__}: {error}", "install torch anew")
        return
    if not distributed.is_available():
        yield fail(
            "torch build", f"{torch.__version__} was built without torch.distributed, whose stores workers meet at",
            "use a build that has it; with a broker alone, torch is still needed with it",
        )  # fmt: skip
        return
    cuda = torch.version.cuda
    devices = torch.cuda.device_count() if cuda else 0
    yield ok("torch build", f"{torch.__version__}, {f'CUDA {cuda} and {devices} devices' if cuda else 'no CUDA'}")


def zeromq() -> Iterator[Finding]:
    """Whether connections can be encrypted."""
    from zrpc.transport.credentials import zmq_versions

    binding, library, has_curve = zmq_versions()
    text = f"pyzmq {binding}, libzmq {library}"
    if has_curve:
        yield ok("zeromq", f"{text}, with CURVE")
    else:
        yield fail(
            "zeromq", f"{text}, built without CURVE: connections cannot be authenticated",
            "pip install --force-reinstall pyzmq (its wheels have CURVE), or build libzmq with libsodium",
        )  # fmt: skip


# ---- limits and files ------------------------------------------------------------------------------------------------


def memory() -> Iterator[Finding]:
    """What shared memory needs."""
    from zrpc.transport.headroom import available_nbytes

    if not hasattr(os, "memfd_create"):
        yield warn("shared memory", "this system has no memfd", "large values between workers of a host use sockets")
    else:
        try:
            os.close(os.memfd_create("zrpc-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            yield ok("shared memory", "memory files (memfd) can be made")
        except OSError as error:
            yield warn(
                "shared memory", f"memory files cannot be made: {error.strerror}",
                "allow memfd_create (a seccomp profile, say); sockets are used meanwhile",
            )  # fmt: skip
    available = available_nbytes()
    if available is not None and available < MEMORY_MIN_NBYTES:
        yield warn("memory", f"{available >> 20} MiB are available", "shared memory may take a quarter of that alone")
    elif available is not None:
        yield ok("memory", f"{available >> 20} MiB are available")
    yield from _dev_shm()


def _dev_shm(folder: str = "/dev/shm") -> Iterator[Finding]:
    """zrpc does not use it; torch's DataLoader and multiprocessing do, beside it."""
    if not os.path.isdir(folder):
        yield warn("/dev/shm", "it is not there", "zrpc does not need it, torch's DataLoader does")
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield warn("/dev/shm", "it cannot be written to", "zrpc does not need it, torch's DataLoader does: chmod 1777")
    elif (free := shutil.disk_usage(folder).free) < SHM_MIN_NBYTES:
        yield warn("/dev/shm", f"{free >> 20} MiB are free", "zrpc does not need it, torch's DataLoader does: "
                    "docker run --shm-size, or mount -o remount,size=")  # fmt: skip
    else:
        yield ok("/dev/shm", f"{free >> 20} MiB are free (zrpc uses memory files instead)")


def open_files() -> Iterator[Finding]:
    """How many workers can be talked to."""
    import resource

    from zrpc.transport import descriptors

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        descriptors.check_room(descriptors.PER_ENDPOINT + descriptors.PER_PEER)
    except LimitError as error:
        yield fail("open files", str(error), "ulimit -n 65536")
        return
    if hard == resource.RLIM_INFINITY:
        yield ok("open files", f"{soft}, and as many as are asked for")
        return
    peers = max(0, (hard - descriptors.SPARE - descriptors.PER_ENDPOINT) // descriptors.PER_PEER)
    text = f"{soft} at first, {hard} if need be: enough to talk to {peers} workers without a broker"
    yield ok("open files", text) if peers >= 64 else warn("open files", text, "ulimit -n 65536, or use a broker")


def thread_limit() -> Iterator[Finding]:
    """Whether a worker's threads can be started."""
    import resource

    limits = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        limits.append((soft, "ulimit -u"))
    for path in ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"):
        try:
            said = Path(path).read_text().strip()
        except OSError:
            continue
        if said.isdigit():
            limits.append((int(said), path))
    least, where = min(limits, default=(None, ""))
    if least is not None and least < THREADS_MIN:
        yield warn("threads", f"{least} processes and threads are allowed ({where})",
                    f"allow {THREADS_MIN} or more, or set num_worker_threads lower")  # fmt: skip
    else:
        yield ok("threads", "no limit" if least is None else f"{least} processes and threads ({where})")


def secret() -> Iterator[Finding]:
    """Whether this process can be a member, and only those that should."""
    try:
        if says_insecure():
            yield warn("secret", "ZRPC_INSECURE=1: whoever reaches a port of a worker can run code in it",
                        "unset it, unless the network is for this group alone")  # fmt: skip
            return
        path = user_file()
        if VARIABLE not in os.environ and FILE_VARIABLE not in os.environ and not path.exists():
            yield from _to_be_made(path)
            return
        yield ok("secret", f"it is from {find_secret().source}")
    except ConfigError as error:
        yield fail("secret", str(error), f"all workers of a group need the same ({VARIABLE} or {FILE_VARIABLE})")


def _to_be_made(path: Path) -> Iterator[Finding]:
    folder = next(parent for parent in path.parents if parent.exists())
    if os.access(folder, os.W_OK | os.X_OK):
        yield ok("secret", f"none yet: the first worker makes one at {path}, for this user")
    else:
        yield fail("secret", f"there is none, and none can be made at {path}", f"set {VARIABLE} or {FILE_VARIABLE}")


def keys() -> Iterator[Finding]:
    """The keys of single workers, where the environment names them."""
    from zrpc.keyring import KEY_VARIABLE, KEYS_VARIABLE, find_keyring
    from zrpc.transport.credentials import worker_credentials

    if not os.environ.get(KEY_VARIABLE) and not os.environ.get(KEYS_VARIABLE):
        yield ok("keys", f"none: whoever knows the secret is a member ({KEYS_VARIABLE} is not set)")
        return
    try:
        worker_credentials(None if says_insecure() else find_secret())
        ring = find_keyring()
    except ConfigError as error:
        yield fail("keys", str(error), "zrpc keys list, zrpc keys new")
        return
    yield ok("keys", f"{0 if ring is None else len(ring.table.by_public)} keys, and this process has a valid one")


def local_sockets() -> Iterator[Finding]:
    """Where workers of this host find each other."""
    from zrpc.ids import new_incarnation
    from zrpc.transport import local_socket

    try:
        path = local_socket.path_in(local_socket.directory(), new_incarnation())
        listener = local_socket.listen(path)
    except OSError as error:
        yield warn(
            "local sockets", f"none can be made in {local_socket.describe()}: {error}",
            f"set {local_socket.VARIABLE} to a folder of this user alone, with a short path. Until then workers of "
            "this host use TCP, without shared memory",
        )  # fmt: skip
        return
    listener.close()
    local_socket.remove(path)
    mode = stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode)
    yield ok("local sockets", f"they lie in {os.path.dirname(path)} (mode {mode:o})")


def clock() -> Iterator[Finding]:
    """The clock that time limits go by."""
    info = time.get_clock_info("monotonic")
    if not info.monotonic or info.adjustable:
        yield warn("clock", "the monotonic clock can be set here", "time limits may be off while it is")
    else:
        yield ok("clock", f"monotonic, with steps of {info.resolution * 1e9:g} ns; zrpc compares no clocks of hosts")


LOCAL: dict[str, Check] = {
    "python": python,
    "packages": packages,
    "torch build": torch_build,
    "zeromq": zeromq,
    "host name": host_name,
    "network": interfaces,
    "ports": ports,
    "shared memory": memory,
    "open files": open_files,
    "threads": thread_limit,
    "secret": secret,
    "keys": keys,
    "local sockets": local_sockets,
    "clock": clock,
}
"""What is looked at on this host."""
