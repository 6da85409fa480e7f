"""A worker of a dynamic group dies before those who wait for something of it have heard that it was there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import zrpc as rpc
from tests.integration.harness import Cluster, is_member
from tests.waiting import until
from zrpc.errors import PeerLostError, RRefError

_kept: list[rpc.RRef[Any]] = []


def identity(value: Any) -> Any:
    return value


def keep(rref: rpc.RRef[Any]) -> None:
    _kept.append(rref)


def init(name: str, rank: int, method: str) -> None:
    options = rpc.RpcBackendOptions(init_method=method, shared_memory=False, rpc_timeout=60)
    rpc.init_rpc(name, rank=rank, world_size=None, rpc_backend_options=options)


def own(_: int, method: str, here: str, over: str) -> None:
    init("owner", 0, method)
    Path(here).write_text(str(os.getpid()))
    until(Path(over).exists, "it is over", within_s=60)
    rpc.shutdown()


def read(_: int, method: str, here: str) -> str:
    init("reader", 1, method)
    until(lambda: is_member("owner"), "the owner is here")
    assert rpc.rpc_sync("owner", identity, args=(1,)) == 1
    Path(here).touch()
    until(lambda: _kept, "a reference came", within_s=60)
    try:
        _kept[0].to_here(timeout=30)
    except (PeerLostError, RRefError) as error:
        return type(error).__name__
    finally:
        _kept.clear()
        rpc.shutdown()
    return "answered"


def create(_: int, method: str, kept: str) -> None:
    """Make a reference on an owner that stands still, so that nothing of it arrives, and hand it on."""
    init("guest", 2, method)
    for name in ("owner", "reader"):
        until(lambda name=name: is_member(name), f"{name} is here")  # type: ignore[misc]
    until(Path(kept + "-stopped").exists, "the owner stands still", within_s=60)
    rref = rpc.remote("owner", identity, args=(5,))
    rpc.rpc_async("reader", keep, args=(rref,))
    assert rpc.rpc_sync("reader", identity, args=(1,)) == 1  # what was sent before it has come too
    Path(kept).touch()
    until(lambda: False, "killed", within_s=120)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a way to make a process stand still")
def test_a_fetch_of_what_an_unknown_worker_was_to_create_ends(cluster: Cluster, tmp_path: Path) -> None:
    """The creator died before its owner had heard of it or of the creation: the fetch of a third worker raises."""
    method = cluster.new_init_method()
    files = {name: os.fspath(tmp_path / name) for name in ("owner", "over", "reader", "kept")}
    owner = cluster.start(own, 1, args=(method, files["owner"], files["over"]), init=False)
    reader = cluster.start(read, 1, args=(method, files["reader"]), init=False)
    until(Path(files["reader"]).exists, "the reader is here", within_s=60)
    stopped = int(Path(files["owner"]).read_text())
    guest = cluster.start(create, 1, args=(method, files["kept"]), init=False)
    os.kill(stopped, signal.SIGSTOP)
    try:
        Path(files["kept"] + "-stopped").touch()
        until(Path(files["kept"]).exists, "the reference was handed on", within_s=60)
        guest.kill(0)
    finally:
        os.kill(stopped, signal.SIGCONT)
    (outcome,) = reader.wait(60.0)
    assert outcome.error is None, outcome.error
    assert outcome.result in ("PeerLostError", "RRefError")
    Path(files["over"]).touch()
    (outcome,) = owner.wait(60.0)
    assert outcome.error is None, outcome.error
