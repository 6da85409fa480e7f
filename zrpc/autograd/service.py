"""Distributed autograd on one worker: its contexts, what it asks of others and what it serves."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from zrpc import finalizers, interrupts
from zrpc.agent.pool import blocking
from zrpc.autograd import gradients as codec
from zrpc.autograd.backward_pass import Arrived, BackwardPass, ForSend
from zrpc.autograd.container import ContextContainer
from zrpc.autograd.marking import Countdown, Further
from zrpc.errors import AgentClosedError, AutogradError, PeerLostError
from zrpc.exception_text import text_of
from zrpc.wire.messages import AbortBackward, BackwardRequest, JoinContexts, MarkSends, Message, ReleaseContexts

if TYPE_CHECKING:
    import torch

    from zrpc.agent.agent import Agent
    from zrpc.agent.call import Call
    from zrpc.agent.request import Request
    from zrpc.autograd.dist_context import DistAutogradContext
    from zrpc.autograd.functions import Gradients, RecvInfo, SendFunction
    from zrpc.ids import GlobalId, Incarnation, WorkerInfo
    from zrpc.transport.inbox import Work
    from zrpc.wire.payload import Payload

CLOSE_FLUSH_S = 5.0
"""How long a worker that shuts down may take to tell of contexts that it released."""

MAX_NAMED = 5

Done = Callable[[BaseException | None], None]


class AutogradService:
    """What `install` puts into `agent.extensions`. Any thread may use it.

    Attributes:
        contexts: the contexts of this worker.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.contexts = ContextContainer(lambda: agent.info, self._meet)
        self._released: deque[tuple[DistAutogradContext, Incarnation | None]] = (
            deque()
        )  # to be told of; by the control thread
        self._closed = False

    # ---- for users -------------------------------------------------------------------------------------------------

    def backward(self, context_id: int, roots: Sequence[torch.Tensor], retain_graph: bool, smart: bool) -> None:
        """Run a pass that begins here; see `zrpc.autograd.backward`."""
        context = self.contexts.get(context_id)
        _check(roots)
        if (active := context.active) is not None and active.began_here:
            raise AutogradError(f"a backward pass is under way in autograd context {context_id}: wait for its end")
        backward = self._join(context, self._agent.ids.next(), retain_graph, began_here=True)
        with interrupts.deferred:
            self._drive(backward, roots, smart)

    def _drive(self, backward: BackwardPass, roots: Sequence[torch.Tensor], smart: bool) -> None:
        context = backward.context
        try:
            sends = self._mark_all(backward, roots) if smart else context.sends()
            backward.drive(roots, sends)
        except BaseException as error:
            backward.fail(error)
            self._call_off(context, backward.pass_id, text_of(error))
            raise

    def release(self, context_id: int) -> None:
        """End a context, here and wherever it was told of.

        Raises:
            AutogradError: there is no such context.
        """
        self.contexts.get(context_id)
        self._release(context_id, _at_once)

    def close(self) -> None:
        """This worker shuts down: end the passes that wait here, and tell the others what is released."""
        for context in self.contexts.all():
            if (active := context.active) is not None:
                active.fail(AgentClosedError("this worker shut down during a backward pass"))
        self._closed = True
        self._agent.control.flush(CLOSE_FLUSH_S)

    def debug_info(self) -> dict[str, int]:
        """How many contexts there are, and how many of them have a pass under way."""
        contexts = self.contexts.all()
        return {
            "num_autograd_contexts": len(contexts),
            "num_current_backward_passes": sum(context.active is not None for context in contexts),
        }

    def describe(self) -> str:
        """Which contexts there are, in words; empty: none."""
        contexts = self.contexts.all()
        named = [f"{each.context_id}{', in a backward pass' * (each.active is not None)}" for each in contexts]
        return f"{len(contexts)} autograd contexts ({'; '.join(named[:MAX_NAMED])})" if contexts else ""

    # ---- for passes ------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """See `Peers.rank`."""
        return self._agent.info.id

    def send_gradients(self, backward: BackwardPass, info: RecvInfo, gradients: Gradients, done: Done) -> None:
        """See `Peers.send_gradients`."""
        message = BackwardRequest(backward.context.context_id, info.message_id, backward.pass_id, backward.retain_graph)

        def answered(call: Call) -> None:
            if call.failed:
                self._agent.control.submit(lambda: done(call.error))
                return
            if not call.is_empty:
                self._arrive(backward, lambda: codec.unpack_several(call.result()))
            done(None)

        call = self._agent.request(
            self._member(info.source, info.message_id.created_on),
            message,
            codec.pack(gradients),
            goes_back=not info.by_answer,
        )
        call.add_done_callback(answered, inline=backward.began_here)

    def may_answer_with(self, info: RecvInfo) -> bool:
        """See `Peers.may_answer_with`."""
        routes = self._agent.routes(self._member(info.source, info.message_id.created_on))
        return routes.requests.devices == routes.replies.devices

    def watch(self, life: Incarnation) -> None:
        """See `Peers.watch`."""
        if life != self._me and (worker := self._worker(life)) is not None:
            self._agent.watch(worker)

    def wait_for(self, backward: BackwardPass) -> None:
        """See `Peers.wait_for`."""
        with blocking():
            self._agent.wait_for(backward, None)
            if not backward.done():  # this worker shuts down, and nobody reads
                backward.block(None)

    def wake(self, backward: BackwardPass) -> None:
        """See `Peers.wake`."""
        self._agent.wake(backward)

    # ---- what comes in ---------------------------------------------------------------------------------------------

    def on_backward(self, request: Request[BackwardRequest]) -> Work | None:
        """Serve gradients: where the pass began its thread runs them, else they are work."""
        message = request.message
        context = self.contexts.get(message.context_id)
        backward = self._join(context, message.pass_id, message.retain_graph, began_here=False)
        if not backward.answer_to(_Asked(request)):
            request.reply()

        def arrived() -> list[ForSend]:
            return [(message.autograd_message_id, codec.unpack(request.payload))]

        if backward.began_here:
            backward.enqueue(arrived)
            return None
        return lambda: backward.run_arrived(arrived)

    def on_mark(self, request: Request[MarkSends]) -> None:
        """Serve a mark of SMART mode, on a handler thread. It is answered when what it leads to is marked."""
        message = request.message
        context = self.contexts.get(message.context_id)
        backward = self._join(context, message.pass_id, message.retain_graph, began_here=False)
        further = backward.mark(message.autograd_message_ids)

        def done(error: BaseException | None) -> None:
            if error is None:
                request.reply()
            else:
                request.fail(error)

        self._mark_further(backward, further, done)

    def on_release(self, request: Request[ReleaseContexts]) -> Work | None:
        """Serve a release. What belongs to the contexts is freed by a thread that does not read."""
        work: list[Work] = []
        for context_id in request.message.context_ids:
            self._release(context_id, work.append, told_by=request.source.incarnation)
        request.reply()
        return (lambda: _do_all(work)) if work else None

    def on_join(self, request: Request[JoinContexts]) -> None:
        """Serve one who knows contexts of this worker from somebody who is gone, on the reading thread."""
        over = []
        for context_id in request.message.context_ids:
            context = self.contexts.find(context_id)
            if context is not None:
                context.add_known_worker(request.source)
            if self.contexts.find(context_id) is None:  # it may have ended just before it was told who knows it
                over.append(context_id)
        request.reply()
        if over:
            self._notify(request.source.incarnation, ReleaseContexts(over))

    def on_abort(self, request: Request[AbortBackward]) -> Work:
        """Serve the end of a failed pass. That frees its local part, which is work."""
        message = request.message

        def abort() -> None:
            context = self.contexts.find(message.context_id)
            if context is not None:
                self._call_off(context, message.pass_id, message.reason, told_by=request.source.incarnation)
            request.reply()

        return abort

    def on_peer_lost(self, worker: WorkerInfo, reason: str) -> None:
        """A peer is gone: its contexts are over, and so are passes that wait for gradients from it.

        It may have been the only one to tell this worker of others' contexts, and of their end: so it is their creators
        who are to tell from now on.
        """
        known: defaultdict[Incarnation, list[int]] = defaultdict(list)
        for context in self.contexts.all():
            if context.creator == worker.incarnation:
                self._release(context.context_id, _at_once)
                continue
            known[context.creator].append(context.context_id)
            if (active := context.active) is not None:
                active.lose(worker.incarnation, f"{worker}, which is lost: {reason}")
        for creator, context_ids in known.items():
            if creator != self._me:
                self._notify(creator, JoinContexts(context_ids))

    def _meet(self, context: DistAutogradContext) -> None:
        """A context of another worker is first heard of: it is over when its creator is, which may be so already."""
        if context.creator != self._me:
            self._agent.watch_life(context.creator)
        if context.creator in self._agent.members.ended:
            self._release(context.context_id, _at_once)

    # ---- passes ----------------------------------------------------------------------------------------------------

    def _arrive(self, backward: BackwardPass, arrived: Arrived) -> None:
        """Gradients came with an answer, on whichever thread reads."""
        if backward.began_here:
            backward.enqueue(arrived)
        else:
            self._agent.submit(lambda: backward.run_arrived(arrived))

    def _join(
        self, context: DistAutogradContext, pass_id: GlobalId, retain_graph: bool, *, began_here: bool
    ) -> BackwardPass:
        backward, replaced = context.join_pass(
            pass_id, lambda: BackwardPass(self, context, pass_id, retain_graph, began_here=began_here)
        )
        if replaced is not None:
            error = AutogradError("another backward pass has begun in this context")
            self._agent.submit(lambda: replaced.fail(error))  # it frees its local part
        return backward

    def _call_off(
        self, context: DistAutogradContext, pass_id: GlobalId, reason: str, told_by: Incarnation | None = None
    ) -> None:
        """End a failed pass here and wherever the context was told of."""
        if not context.note_abort(pass_id):
            return
        active = context.active
        if active is not None and active.pass_id == pass_id:
            failed = active
            self._agent.submit(lambda: failed.fail(AutogradError(f"the backward pass failed elsewhere: {reason}")))
        for life in self._told(context, told_by):
            self._notify(life, AbortBackward(context.context_id, pass_id, reason))

    def _release(
        self, context_id: int, run: Callable[[Callable[[], None]], None], told_by: Incarnation | None = None
    ) -> None:
        """Take a context out and tell the others; `run` is given what ends its pass, which may take a while."""
        context = self.contexts.remove(context_id)
        if context is None:
            return
        if context.is_known_beyond((self._me, told_by)):
            self._tell_soon(context, told_by)
        run(context.release)

    def _tell_soon(self, context: DistAutogradContext, told_by: Incarnation | None) -> None:
        """Tell of a released context, away from the thread that released it."""
        if not self._closed:
            self._released.append((context, told_by))
            finalizers.defer(self._tell_released)

    def _tell_released(self) -> None:
        """Tell of all that is released by now, in one message to each worker; later tasks of a round find nothing."""
        by_life: defaultdict[Incarnation, list[int]] = defaultdict(list)
        while self._released:
            context, told_by = self._released.popleft()
            for life in self._told(context, told_by):
                by_life[life].append(context.context_id)
        for life, context_ids in by_life.items():
            self._notify(life, ReleaseContexts(context_ids))

    def _told(self, context: DistAutogradContext, told_by: Incarnation | None) -> list[Incarnation]:
        """All that know `context` from here, but not who told this worker."""
        return [life for life in context.known_workers() if life not in (self._me, told_by)]

    def _notify(self, life: Incarnation, message: Message) -> None:
        worker = self._worker(life)
        if worker is not None:
            self._agent.notify(worker, message)

    # ---- SMART mode ------------------------------------------------------------------------------------------------

    def _mark_all(self, backward: BackwardPass, roots: Sequence[torch.Tensor]) -> Mapping[GlobalId, SendFunction]:
        """Find out, here and elsewhere, which send functions take part; returns those here."""
        marked = threading.Event()
        errors: list[BaseException] = []

        def done(error: BaseException | None) -> None:
            errors.extend([] if error is None else [error])
            marked.set()

        self._mark_further(backward, backward.marking.begin(roots), done)
        with blocking():
            interrupts.restart(lambda: interrupts.wait(marked.wait))
        if errors:
            raise errors[0]
        return backward.marking.marked()

    def _mark_further(self, backward: BackwardPass, further: Further, done: Done) -> None:
        """Mark send functions elsewhere; `done(error)` is called once all that this leads to is marked."""
        countdown = Countdown(len(further), done)
        for life, message_ids in further.items():
            message = MarkSends(backward.context.context_id, backward.pass_id, backward.retain_graph, message_ids)
            to = self._member(life, message_ids[0].created_on)
            self._ask(to, message, None, countdown.step)

    # ---- sending ---------------------------------------------------------------------------------------------------

    def _ask(self, to: WorkerInfo, message: Message, payload: Payload | None, done: Done) -> None:
        """Send a request; `done(error)` is called with its outcome, maybe on the reading thread."""
        self._agent.request(to, message, payload).add_done_callback(lambda call: done(call.error))

    def _member(self, life: Incarnation, rank: int) -> WorkerInfo:
        worker = self._worker(life)
        if worker is None:  # a group that may shrink does not know any more who that was
            raise PeerLostError(f"the worker of rank {rank} is not in the group any more")
        return worker

    def _worker(self, life: Incarnation) -> WorkerInfo | None:
        member = self._agent.members.by_incarnation(life)
        return None if member is None else member.info

    @property
    def _me(self) -> Incarnation:
        return self._agent.info.incarnation


class _Asked:
    """See `zrpc.autograd.backward_pass.Asked`."""

    def __init__(self, request: Request[BackwardRequest]) -> None:
        self._request = request
        self.source = request.source.incarnation
        self.fail = request.fail

    def reply(self, homeward: Sequence[ForSend]) -> None:
        """See `Asked.reply`."""
        self._request.reply(codec.pack_several(homeward))


def _at_once(task: Callable[[], None]) -> None:
    task()


def _do_all(tasks: Sequence[Callable[[], None]]) -> None:
    for task in tasks:
        task()


def _check(roots: Sequence[torch.Tensor]) -> None:
    """Raise if `roots` cannot be differentiated."""
    if not roots:
        raise AutogradError("No tensors provided for gradient computation.")
    for index, root in enumerate(roots):
        if not root.requires_grad:
            raise AutogradError(f"requires_grad not set on root {index}")
        if root.numel() != 1:
            raise AutogradError(f"root {index} is not a scalar, all roots need to be scalar")
        if root.grad_fn is None:
            raise AutogradError(f"root {index} does not have a valid gradient function: it is a leaf")
