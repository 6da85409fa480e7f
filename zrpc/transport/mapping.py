"""Mapping files into memory without keeping them open.

Python's own `mmap` keeps a duplicate of the file's descriptor for as long as the mapping lives (up to Python 3.12), so
a process that holds a thousand received tensors could open no more files. The system call needs none.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from typing import Any

_READ_AND_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def map_file(fd: int, nbytes: int, *, offset: int = 0, private: bool = False, populate: bool = False) -> memoryview:
    """So many bytes of the file, shared with everybody who maps it, until nobody sees them here any more.

    Args:
        fd: a descriptor that is open for reading and writing; it may be closed afterwards.
        nbytes: how much to map; not more than the file has.
        offset: where to begin, in whole pages.
        private: what is written here nobody else sees: each page that is written to becomes a copy.
        populate: have the pages there at once instead of one by one as they are touched.

    Raises:
        OSError: it cannot be mapped.
    """
    flags = (mmap.MAP_PRIVATE if private else mmap.MAP_SHARED) | (mmap.MAP_POPULATE if populate else 0)
    address = _libc().mmap(None, nbytes, _READ_AND_WRITE, flags, fd, offset)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"{nbytes} bytes cannot be mapped: {os.strerror(code)}")
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(memory, _libc().munmap, address, nbytes).atexit = False  # threads may still use it then
    return memoryview(memory).cast("B")


def drop_pages(memory: memoryview) -> None:
    """Undo what was written to private memory: its pages are those of the file again."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc().madvise(address, len(memory), mmap.MADV_DONTNEED):
        code = ctypes.get_errno()
        raise OSError(code, f"pages of {len(memory)} bytes cannot be dropped: {os.strerror(code)}")
