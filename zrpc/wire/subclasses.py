"""How tensors travel that are not plain: subclasses, `nn.Parameter` among them, and tensors with attributes.

Torch operators and what they answer know only plain tensors, as in torch: `values.plain` makes one of the same memory
and graph. Everywhere else an object of a subclass arrives as one, with its attributes; its graph stays behind, and the
payload notes that if there was one. Its memory goes to the tensor table as a plain tensor, so it may be shared with
others and be of any dtype, which torch's own way of pickling subclasses does not know to do.

Classes that have their own `__reduce_ex__`, and those with a `__torch_dispatch__`, which may have no memory at all,
pickle by their own rules. Importing this module is what makes all of these travel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter

from zrpc.errors import SerializationError
from zrpc.wire import reducers
from zrpc.wire.values import has_memory, plain

if TYPE_CHECKING:
    from collections.abc import Callable

_torch: Any = torch  # parts of it are untyped
_Uninitialized: Any = _torch.nn.parameter.UninitializedTensorMixin
_RULES_OF_TORCH = (torch.Tensor.__reduce_ex__, Parameter.__reduce_ex__, _Uninitialized.__reduce_ex__)
_STAND_INS = ("torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor")
"""Modules of classes whose objects stand for tensors while torch looks at a program."""


def _reducer_of(cls: type) -> Callable[[Any], Any]:
    if cls.__module__ in _STAND_INS:
        return _refuse
    if has_memory(cls):
        return _reduce if cls.__reduce_ex__ in _RULES_OF_TORCH else _reduce_by_its_rules
    return _reduce_by_its_rules


def _refuse(tensor: torch.Tensor) -> Any:
    raise SerializationError(
        f"a {type(tensor).__name__} cannot be sent: it has no data, but stands for a tensor while torch traces a "
        "program (torch.compile, torch.export). Make remote calls outside of what is traced, with real tensors"
    )


def _reduce_by_its_rules(tensor: torch.Tensor) -> Any:
    sent = plain(tensor) if reducers.is_graph_kept() else None
    if sent is not None:
        return reducers.reduce_tensor(sent)
    if tensor.requires_grad:
        reducers.note_cut_off()
    return tensor.__reduce_ex__(5)  # type: ignore[no-untyped-call]


def _reduce(tensor: torch.Tensor) -> Any:
    sent = plain(tensor) if reducers.is_graph_kept() else None
    if sent is not None:
        return reducers.reduce_tensor(sent)
    with _torch._C.DisableTorchFunctionSubclass():
        memory, requires_grad = tensor.detach(), tensor.requires_grad
    if requires_grad:
        reducers.note_cut_off()
    state = tensor.__getstate__()
    return _make, (type(tensor), memory, requires_grad), state or None, None, None, set_state


def _make(cls: type[torch.Tensor], memory: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    return torch.Tensor._make_subclass(cls, memory, requires_grad)


def set_state(tensor: torch.Tensor, state: Any) -> None:
    """Give `tensor` the attributes that `__getstate__` gave."""
    if not isinstance(tensor, torch.Tensor):
        raise SerializationError(f"the state of a tensor came for a {type(tensor).__name__}")
    set_own: Any = type(tensor).__setstate__
    if set_own is torch.Tensor.__setstate__:
        _torch._utils._set_obj_state(tensor, state)
    else:
        set_own(tensor, state)


reducers.register_base(torch.Tensor, _reducer_of)
