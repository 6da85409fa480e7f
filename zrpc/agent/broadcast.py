"""One call to several workers: packed once, and on one host written to shared memory once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc.wire.payload import Payload, packed_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zrpc.agent.agent import Agent
    from zrpc.agent.call import Call
    from zrpc.ids import WorkerInfo
    from zrpc.wire.messages import Message


def call_all(
    agent: Agent, receivers: Sequence[WorkerInfo], message: Message, payload: Payload, timeout_s: float | None
) -> list[Call] | None:
    """Send one request to each of `receivers`, with one payload.

    Args:
        agent: sends them.
        receivers: the callees; one that is named twice gets two requests.
        message: what is asked.
        payload: what rides beside it. Its memory must not be written to until all calls are done.
        timeout_s: as in `Agent.request`.

    Returns:
        The calls, in the order of `receivers`; None, and nothing was sent, where each needs a payload of its own.

    Raises:
        SerializationError: a tensor of the payload cannot travel.
    """
    if any(tensor.requires_grad for tensor in payload.tensors):  # a hook may replace it for each callee
        return None
    if any(agent.routes(to).requests.devices for to in receivers):
        return None
    packed = packed_for(payload, list(dict.fromkeys(to.incarnation for to in receivers)))
    if packed is None:
        return None
    try:
        return [
            agent.request(
                to, message, Payload(payload.data, list(payload.tensors), payload.buffers, packed=packed),
                timeout_s=timeout_s, hooked=True,
            )
            for to in receivers
        ]  # fmt: skip
    finally:
        agent.end_sharing(packed.shared)
