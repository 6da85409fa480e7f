"""RemoteModule on calls that run in this process."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import zrpc.nn.remote_module as home
from zrpc.errors import NotInitializedError
from zrpc.ids import WorkerInfo
from zrpc.nn import RemoteModule
from zrpc.wire import pickling

if TYPE_CHECKING:
    from torch.jit import Future

# torch deprecates TorchScript, and RemoteModule goes on supporting it for as long as it is there.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class LocalRRef:
    """An RRef whose owner is this process."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def owner(self) -> WorkerInfo:
        return WorkerInfo("w1", 1)

    def local_value(self) -> Any:
        return self.value

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalRRef, (self.value,)


class Calls:
    """Stands in for the calls of zrpc.api: runs the function here and keeps whom it was meant for."""

    def __init__(self) -> None:
        self.targets: list[Any] = []

    def rpc_async(self, to: Any, func: Any, args: Any = (), kwargs: Any = None) -> torch.futures.Future[Any]:
        self.targets.append(to)
        future: torch.futures.Future[Any] = torch.futures.Future()
        try:
            future.set_result(func(*args, **(kwargs or {})))
        except Exception as error:
            future.set_exception(error)  # type: ignore[arg-type]
        return future

    def rpc_sync(self, to: Any, func: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.rpc_async(to, func, args, kwargs).wait()

    def remote(self, to: Any, func: Any, args: Any = (), kwargs: Any = None) -> LocalRRef:
        return LocalRRef(self.rpc_sync(to, func, args, kwargs))


class Sum(nn.Module):
    """Adds a parameter, and can be told to count as many times as it likes."""

    def __init__(self, start: float = 1.0) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.tensor([start]))

    def forward(self, tensor: Tensor, times: int = 1, word: str = "one") -> tuple[str, Tensor]:
        return word, tensor + self.start * times


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    agent = SimpleNamespace(
        options=SimpleNamespace(device_maps={"mapped": {"cpu": "cpu"}}),
        resolve=lambda to: WorkerInfo(to if isinstance(to, str) else f"w{to}", 1),
    )
    monkeypatch.setattr(home, "current_agent", lambda: agent)
    monkeypatch.setattr(home, "RRef", LocalRRef)
    for name in ("rpc_async", "rpc_sync", "remote"):
        monkeypatch.setattr(home, name, getattr(made, name))
    return made


def test_forward_runs_on_the_owner_with_all_arguments(calls: Calls) -> None:
    module = RemoteModule("w1/cpu", Sum, (2.0,))
    assert module.forward(torch.zeros(1), 3, word="three") == ("three", torch.tensor([6.0]))
    assert module.forward_async(torch.zeros(1)).wait() == ("one", torch.tensor([2.0]))
    assert module(torch.zeros(1), times=2)[1].item() == 4.0
    assert calls.targets == ["w1", *[WorkerInfo("w1", 1)] * 3]


@pytest.mark.parametrize(
    ("remote_device", "on", "device"),
    [("w1/cpu", "w1", "cpu"), ("w1", "w1", "cpu"), ("rank:1/cuda:0", 1, "cuda:0"), ("rank:3", 3, "cpu")],
)
@pytest.mark.usefixtures("calls")
def test_where_it_goes(remote_device: str, on: str | int, device: str) -> None:
    module = RemoteModule.init_from_module_rref(remote_device, LocalRRef(Sum()))  # type: ignore[arg-type]
    assert (module.on, module.device, module.is_device_map_set) == (on, device, False)


@pytest.mark.usefixtures("calls")
def test_a_device_map_is_noticed() -> None:
    assert RemoteModule("mapped/cpu", Sum).is_device_map_set


@pytest.mark.parametrize("remote_device", ["cpu", "cuda:1"])
@pytest.mark.usefixtures("calls")
def test_a_device_without_a_worker_is_refused(remote_device: str) -> None:
    with pytest.raises(ValueError, match="names no worker: write '<worker name>/<device>'"):
        RemoteModule(remote_device, Sum)


def test_rpc_must_be_initialized() -> None:
    with pytest.raises(NotInitializedError, match="init_rpc"):
        RemoteModule("w1/cpu", Sum)


