"""What a worker or broker proves itself with on its connections, and whom it lets in.

What: all ZeroMQ sockets speak CURVE (CurveZMQ, https://rfc.zeromq.org/spec/26, by libsodium): both ends prove that they
hold a key, and all bytes are encrypted. Two pairs of keys are derived from the group's secret: one for sockets that
listen, one for those that connect. Who does not know the secret knows neither public key, and so cannot even begin.
Those that listen also ask `Authenticator` about each connection (ZAP, https://rfc.zeromq.org/spec/27): it lets in the
keys of the group alone.

On a local link the kernel says whose process it is (`zrpc.transport.local_socket`), and the first message has an
authentication code for these two lives.

Threads: `Credentials` never changes. An `Authenticator` belongs to the thread that calls `answer`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import zmq
from zmq.utils import z85

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.secret import Secret

    Context = zmq.Context[zmq.Socket[bytes]]
    Socket = zmq.Socket[bytes]

LOCAL_PROOF_NBYTES = 32
ZAP_ADDRESS = "inproc://zeromq.zap.01"
DOMAIN = b"zrpc"
_VERSION = b"1.0"


class KeyPair(NamedTuple):
    """Of CURVE, in Z85: 40 characters each."""

    public: bytes
    private: bytes

    def __repr__(self) -> str:
        return "<key pair>"


class Credentials:
    """The keys of one member of a group.

    Args:
        secret: the group's.
    """

    def __init__(self, secret: Secret) -> None:
        self._secret = secret
        self._listening = _pair(secret.derive("curve, who listens"))
        self._connecting = _pair(secret.derive("curve, who connects"))

    @property
    def source(self) -> str:
        """Where the secret came from, for errors."""
        return self._secret.source

    def set_listening(self, sock: Socket) -> None:
        """`sock` will listen: only members can connect to it."""
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._listening.private)
        sock.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)

    def set_connecting(self, sock: Socket) -> None:
        """`sock` will connect: only to members."""
        sock.setsockopt(zmq.CURVE_SERVERKEY, self._listening.public)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self._connecting.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._connecting.private)

    def is_member(self, public: bytes) -> bool:
        """Whether that key, of 32 bytes, is a member's."""
        return public == z85.decode(self._connecting.public)

    def local_proof(self, sender: Incarnation, receiver: Incarnation) -> bytes:
        """What `sender` says on a local link to `receiver`, of `LOCAL_PROOF_NBYTES`."""
        return self._secret.derive("local link", sender, receiver)


class Authenticator:
    """Decides on connections to the sockets of one context that listen. Make it before them.

    Args:
        context: theirs.
        credentials: say who is a member.

    Attributes:
        sock: can be read when there is something to decide.
    """

    def __init__(self, context: Context, credentials: Credentials) -> None:
        self._credentials = credentials
        self.sock: Socket = context.socket(zmq.ROUTER)
        self.sock.setsockopt(zmq.LINGER, 0)
        self.sock.bind(ZAP_ADDRESS)

    def answer(self) -> None:
        """Decide on the connections that wait for it. Never blocks."""
        with suppress(zmq.Again):
            while True:
                self._answer(self.sock.recv_multipart(zmq.NOBLOCK))

    def close(self) -> None:
        """Let nobody in any more."""
        self.sock.close()

    def _answer(self, request: list[bytes]) -> None:
        # [origin, b"", version, request id, domain, address, routing id, mechanism, key]
        if len(request) != 9 or request[2] != _VERSION:
            return
        origin, empty, version, number, domain, _, _, mechanism, key = request
        is_member = domain == DOMAIN and mechanism == b"CURVE" and self._credentials.is_member(key)
        verdict = (b"200", b"OK") if is_member else (b"400", b"not a member of this group")
        with suppress(zmq.Again):
            self.sock.send_multipart([origin, empty, version, number, *verdict, b"", b""], zmq.NOBLOCK)


def _pair(private: bytes) -> KeyPair:
    encoded = z85.encode(private)
    return KeyPair(zmq.curve_public(encoded), encoded)
