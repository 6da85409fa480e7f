"""Mapped files: shared, kept as long as anybody sees them, and no descriptor needed."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from zrpc.transport.mapping import map_file

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no anonymous memory files")


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("zrpc-mapped")
    os.truncate(fd, 8192)
    yield fd
    os.close(fd)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("/memfd:zrpc-mapped")


@pytest.mark.parametrize("populate", [False, True])
def test_what_one_writes_the_other_reads(file: int, populate: bool) -> None:
    one, other = map_file(file, 8192, populate=populate), map_file(file, 8192)
    one[4095:4098] = b"abc"
    assert bytes(other[4094:4099]) == b"\0abc\0"
    assert os.pread(file, 3, 4095) == b"abc"


def test_a_mapping_lives_as_long_as_anybody_sees_it(file: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    memory = map_file(file, 8192)
    assert len(os.listdir("/proc/self/fd")) == before
    tensor = torch.frombuffer(np.frombuffer(memory, np.uint8, 100, 4096).data, dtype=torch.int16)
    del memory
    part = tensor[3:5]
    del tensor
    gc.collect()
    assert mappings() == 1
    part[1] = 0x4142
    assert os.pread(file, 2, 4096 + 8) == b"BA"
    del part
    gc.collect()
    assert mappings() == 0


def test_what_cannot_be_mapped_is_an_error(file: int) -> None:
    with pytest.raises(OSError, match="8192 bytes cannot be mapped: Bad file descriptor"):
        map_file(1 << 20, 8192)
    with pytest.raises(OSError, match="0 bytes cannot be mapped"):
        map_file(file, 0)
