"""What a received stream or call may name: everything, unless `init_rpc` was told otherwise.

What: the functions here are those through which all names that come from other workers go. Without a rule they are
Python's own. `use` puts those of a `Rules` in their place (`zrpc.wire.listed`, `zrpc.wire.registered`). Call them as
`loading.find(...)`: who keeps one of them keeps the rule of then.

Invariants: under a rule nothing is imported, made or called before the rule has allowed its name. Which rule holds is
decided once, as a worker begins: without one no call is any slower.

Threads: `use` is called before the worker joins its group; the functions, on any thread.

Failure: what is refused raises `NotAllowedError`, which names this worker.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from zrpc.wire.envelope import Buffer


class Rules(Protocol):
    """A rule: the functions that take the place of those of this module."""

    def loads(self, stream: Buffer) -> Any:
        """See `loads`."""

    def load_from(self, file: Any) -> Any:
        """See `load_from`."""

    def find(self, module: str, name: str) -> Any:
        """See `find`."""

    def check(self, module: str, name: str) -> None:
        """See `check`."""

    def check_module(self, module: Any) -> None:
        """See `check_module`."""

    def check_operator(self, namespace: str, name: str) -> None:
        """See `check_operator`."""

    def method(self, value: Any, name: str) -> Any:
        """See `method`."""

    def type_of(self, value: Any) -> Any:
        """See `type_of`."""


loads: Callable[[Buffer], Any] = pickle.loads
"""The value that a pickle stream makes."""
method: Callable[[Any, str], Any] = getattr
"""The method `name` of the value of an RRef, to be called for another worker."""
type_of: Callable[[Any], Any] = type
"""What another worker is told that asks for the type of the value of an RRef."""


def load_from(file: Any) -> Any:
    """The value that the pickle stream in `file` makes."""
    return pickle.Unpickler(file).load()


def find(module: str, name: str) -> Any:
    """What has that qualified name in that module, which is imported if need be."""
    return attrgetter(name)(sys.modules.get(module) or importlib.import_module(module))


def check(module: str, name: str) -> None:
    """Refuse what has that name, if it may not be named. It is not looked up."""


def check_module(module: Any) -> None:
    """Refuse the `nn.Module` that a RemoteModule stands for, if others may not have it run."""


def check_operator(namespace: str, name: str) -> None:
    """Refuse the torch operator `namespace::name`, if it may not be called."""


NAMES = ("loads", "load_from", "find", "check", "check_module", "check_operator", "method", "type_of")
_UNRULED = {name: globals()[name] for name in NAMES}


def use(rules: Rules | None) -> None:
    """From now on `rules` hold in this process; None: none."""
    globals().update(_UNRULED if rules is None else {name: getattr(rules, name) for name in NAMES})
