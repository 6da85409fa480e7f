"""The rule of a list of modules: what streams, calls and proxies may name, and that nothing else is even imported."""

from __future__ import annotations

import collections
import copyreg
import datetime
import functools
import importlib
import io
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.unit.wire import allowed_module
from zrpc.errors import NotAllowedError, SerializationError, ZrpcError
from zrpc.wire import loading, pickling, streams
from zrpc.wire.allowed_names import ALLOWED_NAMES
from zrpc.wire.listed import ListedRules
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULE = allowed_module.__name__
RULES = ListedRules("callee", [MODULE, "some.package"])


@pytest.fixture
def _listed() -> Iterator[None]:
    """The rule holds in this process."""
    loading.use(RULES)
    pickling.use(pickling.CHECKED)
    yield
    loading.use(None)
    pickling.use(pickling.PICKLE)


def naming(module: str, name: str) -> bytes:
    """A stream that is nothing but that name."""
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + b"\x93."


class Reduced:
    """Is unpickled as its fields say."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


# ---- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"), ("builtins", "exec"), ("builtins", "__import__"), ("builtins", "open"),
        ("builtins", "compile"), ("builtins", "setattr"), ("os", "system"), ("posix", "system"), ("operator", "call"),
        ("subprocess", "Popen"), ("functools", "partial"), ("importlib", "import_module"), ("pickle", "loads"),
        ("torch", "load"), ("torch", "hub.load"), ("torch.serialization", "load"), ("torch.nn", "Linear"),
        ("torch", "ops.load_library"), ("numpy", "load"), ("numpy.lib.npyio", "load"), ("copyreg", "_reconstructor"),
        ("zrpc.wire.pickling", "loads"), ("zrpc.api", "rpc_sync"), ("zrpc.lifecycle", "init_rpc"),
        ("some", "package.f"), ("some.packages", "f"), (MODULE + "s", "f"), ("", "f"),
        # What a listed module has imported from elsewhere is not its own.
        (MODULE, "os.system"), (MODULE, "os"), (MODULE, "system"), (MODULE, "partial"), (MODULE, "Own.kept"),
        (MODULE, "own.__globals__"), (MODULE, "own.__call__"), (MODULE, "__builtins__"), (MODULE, "TABLE"),
        (MODULE, "Own.__class__"), (MODULE, "Own.__subclasses__"), (MODULE, "__loader__"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_listed_is_refused(module: str, name: str) -> None:
    """As a stream and as a call by name; the error says which worker refuses what, and what to do."""
    for attempt in (lambda: RULES.loads(naming(module, name)), lambda: RULES.find(module, name)):
        with pytest.raises(NotAllowedError, match=r"callee refuses .*allow") as caught:
            attempt()
        assert isinstance(caught.value, ZrpcError)


def test_a_refused_module_is_not_imported() -> None:
    """Importing would run its code already."""
    name = "tests.unit.wire.never_imported"
    with pytest.raises(NotAllowedError):
        RULES.loads(naming(name, "f"))
    assert name not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


@pytest.mark.parametrize("name", ["own", "Own", "Own.method", "Own.Inner", "Hue.RED"])
def test_what_a_listed_module_defines_is_found(name: str) -> None:
    """Functions, classes and what is in classes."""
    found: Any = allowed_module
    for part in name.split("."):
        found = getattr(found, part)
    assert RULES.find(MODULE, name) is found
    assert RULES.loads(naming(MODULE, name)) is found


@pytest.mark.parametrize(("module", "name"), sorted(ALLOWED_NAMES))
def test_each_name_of_the_table_leads_to_a_class_a_constant_or_a_function(module: str, name: str) -> None:
    """No name of the table is a module, and none opens what a caller names."""
    found = RULES.find(module, name)
    assert not isinstance(found, type(sys))
    assert found not in (eval, exec, open, getattr, setattr, compile, print, input, type, map, vars)


def test_the_table_has_no_whole_packages() -> None:
    """It is pairs: torch, numpy and builtins as such are not allowed."""
    for module in ("torch", "numpy", "builtins", "zrpc", "collections"):
        with pytest.raises(NotAllowedError):
            RULES.check(module, "anything")


# ---- streams ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Reduced(subprocess.getoutput, ("true",)), Reduced(functools.partial, (print,)),
        [{"a": (Reduced(subprocess.getoutput, ("true",)),)}], datetime.timedelta(1), print, subprocess.Popen,
        Reduced(getattr, ("text", "format")), Reduced(type, ("New", (), {})),
        Reduced(getattr, (allowed_module.Own, "__subclasses__")), Reduced(getattr, (allowed_module.Own(), "held")),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("_listed")
def test_a_value_that_names_something_else_is_refused(value: Any) -> None:
    """Wherever it is in the value, in one piece and in several, and as an attribute of a tensor or an exception."""
    sent = pickle.dumps(value)
    with pytest.raises(NotAllowedError):
        loading.loads(sent)
    with pytest.raises(NotAllowedError):
        loading.load_from(streams.Reader([sent[:5], sent[5:]]))
    with pytest.raises(NotAllowedError):
        pickling.loads(pickling.dumps([value]))
    with pytest.raises(NotAllowedError):
        pickling.loads(pickling.dumps([value, b"x" * (1 << 20)]))
    tensor = torch.ones(1)
    tensor.note = value  # type: ignore[attr-defined]
    with pytest.raises(NotAllowedError):
        pickling.loads(pickling.dumps([tensor]))


@pytest.mark.usefixtures("_listed")
def test_an_exception_arrives_without_what_its_parts_name() -> None:
    """Its own class, its arguments and its attributes are checked one by one; its text arrives."""
    error = ValueError("text", Reduced(subprocess.getoutput, ("true",)))
    error.note = Reduced(subprocess.getoutput, ("true",))  # type: ignore[attr-defined]
    made = pickling.loads(pickling.dumps([error]))[0]
    assert isinstance(made, ValueError)
    assert not hasattr(made, "note")
    foreign = pickling.loads(pickling.dumps([subprocess.CalledProcessError(1, "true")]))[0]
    assert type(foreign) is not subprocess.CalledProcessError
    assert "true" in str(foreign)
    assert type(pickling.loads(pickling.dumps([allowed_module.OwnError(1)]))[0]) is allowed_module.OwnError


def test_a_stream_may_not_change_what_it_names() -> None:
    """Not a function, not a class: only what it has made."""
    for name in ("own", "Own"):
        stream = naming(MODULE, name)[:-1] + pickle.dumps((None, {"mark": 1}), 4)[2:-1] + b"b."
        with pytest.raises(NotAllowedError, match="change"):
            RULES.loads(stream)
        assert not hasattr(getattr(allowed_module, name), "mark")


def test_the_registry_of_copyreg_is_no_way_around() -> None:
    """Its codes name objects too, and pickle keeps what it has found for them."""
    copyreg.add_extension("subprocess", "getoutput", 240)
    try:
        stream = pickle.dumps(subprocess.getoutput, 2)
        assert pickle.loads(stream) is subprocess.getoutput
        with pytest.raises(NotAllowedError):
            RULES.loads(stream)
    finally:
        copyreg.remove_extension("subprocess", "getoutput", 240)


@pytest.mark.usefixtures("_listed")
def test_plain_things_arrive_as_ever() -> None:
    """Tensors and what torch makes of them, arrays, collections, constants, and what listed modules define."""
    parameter = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    values = [
        1, None, "a", b"b" * (1 << 20), bytearray(b"c"), {1}, frozenset([1]), 1j, range(3), slice(1, 2), ..., int,
        collections.OrderedDict(a=1), collections.deque([1]), collections.defaultdict(list), torch.float32,
        torch.device("cpu"), torch.Size([1]), torch.strided, torch.channels_last, type(None), np.dtype("f4"),
        allowed_module.Hue.RED, allowed_module.Own, allowed_module.own, ValueError,
    ]  # fmt: skip
    assert pickling.loads(pickling.dumps(values)) == values
    made = pickling.loads(pickling.dumps([parameter, np.arange(3), np.float32(2), torch.ones(2).untyped_storage()]))
    assert type(made[0]) is torch.nn.Parameter
    assert made[1].tolist() == [0, 1, 2]
    assert made[2] == 2
    own = pickling.loads(pickling.dumps([allowed_module.Own()]))[0]
    assert own.held == 5
    assert pickling.loads(pickling.dumps([own.method]))[0]() == 5
    assert pickling.loads(pickling.dumps([allowed_module.Own.of_class]))[0]() == "Own"


@pytest.mark.usefixtures("_listed")
def test_a_call_by_name_is_checked() -> None:
    """Calls of plain functions with plain arguments are not pickled, and name their function all the same."""
    assert pickling.loads(pickling.dumps_call((allowed_module.own, (1,), {}))) == (allowed_module.own, (1,), {})
    call = pickling.dumps_call((subprocess.getoutput, ("true",), {}))
    assert bytes(call.data[: len(pickling.CALL)]) == pickling.CALL
    with pytest.raises(NotAllowedError, match=r"subprocess\.getoutput"):
        pickling.loads(call)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.usefixtures("_listed")
def test_compiled_code_needs_its_module_and_saved_code_needs_torch_jit() -> None:
    """A TorchScript function is named like any other; a saved module has code in it."""
    compiled: Any = torch.jit.script(allowed_module.to_compile)
    call = pickling.dumps((compiled, (torch.ones(1),), {}))
    assert pickling.loads(call)[0].qualified_name == compiled.qualified_name
    module = torch.jit.script(torch.nn.ReLU())
    with pytest.raises(NotAllowedError, match=r"torch\.jit"):
        pickling.loads(pickling.dumps([module]))
    loading.use(ListedRules("callee", ["torch.jit"]))
    assert pickling.loads(pickling.dumps([module]))[0](torch.ones(1)).item() == 1
    with pytest.raises(NotAllowedError, match="to_compile"):
        pickling.loads(call)


def test_without_a_rule_everything_is_named_as_ever() -> None:
    """The functions are pickle's own again once the rule is gone."""
    loading.use(RULES)
    loading.use(None)
    assert loading.loads is pickle.loads
    assert loading.method is getattr
    assert pickling.loads(pickling.dumps([datetime.timedelta(1)])) == [datetime.timedelta(1)]


