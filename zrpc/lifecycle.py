"""From nothing to a worker, and back: `init_rpc` and `shutdown`."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import math
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from zrpc import api, draining, ending, gather, interrupts
from zrpc.agent.agent import Agent
from zrpc.agent.card import card_of
from zrpc.agent.current import current_agent, is_agent_set, set_agent
from zrpc.agent.execution import forget_operators
from zrpc.autograd import install as install_autograd
from zrpc.autograd.service import AutogradService
from zrpc.config import (
    BROKER_SCHEME,
    DEFAULT_INIT_METHOD,
    DEFAULT_SHUTDOWN_TIMEOUT_S,
    RpcBackendOptions,
    broker_addresses,
    check_timeout,
)
from zrpc.errors import AlreadyInitializedError, ConfigError
from zrpc.ids import WorkerInfo
from zrpc.membership.permitted import permitted
from zrpc.membership.rendezvous import open_store, resolve_rank
from zrpc.membership.store import StoreGroup
from zrpc.optim.turns import install as install_optim
from zrpc.profiling import install as install_profiling
from zrpc.rref.context import RRefContext
from zrpc.rref.serving import install as install_rrefs
from zrpc.secret import group_secret
from zrpc.sight.serving import install as install_sight
from zrpc.transport import descriptors
from zrpc.transport.credentials import keyring_of, new_life, worker_credentials
from zrpc.transport.look import has_ended
from zrpc.transport.peer import PeerEndpoint
from zrpc.transport.shared_memory import SharedMemory
from zrpc.transport.slabs import is_supported
from zrpc.transport.sockets import reachable_address
from zrpc.wire import loading, pickling
from zrpc.wire.listed import ListedRules
from zrpc.wire.registered import RegisteredRules

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from zrpc.membership.counter import Store
    from zrpc.wire.loading import Rules

log = logging.getLogger("zrpc")

INIT_METHOD_VARIABLE = "ZRPC_INIT_METHOD"
"""Replaces the default `env://`; the launcher sets it, so that a program need not know whether there is a broker."""
BIND_VARIABLE = "ZRPC_BIND"
"""Replaces the default `bind`, for programs that do not set it."""
UNLIMITED_JOIN_S = 1800.0
"""How long to wait for the others where `rpc_timeout` is 0, no limit."""
FLUSH_S = 2.0
"""How long last messages may take to leave at shutdown."""
EXIT_AFTER_LOSS_S = 1.0
"""A process does not end sooner than this after it has lost another worker, which mostly died of an error of its own.
Launchers look at their processes every so often (torchrun every 0.1 s), and report one of those that they find ended.
"""


def init_rpc(
    name: str,
    backend: object = None,
    rank: int = -1,
    world_size: int | None = None,
    rpc_backend_options: RpcBackendOptions | None = None,
) -> None:
    """Make this process a worker of a group, ready to call and to be called.

    Returns when all `world_size` workers are there. Without a world size the group may grow and shrink, and nobody is
    waited for.

    Args:
        name: this worker's name, unique in the group: letters, digits, underscores, colons and dashes, at most 127.
        backend: accepted for programs written for torch.distributed.rpc; there is one backend here.
        rank: this worker's rank, unique in the group; -1: RANK of the environment, or the broker's choice.
        world_size: how many workers the group has; None: where `rank` is -1, WORLD_SIZE of the environment, if it is
            set.
        rpc_backend_options: everything else; see `RpcBackendOptions`.

    Raises:
        AlreadyInitializedError: this process is a worker already.
        ConfigError: an argument, option or environment variable that cannot be used, or a Python without its lock.
        RuntimeError: a name with other characters, an empty or a longer one.
        RendezvousError: store or broker cannot be reached, or somebody did not come within `rpc_timeout` seconds.
        RefusedError: the name or rank is taken, or the others were started with another world size.
    """
    del backend
    _check_interpreter()
    options = RpcBackendOptions() if rpc_backend_options is None else rpc_backend_options
    if not isinstance(options, RpcBackendOptions):
        raise ConfigError(f"rpc_backend_options must be an instance of RpcBackendOptions, not {type(options).__name__}")
    if not isinstance(name, str):
        raise ConfigError(f"name must be a str, not {name!r}")
    if is_agent_set():
        raise AlreadyInitializedError("RPC is already initialized: call shutdown() before init_rpc() again")
    init_method = init_method_of(options)
    rank, world_size = resolve_rank(rank, world_size, init_method)
    WorkerInfo(name, max(rank, 0))  # refuses a name that cannot be one before anything is started
    if init_method.startswith(BROKER_SCHEME):
        agent = _brokered_agent(options, init_method)
    else:
        store = rendezvous(init_method, rank, world_size, options)
        agent = _peer_agent(options, store)
    draining.install_handler()
    _start(agent, name, rank, world_size)


def _check_interpreter() -> None:
    """Refuse a Python whose threads run at the same time: its lock makes the operations whole that change tables here.

    Raises:
        ConfigError: it is one.
    """
    is_gil_enabled: Callable[[], bool] = getattr(sys, "_is_gil_enabled", lambda: True)
    if not is_gil_enabled():
        raise ConfigError(
            "this Python runs without its global interpreter lock, which zrpc was not written for: set PYTHON_GIL=1 in "
            "the environment, or use a build that is not free-threaded"
        )


def rendezvous(init_method: str, rank: int, world_size: int | None, options: RpcBackendOptions) -> Store:
    """The store in which the workers of `init_method` meet; see `open_store`."""
    return open_store(init_method, rank, world_size, _join_limit_s(options))


def start_worker(name: str, rank: int, world_size: int | None, options: RpcBackendOptions, store: Store) -> None:
    """`init_rpc` with a store that is there already. For programs that bring their own."""
    _check_interpreter()
    if is_agent_set():
        raise AlreadyInitializedError("RPC is already initialized: call shutdown() before init_rpc() again")
    _start(_peer_agent(options, store), name, rank, world_size)


def shutdown(graceful: bool = True, timeout: float = DEFAULT_SHUTDOWN_TIMEOUT_S) -> None:
    """Stop being a worker.

    Args:
        graceful: first wait until every worker of a static group has come here too and its calls are done, and serve
            it meanwhile. A worker that is lost is not waited for; the others are, and then learn of it.
        timeout: seconds for each of the steps: to wait for the others, for references to be given up, for calls to end,
            and for the others again; 0: no limit, but 100 s for references.

    Raises:
        NotInitializedError: this process is no worker.
        ConfigError: `timeout` is no number of seconds.
        PeerLostError: workers died, and all others have come; or some did not come within `timeout`. The text names
            them, and what is under way. This worker is shut down all the same.
        RpcTimeoutError: a worker that has come could not be told within `timeout` that all have; the same.
    """
    agent = current_agent()
    limit_s = check_timeout(timeout, "timeout")
    try:
        if graceful and agent.is_static_group:
            ending.end_together(agent, limit_s)
        elif graceful:
            ending.end_alone(agent, limit_s)
    finally:
        finalize(agent, ignore_rref_leak=True)


def finalize(agent: Agent, ignore_rref_leak: bool) -> None:
    """End this worker at once.

    Raises:
        RuntimeError: values are still referenced by others, and `ignore_rref_leak` is false. It is ended all the same.
    """
    try:
        _end_extensions(agent, ignore_rref_leak)
    finally:
        _losses.note(agent)
        agent.say_goodbye(FLUSH_S)
        agent.close(FLUSH_S)
        set_agent(None)
        interrupts.uninstall()


def _end_extensions(agent: Agent, ignore_rref_leak: bool) -> None:
    agent.extensions[AutogradService].close()
    agent.extensions[RRefContext].destroy(ignore_rref_leak)


def _allow(allow: str | Sequence[str], worker: str) -> None:
    """What other workers may name in this process from now on; see `RpcBackendOptions`."""
    rules: Rules | None = None
    codec = pickling.PICKLE
    if allow == "registered":
        for module in ("zrpc.nn.remote_module", "zrpc.optim.distributed_optimizer"):
            importlib.import_module(module)  # what others may call of them is registered then
        rules = registered = RegisteredRules(worker)
        codec = registered.codec()
    elif allow != "any":
        rules = ListedRules(worker, allow)
        codec = pickling.CHECKED
    loading.use(rules)
    api.use_codec(codec)
    forget_operators()


def _start(agent: Agent, name: str, rank: int, world_size: int | None) -> None:
    _allow(agent.options.allow, name)
    gather.install(agent)
    install_rrefs(agent, api, partial(_backward, agent))  # proxies of RRefs call as programs do, seen by profiles
    for install in (install_autograd, install_profiling, install_optim, install_sight):
        install(agent)
    if agent.address is not None and world_size:
        _make_room(world_size)
    try:
        agent.join(name, rank, world_size, card_of(agent), _join_limit_s(agent.options))
        set_agent(agent)
    except BaseException:
        agent.close(0.0)
        raise
    agent.open()


def _backward(agent: Agent, context_id: int, roots: list[torch.Tensor], retain_graph: bool) -> None:
    """What `RRef.backward` runs on the owner."""
    agent.extensions[AutogradService].backward(context_id, roots, retain_graph, smart=False)


def _make_room(world_size: int) -> None:
    """Be allowed the open files that talking to every worker takes, or say that this is not to be."""
    count = world_size * descriptors.PER_PEER
    if not descriptors.make_room(count):
        log.warning(
            "a worker that talks to all %d of this group has %d files open for it, and that is too many here (%s): "
            "raise the limit with `ulimit -n`, or use a broker", world_size, count, descriptors.describe(),
        )  # fmt: skip


def _peer_agent(options: RpcBackendOptions, store: Store) -> Agent:
    bind = (
        options.bind if options.bind != RpcBackendOptions.DEFAULT_BIND else os.environ.get(BIND_VARIABLE, options.bind)
    )
    secret = group_secret(options.secret, insecure=options.insecure)
    credentials = worker_credentials(secret)
    endpoint = PeerEndpoint(
        new_life(credentials), bind, local=options.shared_memory, busy_poll_s=options.busy_poll_s,
        credentials=credentials, liveness_s=options.liveness_timeout,
    )  # fmt: skip
    address = reachable_address(endpoint.address, os.environ.get("MASTER_ADDR"))
    group = StoreGroup(store, partial(has_ended, own_address=address, credentials=credentials), secret)
    return Agent(
        options,
        endpoint,
        permitted(group, keyring_of(credentials)),
        address=address,
        connect=lambda member: endpoint.connect(member.incarnation, member.card["address"]),
        disconnect=endpoint.disconnect,
        shared_memory=_shared_memory(options),
        checks_answers=keyring_of(credentials) is not None,
    )


def _brokered_agent(options: RpcBackendOptions, init_method: str) -> Agent:
    from zrpc.membership.broker import BrokerGroup
    from zrpc.transport.brokered import BrokeredEndpoint

    credentials = worker_credentials(group_secret(options.secret, insecure=options.insecure))
    endpoint = BrokeredEndpoint(
        broker_addresses(init_method), new_life(credentials), local=options.shared_memory,
        busy_poll_s=options.busy_poll_s, credentials=credentials, grace_s=options.broker_grace_s,
    )  # fmt: skip
    agent = Agent(
        options,
        endpoint,
        BrokerGroup(endpoint),
        address=None,
        connect=_nothing,
        disconnect=_nothing,
        shared_memory=_shared_memory(options),
        checks_answers=keyring_of(credentials) is not None,
    )
    endpoint.tell_breaks(agent.outage.on_break, agent.outage.on_resume)
    return agent


def _shared_memory(options: RpcBackendOptions) -> SharedMemory | None:
    return SharedMemory.make() if options.shared_memory and is_supported() else None


def _nothing(_: object) -> None:
    """With a broker there is nobody to connect to."""


def init_method_of(options: RpcBackendOptions) -> str:
    """Where the workers meet: as the options say or, if they say nothing, as the launcher does.

    Raises:
        ConfigError: what the launcher says is no place.
    """
    if options.init_method != DEFAULT_INIT_METHOD:
        return options.init_method
    try:
        return RpcBackendOptions(init_method=os.environ.get(INIT_METHOD_VARIABLE, DEFAULT_INIT_METHOD)).init_method
    except ConfigError as error:
        raise ConfigError(f"the environment variable {INIT_METHOD_VARIABLE} cannot be used: {error}") from error


def _join_limit_s(options: RpcBackendOptions) -> float:
    return options.rpc_timeout or UNLIMITED_JOIN_S


class _Losses:
    """When this process, in whatever group, last lost another worker."""

    def __init__(self) -> None:
        self._last = -math.inf

    def note(self, agent: Agent) -> None:
        """`agent` ends."""
        self._last = max(self._last, -math.inf if agent.lost_at is None else agent.lost_at)

    def left_s(self) -> float:
        """For how long this process should not end yet."""
        return self._last + EXIT_AFTER_LOSS_S - time.monotonic()


_losses = _Losses()


@atexit.register
def _at_exit() -> None:
    """A program that ends without `shutdown` waits for no other worker, and the others learn of it when it is gone."""
    if is_agent_set():
        agent = current_agent()
        with contextlib.suppress(Exception):
            _end_extensions(agent, ignore_rref_leak=True)
        with contextlib.suppress(Exception):
            agent.close(FLUSH_S, at_exit=True)
        _losses.note(agent)
        set_agent(None)
    left_s = _losses.left_s()
    if left_s > 0:
        time.sleep(left_s)
