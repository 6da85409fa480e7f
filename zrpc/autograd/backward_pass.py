"""One backward pass on one worker: the local part, the requests it sends and those it answers.

How the end is found. Every worker but the first is drawn into the pass by a `BackwardRequest`, whose answer it keeps
back until its own part is done: all its sources have arrived, every node has run, and all requests that it sent are
answered. Later requests of the same pass are answered at once. So when the first worker's own part is done, everything
everywhere is (this is Dijkstra's and Scholten's way to detect termination). An error takes the same way back, and the
first worker then calls the pass off everywhere, so that nobody waits for gradients that never come.

Gradients for the worker that drew this one in, the usual case with two workers, are kept back with the answer and
travel on it: that saves a request and an answer. If the end is not reached without them, they are sent at once.

No handler thread waits: what arrives is run by the one that serves the request, and whoever finds everything done
answers. On the first worker the thread that called `backward` would only wait, so it reads messages meanwhile and runs
what arrives there; hooks and profilers see the thread they expect, and hand-overs are saved.

A pass may be called off while a segment runs. The segment is not interrupted, but it cannot send any more, and the taps
on the leaves stay until it has ended.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from zrpc import interrupts
from zrpc.autograd.ddp import WholeLeaves
from zrpc.autograd.local import LocalPass
from zrpc.autograd.marking import Further, Marking
from zrpc.errors import AutogradError, PeerLostError, RpcTimeoutError
from zrpc.exception_text import set_cause, text_of
from zrpc.staging import handover
from zrpc.wakeups import WakeUps
from zrpc.wire.raisable import copy_exception

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from zrpc.autograd.dist_context import DistAutogradContext
    from zrpc.autograd.functions import Gradients, RecvInfo, SendFunction
    from zrpc.ids import GlobalId, Incarnation
    from zrpc.staging.streams import Mark

_PREFIX = "Error on Node "


ForSend = tuple["GlobalId", "Gradients"]
"""Gradients for the send function of that id."""

Arrived = Callable[[], "list[ForSend]"]
"""Gradients that came: reads them, once, where and when they are wanted."""


class Asked(Protocol):
    """The request that drew this worker into a pass."""

    @property
    def source(self) -> Incarnation:
        """The life of the worker that asked."""

    def reply(self, homeward: Sequence[ForSend]) -> None:
        """This worker's part is done; gradients for the asker go with the answer."""

    def fail(self, error: BaseException) -> None:
        """It went wrong."""


class Peers(Protocol):
    """What a pass needs of its worker."""

    @property
    def rank(self) -> int:
        """This worker's."""

    def send_gradients(
        self, backward: BackwardPass, info: RecvInfo, gradients: Gradients, done: Callable[[BaseException | None], None]
    ) -> None:
        """Send gradients back to where the tensors came from; `done(error)` is called once that worker has answered."""

    def may_answer_with(self, info: RecvInfo) -> bool:
        """Whether gradients for tensors that came with an answer may go back with one: by the right device map."""

    def watch(self, life: Incarnation) -> None:
        """See to it that `BackwardPass.lose` is called when that life is over."""

    def wait_for(self, backward: BackwardPass) -> None:
        """Wait until `backward.done()`, as a thread that may belong to a pool, and read messages meanwhile."""

    def wake(self, backward: BackwardPass) -> None:
        """Wake the thread in `wait_for`, if it reads messages."""


