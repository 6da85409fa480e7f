"""What may still be taken is the least of what the machine has and each cgroup leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from zrpc.transport.headroom import available_nbytes

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", "MemTotal:  9000000 kB\nMemAvailable:    8388608 kB\nHugePages_Total:  0\n")
    return tmp_path


def write(path: Path, text: str | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group(path: Path, limit: str | int, usage: int, cache: int = 0) -> None:
    write(path / "memory.max", limit)
    write(path / "memory.current", usage)
    write(path / "memory.stat", f"anon 5\ninactive_file {cache}")


def old_group(path: Path, limit: int, usage: int, cache: int = 0) -> None:
    write(path / "memory.limit_in_bytes", limit)
    write(path / "memory.usage_in_bytes", usage)
    write(path / "memory.stat", f"inactive_file 0\ntotal_inactive_file {cache}")


def test_a_machine_without_cgroups(root: Path) -> None:
    assert available_nbytes(root) == 8 * GIB


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert available_nbytes(tmp_path) is None


def test_a_container_sees_its_own_group_as_the_root(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/")
    group(root / "sys/fs/cgroup", 2 * GIB, GIB, cache=GIB // 4)
    assert available_nbytes(root) == GIB + GIB // 4


def test_every_group_around_the_process_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/slice/job/step")
    group(root / "sys/fs/cgroup/slice/job/step", "max", 5)
    group(root / "sys/fs/cgroup/slice/job", 3 * GIB, GIB)
    group(root / "sys/fs/cgroup/slice", 4 * GIB, 3 * GIB)
    assert available_nbytes(root) == GIB


def test_a_group_that_is_not_mounted_under_its_path_is_the_root(root: Path) -> None:
    write(root / "proc/self/cgroup", "3:cpu:/x\n2:memory:/docker/abc\n1:name=systemd:/\n0::/")
    old_group(root / "sys/fs/cgroup/memory", 2 * GIB, GIB, cache=GIB // 2)
    assert available_nbytes(root) == GIB + GIB // 2


def test_the_old_version_writes_a_huge_number_for_no_limit(root: Path) -> None:
    write(root / "proc/self/cgroup", "2:memory:/")
    old_group(root / "sys/fs/cgroup/memory", 9_223_372_036_854_771_712, GIB)
    assert available_nbytes(root) == 8 * GIB


def test_a_group_over_its_limit_leaves_nothing(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/")
    group(root / "sys/fs/cgroup", GIB, 2 * GIB)
    assert available_nbytes(root) == 0


def test_this_machine_has_some() -> None:
    available = available_nbytes()
    assert available is None or available > 0


@pytest.mark.parametrize("name", ["proc/meminfo", "proc/self/cgroup"])
def test_what_cannot_be_read_is_an_error_and_not_the_rest(tmp_path: Path, name: str) -> None:
    """A limit that is there and cannot be read now may be the least of all."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable:   100 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("")
    assert available_nbytes(tmp_path) == 102_400
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()  # reading it fails, whoever reads
    with pytest.raises(OSError, match=name):
        available_nbytes(tmp_path)
