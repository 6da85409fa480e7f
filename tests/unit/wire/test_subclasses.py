"""Tensors that are not plain arrive as what they are; torch operators get what torch would give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from tests.unit.wire.travel import travel
from zrpc.errors import SerializationError
from zrpc.wire import pickling, values
from zrpc.wire.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

_torch: Any = torch
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # torch.func uses it
]


class Tagged(torch.Tensor):
    """A subclass, which torch functions return objects of."""

    tag: str


class Slotted(torch.Tensor):
    """One with a slot."""

    __slots__ = ("slot",)
    slot: int


class Guarded(torch.Tensor):
    """One whose functions fail: nothing of it is called on the way."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called")


class Weight(nn.Parameter):
    """A subclass of a parameter."""


class Saved(torch.Tensor):
    """One that says itself how it is pickled."""

    def __reduce_ex__(self, protocol: object) -> Any:
        return make_saved, (self.detach().as_subclass(torch.Tensor) + 1,)


def make_saved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(Saved)


CLASSES: list[type[torch.Tensor]] = [torch.Tensor, Tagged, Slotted, Guarded, nn.Parameter, Weight]

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t(),
    "size 1": lambda t: t.as_strided((1, 3), (99, 1)),
    "size 0": lambda t: t.as_strided((0, 3), (7, 2)),
    "0-dim": lambda t: t[1, 2],
    "meta": lambda t: t.to("meta").t(),
    "conjugate": lambda t: t.conj() if t.is_complex() else t,
    "conjugate meta": lambda t: t.to("meta").conj() if t.is_complex() else t,
    "negative": lambda t: _torch._neg_view(t) if t.is_floating_point() else t,
}

Path = tuple[str, "Callable[[Any], Any]"]


def as_argument(value: Any) -> Any:
    return pickling.loads(travel(pickling.dumps_call((print, (value,), {}))))[1][0]


def as_result(value: Any) -> Any:
    return pickling.loads(travel(pickling.dumps(value)))


def as_operand(value: Any) -> Any:
    return values.unpack(travel(values.pack([value])))[0]


def made(cls: type[torch.Tensor], tensor: torch.Tensor, requires_grad: bool) -> Any:
    if cls is torch.Tensor:
        return tensor.detach().requires_grad_(requires_grad)
    return torch.Tensor._make_subclass(cls, tensor, requires_grad)


