"""The pinned pool: bounded, used again, and never lent while a device uses it."""

from __future__ import annotations

import logging

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.unit.staging.fake import FakeAccelerator
from zrpc import finalizers
from zrpc.staging.pinned import Loan, PinnedPool, room_for


def pool(max_nbytes: int, accelerator: FakeAccelerator | None = None) -> PinnedPool:
    return PinnedPool((accelerator or FakeAccelerator()).pinned, max_nbytes)


@pytest.mark.parametrize(("nbytes", "room"), [(1, 4096), (4096, 4096), (4097, 8192), (1 << 20, 1 << 20)])
def test_rooms_are_powers_of_two(nbytes: int, room: int) -> None:
    assert room_for(nbytes) == room


def test_a_block_is_used_again_when_nobody_sees_it() -> None:
    blocks = pool(1 << 20)
    loan: Loan | None = blocks.lend(5000)
    assert loan is not None
    assert loan.array.nbytes == loan.tensor.numel() == 5000
    address, view = loan.array.ctypes.data, loan.array.data[10:20]
    del loan
    other = blocks.lend(5000)
    assert other is not None
    assert other.array.ctypes.data != address, "a view of it is still there"
    del view
    again = blocks.lend(6000)
    assert again is not None
    assert again.array.ctypes.data == address
    assert blocks.counts() == {
        "pinned_nbytes": 16384, "pinned_lent_nbytes": 16384, "pinned_loans": 3, "pinned_blocks_made": 2,
        "pinned_outside_pool": 0,
    }  # fmt: skip


def test_a_block_that_a_device_uses_is_not_lent() -> None:
    accelerator = FakeAccelerator()
    blocks = pool(8192, accelerator)
    stream = accelerator.new_stream("cuda:0")
    loan: Loan | None = blocks.lend(8192)
    assert loan is not None
    with accelerator.running_on([stream]):
        release = accelerator.hold()
    loan.block.busy_until = accelerator.record(stream)
    del loan
    assert blocks.lend(8192) is None
    assert blocks.lend(100) is None, "nor is its memory given up for others"
    release()
    accelerator.finish()
    assert blocks.lend(8192) is not None


def test_idle_blocks_make_way_for_other_sizes() -> None:
    blocks = pool(16384)
    held = [blocks.lend(4096) for _ in range(4)]
    assert all(held)
    assert blocks.lend(4096) is None
    held.clear()
    assert blocks.lend(16384) is not None
    assert blocks.counts()["pinned_nbytes"] == 16384


def test_a_share_leaves_room_for_others() -> None:
    blocks = pool(16384)
    assert blocks.lend(8193, share=0.5) is None
    first = blocks.lend(8192, share=0.5)
    assert first is not None
    assert blocks.lend(1, share=0.5) is None
    assert blocks.lend(8192) is not None


def test_beyond_the_bound_memory_comes_from_elsewhere_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = FakeAccelerator()
    blocks = pool(4096, accelerator)
    with caplog.at_level(logging.WARNING, "zrpc"):
        loans = [blocks.borrow(4096) for _ in range(3)]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "all 4096 bytes of pinned memory are in use, and more is taken"
    ]
    assert len({loan.array.ctypes.data for loan in loans}) == 3
    accelerator.max_pinned_nbytes = 0
    assert blocks.borrow(100).array.nbytes == 100, "and where none can be pinned, it is not"
    assert blocks.counts()["pinned_outside_pool"] == 3


def test_where_nothing_can_be_pinned_the_pool_is_empty(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = FakeAccelerator()
    accelerator.max_pinned_nbytes = 0
    with caplog.at_level(logging.WARNING, "zrpc"):
        assert pool(1 << 20, accelerator).lend(10) is None
    finalizers.run_pending()
    assert "4096 bytes cannot be pinned" in caplog.text


@given(st.lists(st.tuples(st.integers(1, 40_000), st.booleans()), max_size=40), st.integers(0, 100_000))
def test_the_bound_holds_and_no_two_loans_overlap(steps: list[tuple[int, bool]], max_nbytes: int) -> None:
    blocks = pool(max_nbytes)
    held: list[tuple[Loan, int]] = []
    for mark, (nbytes, drops) in enumerate(steps):
        loan = blocks.lend(nbytes)
        if loan is not None:
            loan.array[:] = mark
            held.append((loan, mark))
        counts = blocks.counts()
        assert counts["pinned_lent_nbytes"] == sum(room_for(one.array.nbytes) for one, _ in held)
        assert counts["pinned_lent_nbytes"] <= counts["pinned_nbytes"] <= max_nbytes
        assert all((one.array == its).all() for one, its in held)
        del loan
        if drops and held:
            held.pop(len(held) // 2)