class BackwardPass:
    """The pass `pass_id`. The lock owns all that changes; threads that read messages take it.

    Args:
        peers: this worker.
        context: the context it belongs to.
        pass_id: given out by the worker where it began.
        retain_graph: keep what nodes saved.
        began_here: whether this is the worker where it began, a thread of which will call `drive`.
    """

    def __init__(
        self, peers: Peers, context: DistAutogradContext, pass_id: GlobalId, retain_graph: bool, *, began_here: bool
    ) -> None:
        self.pass_id = pass_id
        self.began_here = began_here
        self.retain_graph = retain_graph
        self.context = context
        self._peers = peers
        self._marking: Marking | None = None
        self._lock = threading.RLock()
        self._building = threading.Lock()
        self._wake_ups = WakeUps()
        self._asked: Asked | None = None
        self._local: LocalPass | None = None
        self._whole: WholeLeaves | None = None
        self._arrived: deque[Arrived] = deque()
        self._homeward: list[tuple[RecvInfo, Gradients]] = []
        self._marks: list[Mark] = []  # in the streams of torch's engine that made them
        self._is_driven = False  # a thread is in `drive`
        self._is_unsettled = False  # it is to settle what changed on another thread
        self._has_looked = False
        self._running = 0
        self._unanswered = 0
        self._over = False
        self._closed = False
        self._error: BaseException | None = None

    @property
    def marking(self) -> Marking:
        """What SMART mode finds out for this pass; asked for in that mode only."""
        with self._lock:
            if self._marking is None:
                self._marking = Marking()
            return self._marking

    def drive(self, roots: Sequence[torch.Tensor], sends: Mapping[GlobalId, SendFunction]) -> None:
        """Run the pass from `roots`, on the worker where it begins, until everything everywhere is done.

        Args:
            roots: scalar tensors.
            sends: the send functions here that will get gradients.

        Raises:
            Exception: whatever a node here raised at the first go.
            AutogradError: "Error on Node <rank>: ..." for what went wrong later or elsewhere.
            PeerLostError: somebody needed is gone.
        """
        self._is_driven = True
        try:
            self._step(lambda: self._built(roots, sends).run_roots(), self.fail)
            self._look_ahead()
            while (arrived := self._next()) is not None:
                self._run_send(arrived)
        finally:
            self._is_driven = False
            self._settle()
            if self._over:  # the thread that ended it may not have told the context yet, and the next one may begin
                self.context.end_pass(self.pass_id)
        if self._error is not None:
            raise copy_exception(self._error)

    def answer_to(self, asked: Asked) -> bool:
        """Let `asked` wait for the end of this pass; False if another request does, or nobody has to."""
        with self._lock:
            if self.began_here or self._asked is not None or self._over:
                return False
            self._asked = asked
            return True

    def done(self) -> bool:
        """Whether the thread in `drive` has something to do. See `Awaited`."""
        return bool(self._arrived) or self._over or self._is_unsettled

    def block(self, deadline: float | None) -> None:
        """Wait for it while another thread reads. See `Awaited`."""
        self._wake_ups.wait(self.done, deadline)

    def enqueue(self, arrived: Arrived) -> None:
        """Gradients came, on the worker where the pass began: they are for the thread in `drive`."""
        with self._lock:
            self._arrived.append(arrived)
        self._wake()

    def run_arrived(self, arrived: Arrived) -> None:
        """Gradients came, on another worker: run what is ready now."""
        self._step(lambda: _run_all(self._prepared(), arrived), self._fail_here)
        self._look_ahead()

    def fail(self, error: BaseException) -> None:
        """End the pass with `error`, unless it is over."""
        with self._lock:
            if self._over:
                return
            self._over, self._error = True, error
            asked = self._asked
            self._homeward.clear()
        self._wake()
        self.context.end_pass(self.pass_id)
        if asked is not None:
            asked.fail(self._described(error))
        self._settle_soon()

    def mark(self, message_ids: Sequence[GlobalId]) -> Further:
        """SMART mode: send functions of this worker take part. Returns those elsewhere that follow.

        Raises:
            AutogradError: "Error on Node <rank>: ..." where one is not there, or spent.
        """
        try:
            return self.marking.mark(message_ids, self.context.sends())
        except AutogradError as error:
            raise self._described(error) from error

    def lose(self, life: Incarnation, text: str) -> None:
        """That life is over: fail if gradients were to come from there."""
        with self._lock:
            local = self._local
        if local is not None and life in local.awaited():
            self.fail(PeerLostError(f"gradients were to come from {text}"))

    # ---- the steps -------------------------------------------------------------------------------------------------

    def _run_send(self, arrived: Arrived) -> None:
        if (local := self._local) is not None:
            self._step(lambda: _run_all(local, arrived), self._fail_here)

    def _prepared(self) -> LocalPass:
        """The local part, on another worker than the first. It stays as long as a step that uses it runs."""
        with self._building:  # of a large graph that takes long, and threads that read take the other lock
            if self._local is None:
                return self._built((), self.context.sends() if self._marking is None else self._marking.marked())
            return self._local

    def _built(self, roots: Sequence[torch.Tensor], sends: Mapping[GlobalId, SendFunction]) -> LocalPass:
        self._whole = WholeLeaves(self.context)
        self._local = LocalPass(
            roots, sends, self.retain_graph, self._send, self.context.add_gradients, self._whole.__contains__
        )
        return self._local

    def _look_ahead(self) -> None:
        """Do what need not be done before gradients are on their way."""
        local = self._local
        if local is not None and not self._has_looked:
            self._has_looked = True
            self._step(lambda: self._watch(local), self._fail_here)

    def _watch(self, local: LocalPass) -> None:
        for life in local.awaited():
            self._peers.watch(life)
        local.look_ahead()

    def _step(self, work: Callable[[], object], on_error: Callable[[BaseException], None]) -> None:
        """Do `work`, unless the pass is over; then see whether that was all."""
        with self._lock:
            if self._over:
                return
            self._running += 1
        try:
            work()
        except BaseException as error:
            on_error(error)
        finally:
            with self._lock:
                self._running -= 1
        self._settle()

    def _next(self) -> Arrived | None:
        """What arrived next; None once the pass is over."""
        while True:
            interrupts.run_handlers()
            if not self.done():
                self._peers.wait_for(self)
            if self._is_unsettled:
                self._is_unsettled = False
                self._settle()
            with self._lock:
                if self._over:
                    return None
                if self._arrived:
                    return self._arrived.popleft()

    def _wake(self) -> None:
        """Wake the thread in `drive`, if it waits."""
        self._wake_ups.wake_all()
        self._peers.wake(self)

    def _fail_here(self, error: BaseException) -> None:
        as_it_is = isinstance(error, PeerLostError | RpcTimeoutError)  # of an answer that was to bring gradients
        self.fail(error if as_it_is else self._described(error))

    def _described(self, error: BaseException) -> BaseException:
        """`error` with the rank of the worker where it came up, for those elsewhere."""
        if isinstance(error, AutogradError) and text_of(error).startswith(_PREFIX):
            return error
        described = AutogradError(f"{_PREFIX}{self._peers.rank}: {text_of(error)}")
        set_cause(described, error)
        return described

    # ---- what goes out ---------------------------------------------------------------------------------------------

    def _send(self, info: RecvInfo, gradients: Gradients) -> None:
        """A receive function got gradients. Runs inside torch's engine, on one of its threads."""
        with self._lock:
            if self._over:
                raise AutogradError(f"the backward pass was called off: {self._error}")
            goes_home = self._asked is not None and info.source == self._asked.source
            if goes_home and (not info.by_answer or self._peers.may_answer_with(info)):
                self._homeward.append((info, gradients))
                if handover.streams is not None:
                    self._marks.append(handover.streams.mark())
                return
            self._unanswered += 1
        self._send_counted(info, gradients)

    def _send_counted(self, info: RecvInfo, gradients: Gradients) -> None:
        """Send gradients that are counted as unanswered already."""
        try:
            self._peers.send_gradients(self, info, gradients, self._on_answer)
        except BaseException:
            with self._lock:
                self._unanswered -= 1
            raise

    def _on_answer(self, error: BaseException | None) -> None:
        with self._lock:
            self._unanswered -= 1
        if error is None:
            self._settle_soon()
        else:
            self.fail(error)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _settle_soon(self) -> None:
        """Settle; if a thread is in `drive`, there: to free the local part of the graph may take long."""
        if not self._is_driven:
            self._settle()
            return
        self._is_unsettled = True
        self._wake()

    def _settle(self) -> None:
        """End the pass if everything is done, and clean up once nothing runs any more."""
        with self._lock:
            local = self._local
            done = not (self._over or self._running or self._unanswered) and local is not None and local.finished
            close = (done or self._over) and not self._running and not self._closed
            self._over |= done
            self._closed |= close
            homeward: list[tuple[RecvInfo, Gradients]] = []
            marks: list[Mark] = []
            if not self._running:
                homeward, self._homeward = self._homeward, []
                marks, self._marks = self._marks, []
                self._unanswered += 0 if done else len(homeward)
        if close:
            self._close()
        for mark in marks:
            mark.join()
        if not done:
            self._send_home(homeward)
            return
        self.context.end_pass(self.pass_id)
        if self._asked is not None:
            self._asked.reply([(info.message_id, gradients) for info, gradients in homeward])
        self._wake()

    def _send_home(self, homeward: list[tuple[RecvInfo, Gradients]]) -> None:
        """Send what cannot wait for the answer; it is counted as unanswered already."""
        for place, (info, gradients) in enumerate(homeward):
            try:
                self._send_counted(info, gradients)
            except BaseException as error:
                with self._lock:
                    self._unanswered -= len(homeward) - place - 1
                self._fail_here(error)
                return

    def _close(self) -> None:
        """Clean up. The local part refers to this one: if it stayed, its tensors would until a garbage collection."""
        local, self._local = self._local, None
        whole, self._whole = self._whole, None
        if local is not None:
            local.close()
        if whole is not None:
            whole.close()


def _run_all(local: LocalPass, arrived: Arrived) -> None:
    """Run what is ready now that gradients came, of which nothing is kept here: then they need not be copied."""
    several = arrived()
    while several:
        local.run_send(several[0][0], several.pop(0)[1])
