"""The secret that the workers of a group share, and what is derived from it.

What: whoever knows the secret may be a member of the group, and nobody else. It is found in this order: the option
`secret`, `ZRPC_SECRET`, the file that `ZRPC_SECRET_FILE` names, and a file of the user that is made at first use, so
that all programs of one user on one host (or with one home folder) meet without being told.

Keys and authentication codes are derived from it by HMAC-SHA256 (RFC 2104), each for one purpose: what is seen of one
says nothing of another, or of the secret.

Invariants: the secret is in no message, command line, log or `repr`.

Failure: a secret that others could read, guess or change is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import warnings
from pathlib import Path

from zrpc.errors import ConfigError

VARIABLE = "ZRPC_SECRET"
FILE_VARIABLE = "ZRPC_SECRET_FILE"
INSECURE_VARIABLE = "ZRPC_INSECURE"
"""1: workers and brokers that do not say otherwise authenticate nobody."""
MIN_LENGTH = 16
"""Characters. A shorter one could be guessed: 32 hexadecimal digits are 128 bits."""
TAG_NBYTES = 16
_HOW = "make one with `python -c 'import secrets; print(secrets.token_hex(32))'`"


class Secret:
    """A secret, which shows itself to nobody.

    Args:
        value: at least `MIN_LENGTH` characters.
        source: where it came from, for errors.

    Raises:
        ConfigError: it is too short.
    """

    __slots__ = ("_value", "source")

    def __init__(self, value: str | bytes, source: str = "the option secret") -> None:
        raw = (value.encode() if isinstance(value, str) else bytes(value)).strip()
        if len(raw) < MIN_LENGTH:
            raise ConfigError(f"{source} has {len(raw)} characters, and needs {MIN_LENGTH} or more: {_HOW}")
        self._value = raw
        self.source = source

    def __repr__(self) -> str:
        return f"<secret from {self.source}>"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not pickled")

    def derive(self, purpose: str, *parts: bytes) -> bytes:
        """32 bytes that only who knows the secret can make.

        Args:
            purpose: what they are for. Nothing can be learned of those for another purpose.
            parts: what else they depend on.
        """
        message = hmac.new(self._value, b"zrpc-1 " + purpose.encode(), hashlib.sha256)
        for part in parts:
            message.update(len(part).to_bytes(8, "little"))
            message.update(part)
        return message.digest()

    def tag(self, purpose: str, *parts: bytes) -> bytes:
        """An authentication code of `TAG_NBYTES` for `parts`."""
        return self.derive(purpose, *parts)[:TAG_NBYTES]

    def is_tag(self, tag: bytes, purpose: str, *parts: bytes) -> bool:
        """Whether `tag` is that of `parts`. Takes as long for a wrong one."""
        return hmac.compare_digest(tag, self.tag(purpose, *parts))


def make_secret() -> str:
    """A new one, of 256 random bits."""
    return secrets.token_hex(32)


def find_secret(value: str | bytes | None = None) -> Secret:
    """The secret of this process; see above.

    Args:
        value: what the option says; None: nothing.

    Raises:
        ConfigError: there is none, or one that others could read or guess.
    """
    if value is not None:
        return Secret(value)
    if VARIABLE in os.environ:
        return Secret(os.environ[VARIABLE], VARIABLE)
    if FILE_VARIABLE in os.environ:
        path = Path(os.environ[FILE_VARIABLE])
        return _read(path, f"{FILE_VARIABLE} ({path})")
    path = user_file()
    if not path.exists():
        _make(path)
    return _read(path, str(path))


def group_secret(value: str | bytes | None, *, insecure: bool) -> Secret | None:
    """The secret of a worker's group; None, with a warning, where it has none and lets anybody in.

    Args:
        value: what the option `secret` says.
        insecure: what the option `insecure` says.

    Raises:
        ConfigError: see `find_secret`.
    """
    if not insecure:
        return find_secret(value)
    warnings.warn(
        "zrpc runs without authentication (insecure): whoever reaches a port of this group can run code in its workers",
        stacklevel=2,
    )
    return None


def says_insecure() -> bool:
    """What the environment says of the option `insecure`.

    Raises:
        ConfigError: something else than yes or no.
    """
    said = os.environ.get(INSECURE_VARIABLE, "0")
    if said not in ("", "0", "1"):
        raise ConfigError(f"{INSECURE_VARIABLE} must be 1 or 0, not {said!r}")
    return said == "1"


def user_file() -> Path:
    """Where the secret of this user lies."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(folder) / "zrpc" / "secret"


def read_private(path: Path, what: str, source: str) -> bytes:
    """The content of a file that this user alone can read.

    Args:
        path: the file.
        what: what it holds, for errors.
        source: where it was named, likewise.

    Raises:
        ConfigError: it cannot be read, or others can read it or have written it.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if stat.S_IMODE(found.st_mode) & 0o077:
                raise ConfigError(
                    f"{source} can be read by other users (mode {stat.S_IMODE(found.st_mode):o}): chmod 600 {path}, "
                    f"and make {what} anew if they may have"
                )
            if found.st_uid not in (os.geteuid(), 0):
                raise ConfigError(f"{source} belongs to another user (id {found.st_uid}): make one of your own")
            return file.read(1 << 16)
    except OSError as error:
        raise ConfigError(f"{what} cannot be read from {source}: {error.strerror}") from error


def _read(path: Path, source: str) -> Secret:
    return Secret(read_private(path, "the secret", source), source)


def _make(path: Path) -> None:
    """Write a new secret to `path`, unless another process has meanwhile."""
    fresh = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(make_secret() + "\n")
        try:
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)  # whole, and not in place of another one
        finally:
            fresh.unlink()
    except OSError as error:
        raise ConfigError(
            f"no secret can be made at {path} ({error.strerror}): set {VARIABLE} or {FILE_VARIABLE}, to the same for "
            f"all workers; {_HOW}"
        ) from error
