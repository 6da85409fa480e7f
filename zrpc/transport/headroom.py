"""How much memory this process may still take before the system, or its container, runs out.

To take memory for slabs that is not there would not fail: the kernel would end some process for it. So it is asked for.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

_UNLIMITED = 1 << 62


def available_nbytes(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping; None where the system has nothing that says so.

    The least of what the machine has and what each memory cgroup around this process leaves, of either version.

    Args:
        root: where `proc` and `sys` are.

    Raises:
        OSError: what says so is there and cannot be read now: no more files may be opened, say.
    """
    known = [nbytes for nbytes in (_of_machine(root), *_of_cgroups(root)) if nbytes is not None]
    return max(0, min(known)) if known else None


def _of_machine(root: Path) -> int | None:
    fields = _fields(root / "proc/meminfo")
    return fields["MemAvailable:"] << 10 if "MemAvailable:" in fields else None


def _of_cgroups(root: Path) -> list[int | None]:
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            names = ("memory.max", "memory.current", "inactive_file")
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mounts = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        # In a container the group that is the host's /a/b is mounted as the root, and /a/b is not there.
        relative = PurePosixPath(path.lstrip("/"))
        groups = {mount / group for mount in mounts for group in (relative, *relative.parents)}
        found += [_of_group(group, *names) for group in groups]
    return found


def _of_group(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    limit = _number(group / limit_name)
    if limit is None or limit >= _UNLIMITED:
        return None
    usage = _number(group / usage_name)  # the kernel adds this one up anew each time, which takes it a while
    if usage is None:
        return None
    return limit - usage + _fields(group / "memory.stat").get(cache_name, 0)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None  # "max": no limit


def _fields(path: Path) -> dict[str, int]:
    pairs = [line.split()[:2] for line in _lines(path)]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
