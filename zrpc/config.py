"""The options of a worker, with what each may be."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from zrpc.errors import ConfigError
from zrpc.secret import says_insecure

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    Device = torch.device | str | int
    DeviceMap = dict[torch.device, torch.device]

DEFAULT_RPC_TIMEOUT_S = 60.0
DEFAULT_INIT_METHOD = "env://"
DEFAULT_NUM_WORKER_THREADS = 16
DEFAULT_SHUTDOWN_TIMEOUT_S = 0.0
DEFAULT_LIVENESS_TIMEOUT_S = 4.0
"""With what it takes to look and to tell, a host that vanishes is noticed within 5 s. See `RpcBackendOptions`."""
MIN_LIVENESS_TIMEOUT_S = 2.0
"""The kernel probes a connection once a second, and one probe that is lost must not end it."""
MAX_TIMEOUT_S = 1e9
"""A longer time limit is none: threads cannot wait for much longer, and nobody does."""
DEFAULT_BUSY_POLL_S = 0.001
DEFAULT_MAX_IN_FLIGHT_NBYTES = 1 << 30
DEFAULT_MAX_IN_FLIGHT_CALLS = 1 << 18
"""An unanswered small call takes 1.3 to 2 KB of its caller (`benchmarks.memory flight`), so this is up to 0.5 GB."""
DEFAULT_PINNED_POOL_NBYTES = 1 << 30
DEFAULT_MAX_QUEUED_CALLS = 1 << 20
"""A small call that waits takes about 2 KB of its callee, so this is about 2 GB. Programs that work stay far below."""
ALLOW_VARIABLE = "ZRPC_ALLOW"
"""What `allow` is where it is not given: `any`, `registered`, or names of modules with commas between them."""
UNSET_RPC_TIMEOUT_S = -1.0
"""A call with this timeout takes the worker's default."""

OVERLOAD_MODES = ("refuse", "wait")
ALLOW_MODES = ("any", "registered")
INIT_SCHEMES = ("env", "tcp", "file", "broker")
BROKER_SCHEME = "broker://"
DEFAULT_BROKER_GRACE_S = 30.0


