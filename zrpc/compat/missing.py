"""The names of torch's RPC modules that are missing here, and why. docs/compatibility.md has the same table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

_SCRIPT_PICKLE = "torch.jit.save cannot store zrpc's RRefs; store the values, or send the module by RPC"
_FAULTY = "it loses messages of TensorPipe's protocol, which is not spoken here"
_GATHER = "gatherings are kept by zrpc.gather; programs that build their own have AllGatherStates"
_MEMBERS = "membership is kept by zrpc.membership, which needs no token in the store"
_PICKLER = "zrpc's pickler keeps what is under way by itself; override `serialize`, or use `_register_reducer`"
_DEVICES = "device maps travel with the membership, and zrpc.membership.device_maps checks them"
_PROFILE = "profiles of a process are kept by zrpc.profiling.process; use `_server_process_global_profile`"
_SCRIPT_OPTIMIZER = "optimizers run in Python here; a functional optimizer is called with its list of gradients"
_TEMPLATE = "methods of a RemoteModule are made by zrpc.nn.scripting, without template files"
_PICKLED_MODULE = "a RemoteModule travels as its RRef and place, by a reducer of zrpc's pickler"
_COUNTER = "init_rpc needs no counter: the store's keys are told apart by zrpc.membership"

_RPC = "torch.distributed.rpc"
_REMOTE_MODULE = "torch.distributed.nn.api.remote_module"

MISSING: dict[str, dict[str, str]] = {
    _RPC: {
        "_disable_jit_rref_pickle": _SCRIPT_PICKLE,
        "_disable_server_process_global_profiler": _PROFILE,
        "_enable_jit_rref_pickle": _SCRIPT_PICKLE,
        "_enable_server_process_global_profiler": _PROFILE,
        "_init_counter": _COUNTER,
        "_init_counter_lock": _COUNTER,
    },
    f"{_RPC}._testing": dict.fromkeys(
        ("FaultyTensorPipeAgent", "FaultyTensorPipeRpcBackendOptions", "faulty_agent_backend_registry"), _FAULTY
    ),
    f"{_RPC}._utils": {"_group_membership_management": _MEMBERS, "_update_group_membership": _MEMBERS},
    f"{_RPC}.api": {
        "_all_gather_dict_lock": _GATHER,
        "_all_gather_sequence_id": _GATHER,
        "_all_gather_sequence_id_to_states": _GATHER,
        "_group_membership_management": _MEMBERS,
        "_update_group_membership": _MEMBERS,
    },
    f"{_RPC}.backend_registry": {
        "_create_device_list": _DEVICES,
        "_create_reverse_mapping": _DEVICES,
        "_get_device_infos": _DEVICES,
        "_group_membership_management": _MEMBERS,
        "_set_devices_and_reverse_device_map": _DEVICES,
        "_tensorpipe_exchange_and_check_all_device_maps": _DEVICES,
        "_tensorpipe_validate_devices": _DEVICES,
        "_update_group_membership": _MEMBERS,
        "_validate_device_maps": _DEVICES,
    },
    f"{_RPC}.internal": {"_thread_local_tensor_tables": _PICKLER},
    f"{_RPC}.server_process_global_profiler": {
        "_disable_server_process_global_profiler": _PROFILE,
        "_enable_server_process_global_profiler": _PROFILE,
    },
    "torch.distributed.optim.optimizer": {
        "_ScriptLocalOptimizer": _SCRIPT_OPTIMIZER,
        "_ScriptLocalOptimizerInterface": _SCRIPT_OPTIMIZER,
        "_new_script_local_optimizer": _SCRIPT_OPTIMIZER,
        "_script_local_optimizer_step": _SCRIPT_OPTIMIZER,
    },
    _REMOTE_MODULE: {
        "_NON_SCRIPTABLE_REMOTE_MODULE_MODULE": _TEMPLATE,
        "_REMOTE_MODULE_ATTRIBUTES_IGNORE_FOR_PICKLING": _PICKLED_MODULE,
        "_SerializedRemoteModule": _PICKLED_MODULE,
        "_instantiate_template": _TEMPLATE,
        "_internal_rpc_pickler": _PICKLED_MODULE,
        "_recursive_script_module_receiver": _PICKLED_MODULE,
        "_recursive_script_module_reducer": _PICKLED_MODULE,
        "_remote_module_receiver": _PICKLED_MODULE,
        "_remote_module_reducer": _PICKLED_MODULE,
    },
}
"""Module of torch -> name that is missing in its replacement -> why."""


def explaining(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for the replacement of torch's `module`: its AttributeError says why a name is missing."""

    def explain(name: str) -> NoReturn:
        why = MISSING[module].get(name)
        because = f": {why}" if why else ""
        raise AttributeError(f"module {module!r} (of zrpc) has no attribute {name!r}{because}")

    return explain
