"""The message of a caller that says which of its calls ended without an answer.

It is apart from `zrpc.wire.messages` for its length alone. docs/wire.md lists them all.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zrpc.errors import ProtocolError
from zrpc.wire.messages import Message, message_type

if TYPE_CHECKING:
    from collections.abc import Iterator


@message_type(25, idempotent=True)
@dataclass(frozen=True, slots=True)
class CallsUnanswered(Message):
    """Calls ended without an answer: RRefs that they carried, or their answers, may have been lost. Caller to callee.

    `calls` holds a `[call_id, forks]` for each, with the packed forks that the request carried.
    """

    calls: list[Any]

    def __iter__(self) -> Iterator[tuple[int, list[bytes]]]:
        """Each call's number, and its packed forks.

        Raises:
            ProtocolError: `calls` holds something else.
        """
        for call in self.calls:
            if not (type(call) is list and len(call) == 2 and type(call[0]) is int and type(call[1]) is list):
                raise ProtocolError(f"{reprlib.repr(call)} is no call and its RRefs")
            yield call[0], call[1]
