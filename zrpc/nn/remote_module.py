"""RemoteModule: an `nn.Module` whose forward runs on another worker.

The module itself lives behind an RRef on its owner; what the user holds is a small local stand-in. Calls go out as
ordinary remote calls, so distributed autograd records them and the gradients find their way back by themselves.

The stand-in can be sent to other workers by RPC: what travels is the RRef and where the module is (attributes that a
user adds stay behind). It cannot be pickled in any other way, because the owner would not know of the copy.
"""

from __future__ import annotations

import functools
import io
import types
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.distributed.remote_device import _remote_device
from torch.jit import RecursiveScriptModule

from zrpc.agent.current import current_agent
from zrpc.api import remote, rpc_async, rpc_sync
from zrpc.exposed import expose
from zrpc.nn import scripting
from zrpc.rref.rref import RRef
from zrpc.wire import carried, loading
from zrpc.wire.reducers import register_reducer

if TYPE_CHECKING:
    from collections.abc import Callable

_REMOTE_MODULE_PICKLED_ATTRIBUTES = (
    "on",
    "device",
    "is_device_map_set",
    "is_scriptable",
    "generated_methods",
    "module_rref",
)
"""The attributes that a RemoteModule has on arrival at another worker, beside its methods; in this order."""

# fmt: off
_UNSUPPORTED = (
    "register_buffer", "register_parameter", "add_module", "apply", "cuda", "ipu", "xpu", "cpu", "type",
    "float", "double", "half", "bfloat16", "to", "register_backward_hook", "register_forward_pre_hook",
    "register_forward_hook", "state_dict", "load_state_dict", "named_parameters", "buffers", "named_buffers",
    "children", "named_children", "modules", "named_modules", "requires_grad_", "zero_grad", "share_memory",
    "extra_repr",
)
# fmt: on
"""Methods of `nn.Module` that would have to reach into the module itself, and are not carried over."""