class RpcBackendOptions:
    """How a worker reaches the others and serves their calls.

    Attributes may be changed until `init_rpc`; later it has no effect.

    Args:
        num_worker_threads: handler threads that run user functions; one more is added while all of them wait for remote
            calls of their own, so nested calls cannot use them up.
        rpc_timeout: default time limit of a call in seconds; 0: none.
        init_method: where the workers find each other: `env://`, `tcp://host:port`, `file:///path` or
            `broker://host:port`, or `broker://a:5555,b:5555` where there are several brokers.
        device_maps: peer name -> {device here: device there}, for tensors that are not on the CPU.
        devices: the devices this worker uses; empty: those that the device maps name.
        shared_memory: allow shared memory and Unix sockets between workers on one host; without it all bytes go through
            TCP.
        bind: where this worker listens in peer mode, as `tcp://address:port`; port 0 is any free one. The others
            connect to this address; `tcp://0.0.0.0:0` listens everywhere and tells them this host's own address.
        max_in_flight_nbytes: how many bytes may be on the way to one worker in calls that it has not answered, 0: no
            limit. A call beyond that waits for room in `rpc_async`, `remote` or `rpc_sync`, up to its own time limit,
            and then fails with `OverloadedError`. A single larger call is sent when no other is on the way. Calls of
            up to 4 KiB are not counted here.
        max_in_flight_calls: how many calls to one worker may be unanswered, in the same way; 0: no limit.
        busy_poll_s: for how many seconds a thread that reads messages polls, yielding its processor in between, before
            it sleeps, where messages follow each other as fast and processors are not short; 0: not at all, which
            makes a small call take two to three times as long, and takes less of the processor.
        pinned_pool_nbytes: how much memory of the host may be pinned, through which tensors travel to and from CUDA
            devices. It is taken as it is needed, and only by workers that use devices. What does not fit goes through
            memory that is pinned for the moment.
        propagate_grad_mode: let `torch.no_grad` and `torch.inference_mode` hold for calls that are made under them in
            a distributed autograd context, so that their results do not require grad. False: callees record all the
            same, as in torch.
        secret: what all workers of the group know, and nobody else, at least 16 characters; None: see `zrpc.secret`.
        insecure: let whoever reaches a port be a member, and run code here. For groups that are alone on their network.
        allow: what calls, arguments and results that come to this worker may name. `"any"`: whatever can be imported,
            as in torch. A list of modules: what these and their submodules define, beside what tensors and zrpc itself
            need. `"registered"`: functions and classes marked with `zrpc.expose`, and nothing is unpickled; all workers
            of a group then say so. None: what the environment variable ZRPC_ALLOW says, or `"any"`. See
            docs/security.md.
        max_queued_calls: how many calls of others may wait here for a handler thread; 0: no limit.
        overload: what is done about calls that come while more wait. `"refuse"`: they fail at once with
            `OverloadedError`, and did not run. `"wait"`: they wait too, and callers are slowed by their windows alone
            (`max_in_flight_calls`).
        propagate_deadlines: tell callees how much time is left of each call, and when it is over. Calls made in a
            function that serves a call then have no more time than is left of that. False: as in torch.
        wait_for_worker: for how many seconds a call to a name that no worker has (yet, or between two lives) waits for
            one, in a group that grows and shrinks; 0: not at all. A call's own `wait_for_worker` comes first.
        liveness_timeout: for how many seconds the host of another worker may be silent until it is lost, and a worker
            that leaves calls unanswered may not react until the log says that it stands still; 2 or more. See
            docs/operations.md.
        broker_grace_s: for how many seconds a broker is looked for, the same or another of the list, when the
            connection to it broke. After that all other workers are lost.

    Raises:
        ConfigError: a value of the wrong type or out of range, with what to write.
        ValueError: device maps or devices as `set_device_map` and `set_devices` do not take them.
    """

    DEFAULT_BIND = "tcp://127.0.0.1:0"

    def __init__(
        self,
        num_worker_threads: int = DEFAULT_NUM_WORKER_THREADS,
        rpc_timeout: float | timedelta = DEFAULT_RPC_TIMEOUT_S,
        init_method: str = DEFAULT_INIT_METHOD,
        device_maps: Mapping[str, Mapping[Device, Device]] | None = None,
        devices: Sequence[Device] | None = None,
        shared_memory: bool = True,
        bind: str = DEFAULT_BIND,
        max_in_flight_nbytes: int = DEFAULT_MAX_IN_FLIGHT_NBYTES,
        max_in_flight_calls: int = DEFAULT_MAX_IN_FLIGHT_CALLS,
        busy_poll_s: float = DEFAULT_BUSY_POLL_S,
        pinned_pool_nbytes: int = DEFAULT_PINNED_POOL_NBYTES,
        propagate_grad_mode: bool = True,
        secret: str | bytes | None = None,
        insecure: bool | None = None,
        allow: str | Sequence[str] | None = None,
        max_queued_calls: int = DEFAULT_MAX_QUEUED_CALLS,
        overload: str = "refuse",
        propagate_deadlines: bool = True,
        wait_for_worker: float | timedelta = 0.0,
        liveness_timeout: float | timedelta = DEFAULT_LIVENESS_TIMEOUT_S,
        broker_grace_s: float = DEFAULT_BROKER_GRACE_S,
    ) -> None:
        insecure = says_insecure() if insecure is None else insecure
        switches = {"shared_memory": shared_memory, "propagate_grad_mode": propagate_grad_mode, "insecure": insecure}
        _check_kinds({**switches, "propagate_deadlines": propagate_deadlines}, bind)
        if overload not in OVERLOAD_MODES:
            raise ConfigError(f"overload must be 'refuse' or 'wait', not {overload!r}")
        self.secret = _checked_secret(secret)
        self.insecure = insecure
        self.num_worker_threads = _whole(num_worker_threads, "num_worker_threads", 1)
        self.max_in_flight_nbytes = _whole(max_in_flight_nbytes, "max_in_flight_nbytes (0: no limit)", 0)
        self.max_in_flight_calls = _whole(max_in_flight_calls, "max_in_flight_calls (0: no limit)", 0)
        self.busy_poll_s = check_timeout(busy_poll_s, "busy_poll_s", "never poll")
        self.broker_grace_s = check_timeout(broker_grace_s, "broker_grace_s", "all are lost at once")
        self.pinned_pool_nbytes = _whole(pinned_pool_nbytes, "pinned_pool_nbytes", 0)
        self.rpc_timeout = rpc_timeout
        self.init_method = init_method
        self.device_maps: dict[str, DeviceMap] = {}
        self.devices: list[torch.device] = []
        self.shared_memory = shared_memory
        self.propagate_grad_mode = propagate_grad_mode
        self.bind = bind
        self.allow = allow
        self.max_queued_calls = _whole(max_queued_calls, "max_queued_calls (0: no limit)", 0)
        self.overload = overload
        self.propagate_deadlines = propagate_deadlines
        self.wait_for_worker = check_timeout(wait_for_worker, "wait_for_worker", "do not wait")
        self.liveness_timeout = _checked_liveness(liveness_timeout)
        if not isinstance(device_maps, Mapping | None):
            raise ConfigError(f"device_maps must be a dict, worker name -> {{device: device}}, not {device_maps!r}")
        for worker, device_map in (device_maps or {}).items():
            self.set_device_map(worker, device_map)
        if devices is not None:
            self.set_devices(devices)

    @property
    def rpc_timeout(self) -> float:
        """Default time limit of a call in seconds; 0: none."""
        return self._rpc_timeout

    @rpc_timeout.setter
    def rpc_timeout(self, value: float | timedelta) -> None:
        self._rpc_timeout = check_timeout(value, "rpc_timeout")

    @property
    def init_method(self) -> str:
        """Where the workers find each other."""
        return self._init_method

    @init_method.setter
    def init_method(self, value: str) -> None:
        if not isinstance(value, str) or value.split("://", 1)[0] not in INIT_SCHEMES or "://" not in value:
            raise ConfigError(
                f"init_method must be env://, tcp://host:port, file:///path or broker://host:port, not {value!r}"
            )
        if value.startswith(BROKER_SCHEME):
            broker_addresses(value)
        self._init_method = value

    @property
    def allow(self) -> str | tuple[str, ...]:
        """What may be named here: `"any"`, `"registered"`, or modules."""
        return self._allow

    @allow.setter
    def allow(self, value: str | Sequence[str] | None) -> None:
        self._allow = _allowed_of_environment() if value is None else _as_allowed(value, "allow")

    def set_device_map(self, to: str, device_map: Mapping[Device, Device]) -> None:
        """Say on which device of the worker `to` a tensor of each device here arrives. Adds to what was said before.

        Whether the whole map fits the devices that both workers have is checked by `init_rpc`, for all workers at once.

        Raises:
            ConfigError: `to` is no name, or `device_map` no dict of devices.
            ValueError: `device_map` maps two devices to one, or one that was mapped to another before.
        """
        if not isinstance(to, str) or not isinstance(device_map, Mapping):
            raise ConfigError(
                f"a device map must be a worker's name and {{device: device}}, not {to!r}: {device_map!r}"
            )
        merged = dict(self.device_maps.get(to, {}))
        for source, target in _as_devices(device_map).items():
            if merged.get(source, target) != target:
                raise ValueError(
                    f"`set_device_map` only supports 1-to-1 mapping: {source} is mapped to {merged[source]} on {to!r} "
                    f"already, not to {target}"
                )
            merged[source] = target
        self.device_maps[to] = merged

    def set_devices(self, devices: Sequence[Device]) -> None:
        """Name the CUDA devices that this worker uses.

        Raises:
            ConfigError: what is no list, or no device.
            ValueError: a device that is not a CUDA one.
        """
        if isinstance(devices, str) or not isinstance(devices, Iterable):
            raise ConfigError(f"devices must be a list, such as ['cuda:0'], not {devices!r}")
        named = [_as_device(device) for device in devices]
        for device in named:
            if device.type != "cuda":
                raise ValueError(f"`set_devices` expect a list of CUDA devices, but got device type {device.type}.")
        self.devices = named


