"""Functions and classes that travel by value: as code, where no name says at the other end which they are.

What: pickle writes functions and classes as names. cloudpickle (extra `by-value`) takes lambdas, closures and what was
defined in a notebook apart instead. It is asked where pickle has failed, and where a call names something of
`__main__`, which is another module at the callee: `identity` says which one it is here, and is on each worker's card.

Threads: any. Failure: without cloudpickle things are as pickle has them. At a callee with `allow` set to a list of
modules, streams that it made are refused unless `cloudpickle` is one of them; with `registered` nothing is pickled.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
from collections import ChainMap
from functools import cache
from typing import TYPE_CHECKING, Any

from zrpc.wire.reducers import dispatch_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zrpc.wire.payload import Payload

CARD_KEY = "main"
"""Of what a card says of `__main__`."""
MAIN = b"__main__"
_session = os.urandom(8)
"""Tells what is typed into one process from what is typed into others. Processes that are forked know the same."""


@cache
def pickler_class() -> type[pickle.Pickler] | None:
    """What takes functions and classes apart; None: there is no cloudpickle here."""
    try:
        import cloudpickle  # type: ignore[import-untyped]  # optional, and takes time
    except ImportError:
        return None

    reducers: Any = ChainMap(dispatch_table, _without_files(cloudpickle.Pickler.dispatch_table))
    return type("ByValuePickler", (cloudpickle.Pickler,), {"dispatch_table": reducers})


def _without_files(reducers: Mapping[type, Any]) -> dict[type, Any]:
    """Open files do not travel: cloudpickle would read what is left of one, and send that."""
    return {
        cls: reduce for cls, reduce in reducers.items() if not (isinstance(cls, type) and issubclass(cls, io.IOBase))
    }


def may_help(error: BaseException | None) -> bool:
    """Whether pickle may have failed with `error` because it found no name for a function or class."""
    return isinstance(error, pickle.PicklingError | AttributeError) and pickler_class() is not None


def names_main(payload: Payload) -> bool:
    """Whether a pickled call may name something of `__main__`."""
    return payload.has_in_stream(MAIN)


def identity() -> str:
    """Which `__main__` this process runs: equal in processes that run the same script, as far as can be told."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if file:
        told = os.path.realpath(file).encode()
    elif hasattr(sys, "ps1") or hasattr(main, "get_ipython"):
        told = _session
    else:  # `python -c`: the code is there
        told = "\0".join(sys.orig_argv).encode(errors="surrogateescape")
    return hashlib.sha256(told).hexdigest()[:16]
