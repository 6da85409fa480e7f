"""What a worker or broker proves itself with on its connections, and whom it lets in.

What: all ZeroMQ sockets speak CURVE (CurveZMQ, https://rfc.zeromq.org/spec/26, by libsodium): both ends prove that they
hold a key, and all bytes are encrypted. Two pairs of keys are derived from the group's secret: one for sockets that
listen, one for those that connect. Who does not know the secret knows neither public key, and so cannot even begin.
Those that listen also ask `Authenticator` about each connection (ZAP, https://rfc.zeromq.org/spec/27): it lets in the
keys of the group alone.

With a keyring (`zrpc.keyring`) each worker connects and listens with a key of its own instead; a broker listens with
the group's. Who listens where a worker is looked for must hold that worker's key, and all that comes over a connection
is of the worker whose key it has (`zrpc.transport.senders`).

On a local link the kernel says whose process it is (`zrpc.transport.local_socket`), and the first message has an
authentication code for these two lives.

Threads: `Credentials` never changes. An `Authenticator` belongs to the thread that calls `answer`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import zmq
from zmq.utils import z85

from zrpc.errors import ConfigError
from zrpc.ids import new_incarnation
from zrpc.keyring import INSECURE_KEYS, check_pair, find_keyring, find_private_key
from zrpc.keyring_file import fingerprint

if TYPE_CHECKING:
    from zrpc.ids import Incarnation
    from zrpc.keyring import Keyring
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
        keyring: the keys of single workers; None: the secret makes a member.
        private: this worker's own key, in Z85, with a keyring; None: a broker's, which has none.

    Attributes:
        keyring: as given.
    """

    def __init__(self, secret: Secret, keyring: Keyring | None = None, private: str | None = None) -> None:
        self._secret = secret
        self.keyring = keyring
        self._group_listens = _pair(secret.derive("curve, who listens"))
        group_connects = _pair(secret.derive("curve, who connects"))
        own = None if private is None else KeyPair(zmq.curve_public(private.encode()), private.encode())
        self._listening, self._connecting = own or self._group_listens, own or group_connects
        self._group_public = z85.decode(group_connects.public)

    @property
    def source(self) -> str:
        """Where the secret came from, for errors."""
        return self._secret.source

    def new_life(self) -> Incarnation:
        """A fresh incarnation of this worker."""
        return new_incarnation(fingerprint(self._connecting.public.decode()) if self.keyring is not None else b"")

    def set_listening(self, sock: Socket) -> None:
        """`sock` will listen: only members can connect to it."""
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._listening.private)
        sock.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)

    def set_connecting(self, sock: Socket, listener: Incarnation | None = None) -> None:
        """`sock` will connect: only to members.

        Args:
            sock: the socket.
            listener: to this worker alone, where workers have keys of their own; None: to the broker.

        Raises:
            ConfigError: it has no key that is valid.
        """
        sock.setsockopt(zmq.CURVE_SERVERKEY, self._key_of(listener))
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self._connecting.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._connecting.private)

    def is_member(self, public: bytes) -> bool:
        """Whether that key, of 32 bytes, is a member's."""
        if self.keyring is None:
            return public == self._group_public
        self.keyring.reload()
        return self.keyring.is_valid(z85.encode(public).decode())

    def why_not(self, life: Incarnation) -> str | None:
        """Why a worker is not let in, in that life, as far as the keyring says now; None: it is."""
        if self.keyring is None:
            return None
        self.keyring.reload()
        return self.keyring.why_not(life)

    def is_revoked(self, life: Incarnation) -> bool:
        """Whether the key of a worker was, as far as the keyring says now."""
        if self.keyring is None:
            return False
        self.keyring.reload()
        entry = self.keyring.entry_of(life)
        return entry is not None and entry.revoked is not None

    def local_proof(self, sender: Incarnation, receiver: Incarnation) -> bytes:
        """What `sender` says on a local link to `receiver`, of `LOCAL_PROOF_NBYTES`."""
        return self._secret.derive("local link", sender, receiver)

    def _key_of(self, listener: Incarnation | None) -> bytes:
        if self.keyring is None or listener is None:
            return self._group_listens.public
        reason = self.why_not(listener)
        entry = self.keyring.entry_of(listener)
        if reason is not None or entry is None:
            raise ConfigError(str(reason))
        return entry.public.encode()


def worker_credentials(secret: Secret | None) -> Credentials | None:
    """What a worker proves itself with: the group's secret and, where the environment names them, keys of workers.

    Args:
        secret: None where the group has none (insecure).

    Raises:
        ConfigError: the keyring or this worker's own key cannot be used.
    """
    keyring, private = find_keyring(), find_private_key()
    if secret is None:
        if keyring is not None or private is not None:
            raise ConfigError(INSECURE_KEYS)
        return None
    check_pair(keyring, private)
    credentials = Credentials(secret, keyring, private)
    if (reason := credentials.why_not(credentials.new_life())) is not None:
        raise ConfigError(f"this worker cannot be a member: {reason}")
    return credentials


def new_life(credentials: Credentials | None) -> Incarnation:
    """A fresh incarnation of a worker that has these, or none."""
    return new_incarnation() if credentials is None else credentials.new_life()


def keyring_of(credentials: Credentials | None) -> Keyring | None:
    """The keys of single workers; None where members are trusted with being any of them."""
    return None if credentials is None else credentials.keyring


def make_pair() -> KeyPair:
    """A new key."""
    return KeyPair(*zmq.curve_keypair())


def zmq_versions() -> tuple[str, str, bool]:
    """Of pyzmq and of libzmq, and whether that can encrypt (CURVE)."""
    return zmq.__version__, zmq.zmq_version(), bool(zmq.has("curve"))


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
        user = z85.encode(key) if is_member else b""  # goes with all that comes over the connection
        with suppress(zmq.Again):
            self.sock.send_multipart([origin, empty, version, number, *verdict, user, b""], zmq.NOBLOCK)


def _pair(private: bytes) -> KeyPair:
    encoded = z85.encode(private)
    return KeyPair(zmq.curve_public(encoded), encoded)