def broker_addresses(init_method: str) -> list[str]:
    """The addresses of the brokers that `init_method` lists.

    Raises:
        ConfigError: the list has nothing between two commas, or one twice.
    """
    listed = ["tcp://" + one.strip() for one in init_method.removeprefix(BROKER_SCHEME).split(",")]
    if "tcp://" in listed or len(set(listed)) < len(listed):
        raise ConfigError(
            f"{init_method!r} must list each broker once, with a comma between two: broker://host:port,host:port"
        )
    return listed


def _whole(value: Any, what: str, least: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ConfigError(f"{what} must be a whole number, not {value!r}")
    if int(value) < least:
        raise ConfigError(f"{what} must be {least} or more, not {value}")
    return int(value)


def _checked_secret(value: Any) -> str | bytes | None:
    if not isinstance(value, str | bytes | None):
        raise ConfigError(f"secret must be a str or bytes, not {type(value).__name__}")
    return value


def _allowed_of_environment() -> str | tuple[str, ...]:
    given = os.environ.get(ALLOW_VARIABLE, "").strip() or "any"
    if given not in ALLOW_MODES:
        return _as_allowed([part.strip() for part in given.split(",")], f"the environment variable {ALLOW_VARIABLE}")
    return given


def _as_allowed(value: Any, what: str) -> str | tuple[str, ...]:
    """`value` as the mode that it names, or as modules."""
    if isinstance(value, str) and value in ALLOW_MODES:
        return value
    if isinstance(value, list | tuple):
        bad = [name for name in value if not (isinstance(name, str) and all(map(str.isidentifier, name.split("."))))]
        if not bad:
            return tuple(value)
        raise ConfigError(f"{what} has {bad[0]!r} in it, which is no name of a module such as 'mypackage.models'")
    raise ConfigError(f"{what} must be 'any', 'registered' or a list of modules such as ['mypackage'], not {value!r}")


def _check_kinds(switches: dict[str, Any], bind: Any) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, not {value!r}")
    if not isinstance(bind, str) or not bind.startswith("tcp://"):
        raise ConfigError(f"bind must be an address such as 'tcp://127.0.0.1:0', not {bind!r}")


def check_timeout(value: Any, what: str, zero: str = "no limit") -> float:
    """`value` as seconds.

    Args:
        value: a number or a timedelta.
        what: what it is called, for errors.
        zero: what 0 stands for, likewise.

    Returns:
        The seconds; 0, no limit, also for what is longer than a thread can wait.

    Raises:
        ConfigError: it is not a number of seconds (or a timedelta), or it is negative.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        raise ConfigError(f"{what} must be a number of seconds (0: {zero}), not {value!r}")
    if seconds < 0 or seconds != seconds:
        raise ConfigError(f"{what} must be 0 ({zero}) or more seconds, not {value!r}")
    return float(seconds) if seconds < MAX_TIMEOUT_S else 0.0


def _checked_liveness(value: Any) -> float:
    seconds = check_timeout(value, "liveness_timeout", "refused")
    if seconds < MIN_LIVENESS_TIMEOUT_S:
        raise ConfigError(f"liveness_timeout must be {MIN_LIVENESS_TIMEOUT_S:g} s or more, not {value!r}")
    return seconds


def _as_devices(device_map: Mapping[Device, Device]) -> DeviceMap:
    return _one_to_one({_as_device(source): _as_device(target) for source, target in device_map.items()})


def _as_device(device: Device) -> torch.device:
    """A number is a CUDA device, whether or not there is one on this host."""
    import torch

    try:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{device!r} is not a device such as 'cuda:0', 'cpu' or 0: {error}") from error


def _one_to_one(device_map: DeviceMap) -> DeviceMap:
    sources: DeviceMap = {}
    for source, target in device_map.items():
        if target in sources:
            raise ValueError(
                f"`device_map` only supports 1-to-1 mapping, trying to map {source} and {sources[target]} to {target}"
            )
        sources[target] = source
    return device_map