@pytest.mark.usefixtures("calls")
def test_something_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expect `module_cls.*returns an instance of <class nn.Module>,.* dict"):
        RemoteModule("w1/cpu", dict)  # type: ignore[arg-type]


@pytest.mark.usefixtures("calls")
def test_parameters_are_referenced_and_not_copied() -> None:
    module = RemoteModule("w1/cpu", Sum)
    remote_module = module.get_module_rref().local_value()
    assert [rref.local_value() for rref in module.remote_parameters()] == [remote_module.start]
    nested = RemoteModule("w1/cpu", nn.Sequential, (Sum(),))
    assert nested.remote_parameters(recurse=False) == []
    assert len(nested.remote_parameters()) == 1


@pytest.mark.usefixtures("calls")
def test_training_mode_is_the_remote_modules() -> None:
    module = RemoteModule("w1/cpu", Sum)
    assert module.eval() is module
    assert not module.get_module_rref().local_value().training
    assert not module.training
    module.train()
    assert module.get_module_rref().local_value().training
    assert module.training


@pytest.mark.parametrize("name", [*home._UNSUPPORTED, "parameters"])
@pytest.mark.usefixtures("calls")
def test_what_reaches_into_the_module_is_refused(name: str) -> None:
    module = RemoteModule("w1/cpu", Sum)
    with pytest.raises(ValueError, match=f"Method ``{name}`` not supported for RemoteModule"):
        getattr(module, name)()


@pytest.mark.usefixtures("calls")
def test_rpc_carries_the_reference_and_no_attributes_of_the_user() -> None:
    module = RemoteModule("w1/cpu", Sum, (2.0,))
    module.note = 1
    arrived = pickling.loads(pickling.dumps(module))
    assert list(arrived.__dict__) == [*home._REMOTE_MODULE_PICKLED_ATTRIBUTES, "forward_async", "forward"]
    assert (arrived.on, arrived.device, arrived.is_scriptable) == ("w1", "cpu", False)
    assert arrived(torch.zeros(1))[1].item() == 2.0
    assert repr(arrived) == "RemoteModule(on='w1', device='cpu')"


@pytest.mark.usefixtures("calls")
def test_nothing_else_pickles_it() -> None:
    module = RemoteModule("w1/cpu", Sum)
    with pytest.raises(RuntimeError, match="can only be pickled when using RPC"):
        copy.deepcopy(module)


# ---- TorchScript -----------------------------------------------------------------------------------------------

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):

    @torch.jit.interface
    class SumInterface:
        """What Sum does, for TorchScript."""

        def forward(self, tensor: Tensor, times: int = 1, word: str = "one") -> tuple[str, Tensor]:
            pass

    @torch.jit.interface
    class RemoteSumInterface:
        """What a RemoteModule of Sum does, for TorchScript."""

        def forward(self, tensor: Tensor, times: int = 1, word: str = "one") -> tuple[str, Tensor]:
            pass

        def forward_async(self, tensor: Tensor, times: int = 1, word: str = "one") -> Future[tuple[str, Tensor]]:
            pass


def use(module: SumInterface) -> tuple[str, Tensor]:
    """A program to compile."""
    word, tensor = module.forward(torch.ones(1), 2, "two")
    return word + "!", tensor * 10


def use_async(module: RemoteSumInterface) -> tuple[str, Tensor]:
    """Another: two calls under way at once."""
    first, second = module.forward_async(torch.ones(1), 2, "two"), module.forward_async(torch.ones(1), 3, "three")
    word, tensor = first.wait()
    other_word, other_tensor = second.wait()
    return word + other_word, tensor + other_tensor


def compiled_module() -> Any:
    return torch.jit.script(RemoteModule("w1/cpu", Sum, (2.0,), _module_interface_cls=SumInterface))


@pytest.mark.usefixtures("calls")
def test_compiled_programs_call_it() -> None:
    module = compiled_module()
    assert torch.jit.script(use)(module) == ("two!", torch.tensor([50.0]))
    assert torch.jit.script(use_async)(module) == ("twothree", torch.tensor([12.0]))
    assert module.forward(torch.ones(1), 1, "one") == ("one", torch.tensor([3.0]))


@pytest.mark.usefixtures("calls")
def test_an_uncompiled_scriptable_one_works_too() -> None:
    module = RemoteModule("w1/cpu", Sum, _module_interface_cls=SumInterface)
    assert module.is_scriptable
    assert module.forward(torch.ones(1)) == ("one", torch.tensor([2.0]))
    assert module.forward_async(torch.ones(1)).wait() == ("one", torch.tensor([2.0]))


@pytest.mark.usefixtures("calls")
def test_a_compiled_one_does_not_travel_and_says_what_does() -> None:
    scriptable = RemoteModule("w1/cpu", Sum, _module_interface_cls=SumInterface)
    for module in (scriptable, torch.jit.script(scriptable)):
        with pytest.raises(RuntimeError, match=r"Passing a script RemoteModule over RPC.*module_rref"):
            pickling.dumps([module])


@pytest.mark.usefixtures("calls")
def test_another_one_can_be_made_on_the_same_script_module() -> None:
    first = RemoteModule("w1/cpu", Sum, (2.0,), _module_interface_cls=SumInterface)
    second = RemoteModule.init_from_module_rref("w1/cpu", first.get_module_rref(), _module_interface_cls=SumInterface)
    assert torch.jit.script(use)(torch.jit.script(second)) == ("two!", torch.tensor([50.0]))


def test_other_script_modules_travel() -> None:
    arrived = pickling.loads(pickling.dumps(torch.jit.script(Sum(4.0))))
    assert arrived(torch.ones(1)) == ("one", torch.tensor([5.0]))


@pytest.mark.usefixtures("calls")
def test_an_interface_must_be_one() -> None:
    with pytest.raises(ValueError, match=r"must be a type object decorated by @torch.jit.interface"):
        RemoteModule("w1/cpu", Sum, _module_interface_cls=Sum)
