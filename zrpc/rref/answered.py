"""Which forks left with which answers, as long as they are heard of no other way: an answer may be lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.ids import Incarnation
    from zrpc.rref.forkdata import ForkData

LOOK_AT = 64
"""So many answers are noted before those are looked for whose forks are settled; later, twice as many as were left."""


class AnsweredForks:
    """The forks in answers. Whoever calls it owns it: nothing here locks.

    Args:
        is_given: whether a fork that was handed out is still to be heard of.
    """

    def __init__(self, is_given: Callable[[ForkData], bool]) -> None:
        self._is_given = is_given
        self._answers: dict[tuple[Incarnation, int], Sequence[ForkData]] = {}
        self._look_at = LOOK_AT

    def __len__(self) -> int:
        return len(self._answers)

    def note(self, holder: Incarnation, call_id: int, forks: Sequence[ForkData]) -> None:
        """The answer to call `call_id` of `holder` carries `forks`."""
        self._answers[holder, call_id] = forks
        if len(self._answers) > self._look_at:
            self._answers = {key: kept for key, kept in self._answers.items() if any(map(self._is_given, kept))}
            self._look_at = max(LOOK_AT, 2 * len(self._answers))

    def take(self, holder: Incarnation, call_id: int) -> Sequence[ForkData]:
        """The forks of that answer, which are forgotten."""
        return self._answers.pop((holder, call_id), ())
