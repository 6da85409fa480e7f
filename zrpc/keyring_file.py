"""The file of a keyring: an entry for each key, read and written whole.

It is JSON: `{"version": 1, "keys": [{"label", "public", "workers", "ranks", "revoked"}, ...]}`.

Invariants: who reads it sees all of a change or nothing. One process at a time changes it.

Failure: a file that cannot be read, is malformed, or that others than this user and root could write to is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import stat
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zrpc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FINGERPRINT_NBYTES = 3
"""The rest of an incarnation stays random: 40 bits."""
ANY = "any"
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,63}")
_VERSION = 1
_MAX_NBYTES = 16 << 20
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_KEY_LENGTH = 40

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One key.

    Attributes:
        label: what people call it; unique in its keyring.
        public: its public half, in Z85.
        workers: patterns (`fnmatch`) of the names that it may claim.
        ranks: those that it may claim, such as `0-3,7`, or `any`.
        revoked: when it was, in words; None: it is valid.

    Raises:
        ConfigError: a value that cannot be one.
    """

    label: str
    public: str
    workers: tuple[str, ...]
    ranks: str = ANY
    revoked: str | None = None

    def __post_init__(self) -> None:
        check_label(self.label)
        if not is_key(self.public):
            raise ConfigError(f"the public key of {self.label!r} is none: it has {_KEY_LENGTH} characters of Z85")
        if not self.workers or not all(isinstance(pattern, str) and pattern for pattern in self.workers):
            raise ConfigError(f"the key {self.label!r} may claim no name: list patterns, such as trainer*")
        if not isinstance(self.revoked, str | None):
            raise ConfigError(f"the key {self.label!r} is revoked at {self.revoked!r}, which is no time")
        _parse_ranks(self.ranks)

    @property
    def fingerprint(self) -> bytes:
        return fingerprint(self.public)

    def permits(self, name: str, rank: int) -> bool:
        """Whether it may claim `name` and `rank`."""
        return self.may_have(name) and (
            self.ranks == ANY or any(first <= rank <= last for first, last in _parse_ranks(self.ranks))
        )

    def may_have(self, name: str) -> bool:
        """Whether it may claim `name`, with some rank."""
        return any(fnmatchcase(name, pattern) for pattern in self.workers)

    def describe(self) -> str:
        """What it may claim."""
        ranks = "any rank" if self.ranks == ANY else f"rank {self.ranks}"
        return f"the name {' or '.join(self.workers)} and {ranks}"


@dataclass(frozen=True, slots=True)
class Table:
    """What a keyring said when it was read."""

    by_public: dict[str, Entry]
    by_fingerprint: dict[bytes, Entry]

    @classmethod
    def of(cls, entries: list[Entry]) -> Table:
        """The table of `entries`.

        Raises:
            ConfigError: two have one label, key or fingerprint.
        """
        labels: set[str] = set()
        table = cls({}, {})
        for entry in entries:
            if entry.label in labels:
                raise ConfigError(f"two keys have the label {entry.label!r}: give each one of its own")
            other = table.by_fingerprint.get(entry.fingerprint)
            if other is not None:
                raise ConfigError(f"the keys {other.label!r} and {entry.label!r} cannot be told apart: make a new one")
            labels.add(entry.label)
            table.by_public[entry.public] = table.by_fingerprint[entry.fingerprint] = entry
        return table


