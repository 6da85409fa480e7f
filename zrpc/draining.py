"""Taking no new calls, and finishing what runs: `drain`, and what SIGTERM does in workers of `zrpc launch`.

What: a worker that drains says so to all members. From then on a call to it fails where it is made, with
`DrainingError`: it did not run, and may be made to another worker, or wait for the next one of that name. What had come
before is run and answered. References and autograd contexts work on until `shutdown`; the log names the RRefs that
others still hold. In a static group `shutdown` waits for the others, as ever.

Failure: a member that cannot be told goes on calling, and is answered. A call that runs for longer than the time limit
is not waited for; the log names it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from zrpc import interrupts, threads
from zrpc.agent.current import current_agent, is_agent_set
from zrpc.agent.pool import blocking
from zrpc.config import check_timeout
from zrpc.errors import ConfigError, ZrpcError
from zrpc.exposed import expose
from zrpc.rref.context import RRefContext
from zrpc.rref.leftovers import describe_leftovers
from zrpc.wire import pickling
from zrpc.wire.messages import PythonCall

if TYPE_CHECKING:
    from types import FrameType

    from zrpc.agent.agent import Agent
    from zrpc.ids import Incarnation, WorkerInfo

log = logging.getLogger("zrpc")

GRACE_VARIABLE = "ZRPC_DRAIN_ON_SIGTERM"
"""For how many seconds a worker drains when it is told to end by SIGTERM; `zrpc launch` sets it."""
TELL_S = 2.0
"""How long it may take to tell a member."""
PAUSE_S = 0.02
REPORT_S = 5.0
"""How often the log says what is waited for."""
EXIT_CODE = 128 + signal.SIGTERM


def drain(timeout: float = 0.0) -> bool:
    """Take no new calls, and wait until those that run here are answered. `shutdown` is still to be called.

    For handlers of signals, too: what the interrupted thread has called itself is not waited for.

    Args:
        timeout: seconds to wait; 0: no limit.

    Returns:
        Whether all are answered.

    Raises:
        NotInitializedError: this process is no worker.
        ConfigError: `timeout` is no number of seconds.
    """
    agent = current_agent()
    limit_s = check_timeout(timeout, "timeout")
    deadline = time.monotonic() + limit_s if limit_s else None
    _tell(agent)
    is_finished = _finish(agent, deadline)
    left = describe_leftovers(agent.extensions[RRefContext])
    if left:
        log.warning("%s has drained, and is to stay as long as others need what it keeps: %s", agent.info, left)
    return is_finished


def drain_worker(to: str | int | WorkerInfo) -> None:
    """Have the worker `to` drain. One that drains at SIGTERM then ends, as if that had come.

    Raises:
        UnknownWorkerError: there is none.
        PeerLostError: it has gone meanwhile.
    """
    agent = current_agent()
    info = agent.resolve(to)
    with interrupts.deferred:
        agent.request(info, PythonCall(), pickling.dumps_call((_drain_here, (), {})), waited=True).wait()


def _tell(agent: Agent) -> None:
    with suppress(ZrpcError):
        agent.refresh()  # newcomers are to know, too
    me = agent.info.incarnation
    with interrupts.deferred:
        calls = [
            agent.request(info, PythonCall(), pickling.dumps_call((_note_draining, (me,), {})), timeout_s=TELL_S)
            for info in agent.members.all()
            if info.incarnation != me
        ]
        for call in calls:
            with suppress(ZrpcError):
                call.wait()


def _finish(agent: Agent, deadline: float | None) -> bool:
    """Wait until no request is served; false: it was not so by `deadline`."""
    report_at = time.monotonic() + REPORT_S
    with blocking():
        while agent.counts()["server_active_calls"] and not _is_stuck(agent):
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                log.warning("%s has drained, but for what is still under way: %s", agent.info, agent.describe_waits())
                return False
            if now >= report_at:
                log.warning("%s drains; under way: %s", agent.info, agent.describe_waits())
                report_at = now + REPORT_S
            time.sleep(PAUSE_S)
    return True


def _is_stuck(agent: Agent) -> bool:
    """Whether what runs may never end: a worker of a static group is lost."""
    return agent.is_static_group and agent.lost_at is not None


@expose
def _note_draining(life: Incarnation) -> None:
    current_agent().note_draining(life)


@expose
def _drain_here() -> None:
    """Drain on a thread of its own, so that the call that says so is answered."""
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        threads.start(_end, "zrpc-drain")
    else:
        threads.start(drain, "zrpc-drain")


def _end() -> None:
    time.sleep(PAUSE_S)  # the call that said so is to be answered first
    os.kill(os.getpid(), signal.SIGTERM)


# ---- SIGTERM ---------------------------------------------------------------------------------------------------------


def install_handler() -> None:
    """Drain at SIGTERM, where the launcher says so and the program has no handler of its own.

    Raises:
        ConfigError: what the launcher says is no number of seconds.
    """
    said = os.environ.get(GRACE_VARIABLE)
    if not said or threading.current_thread() is not threading.main_thread():
        return
    try:
        check_timeout(float(said), GRACE_VARIABLE)
    except ValueError as error:
        raise ConfigError(f"{GRACE_VARIABLE} must be a number of seconds, not {said!r}") from error
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(_number: int, _frame: FrameType | None) -> NoReturn:
    """Drain, then end with the exit code that shells give for SIGTERM. Exit handlers and `finally` run."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the next one ends the process
    if is_agent_set():
        log.warning("SIGTERM: %s takes no new calls, and ends when those that run are answered", current_agent().info)
        with suppress(ZrpcError):
            drain(float(os.environ[GRACE_VARIABLE]))
    raise SystemExit(EXIT_CODE)
