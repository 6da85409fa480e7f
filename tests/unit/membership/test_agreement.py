"""Groups whose workers do not say the same of what they unpickle."""

from __future__ import annotations

import pytest

from zrpc.errors import ConfigError
from zrpc.ids import WorkerInfo
from zrpc.membership.agreement import REGISTERED, check_agreement
from zrpc.membership.group import Member


def member(rank: int, registered: bool | None) -> Member:
    card = {} if registered is None else {REGISTERED: registered}
    info = WorkerInfo(f"w{rank}", rank, bytes([rank + 1]) * 8)
    return Member(info, info.incarnation, card)


@pytest.mark.parametrize("said", [[True, True], [False, None], [None], []])
def test_workers_that_say_the_same_are_a_group(said: list[bool | None]) -> None:
    """To say nothing is to unpickle."""
    check_agreement([member(rank, one) for rank, one in enumerate(said)])


def test_workers_that_differ_are_told_which() -> None:
    """A few names of each kind, and how many more there are."""
    with pytest.raises(ConfigError, match="w0, w1, w2 and 1 more have allow='registered', and w4 have not"):
        check_agreement([member(rank, rank < 4) for rank in range(5)])
