"""RRefs in compiled code: what stands for one there, and the Python functions that compiled code calls with it.

A *link* is an empty tensor that carries the RRef as a Python attribute of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zrpc import interrupts
from zrpc.agent.future import Future, settle
from zrpc.agent.scripted import ScriptValue
from zrpc.compat.script_threads import may_block
from zrpc.compat.script_views import Wrap, view_of
from zrpc.rref import travel
from zrpc.rref.rref import RRef
from zrpc.wire.pickling import register_reducer

if TYPE_CHECKING:
    from zrpc.rref.cell import Cell


class ReturnedRRef(RRef[Any]):
    """An RRef that compiled code returned: another object for the same fork, which the first one gives up."""

    _original: RRef[Any]

    @property
    def _script_link(self) -> torch.Tensor:
        return link_of(self._original)

    @_script_link.setter
    def _script_link(self, link: torch.Tensor) -> None:  # TorchScript sets it on an object made without __init__
        self._original = original = rref_of(link)
        vars(self).update({name: value for name, value in vars(original).items() if name != "_original"})

    @interrupts.uninterrupted
    def __del__(self) -> None:
        """The original says that it goes."""


def _reduce_returned(rref: ReturnedRRef) -> Any:
    return travel.reduce(rref._original)


register_reducer(ReturnedRRef, _reduce_returned)


def link_of(rref: RRef[Any]) -> torch.Tensor:
    """What stands for `rref` in compiled code."""
    link = torch.empty(0)
    link.__dict__["rref"] = rref
    return link


def rref_of(link: torch.Tensor) -> RRef[Any]:
    """The RRef that compiled code has as `link`."""
    found: RRef[Any] = link.__dict__["rref"]
    return found


def fetch(link: torch.Tensor, timeout: float) -> Any:
    rref = rref_of(link)
    if not may_block():
        return handed_on(rref.to_here_async(timeout))
    done: Future[Any] = Future()
    settle(done, lambda: rref.to_here(timeout))
    return handed_on(done)


def handed_on(future: Future[Any]) -> Any:
    """A future for `future` itself, once that is done: compiled code takes no errors of Python from a future."""
    done: torch.futures.Future[Any] = torch.futures.Future()
    if future.done():
        done.set_result(future)
    else:
        future.add_done_callback(done.set_result)
    return done


def take(done: Future[Any]) -> Any:
    """The value of a future that is done, or its error."""
    return done.value()


def refuse() -> torch.Tensor:
    raise RuntimeError(
        "RRef jit pickling is only allowed inside RPC calls: an RRef cannot be saved to a file; save the value that "
        "to_here() gives"
    )


def kept_of(link: torch.Tensor, timeout: float, wrap: Wrap) -> Any:
    cell = _owned(link, timeout)
    kept = cell.kept()
    if type(kept) is ScriptValue:
        return kept.future
    view = cell.view(lambda value: view_of(value, wrap))
    assert view is not None
    return view.future()


def local_value(link: torch.Tensor, timeout: float, _: Wrap) -> Any:
    return _owned(link, timeout).kept()


def _owned(link: torch.Tensor, timeout: float) -> Cell:
    rref = rref_of(link)
    if not rref.is_owner():
        raise RuntimeError(
            f"Can't call RRef.local_value() on a non-owner RRef: call it on {rref.owner()}; to_here() copies the value"
        )
    return rref._owned(timeout)


def end(link: torch.Tensor) -> int:
    """A compiled function that was given the RRef is over."""
    rref = rref_of(link)
    view = rref._owned().view() if rref.is_owner() else None
    if view is not None:
        view.write_back()
    return 0
