"""The keys of single workers: who may come in, and under which names and ranks.

What: without a keyring whoever knows the group's secret is trusted as any member. With one, each worker has a key of
its own (`ZRPC_KEY`), and a file lists the public halves (`ZRPC_KEYS`): which names and ranks each may claim, and
whether it is revoked. The file is read again when it has changed.

The last bytes of an incarnation are the fingerprint of its worker's key. So whoever reads an incarnation, wherever it
stands, knows which key its messages must come with, and what it may be called: no table says so that could be told
wrong, or too late.

Invariants: no two keys of a keyring have one fingerprint, also where they are revoked. A table never changes: a keyring
that was read again has a new one.

Threads: any may call. What was read is one attribute, which is set whole.

Failure: a keyring that cannot be read, or that others could write to, is refused at the start. Later what it said last
stays, and `complaint` says why.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from zrpc.errors import ConfigError
from zrpc.ids import INCARNATION_NBYTES
from zrpc.keyring_file import ANY, FINGERPRINT_NBYTES, Entry, Table, is_key, read, stamp_of
from zrpc.secret import read_private

if TYPE_CHECKING:
    from zrpc.ids import Incarnation

KEY_VARIABLE = "ZRPC_KEY"
KEYS_VARIABLE = "ZRPC_KEYS"
INSECURE_KEYS = f"{KEYS_VARIABLE} or {KEY_VARIABLE} is set, and insecure lets in anybody: leave out one of the two"


class Keyring:
    """The keys of a file, as it was when it was last read.

    Args:
        path: the file.

    Attributes:
        complaint: why the file could not be read the last time; None: it could.

    Raises:
        ConfigError: it cannot be read, others could write to it, or it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.complaint: str | None = None
        self._read = (stamp_of(path), Table.of(read(path)))

    @property
    def table(self) -> Table:
        """What it says. Another object once it was read again."""
        return self._read[1]

    def reload(self) -> None:
        """Read the file again if it has changed; one `stat` if not. Where it cannot be read, what it said stays."""
        stamp = stamp_of(self.path)
        if stamp == self._read[0]:
            return
        try:
            self._read = (stamp, Table.of(read(self.path)))
            self.complaint = None
        except ConfigError as error:
            self._read = (stamp, self._read[1])
            self.complaint = str(error)

    def is_valid(self, public: str) -> bool:
        """Whether that key is listed, and not revoked."""
        entry = self.table.by_public.get(public)
        return entry is not None and entry.revoked is None

    def permits(self, public: str, name: str, rank: int) -> bool:
        """Whether that key is valid, and may claim `name` and `rank`."""
        return self.is_valid(public) and self.table.by_public[public].permits(name, rank)

    def entry_of(self, life: Incarnation) -> Entry | None:
        """The key of a worker in that life, if it is listed."""
        return self.table.by_fingerprint.get(life[INCARNATION_NBYTES - FINGERPRINT_NBYTES :])

    def why_not(self, life: Incarnation) -> str | None:
        """Why a worker is not let in, in that life, under whatever name; None: it is."""
        entry = self.entry_of(life)
        if entry is None:
            return f"its key is not in the keyring ({self.path}): `zrpc keys new` makes one that is"
        if entry.revoked is not None:
            return (
                f"its key {entry.label!r} was revoked ({entry.revoked}): start it again with another one "
                f"({KEY_VARIABLE}), which `zrpc keys new` makes"
            )
        return None

    def why_not_name(self, life: Incarnation, name: str) -> str | None:
        """Why a worker may not have that name in that life, whatever its rank; None: it may."""
        reason, entry = self.why_not(life), self.entry_of(life)
        if reason is not None or entry is None:
            return f"{name!r} is refused: {reason}"
        if entry.may_have(name):
            return None
        return (
            f"{name!r} is refused: its key {entry.label!r} may claim {entry.describe()}. Make one that may: "
            f"`zrpc keys new LABEL --workers {name}`"
        )

    def refusal(self, life: Incarnation, name: str, rank: int) -> str | None:
        """Why a worker may not be `name` and `rank` in that life; None: it may. Rank -1: it leaves that to others."""
        reason = self.why_not(life)
        entry = self.entry_of(life)
        if reason is not None or entry is None:
            return f"{name!r} is refused: {reason}"
        if rank < 0 and entry.ranks != ANY:
            return (
                f"{name!r} is refused: its key {entry.label!r} may claim rank {entry.ranks} alone, and it asks to be "
                "given one (-1): start it with its rank"
            )
        if entry.permits(name, rank):
            return None
        return (
            f"{name!r}, rank {rank}, is refused: its key {entry.label!r} may claim {entry.describe()}. Start it with "
            f"the key that was made for it ({KEY_VARIABLE}), or make one: `zrpc keys new LABEL --workers {name}`"
        )


def find_keyring() -> Keyring | None:
    """The keyring that the environment names, if it names one.

    Raises:
        ConfigError: it cannot be used.
    """
    named = os.environ.get(KEYS_VARIABLE)
    return Keyring(Path(named)) if named else None


def find_private_key() -> str | None:
    """This worker's own key, in Z85, if the environment names its file.

    Raises:
        ConfigError: it cannot be read, others can read it, or it is none.
    """
    named = os.environ.get(KEY_VARIABLE)
    if not named:
        return None
    key = read_private(Path(named), "the key", f"{KEY_VARIABLE} ({named})").decode("ascii", "replace").strip()
    if not is_key(key):
        raise ConfigError(f"{KEY_VARIABLE} ({named}) holds no key: `zrpc keys new` makes files that do")
    return key


def check_pair(keyring: Keyring | None, private: str | None) -> None:
    """A worker has both or neither.

    Raises:
        ConfigError: it has one.
    """
    if (keyring is None) != (private is None):
        there, absent = (KEYS_VARIABLE, KEY_VARIABLE) if private is None else (KEY_VARIABLE, KEYS_VARIABLE)
        raise ConfigError(
            f"{there} is set, and {absent} is not: a worker needs both, its own key and the list of all. "
            "`zrpc keys new` says where both lie"
        )