def described(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that is asked of a tensor but its class and elements."""
    with _torch._C.DisableTorchFunctionSubclass():
        properties = tensor.dtype, tensor.shape, tensor.device, tensor.layout, tensor.requires_grad, tensor.is_leaf
        return *properties, tensor.stride(), tensor.is_conj(), tensor.is_neg()


def example(dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"\1" * dtype.itemsize * 24), dtype=dtype).view(4, 6)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", DTYPES)
def test_every_class_dtype_and_view_keeps_its_properties_on_every_path(name: str, view: str) -> None:
    """Class, dtype, shape, strides, device, conjugation and being a leaf that requires grad are as they were."""
    base = VIEWS[view](example(DTYPES[name]))
    for cls in CLASSES:
        for requires_grad in {False, base.is_floating_point() or base.is_complex()}:
            before = made(cls, base, requires_grad)
            for path in (as_argument, as_result):
                after = path(before)
                assert type(after) is cls
                assert described(after) == described(before)
            operand = as_operand(before)
            assert type(operand) is torch.Tensor
            with _torch._C.DisableTorchFunctionSubclass():
                assert described(operand) == described(before)


PARTS: dict[str, Callable[[], torch.Tensor]] = {
    "coo": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "coo, meta": lambda: torch.eye(4).to_sparse().to("meta"),
    "csr, meta": lambda: torch.eye(4).to_sparse_csr().to("meta"),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", PARTS)
def test_sparse_tensors_of_every_class_stay_sparse(kind: str, requires_grad: bool) -> None:
    """Also on the meta device."""
    for cls in (torch.Tensor, Tagged, nn.Parameter):
        before = made(cls, PARTS[kind](), requires_grad)
        for path in (as_argument, as_result):
            after = path(before)
            assert type(after) is cls
            assert (after.layout, after.device, after.shape, after._nnz()) == (
                before.layout,
                before.device,
                before.shape,
                before._nnz(),
            )
            assert after.is_leaf
            assert after.requires_grad is requires_grad


def test_a_quantized_subclass_arrives() -> None:
    """A subclass may be of what has no plain memory."""
    before = torch.quantize_per_tensor(torch.rand(3, 4), 0.1, 3, torch.quint8).as_subclass(Tagged)
    after = as_argument(before)
    assert type(after) is Tagged
    assert torch.equal(after.dequantize(), before.dequantize())


def test_attributes_travel() -> None:
    """Those of plain tensors, of subclasses and of parameters, in `__dict__` and in slots."""
    for before in (torch.ones(2), torch.ones(2).as_subclass(Tagged), nn.Parameter(torch.ones(2))):
        anything: Any = before
        anything.tag, anything.me = "a", before
        for path in (as_argument, as_result):
            after = path(before)
            assert after.tag == "a"
            assert after.me is after
    slotted: Any = torch.ones(2).as_subclass(Slotted)
    slotted.slot, slotted.other = 5, torch.ones(1)
    after = as_result(slotted)
    assert (after.slot, after.other) == (5, torch.ones(1))


def test_an_attribute_of_a_plain_tensor_that_cannot_be_pickled_stays() -> None:
    """As all attributes do on torch; the tensor travels, and so do its other attributes."""
    tensor: Any = torch.ones(2)
    tensor.hook, tensor.tag = lambda: 1, "a"
    after = as_argument(tensor)
    assert after.tag == "a"
    assert not hasattr(after, "hook")


@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_of_a_module_arrives_as_one(persistent: bool) -> None:
    """`nn.Buffer` makes plain tensors with attributes."""
    before = nn.Buffer(torch.ones(2), persistent=persistent)
    for path in (as_argument, as_result):
        after = path(before)
        assert isinstance(after, nn.Buffer)
        assert after.persistent is persistent  # type: ignore[attr-defined]


def test_uninitialized_parameters_and_buffers_keep_what_they_will_be() -> None:
    """Class, dtype, device, persistence; a lazy module of float64 is one where it arrives."""
    parameter = nn.UninitializedParameter(requires_grad=False, dtype=torch.float64, device="meta")  # type: ignore[no-untyped-call]
    after = as_argument(parameter)
    assert type(after) is nn.UninitializedParameter
    assert (after.dtype, after.device.type, after.requires_grad) == (torch.float64, "meta", False)
    buffer = as_result(nn.UninitializedBuffer(dtype=torch.int8, persistent=False))  # type: ignore[no-untyped-call]
    assert type(buffer) is nn.UninitializedBuffer
    assert (buffer.dtype, buffer.persistent) == (torch.int8, False)
    assert as_argument(nn.LazyLinear(3, dtype=torch.float64))(torch.ones(2, 4, dtype=torch.float64)).shape == (2, 3)


def test_memory_that_is_shared_stays_shared_whatever_the_classes() -> None:
    """A parameter, a plain view of it and a subclass of its memory."""
    parameter = nn.Parameter(torch.ones(4))
    data = parameter.data
    first, view, tagged, again = as_result([parameter, data[1:], data.as_subclass(Tagged), parameter])
    view[0] = 7
    assert first[1] == tagged[1] == 7
    assert again is first


def test_tied_parameters_stay_tied() -> None:
    """One parameter of two modules arrives as one."""
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = one.weight
    after = as_argument([one, other])
    assert after[0].weight is after[1].weight


def test_a_subclass_with_a_way_of_its_own_is_pickled_in_that_way() -> None:
    """Its `__reduce_ex__` decides."""
    after = as_result(torch.ones(2).as_subclass(Saved))
    assert type(after) is Saved
    assert after.tolist() == [2, 2]


def test_subclasses_made_of_other_tensors_travel_by_torchs_rules() -> None:
    """They have no memory of their own: no operator takes them packed, pickle carries their parts."""
    pair = TwoTensor(torch.ones(2), torch.zeros(2)).requires_grad_()
    after = as_argument(pair)
    assert type(after) is TwoTensor
    assert after.requires_grad
    assert torch.equal(after.b, torch.zeros(2))
    ragged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    assert [part.shape for part in as_argument(ragged).unbind()] == [(2, 3), (1, 3)]
    for one in (pair, ragged):
        with pytest.raises(values.UnpackableError):
            values.pack([one])


@pytest.mark.parametrize("nbytes", [12, 20_000])
def test_tensors_inside_transforms_are_refused_in_words(nbytes: int) -> None:
    """What torch.func passes to a function stands for others, and has no data."""
    refused = []

    def try_to_send(x: torch.Tensor) -> torch.Tensor:
        for path in (as_argument, as_result, as_operand):
            with pytest.raises(SerializationError, match=r"function transform of torch\.func .* Make remote calls"):
                path(x)
            refused.append(path)
        return x.sum()

    x = torch.ones(nbytes // 4)
    func: Any = torch.func
    func.grad(try_to_send)(x)
    func.vmap(try_to_send)(x[None])
    func.functionalize(try_to_send)(x)
    func.jvp(try_to_send, (x,), (x,))
    try_to_send(_torch._to_functional_tensor(x))
    assert len(refused) == 15


def test_tensors_of_a_traced_program_are_refused_in_words() -> None:
    """Fake and functional tensors have no data."""
    with FakeTensorMode():  # type: ignore[no-untyped-call]
        fake, module = torch.ones(3), nn.Linear(2, 2)
    with FunctionalTensorMode():  # type: ignore[no-untyped-call]
        functional = FunctionalTensor.to_functional(torch.ones(3))  # type: ignore[no-untyped-call]
    for value in (fake, [functional], module):
        with pytest.raises(SerializationError, match=r"(Fake|Functional)Tensor cannot be sent.*with real tensors"):
            as_argument(value)


def test_what_is_cut_off_is_noted() -> None:
    """A payload knows whether something that requires grad travels without its graph."""
    parameter = nn.Parameter(torch.ones(2))
    cut_off = [parameter, [parameter], nn.Linear(1, 1), torch.ones(2).as_subclass(Tagged).requires_grad_()]
    assert all(pickling.dumps(value).is_cut_off for value in cut_off)
    kept: list[Any] = [parameter.detach(), [parameter * 1], nn.ReLU(), nn.Parameter(torch.ones(2), requires_grad=False)]
    assert not any(pickling.dumps(value).is_cut_off for value in kept)
    assert not pickling.dumps([parameter], keep_graph=True).is_cut_off


def test_operators_get_part_of_the_graph() -> None:
    """A tensor of a subclass travels as a plain one whose gradients are its own, also where grad mode is off."""
    for leaf in (nn.Parameter(torch.ones(2)), torch.ones(2).as_subclass(Tagged).requires_grad_()):
        with torch.no_grad():
            payloads = [values.pack([{"a": (leaf, leaf)}]), pickling.dumps([leaf, {1}], keep_graph=True)]
        for payload in payloads:
            (sent,) = payload.tensors
            assert sent.requires_grad
            gradients = torch.autograd.grad((sent * 3).sum(), leaf)
            assert gradients[0].tolist() == [3, 3]
