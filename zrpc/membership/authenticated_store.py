"""Records in a store that everybody may reach, of which only the group's own are believed.

What: each value carries an authentication code over the run, its key and itself, made with the secret of the group. So
a record that was written without the secret, changed, moved to another key or kept from another run is refused. The run
is a random number that the worker which comes first writes; its own code depends on nothing else.

Limits: who writes to the store may still delete records, or put an older value of the same key and run in place of a
newer one, or a whole earlier run in place of this one. That the others are of this life is for the group to find out
(`StoreGroup`). The numbers of `add` have no code: they decide nothing.

An empty value has no code. It says no more than a key that is not there, and whoever can write can delete.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from zrpc.errors import RefusedError
from zrpc.secret import FILE_VARIABLE, TAG_NBYTES, VARIABLE, user_file

if TYPE_CHECKING:
    from datetime import timedelta

    from zrpc.membership.counter import Store
    from zrpc.secret import Secret

RUN = "run"
"""The key of the run."""
PURPOSE = "record of the store"
MARK = b"zrpc-with-secret:"
"""What a value with a code begins with; the code follows, as hexadecimal digits. Older versions may show it."""
RUN_NBYTES = 16
_WHERE = f"{VARIABLE}, {FILE_VARIABLE} or the file of their user"


def with_secret(store: Store, secret: Secret | None) -> AuthenticatedStore | PlainStore:
    """`store` as workers with `secret` use it, or workers without one."""
    return PlainStore(store) if secret is None else AuthenticatedStore(store, secret)


class AuthenticatedStore:
    """A store whose values have codes. Any thread may use it, if it may use `store`.

    Args:
        store: what keeps the values.
        secret: that of the group.
    """

    def __init__(self, store: Store, secret: Secret) -> None:
        self._store = store
        self._secret = secret
        self._run = b""

    def set(self, key: str, value: str | bytes) -> None:
        """See `Store`."""
        self._store.set(key, self._seal(key, value))

    def get(self, key: str) -> bytes:
        """See `Store`.

        Raises:
            RefusedError: what lies under `key` was not written there by a worker of this run.
        """
        return self._open(key, self._store.get(key))

    def add(self, key: str, amount: int) -> int:
        """See `Store`. The result may be anybody's: nothing may be decided by it, and nothing sized."""
        return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        """See `Store`. That something is there says not that it is the group's."""
        return self._store.check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """See `Store`.

        Raises:
            RefusedError: as `get`; nothing was changed.
        """
        was = self._seal(key, expected).decode() if expected else ""
        found = self._store.compare_set(key, was, self._seal(key, desired).decode() if desired else "")
        return self._open(key, found) if found else b""

    def set_timeout(self, timeout: timedelta) -> None:
        """How long `store` may take from now on."""
        _set_timeout(self._store, timeout)

    def _seal(self, key: str, value: str | bytes) -> bytes:
        return self._sealed(key, value.encode() if isinstance(value, str) else bytes(value), self._this_run())

    def _open(self, key: str, raw: bytes) -> bytes:
        return self._opened(key, raw, self._this_run())

    def _this_run(self) -> bytes:
        """The run, which is written or read first of all."""
        if not self._run:
            mine = self._sealed(RUN, secrets.token_hex(RUN_NBYTES).encode(), b"").decode()
            self._run = self._opened(RUN, self._store.compare_set(RUN, "", mine), b"")
        return self._run

    def _sealed(self, key: str, payload: bytes, run: bytes) -> bytes:
        return MARK + self._secret.tag(PURPOSE, run, key.encode(), payload).hex().encode() + payload

    def _opened(self, key: str, raw: bytes, run: bytes) -> bytes:
        if not raw.startswith(MARK):
            raise RefusedError(
                f"the record {key!r} in the store of this group has no authentication code: what wrote it has no "
                "secret (insecure=True, or ZRPC_INSECURE=1), is an older zrpc, or is no worker. This worker's secret "
                f"is from {self._secret.source}: give the others the same, and update zrpc where it is older"
            )
        at = len(MARK) + 2 * TAG_NBYTES
        payload = raw[at:]
        try:
            tag = bytes.fromhex(raw[len(MARK) : at].decode("ascii"))
        except ValueError:
            tag = b""
        if not self._secret.is_tag(tag, PURPOSE, run, key.encode(), payload):
            raise RefusedError(self._why_wrong(key))
        return payload

    def _why_wrong(self, key: str) -> str:
        if key == RUN:
            return (
                "the worker that came first to the store of this group has another secret than this one, whose secret "
                f"is from {self._secret.source}: give all workers the same, by {_WHERE} (here {user_file()}), and "
                "look at where each has its own from"
            )
        return (
            f"the record {key!r} in the store of this group is not as a worker of this run wrote it: it was changed, "
            "is that of another key or of an earlier run, or was made with another secret than this worker's, which "
            f"is from {self._secret.source}. Use a fresh store, which only the workers can reach, and give them the "
            "same secret"
        )


class PlainStore:
    """A store as it is, for workers without a secret; they are told where the others have one.

    Args:
        store: what keeps the values.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, key: str, value: str | bytes) -> None:
        """See `Store`."""
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        """See `Store`.

        Raises:
            RefusedError: the value has a code.
        """
        return _plain(self._store.get(key))

    def add(self, key: str, amount: int) -> int:
        """See `Store`."""
        return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        """See `Store`."""
        return self._store.check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """See `Store`.

        Raises:
            RefusedError: the value has a code; nothing was changed.
        """
        return _plain(self._store.compare_set(key, expected, desired))

    def set_timeout(self, timeout: timedelta) -> None:
        """How long `store` may take from now on."""
        _set_timeout(self._store, timeout)


def _plain(raw: bytes) -> bytes:
    if raw.startswith(MARK):
        raise RefusedError(
            "the workers of this group have a secret, and this one has none (insecure=True, or ZRPC_INSECURE=1): take "
            f"that away and give it the secret of the others, by {_WHERE} (here {user_file()})"
        )
    return raw


def _set_timeout(store: Store, timeout: timedelta) -> None:
    set_timeout = getattr(store, "set_timeout", None)
    if set_timeout is not None:
        set_timeout(timeout)