def check_label(label: object) -> None:
    """Whether a key can be called that. It is part of a file's name, too.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise ConfigError(
            f"{label!r} cannot be the label of a key: take letters, digits, dots, dashes, colons and underscores, at "
            "most 64"
        )


def fingerprint(public: str) -> bytes:
    """What the incarnations of the worker that has that key end with."""
    return sha256(public.encode()).digest()[:FINGERPRINT_NBYTES]


# ---- changing the file ----------------------------------------------------------------------------------------------


def add(path: Path, label: str, make: Callable[[Callable[[str], bool]], Entry]) -> Entry:
    """Add a key to the keyring at `path`, which is made if it is not there.

    Args:
        path: the keyring.
        label: what people shall call it.
        make: makes it. It is given a function that says whether a public key can be told apart from those there.

    Raises:
        ConfigError: the label is taken, or the file cannot be changed.
    """

    def change(entries: list[Entry]) -> tuple[list[Entry], Entry]:
        if any(entry.label == label for entry in entries):
            raise ConfigError(
                f"{path} has a key {label!r} already: choose another label, and revoke that one if need be"
            )
        taken = {entry.fingerprint for entry in entries}
        made = make(lambda public: fingerprint(public) not in taken)
        return [*entries, made], made

    return _change(path, change)


def revoke(path: Path, label: str) -> Entry:
    """Revoke a key of the keyring at `path`. One that was revoked before stays so.

    Raises:
        ConfigError: there is none of that label, or the file cannot be changed.
    """

    def change(entries: list[Entry]) -> tuple[list[Entry], Entry]:
        for index, entry in enumerate(entries):
            if entry.label == label:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                revoked = replace(entry, revoked=entry.revoked or now)
                return [*entries[:index], revoked, *entries[index + 1 :]], revoked
        raise ConfigError(f"{path} has no key {label!r}: `zrpc keys list` shows those that it has")

    return _change(path, change)


def _change(path: Path, change: Callable[[list[Entry]], tuple[list[Entry], T]]) -> T:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.parent):
            entries, result = change(read(path) if path.exists() else [])
            Table.of(entries)
            _write(path, entries)
            return result
    except OSError as error:
        raise ConfigError(f"the keyring {path} cannot be changed: {error.strerror}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time changes keyrings there."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _write(path: Path, entries: list[Entry]) -> None:
    """Put a whole file in place of the old one."""
    fresh = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"version": _VERSION, "keys": [asdict(entry) for entry in entries]}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


# ---- reading it -----------------------------------------------------------------------------------------------------


def stamp_of(path: Path) -> tuple[int, ...]:
    """What another content of the file changes."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode


def read(path: Path) -> list[Entry]:
    """The entries of a keyring.

    Raises:
        ConfigError: it cannot be read, others could write to it, or it is none.
    """
    try:
        with path.open("rb") as file:
            _check_owner(path, os.fstat(file.fileno()), 0)
            folder = Path(os.path.realpath(path)).parent
            _check_owner(folder, os.stat(folder), stat.S_ISVTX)
            content = file.read(_MAX_NBYTES)
    except OSError as error:
        raise ConfigError(f"the keyring {path} cannot be read: {error.strerror}") from error
    try:
        told: Any = json.loads(content)
        if told["version"] != _VERSION:
            raise ConfigError(f"its version is {told['version']!r}, and this zrpc reads {_VERSION}")
        entries = [_entry(one) for one in told["keys"]]
        Table.of(entries)
        return entries
    except (ConfigError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no keyring as `zrpc keys new` writes it: {error!s}") from error


def _entry(told: dict[str, Any]) -> Entry:
    workers = told["workers"]
    return Entry(
        told["label"],
        told["public"],
        tuple(workers) if isinstance(workers, list) else (),
        told["ranks"],
        told["revoked"],
    )


def _check_owner(path: Path, found: os.stat_result, unless: int) -> None:
    """Whether this user alone, and the system's, could write to what is at `path`; `unless` it has that mode."""
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{path} belongs to another user (id {found.st_uid}), who could let in anybody: keep a keyring of your own"
        )
    if found.st_mode & 0o022 and not found.st_mode & unless:
        raise ConfigError(
            f"{path} can be written to by other users (mode {stat.S_IMODE(found.st_mode):o}), who could let in "
            f"anybody: chmod go-w {path}, and look at what the keyring lists"
        )


def _parse_ranks(text: Any) -> list[tuple[int, int]]:
    """The first and last of each part of `0-3,7`; none of `any`.

    Raises:
        ConfigError: it is neither.
    """
    if text == ANY:
        return []
    parts = text.split(",") if isinstance(text, str) else [""]
    found = [re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part, re.ASCII) for part in parts]
    ranges = [(int(match[1]), int(match[2] or match[1])) for match in found if match is not None]
    if len(ranges) < len(parts) or any(first > last for first, last in ranges):
        raise ConfigError(f"{text!r} are no ranks: write them as 0-3,7, or {ANY}")
    return ranges


def is_key(text: object) -> bool:
    """Whether it is the Z85 of 32 bytes."""
    if not isinstance(text, str) or len(text) != _KEY_LENGTH or not set(text) <= set(_Z85):
        return False
    values = [
        sum(_Z85.index(character) * 85 ** (4 - place) for place, character in enumerate(text[begin : begin + 5]))
        for begin in range(0, _KEY_LENGTH, 5)
    ]
    return all(value < 1 << 32 for value in values)
