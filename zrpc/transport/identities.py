"""The identities of the connections between workers and a broker, by which its ROUTER tells them apart.

A worker has two DEALERs connected to the one ROUTER: it sends on the one whose identity is `SENDER + incarnation` and
receives on the one whose identity is `RECEIVER + incarnation`. So every socket is one-way, and the worker needs no port
of its own.

    worker to hub   [SENDER + source] destination, frames...      destination b"": the broker itself
    hub to worker   [RECEIVER + destination] source, frames...    source b"": the broker itself
    hello           [RECEIVER + source] b""                       the receiver can be reached from now on
    question        [ASKER + source] frames...                    for the broker, which answers on that connection

A worker that connects again puts the number of that connection behind its incarnation in both identities, as their end.
So what is left of the connections before is never in its way, and what they still say is told from what the newest one
says. A question says nothing of the connection of the worker that asks: it may be connected to another broker.
"""

from __future__ import annotations

from zrpc.ids import INCARNATION_NBYTES

SENDER = b"S"
RECEIVER = b"R"
ASKER = b"A"
BROKER = b""
"""Stands for the broker as a source or a destination."""
END_NBYTES = 4
SOURCE = slice(1, 1 + INCARNATION_NBYTES)
END = slice(1 + INCARNATION_NBYTES, None)
IDENTITY_NBYTES = (1 + INCARNATION_NBYTES, 1 + INCARNATION_NBYTES + END_NBYTES)
