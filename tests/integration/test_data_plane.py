"""Every kind of value arrives right over every path, as an argument and as a result, and takes the path it should.

What each message is made of is read off where it leaves for the socket: a buffer rides in the header, is a frame of
its own, or is named by a descriptor of a slab or of a transfer in chunks.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
import torch

import zrpc as rpc
from tests.integration.data_plane_cases import CASES, LARGE, assert_same
from zrpc.agent.current import current_agent
from zrpc.gather import all_gather
from zrpc.transport import carrier, chunks, slabs
from zrpc.wire import region
from zrpc.wire.envelope import INLINE_MAX_NBYTES
from zrpc.wire.region import MEMBER_LENGTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.integration.harness import Cluster
    from zrpc.wire.envelope import Buffer, Envelope

INLINE, FRAME, SLAB, CHUNKS = "inline", "frame", "slab", "chunks"
SIZES = {INLINE: 1_024, FRAME: 10_240, SLAB: 81_920, CHUNKS: 61_440}
"""How large values are, in bytes, to take a path. Their largest part may have four times as much."""
CHUNK_MIN_NBYTES, CHUNK_NBYTES = 50_000, 20_000
"""Chunks are made of smaller values here than otherwise, so that all can be sent; the real sizes have a test too."""
BUFFERS = 6
"""Their place in a header."""
SLOTS = {4: SLAB, 2: CHUNKS}
"""The paths that have descriptors, by the length of those."""


@dataclass
class Recorder:
    """How the buffers of the messages travelled that left since the last look."""

    seen: list[tuple[int, str]] = field(default_factory=list)
    chunk_nbytes: int = 0

    def record(self, frames: Sequence[Buffer]) -> None:
        buffers = msgpack.unpackb(frames[0])[BUFFERS]
        regions = {entry[0] for entry in buffers if isinstance(entry, list) and len(entry) == MEMBER_LENGTH}
        if None in buffers:  # packed buffers are tiny ones; their region, and their sizes behind it
            self.seen += [(nbytes, INLINE) for (nbytes,) in struct.iter_unpack("<H", buffers.pop())]
            buffers.pop()
        for index, entry in enumerate(buffers):
            if isinstance(entry, bytes):
                self.seen.append((len(entry), INLINE))
            elif entry is not None and index not in regions:
                where = entry
                if isinstance(entry, list) and len(entry) == MEMBER_LENGTH:
                    where = buffers[entry[0]]
                nbytes = entry if isinstance(entry, int) else entry[-1 if len(entry) == MEMBER_LENGTH else 1]
                self.seen.append((nbytes, FRAME if isinstance(where, int) else SLOTS[len(where)]))

    def record_chunk(self, frames: Sequence[Buffer]) -> None:
        self.chunk_nbytes += len(frames[1])

    def take(self) -> list[tuple[int, str]]:
        seen, self.seen = self.seen, []
        chunked = sum(nbytes for nbytes, path in seen if path == CHUNKS)
        assert chunked == self.chunk_nbytes, "chunks are announced that were not sent"
        self.chunk_nbytes = 0
        return seen


_recorder = Recorder()


def record_and_meet(rank: int) -> str:
    """Note from now on what leaves; wait until the other can be sent everything in the best way there is."""
    sees = current_agent()._carrier
    encode, send_chunk = carrier.encode, sees._transfers._send

    def encode_and_record(envelope: Envelope, *place: Any) -> list[Buffer]:
        frames = encode(envelope, *place)
        _recorder.record(frames)
        return frames

    def record_and_send(to: bytes, frames: Sequence[Buffer]) -> None:
        _recorder.record_chunk(frames)
        send_chunk(to, frames)

    carrier.encode = encode_and_record  # type: ignore[assignment]
    sees._transfers._send = record_and_send
    other = f"worker{1 - rank}"
    while sees._shared_memory is not None:  # each tries the other's memory when they meet
        rpc.rpc_sync(other, size_of, args=(torch.zeros(SIZES[SLAB]),))
        if any(path == SLAB for _, path in _recorder.take()):
            break
    return other


def size_of(tensor: torch.Tensor) -> int:
    return tensor.nbytes


def check_and_return(name: str, nbytes: int, got: Any) -> Any:
    """Compare what came with what it should be, and send the like back."""
    _recorder.take()
    assert_same(got, CASES[name](nbytes))
    return CASES[name](nbytes)


def paths_taken() -> list[tuple[int, str]]:
    return _recorder.take()


def assert_took(path: str, name: str, taken: list[tuple[int, str]]) -> None:
    if name not in LARGE and path in (SLAB, CHUNKS):
        return  # large streams travel as buffers, and which are large depends on what pickle writes
    expected = path if name in LARGE else INLINE
    assert max(taken, default=(0, INLINE))[1] == expected, f"it should have gone by {expected}: {taken}"


def exchange_all(rank: int, paths: list[str]) -> list[str]:
    """Exchange every case over each of `paths`; what went wrong."""
    warnings.simplefilter("ignore")
    chunks.ENCRYPTED_MIN_NBYTES, chunks.CHUNK_NBYTES = CHUNK_MIN_NBYTES, CHUNK_NBYTES
    region.MEMBER_MAX_NBYTES = CHUNK_MIN_NBYTES - 1  # larger ones would go by neither path
    other = record_and_meet(rank)
    all_gather(None)
    failed = []
    for path, name in [(path, name) for path in paths for name in CASES] if rank == 0 else []:
        try:
            exchange(other, path, name)
        except Exception as error:
            failed.append(f"{path}, {name}: {type(error).__name__}: {error}")
    return failed


def exchange(other: str, path: str, name: str) -> None:
    value = CASES[name](SIZES[path])
    _recorder.take()
    result = rpc.rpc_sync(other, check_and_return, args=(name, SIZES[path], value))
    assert_took(path, name, _recorder.take())
    assert_same(result, value)
    assert_took(path, name, rpc.rpc_sync(other, paths_taken))


@pytest.mark.parametrize("cluster_in_each_mode", ["file", "broker"], indirect=True)
@pytest.mark.parametrize("paths", [[INLINE, SLAB], [FRAME, CHUNKS]], ids=lambda paths: " and ".join(paths))
def test_every_kind_of_value_arrives_right(cluster_in_each_mode: Cluster, paths: list[str]) -> None:
    failed, _ = cluster_in_each_mode.run(exchange_all, 2, args=(paths,), shared_memory=SLAB in paths)
    assert not failed, "\n".join(failed)


def exchange_real_sizes(rank: int, path: str) -> None:
    """On both sides of the size from which chunks are made; the last chunk is a short one."""
    other = record_and_meet(rank)
    all_gather(None)
    if rank == 0:
        large = FRAME if path == CHUNKS else SLAB
        limits = {INLINE_MAX_NBYTES: INLINE, slabs.MIN_NBYTES - 4: FRAME, slabs.MIN_NBYTES: large}
        least = chunks.ENCRYPTED_MIN_NBYTES
        for nbytes, way in {**limits, least - 4: large, least + 4: path}.items():
            _recorder.take()
            sent = torch.arange(nbytes // 4, dtype=torch.int32)
            assert torch.equal(rpc.rpc_sync(other, torch.neg, args=(sent,)), -sent)
            assert _recorder.take() == [(nbytes, way)]


@pytest.mark.parametrize("cluster_in_each_mode", ["file", "broker"], indirect=True)
@pytest.mark.parametrize("path", [SLAB, CHUNKS])
def test_sizes_choose_the_path(cluster_in_each_mode: Cluster, path: str) -> None:
    cluster_in_each_mode.run(exchange_real_sizes, 2, args=(path,), shared_memory=path == SLAB)
