"""The graceful half of shutdown: what is waited for, and what is named where that does not come in time.

What: all workers of a static group come to their shutdown; then each gives up its references, and waits for its calls
to end; then all come together again.

Failure: each step has a time limit. A step that ends without what it waited for says what is under way: here, and on
workers that did not come, if they answer. Then the shutdown goes on.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from zrpc import gather, interrupts
from zrpc.agent.current import current_agent
from zrpc.autograd.service import AutogradService
from zrpc.errors import PeerLostError, RpcTimeoutError, ZrpcError
from zrpc.exposed import expose
from zrpc.gathering import LateError, WorkersLostError
from zrpc.rref.context import RRefContext
from zrpc.rref.leftovers import describe_leftovers
from zrpc.wire import pickling
from zrpc.wire.messages import PythonCall

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zrpc.agent.agent import Agent

log = logging.getLogger("zrpc")

RREF_DRAIN_S = 100.0
"""How long a static group's references may take to be given up at shutdown; torch waits as long."""
LOSS_DRAIN_S = 5.0
"""The same where workers are lost: what they took along of the protocol of references is not waited for."""
ALONE_DRAIN_S = 2.0
"""How long references may take to be given up where others may go on using what this worker owns."""
ASK_S = 1.0
"""How long a worker that did not come may take to say what is under way there."""
MAX_ASKED = 8


def end_together(agent: Agent, timeout_s: float) -> None:
    """What a worker of a static group waits for, each step for `timeout_s` seconds at most; 0: no limit.

    Raises:
        PeerLostError, RpcTimeoutError: see `wait_for_all`.
    """
    lost = workers_lost(wait_for_all, timeout_s)
    delete_rrefs(agent, timeout_s if lost is None else LOSS_DRAIN_S)
    finish_calls(agent, timeout_s)
    wait_for_all(timeout_s)


def end_alone(agent: Agent, timeout_s: float) -> None:
    """The same in a group that grows and shrinks: others may go on using what this worker owns."""
    delete_rrefs(agent, ALONE_DRAIN_S, names=False)
    finish_calls(agent, timeout_s)


def wait_for_all(timeout_s: float) -> None:
    """As `gather.gather_living`; where that is in vain, the error says what is under way.

    Raises:
        WorkersLostError: all others came, but those that are lost.
        PeerLostError: not all came in time.
        RpcTimeoutError: a worker that came could not be told in time that all had come.
    """
    try:
        gather.gather_living(timeout_s)
    except WorkersLostError:
        raise
    except LateError as late:
        there = "".join(f". At {name}: {text}" for name, text in _ask(late.missing))
        raise LateError(f"{late}{there}. Here: {describe(current_agent())}", late.missing) from late
    except (PeerLostError, RpcTimeoutError) as error:
        raise type(error)(f"{error}. Here: {describe(current_agent())}") from error


def workers_lost(wait: Callable[[float], None], timeout_s: float) -> WorkersLostError | None:
    """Call `wait`, which waits for the living as `wait_for_all`; the error that names the lost ones, if any.

    It is kept back: those that live have calls under way that are to end well. The next wait raises it again.
    """
    try:
        wait(timeout_s)
    except WorkersLostError as error:
        return error
    return None


def delete_rrefs(agent: Agent, timeout_s: float, *, names: bool = True) -> None:
    """Give up this worker's references and wait until others gave up theirs to what it owns; 0: `RREF_DRAIN_S`.

    With `names` the log names those that were not given up.
    """
    context: RRefContext = agent.extensions[RRefContext]
    context.delete_all_user_and_unforked_owner_rrefs(timeout_s or RREF_DRAIN_S)
    left = describe_leftovers(context) if names else ""
    if left:
        log.warning("%s shuts down with references that were not given up: %s", agent.info, left)


def finish_calls(agent: Agent, timeout_s: float) -> None:
    """Wait until no call is under way; `timeout_s` 0: no limit."""
    if not agent.quiesce(timeout_s):
        log.warning("%s shuts down, and these are under way: %s", agent.info, describe(agent))


def describe(agent: Agent) -> str:
    """What is under way: calls out and in, references, contexts of autograd."""
    contexts: AutogradService = agent.extensions[AutogradService]
    parts = (agent.describe_waits(), describe_leftovers(agent.extensions[RRefContext]), contexts.describe())
    return "; ".join(part for part in parts if part)


def _ask(names: Sequence[str]) -> list[tuple[str, str]]:
    """What is under way on these workers, those that answer."""
    agent = current_agent()
    calls = []
    with interrupts.deferred:
        for name in names[:MAX_ASKED]:
            with suppress(ZrpcError):
                payload = pickling.dumps_call((_under_way, (), {}))
                calls.append(agent.request(agent.members.find(name), PythonCall(), payload, timeout_s=ASK_S))
        told = []
        for call in calls:
            with suppress(RuntimeError):  # it does not answer, or is another version
                told.append((call.peer.name, str(pickling.loads(call.wait()))))
    return told


@expose
def _under_way() -> str:
    return describe(current_agent())
