"""Remote exceptions as programs for torch.distributed.rpc expect them.

torch makes a remote exception anew by calling its class with one string. Where the class does not take that, the caller
gets a RuntimeError that tells of it, so programs catch RuntimeError. zrpc rebuilds such exceptions as they were; here
they become RuntimeErrors too, with torch's text, and stay what they are beside it.
"""

from __future__ import annotations

from zrpc.exception_text import is_interrupt, text_of
from zrpc.wire.stand_in import as_stand_in


def as_torch_raises(error: Exception, remote_text: str) -> Exception:
    """`error`, or a RuntimeError in its place if torch could not raise it."""
    try:
        type(error)(remote_text)
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        text = (
            f"Failed to create original exception type. Error msg was {text_of(failure)}. "
            f"Original exception on remote side was {remote_text}"
        )
    else:
        return error
    both = as_stand_in(error, text)
    return RuntimeError(text) if not isinstance(both, Exception) else both