class RemoteModule(nn.Module):
    """An `nn.Module` that is made, and runs its forward, on another worker.

    `forward` waits for the result; `forward_async` returns a future of it. Both take what the forward of the module
    takes. If the module is on a CUDA device, CPU tensors among the arguments are moved there, and unless the owner's
    device map says where CUDA tensors go, the results come back as CPU tensors.

    Of the other methods of `nn.Module` only `train` and `eval` work, and act on the remote module; the rest raise
    `ValueError`. For optimizers there is `remote_parameters`.

    Args:
        remote_device: where the module goes: `"<worker name>/<device>"` or `"rank:<rank>/<device>"`; without a device
            it is the CPU.
        module_cls: makes the module on the owner: a class or function that gives an `nn.Module`.
        args: positional arguments of `module_cls`.
        kwargs: keyword arguments of `module_cls`.
        _module_interface_cls: a `torch.jit.interface` that the module fulfils: it is scripted on the owner, and this
            object can be compiled with `torch.jit.script` here.

    Raises:
        NotInitializedError: RPC is not initialized.
        ValueError: `remote_device` cannot be read, or, at the first use, `module_cls` did not give an `nn.Module`.
        UnknownWorkerError: there is no such worker.
    """

    __jit_ignored_attributes__ = ("module_rref", "generated_methods")  # TorchScript leaves these in Python

    def __init__(
        self,
        remote_device: str,
        module_cls: Callable[..., nn.Module],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        _module_interface_cls: Any = None,
    ) -> None:
        super().__init__()
        self._place(remote_device)
        scripted = _module_interface_cls is not None
        module_rref = remote(
            self.on, _create_module, args=(module_cls, args or (), kwargs or {}, self.device, scripted)
        )
        self._attach(module_rref, _module_interface_cls)

    @staticmethod
    def init_from_module_rref(
        remote_device: str, module_rref: RRef[Any], _module_interface_cls: Any = None
    ) -> RemoteModule:
        """Another RemoteModule on a module that is already there.

        Args:
            remote_device: where the module is, as in the constructor.
            module_rref: the module, from `get_module_rref`.
            _module_interface_cls: as in the constructor; the module must be scripted already.

        Returns:
            A RemoteModule that shares the module with the others on it.

        Raises:
            TypeError: `module_rref` is no RRef.
        """
        if not isinstance(module_rref, RRef):
            kind = type(module_rref).__name__
            raise TypeError(f"module_rref must be an RRef, as get_module_rref() gives it, not a {kind}")
        made = RemoteModule.__new__(RemoteModule)
        nn.Module.__init__(made)
        made._place(remote_device)
        made._attach(module_rref, _module_interface_cls)
        return made

    def remote_parameters(self, recurse: bool = True) -> list[RRef[nn.Parameter]]:
        """References to the module's parameters, as DistributedOptimizer takes them.

        Args:
            recurse: those of its submodules too.

        Raises:
            NotInitializedError: this process is no worker.
        """
        found: list[RRef[nn.Parameter]] = rpc_sync(self.on, _parameter_rrefs, args=(self.module_rref, recurse))
        return found

    def get_module_rref(self) -> RRef[Any]:
        """The reference to the module itself."""
        return self.module_rref

    def train(self, mode: bool = True) -> RemoteModule:
        """Put the remote module into training mode (or, if not `mode`, evaluation mode)."""
        rpc_sync(self.on, _set_training, args=(self.module_rref, mode))
        self.training = mode
        return self

    def eval(self) -> RemoteModule:
        """Put the remote module into evaluation mode."""
        return self.train(False)

    def parameters(self, recurse: bool = True) -> NoReturn:
        """Not there: the parameters are on another worker."""
        raise ValueError(
            "Method ``parameters`` not supported for RemoteModule. Please use ``remote_parameters`` instead."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `forward`: hooks are those of the remote module."""
        return self.forward(*args, **kwargs)

    def __repr__(self) -> str:
        return f"RemoteModule(on={self.on!r}, device={self.device!r})"

    # TorchScript compiles the next two, so their texts stand here as literals.

    @torch.jit.export
    def __getstate__(self) -> None:
        raise RuntimeError(
            "Cannot pickle RemoteModule in python pickler. RemoteModule can only be pickled when using RPC"
        )

    @torch.jit.export
    def __setstate__(self, state: torch.Tensor) -> None:
        raise RuntimeError(
            "Cannot unpickle RemoteModule in python pickler. RemoteModule can only be unpickled when using RPC"
        )

    def _place(self, remote_device: str) -> None:
        """Work out which worker and device are meant."""
        agent = current_agent()
        parsed = _remote_device(remote_device)
        name, rank = parsed.worker_name(), parsed.rank()
        on = name if name is not None else rank
        if on is None:
            raise ValueError(
                f"{remote_device!r} names no worker: write '<worker name>/<device>' or 'rank:<rank>/<device>'"
            )
        self.on = on
        self.device = str(parsed.device())
        self.is_device_map_set = bool(agent.options.device_maps.get(agent.resolve(self.on).name))

    def _attach(self, module_rref: RRef[Any], interface: Any) -> None:
        self.is_scriptable = interface is not None
        own = scripting.methods_of(interface) if self.is_scriptable else [forward_async, forward]
        self.generated_methods: list[Callable[..., Any]] = own
        self.module_rref = module_rref
        if self.is_scriptable:
            start = functools.partial(_start_forward, module_rref, self.device, self.is_device_map_set)
            self._link = scripting.make_link(start)
        self._install_methods()

    def _install_methods(self) -> None:
        """Make the generated methods this object's own: TorchScript compiles them from here."""
        for method in self.generated_methods:
            object.__setattr__(self, method.__name__, types.MethodType(method, self))


def forward_async(self: RemoteModule, *args: Any, **kwargs: Any) -> torch.futures.Future[Any]:
    """Start the remote module's forward; a future of its result."""
    return _start_forward(self.module_rref, self.device, self.is_device_map_set, args, kwargs)


def forward(self: RemoteModule, *args: Any, **kwargs: Any) -> Any:
    """Run the remote module's forward and wait for its result."""
    return forward_async(self, *args, **kwargs).wait()


def _start_forward(
    module_rref: RRef[Any], device: str, is_device_map_set: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.futures.Future[Any]:
    return rpc_async(module_rref.owner(), _run_forward, args=(module_rref, device, is_device_map_set, args, kwargs))


def _unsupported(name: str) -> Callable[..., NoReturn]:
    def method(self: RemoteModule, *args: object, **kwargs: object) -> NoReturn:
        _raise_not_supported(name)

    method.__name__ = name
    method.__qualname__ = f"RemoteModule.{name}"
    return method


for _name in _UNSUPPORTED:
    setattr(RemoteModule, _name, _unsupported(_name))


def _raise_not_supported(name: str) -> NoReturn:
    raise ValueError(f"Method ``{name}`` not supported for RemoteModule")


_RemoteModule = RemoteModule
"""torch's name for the class that takes `_module_interface_cls`; here it is one class."""


# ---- on the owner ----------------------------------------------------------------------------------------------


@expose
def _create_module(
    module_cls: Callable[..., nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: str,
    scripted: bool = False,
) -> nn.Module:
    module = module_cls(*args, **kwargs)
    if not isinstance(module, nn.Module):
        raise ValueError(
            "Expect `module_cls(*args, **kwargs)` returns an instance of <class nn.Module>, "
            f"but it returns a {type(module).__name__}: pass a class or function that makes a module"
        )
    module.to(device)
    return torch.jit.script(module) if scripted else module


@expose
def _parameter_rrefs(module_rref: RRef[Any], recurse: bool) -> list[RRef[nn.Parameter]]:
    return [RRef(parameter) for parameter in _method(module_rref, "parameters")(recurse)]


def _method(module_rref: RRef[Any], name: str) -> Any:
    """The method `name` of the module, if others may have it called."""
    module = module_rref.local_value()
    loading.check_module(module)
    return getattr(module, name)


@expose
def _create_module_with_interface(
    module_cls: Callable[..., nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], device: str, interface: Any
) -> RRef[nn.Module]:
    return RRef(_create_module(module_cls, args, kwargs, device, interface is not None), interface)


@expose
def _param_rrefs(module_rref: RRef[Any], recurse: bool) -> list[RRef[nn.Parameter]]:
    return _parameter_rrefs(module_rref, recurse)


@expose
def _set_training(module_rref: RRef[Any], mode: bool) -> None:
    _method(module_rref, "train")(mode)


@expose
def _run_forward(
    module_rref: RRef[Any], device: str, is_device_map_set: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    module = _method(module_rref, "__call__")
    target = torch.device(device)
    if target.type == "cpu":
        return module(*args, **kwargs)
    result = module(*_moved(args, target), **_moved(kwargs, target))
    return result if is_device_map_set else _moved(result, torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    """`value` with the tensors in it, also those in tuples, lists and dicts, moved to `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value


# ---- travelling ------------------------------------------------------------------------------------------------

_NO_SCRIPT = (
    "Passing a script RemoteModule over RPC is not supported. Send its `module_rref`, and let the receiver make "
    "another RemoteModule on it with `RemoteModule.init_from_module_rref`"
)


def _reduce_remote_module(module: RemoteModule) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if module.is_scriptable:
        raise RuntimeError(_NO_SCRIPT)
    return _rebuild_remote_module, (module.on, module.device, module.is_device_map_set, module.module_rref)


def _rebuild_remote_module(on: str | int, device: str, is_device_map_set: bool, module_rref: RRef[Any]) -> RemoteModule:
    module = RemoteModule.__new__(RemoteModule)
    values = (on, device, is_device_map_set, False, [forward_async, forward], module_rref)
    module.__dict__.update(zip(_REMOTE_MODULE_PICKLED_ATTRIBUTES, values, strict=True))
    module._install_methods()
    return module


def _reduce_script_module(module: RecursiveScriptModule) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if any(scripting.is_linked(part) for part in module.modules()):
        raise RuntimeError(_NO_SCRIPT)
    saved = io.BytesIO()
    torch.jit.save(module, saved)
    return _rebuild_script_module, (saved.getvalue(),)


def _rebuild_script_module(saved: bytes) -> Any:
    loading.check("torch.jit", "load")  # what is saved has code in it
    return torch.jit.load(io.BytesIO(saved))  # type: ignore[no-untyped-call]


def _parts(module: RemoteModule) -> tuple[Any, ...]:
    return _reduce_remote_module(module)[1]


register_reducer(RemoteModule, _reduce_remote_module)
carried.register_parts(RemoteModule, carried.REMOTE_MODULE, _parts, _rebuild_remote_module)
register_reducer(RecursiveScriptModule, _reduce_script_module)