@pytest.mark.usefixtures("_listed")
def test_reducers_change_nothing_but_tensors() -> None:
    """What stands for attributes of tensors in streams takes no other object."""
    tensor = torch.ones(1)
    tensor.note = 1  # type: ignore[attr-defined]
    stream = bytes(pickling.dumps([tensor]).data)
    assert b"_set_attributes" in stream
    found = RULES.find("zrpc.wire.reducers", "_set_attributes")
    with pytest.raises(pickle.UnpicklingError):
        found(allowed_module.own, {"mark": 1})
    with pytest.raises(SerializationError):
        RULES.find("zrpc.wire.subclasses", "set_state")(allowed_module.Own, {"mark": 1})


# ---- methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name"),
    [(torch.ones(2), "sum"), ([1], "append"), ({1: 2}, "get"), ({1: 2}, "__getitem__"),
     (allowed_module.Own(), "method"), (allowed_module.Own(), "of_class"), (allowed_module.Own(), "cached")],
)  # fmt: skip
def test_methods_of_plain_values_and_of_listed_classes_may_be_called(value: Any, name: str) -> None:
    """On the values of RRefs."""
    assert callable(RULES.method(value, name))


@pytest.mark.parametrize(
    ("value", "name"),
    [(torch.ones(2), "_make_subclass"), (torch.ones(2), "__reduce_ex__"), (torch.ones(2), "__class__"),
     ("text", "format"), (io.StringIO(), "read"), (allowed_module, "own"), (np.ones(2), "tofile"), (print, "__call__"),
     (allowed_module.Own(), "held"), (allowed_module.Own(), "computed"), (allowed_module.Own(), "kept"),
     (allowed_module.Own(), "_private"), (allowed_module.Own(), "__getattribute__"), (allowed_module.own, "__call__"),
     (allowed_module.Own(), "__init__"), (allowed_module.Own(), 1)],
)  # fmt: skip
def test_other_attributes_may_not(value: Any, name: Any) -> None:
    """Private and special ones, properties, what an object holds, and those of other classes."""
    with pytest.raises(NotAllowedError):
        RULES.method(value, name)


def test_operators_of_torch_that_open_no_files_may_be_called() -> None:
    """Those of other namespaces are listed as torch.ops.NAMESPACE."""
    RULES.check_operator("aten", "add")
    ListedRules("callee", ["torch.ops.mylib"]).check_operator("mylib", "op")
    for namespace, name in (("aten", "from_file"), ("aten", "save"), ("mylib", "op"), ("debugprims", "load_tensor")):
        with pytest.raises(NotAllowedError, match=f"torch.ops.{namespace}"):
            RULES.check_operator(namespace, name)


def test_a_damaged_stream_is_a_serialization_error() -> None:
    """As without a rule."""
    loading.use(RULES)
    try:
        with pytest.raises(SerializationError):
            pickling.loads(Payload(b"\x80\x05damaged"))
    finally:
        loading.use(None)
