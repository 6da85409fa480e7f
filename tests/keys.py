"""Keys of single workers, for tests, and what an attacker does with one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zrpc import keyring_file
from zrpc.keyring import Keyring
from zrpc.keyring_file import ANY, Entry
from zrpc.secret import find_secret
from zrpc.transport.credentials import Credentials, KeyPair, make_pair

if TYPE_CHECKING:
    from pathlib import Path


class Keys:
    """A keyring in a folder, and the private keys, which lie there too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "keyring.json"

    def new(self, label: str, *workers: str, ranks: str = ANY) -> Credentials:
        """Make a key for the worker of that name, or for such; what it proves itself with."""
        return self.list_key(label, make_pair(), *workers, ranks=ranks)

    def list_key(self, label: str, pair: KeyPair, *workers: str, ranks: str = ANY) -> Credentials:
        """The same, for a key that is there already: another keyring may list it with other names."""
        entry = Entry(label, pair.public.decode(), workers or (label,), ranks)
        keyring_file.add(self.path, label, lambda _: entry)
        file = self.key_file(label)
        file.touch(mode=0o600)
        file.write_bytes(pair.private)
        return self.credentials(pair)

    def credentials(self, pair: KeyPair) -> Credentials:
        """What the holder of `pair` proves itself with, whether it is listed or not."""
        return Credentials(find_secret(), Keyring(self.path), pair.private.decode())

    def of_broker(self) -> Credentials:
        """What a broker proves itself with."""
        return Credentials(find_secret(), Keyring(self.path))

    def key_file(self, label: str) -> Path:
        """Where the private key lies."""
        return self.folder / f"{label}.key"

    def environment(self, label: str) -> dict[str, str]:
        """What makes a process a worker with that key."""
        return {"ZRPC_KEY": str(self.key_file(label)), "ZRPC_KEYS": str(self.path)}

    def revoke(self, label: str) -> None:
        keyring_file.revoke(self.path, label)

    def copy_to(self, other: Keys) -> None:
        """Another folder has the same keys, and keeps them."""
        other.folder.mkdir(mode=0o700)
        for file in (self.path, *self.folder.glob("*.key")):
            copy = other.folder / file.name
            copy.touch(mode=0o600)
            copy.write_bytes(file.read_bytes())

    def credentials_of(self, label: str) -> Credentials:
        """What the holder of that key proves itself with."""
        return Credentials(find_secret(), Keyring(self.path), self.key_file(label).read_text())
