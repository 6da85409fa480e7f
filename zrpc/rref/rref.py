"""`RRef`: a reference to a value that lives on one worker, its owner, and can be used on any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from zrpc import interrupts
from zrpc.agent.current import current_agent
from zrpc.agent.future import Future, future_of, settle
from zrpc.config import UNSET_RPC_TIMEOUT_S, check_timeout
from zrpc.errors import RpcTimeoutError, RRefError
from zrpc.exception_text import describe, text_of
from zrpc.exposed import expose
from zrpc.rref.cell import Cell
from zrpc.rref.context import RRefContext
from zrpc.rref.forkdata import ForkData
from zrpc.rref.proxy import RRefProxy
from zrpc.rref.states import UserState
from zrpc.wire import loading, pickling
from zrpc.wire.messages import RRefBackward, RRefFetch

if TYPE_CHECKING:
    from zrpc.agent.call import Call
    from zrpc.ids import ForkId, RRefId, WorkerInfo

T = TypeVar("T")

NO_CONTEXT = -1
"""The `dist_autograd_ctx_id` of a backward pass outside distributed autograd."""
_FETCH_PHRASE = "Cannot call to_here() on it after deletion."


class RRef(Generic[T]):
    """A reference to a value of type `T` on its owner.

    `RRef(value)` makes one whose owner is this worker; `remote` makes one on another; one that is passed in a call or
    returned from it makes a further one on the worker that gets it. The owner keeps the value for as long as any worker
    holds one of them. RRefs may be used from any thread.

    Args:
        value: what to refer to. It is not copied.
        type_hint: accepted for programs written for torch, whose TorchScript needs it; not used.

    Raises:
        NotInitializedError: `init_rpc` was not called.
    """

    _context: RRefContext
    _owner: WorkerInfo
    _rref_id: RRefId
    _fork_id: ForkId | None  # this user's fork; on the owner, what stands for it while the creation is awaited
    _cell: Cell | None  # on the owner: where the value is
    _call: Call | None  # where remote() made it: what asks the owner to create the value
    _type: Future[type] | None
    _profiling_future: torch.futures.Future[Any] | None

    def __init__(self, value: T, type_hint: object = None) -> None:
        del type_hint
        agent = current_agent()
        context: RRefContext = agent.extensions[RRefContext]
        self._bind(context, agent.info, agent.ids.next(), None, Cell.holding(value))

    @classmethod
    def _of(
        cls,
        context: RRefContext,
        owner: WorkerInfo,
        rref_id: RRefId,
        fork_id: ForkId | None,
        cell: Cell | None = None,
    ) -> RRef[T]:
        """A user's RRef (`fork_id`), or the owner's (`cell`)."""
        made = cls.__new__(cls)
        made._bind(context, owner, rref_id, fork_id, cell)
        return made

    def _bind(
        self, context: RRefContext, owner: WorkerInfo, rref_id: RRefId, fork_id: ForkId | None, cell: Cell | None
    ) -> None:
        self._owner, self._rref_id, self._fork_id, self._cell = owner, rref_id, fork_id, cell
        self._call = self._type = self._profiling_future = None
        self._context = context

    @interrupts.uninterrupted
    def __del__(self) -> None:
        context = getattr(self, "_context", None)
        if context is not None and self._fork_id is not None:
            context.note_dropped(self._rref_id if self._cell is not None else None, self._fork_id)

    # ---- the value -------------------------------------------------------------------------------------------------

    def to_here(self, timeout: float = UNSET_RPC_TIMEOUT_S) -> T:
        """A copy of the value, once it is made; on the owner the value itself.

        Args:
            timeout: seconds; 0: no limit; by default the agent's time limit, and none on the owner.

        Raises:
            ConfigError: `timeout` is no number of seconds.
            RpcTimeoutError: the time ran out, of this call or of the `remote` that was to create the value.
            PeerLostError: the owner died or left.
            RRefError: the RRef was deleted, because this worker shut down.
            Exception: whatever making the value raised.
        """
        self._check_creation()
        if self._cell is not None:
            return self._cell.wait(_wait_s(timeout))  # type: ignore[no-any-return]
        with interrupts.deferred:
            return pickling.loads(self._fetch(timeout, waited=True).wait())  # type: ignore[no-any-return]

    def to_here_async(self, timeout: float = UNSET_RPC_TIMEOUT_S) -> Future[T]:
        """As `to_here`, at once: a future, which can be awaited, for the value. No thread waits meanwhile.

        What is known to be wrong already is raised at once, everything else by the future. On the owner a handler
        thread waits if there is a `timeout` and the value is not there.
        """
        self._check_creation()
        cell = self._cell
        if cell is None:
            agent = self._context.agent
            with interrupts.deferred:
                return future_of(self._fetch(timeout, waited=False), pickling.loads, agent.completions)
        future: Future[T] = Future()
        limit_s = _wait_s(timeout)
        if limit_s and not cell.is_set():
            self._context.agent.submit(lambda: settle(future, lambda: cell.wait(limit_s)))
        else:
            cell.when_set(lambda: settle(future, cell.get))
        return future

    def local_value(self) -> T:
        """The value itself, once it is made. Only on the owner.

        Raises:
            RRefError: this worker is not the owner.
            Exception: whatever making the value raised.
        """
        if self._cell is None:
            me = self._context.agent.info
            raise RRefError(
                f"For UserRRef(rref_id={self._rref_id}, fork_id={self._fork_id}), can't call localValue() on user "
                f"{me}. Call it on owner {self._owner}; to_here() copies the value to where you are"
            )
        self._check_creation()
        return self._cell.wait()  # type: ignore[no-any-return]

    def owner(self) -> WorkerInfo:
        """The worker that holds the value."""
        return self._owner

    def owner_name(self) -> str:
        """The name of the worker that holds the value."""
        return self._owner.name

    def is_owner(self) -> bool:
        """Whether this worker holds the value."""
        return self._cell is not None

    def confirmed_by_owner(self) -> bool:
        """Whether the owner counts this RRef. The value may still be in the making."""
        if self._cell is not None:
            return True
        assert self._fork_id is not None
        return self._context.user_state(self._fork_id) is UserState.CONFIRMED

    # ---- calls on the value ----------------------------------------------------------------------------------------

    def rpc_sync(self, timeout: float = UNSET_RPC_TIMEOUT_S) -> RRefProxy:
        """A stand-in for the value: its methods run on the owner, and their results come back.

        `rref.rpc_sync().size()` is `rpc_sync(rref.owner(), lambda r: r.local_value().size(), (rref,))`.
        """
        return RRefProxy(self, "rpc_sync", timeout)

    def rpc_async(self, timeout: float = UNSET_RPC_TIMEOUT_S) -> RRefProxy:
        """As `rpc_sync`; its methods return futures."""
        return RRefProxy(self, "rpc_async", timeout)

    def remote(self, timeout: float = UNSET_RPC_TIMEOUT_S) -> RRefProxy:
        """As `rpc_sync`; the results of its methods stay on the owner, and RRefs to them come back."""
        return RRefProxy(self, "remote", timeout)

    def backward(self, dist_autograd_ctx_id: int = NO_CONTEXT, retain_graph: bool = False) -> None:
        """Run a backward pass from the value, a scalar tensor.

        Args:
            dist_autograd_ctx_id: the distributed autograd context whose gradients it adds to. Without one, on the owner
                only, gradients go to `.grad`.
            retain_graph: keep the graph for another pass.

        Raises:
            RRefError: the value is no tensor, or no context was given on a user.
            AutogradError: there is no such context.
        """
        if self._cell is not None:
            backward_from(self._context, self.local_value(), dist_autograd_ctx_id, retain_graph)
            return
        if dist_autograd_ctx_id == NO_CONTEXT:
            raise RRefError(
                "User RRefs require 'dist_autograd_ctx_id' to be specified: only the owner, "
                f"{self._owner}, can run a backward pass without a context"
            )
        self._check_creation()
        fork_id = self._usable_fork("Cannot call backward() on it after deletion.")
        message = RRefBackward(self._rref_id, fork_id, dist_autograd_ctx_id, retain_graph)
        with interrupts.deferred:
            self._context.agent.request(self._owner, message, waited=True).wait()

    # ---- under torch's names ---------------------------------------------------------------------------------------

    def _owned(self, timeout: float = UNSET_RPC_TIMEOUT_S) -> Cell:
        """On the owner: the cell, once the value is made."""
        self._check_creation()
        assert self._cell is not None
        self._cell.await_set(_wait_s(timeout))
        return self._cell

    def _get_type(self, timeout: float = UNSET_RPC_TIMEOUT_S, blocking: bool = True) -> Any:
        """The type of the value, or (`blocking` false) a future for it. The owner is asked once."""
        known = self._type
        if known is None or (known.done() and _failed(known)):
            known = self._type = self._ask_type(timeout)
        return known.wait() if blocking else known

    def _get_future(self) -> torch.futures.Future[None]:
        """A future that is done when the owner has answered the `remote` that made this RRef."""
        if self._call is not None:
            return future_of(self._call, lambda _: None, self._context.agent.completions)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _get_profiling_future(self) -> torch.futures.Future[Any]:
        """What `_set_profiling_future` was given.

        Raises:
            RRefError: it was not called.
        """
        if self._profiling_future is None:
            raise RRefError("Profiling future has not been set: the RRef was not made under a profiler")
        return self._profiling_future

    def _set_profiling_future(self, future: torch.futures.Future[Any]) -> None:
        """Keep the future that is done when a profiler has seen the creation."""
        self._profiling_future = future

    def _serialize(self) -> tuple[int, int, int, int, int, int, bytes]:
        """Fork this RRef for somebody who gives the result to `_deserialize`, once."""
        return self._fork().as_tuple()

    @staticmethod
    def _deserialize(fields: tuple[int, int, int, int, int, int, bytes]) -> RRef[Any]:
        """The RRef that `_serialize` forked."""
        return receive(current_agent().extensions[RRefContext], ForkData.from_tuple(fields))

    def __reduce_ex__(self, protocol: object) -> Any:
        raise RRefError(
            "Can not pickle rref in python pickler, rref can only be pickled when using RPC: "
            "pass it to rpc_sync, rpc_async or remote, or return it from a function they call"
        )

    def __repr__(self) -> str:
        if self._cell is not None:
            return f"OwnerRRef({self._rref_id})"
        return f"UserRRef(RRefId = {self._rref_id}, ForkId = {self._fork_id})"

    # ---- below -----------------------------------------------------------------------------------------------------

    def _ask_type(self, timeout: float) -> Future[type]:
        """A future for the type of the value; a user asks the owner."""
        if self._cell is None:
            ask = self._context.invoke.rpc_async
            return ask(self._owner, _rref_typeof_on_owner, (self,), None, timeout)
        local: Future[type] = Future()
        cell = self._cell
        cell.when_set(lambda: settle(local, lambda: type(cell.get())))
        return local

    def _set_creation(self, call: Call) -> None:
        """`call` asks the owner to create the value. Once, where remote() made this RRef."""
        self._call = call

    def _fork(self) -> ForkData:
        self._check_creation()
        return self._context.fork(self._owner, self._rref_id, self._fork_id, self._cell)

    def _fetch(self, timeout: float, *, waited: bool) -> Call:
        fork_id = self._usable_fork(_FETCH_PHRASE)
        message = RRefFetch(self._rref_id, fork_id)
        return self._context.agent.request(
            self._owner, message, timeout_s=_limit_s(timeout), hooked=True, waited=waited
        )

    def _usable_fork(self, phrase: str) -> ForkId:
        assert self._fork_id is not None
        self._context.check_usable(self._owner, self._rref_id, self._fork_id, phrase)
        return self._fork_id

    def _check_creation(self) -> None:
        """Raise what kept the owner from creating the value.

        Raises:
            RpcTimeoutError: it did not answer in time.
            RRefError: anything else went wrong.
        """
        error = self._call.error if self._call is not None and self._call.done() else None
        if error is not None and issubclass(type(error), RpcTimeoutError):
            raise RpcTimeoutError(
                f"RRef creation via rpc.remote() timed out, and it is possible that the RRef on the owner node "
                f"{self._owner} does not exist: {describe(error)}"
            ) from error
        if error is not None:
            raise RRefError(f"RRef creation via rpc.remote() on {self._owner} failed: {text_of(error)}") from error


def receive(context: RRefContext, fork: ForkData, announced: bool = False) -> RRef[Any]:
    """The RRef that `fork` makes here."""
    me = context.agent.info
    if fork.owner_life == me.incarnation:
        with interrupts.held:
            cell, awaited = context.receive_owned(fork)
            return RRef._of(context, me, fork.rref_id, fork.fork_id if awaited else None, cell)
    owner = context.agent.resolve_life(fork.owner, fork.owner_life)
    with interrupts.held:
        context.receive_used(fork, announced)
        return RRef._of(context, owner, fork.rref_id, fork.fork_id)


def backward_from(context: RRefContext, value: object, context_id: int, retain_graph: bool) -> None:
    """Run a backward pass from the value of an RRef, on its owner.

    Raises:
        RRefError: `value` is no tensor.
    """
    if not isinstance(value, torch.Tensor):
        raise RRefError(f"RRef should contain a tensor for .backward(), and this one contains a {type(value).__name__}")
    if context_id == NO_CONTEXT:
        torch.autograd.backward([value], retain_graph=retain_graph)
    else:
        context.backward(context_id, [value], retain_graph)


@expose
def _rref_typeof_on_owner(rref: RRef[Any]) -> type:
    return loading.type_of(rref.local_value())  # type: ignore[no-any-return]


def _limit_s(timeout: float) -> float | None:
    return None if timeout == UNSET_RPC_TIMEOUT_S else timeout


def _wait_s(timeout: float) -> float:
    """How long the owner waits for its own value, in seconds; 0: no limit."""
    return 0.0 if timeout == UNSET_RPC_TIMEOUT_S else check_timeout(timeout, "timeout")


def _failed(future: torch.futures.Future[Any]) -> bool:
    try:
        future.value()
    except Exception:
        return True
    return False
