"""torch.distributed.rpc._testing: torch's agent that loses messages on purpose. There is none here."""

from __future__ import annotations

from zrpc.compat.missing import explaining

__getattr__ = explaining("torch.distributed.rpc._testing")


def is_available() -> bool:
    """Whether there is a faulty agent: never."""
    return False
