"""`zrpc keys`: keys of single workers, and which names and ranks they may claim. See `zrpc.keyring`."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zrpc.errors import ConfigError
from zrpc.keyring import KEY_VARIABLE, KEYS_VARIABLE
from zrpc.keyring_file import ANY, Entry, add, check_label, read, revoke
from zrpc.secret import user_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXIT_USAGE = 2
FILE = "keyring.json"

Label = Annotated[str, typer.Argument(help="what the key is called", show_default=False)]
Folder = Annotated[
    Path | None, typer.Option(help=f"where {FILE} and private keys lie; else beside the secret file of this user")
]

app = typer.Typer(help="Keys of single workers: who may have which name and rank.", no_args_is_help=True)


@app.command("new")
def _new(
    label: Label,
    workers: Annotated[
        list[str] | None,
        typer.Option(help="pattern of the names that it may claim, such as trainer*; else LABEL itself"),
    ] = None,
    ranks: Annotated[str, typer.Option(help="ranks that it may claim, such as 0-3,7")] = ANY,
    folder: Folder = None,
) -> None:
    """Make a key, and let its holder in."""
    with _errors_told():
        check_label(label)
        where = _folder(folder)
        private = where / f"{label}.key"
        keyring = where / FILE
        with _undone(private):
            entry = add(keyring, label, lambda is_apart: _make(label, workers, ranks, private, is_apart))
        typer.echo(f"{label} may claim {entry.describe()}")
        typer.echo(f"{KEY_VARIABLE}={private}   for its worker alone: whoever can read the file is that worker")
        typer.echo(f"{KEYS_VARIABLE}={keyring}   for all workers and the broker")


@app.command("list")
def _list(
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for programs")] = False, folder: Folder = None
) -> None:
    """Show the keys that there are."""
    with _errors_told():
        keyring = _folder(folder) / FILE
        entries = read(keyring) if keyring.exists() else []
        if as_json:
            typer.echo(json.dumps([asdict(entry) for entry in entries], indent=1))
            return
        for entry in entries:
            state = "valid" if entry.revoked is None else f"revoked {entry.revoked}"
            typer.echo(f"{entry.label}: {state}; {entry.describe()}")
        if not entries:
            typer.echo(f"there are no keys in {keyring}: `zrpc keys new` makes one", err=True)


@app.command("revoke")
def _revoke(label: Label, folder: Folder = None) -> None:
    """Let the holder of a key in no more: those who have it are lost within seconds."""
    with _errors_told():
        entry = revoke(_folder(folder) / FILE, label)
        typer.echo(f"{label} is revoked since {entry.revoked}")


def _folder(said: Path | None) -> Path:
    return Path(os.path.abspath(said)) if said is not None else user_file().parent


def _make(label: str, workers: list[str] | None, ranks: str, private: Path, is_apart: Callable[[str], bool]) -> Entry:
    """A new key, whose private half lies in a file that was not there before."""
    from zrpc.transport.credentials import make_pair

    pair = make_pair()
    while not is_apart(pair.public.decode()):
        pair = make_pair()
    entry = Entry(label, pair.public.decode(), tuple(workers or [label]), ranks)
    try:
        with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pair.private + b"\n")
    except FileExistsError as error:
        raise ConfigError(f"{private} is there already: choose another label, or move that file away") from error
    except OSError as error:
        raise ConfigError(f"the key cannot be written to {private}: {error.strerror}") from error
    return entry


@contextmanager
def _undone(private: Path) -> Iterator[None]:
    """Leave no private key behind whose public half is in no keyring."""
    was_there = private.exists()
    try:
        yield
    except BaseException:
        if not was_there:
            private.unlink(missing_ok=True)
        raise


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        typer.echo(f"zrpc keys: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from error
