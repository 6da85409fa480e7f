"""What is used of a store, and a counter in it that others may write to, too.

What: `add` of a store would do, if others could not have it say anything. So each step is a `compare_set` of a value
that names the worker which counted.

Failure: what is no number, and what never stays as it is, raises `RefusedError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from zrpc.errors import RefusedError

if TYPE_CHECKING:
    from zrpc.ids import Incarnation

COUNTER_MAX = 1 << 20
"""So many steps of one counter are believed."""
COUNT_TRIES = 1 << 12
ABSENT = "-"
"""What no record is: comparing with it reads one that may not be there, without waiting for it."""


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str | bytes, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class Counter:
    """The counter under one key. Any thread may use it, if it may use `store`.

    Args:
        store: where it is kept.
        key: under which.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key

    def next(self, life: Incarnation) -> int:
        """Count up, as the worker of that life; another number than all before."""
        found = ""
        for _ in range(COUNT_TRIES):
            expected, number = found, self._number(found) + 1
            mine = f"{number} {life.hex()}"  # two that count up at once do not write the same
            found = self._store.compare_set(self._key, expected, mine).decode()
            if found == mine:
                return number
        raise RefusedError(
            f"the counter {self._key!r} in the store of this group never stays as it is: others write to it"
        )

    def read(self) -> int:
        """The number that was given out last; 0: none."""
        return self._number(self._store.compare_set(self._key, ABSENT, ABSENT).decode())

    def _number(self, found: str) -> int:
        if found in ("", ABSENT):
            return 0
        text = found.split(" ")[0]
        if not (text.isascii() and text.isdigit() and len(text) <= len(str(COUNTER_MAX))) or int(text) > COUNTER_MAX:
            raise RefusedError(
                f"the counter {self._key!r} in the store of this group says {text[:32]!r}, which is no number from 0 "
                f"to {COUNTER_MAX}: others write to it, or the group is to be started anew with a fresh store"
            )
        return int(text)
