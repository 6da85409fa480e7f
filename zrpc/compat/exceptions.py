"""Remote exceptions as programs for torch.distributed.rpc expect them.

torch makes a remote exception anew by calling its class with one string. Where the class does not take that, the caller
gets a RuntimeError that tells of it, so programs catch RuntimeError. zrpc rebuilds such exceptions as they were; here
they become RuntimeErrors too, with torch's text, and stay what they are beside it.
"""

from __future__ import annotations

from typing import Any


def as_torch_raises(error: Exception, remote_text: str) -> Exception:
    """`error`, or a RuntimeError in its place if torch could not raise it."""
    try:
        type(error)(remote_text)
    except Exception as failure:
        text = (
            f"Failed to create original exception type. Error msg was {failure}. "
            f"Original exception on remote side was {remote_text}"
        )
    else:
        return error
    try:
        both = _both(type(error))
        made: Exception = both.__new__(both, *error.args)
    except TypeError:  # instances of the two cannot be one object
        return RuntimeError(text)
    made.__dict__.update(error.__dict__, _text=text)
    made.args = error.args
    return made


def _both(cls: type[Exception]) -> type[Exception]:
    """A class of exceptions that are `cls` and RuntimeErrors."""
    namespace: dict[str, Any] = {"__str__": lambda self: self._text, "__module__": cls.__module__}
    return type(cls.__name__, (cls, RuntimeError), namespace)
