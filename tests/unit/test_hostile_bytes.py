"""Whatever bytes come, decoders raise ProtocolError alone, and make no more memory than what came deserves.

`make fuzz` does the same with a million inputs; a failure names the number of its input.
"""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.run import check, input_of
from tests.fuzz.targets import TARGETS
from zrpc.errors import ProtocolError
from zrpc.wire.bounds import span_of

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

pytestmark = pytest.mark.filterwarnings("ignore")


def checked(target: Target, frames: list[bytes]) -> str:
    """`check`, with memory counted: only here, since that takes hypothesis several times as long."""
    tracemalloc.start()
    try:
        return check(target, frames)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_valid_messages_are_read_or_refused(name: str) -> None:
    """What mutations begin with is not refused for another reason than it should be: at least one is read."""
    outcomes = {checked(TARGETS[name], seed) for seed in TARGETS[name].seeds}
    assert name in ("slabs", "codes") or "read" in outcomes


@pytest.mark.parametrize("name", TARGETS)
@given(number=st.integers(0, (1 << 63) - 1))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_messages_are_read_or_refused(name: str, number: int) -> None:
    """Bits, lengths, numbers, types and nesting are changed: nothing but ProtocolError, and no large memory."""
    checked(TARGETS[name], input_of(TARGETS[name], number))


numbers = st.one_of(st.integers(-2, 6), st.sampled_from([1 << 31, 1 << 58, (1 << 63) - 1, 1 << 63, -(1 << 63)]))


@given(st.lists(st.tuples(numbers, numbers), max_size=4), numbers, st.integers(0, 100))
@settings(max_examples=300, deadline=None)
def test_a_view_that_is_let_pass_lies_in_its_memory(dims: list[tuple[int, int]], offset: int, count: int) -> None:
    """The first and the last element that it sees are there, and no number is one that torch cannot count with."""
    shape, strides = [size for size, _ in dims], [stride for _, stride in dims]
    try:
        span = span_of(shape, strides, offset, count)
    except ProtocolError:
        return
    assert min([0, offset, *shape, *strides]) == 0
    assert max([0, offset, *shape, *strides]) < 1 << 63
    if 0 in shape:
        assert span == 0
    else:
        assert span == offset + sum((size - 1) * stride for size, stride in dims) + 1 <= count
