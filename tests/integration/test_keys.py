"""Workers with keys of their own: a key claims its names and ranks alone, and a revoked one nothing. Real processes."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import zmq

import zrpc as rpc
from tests.integration.broker_harness import Broker, Worker, running_broker
from tests.integration.harness import MODES, Cluster, is_member
from tests.keys import Keys
from tests.waiting import until
from zrpc.errors import PeerLostError, RefusedError, RendezvousError, ZrpcError
from zrpc.ids import new_incarnation
from zrpc.transport import sockets
from zrpc.transport.credentials import Credentials, make_pair
from zrpc.transport.identities import BROKER, RECEIVER, SENDER
from zrpc.wire.envelope import Envelope, decode, encode
from zrpc.wire.messages import Heartbeat, Refused, Welcome
from zrpc.wire.rejoining import Rejoin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zrpc.wire.messages import Message


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    return Keys(folder)


# ---- with a broker, at the transport --------------------------------------------------------------------------------


@pytest.fixture
def broker(keys: Keys) -> Iterator[Broker]:
    keys.new("first", ranks="0")
    with running_broker(ZRPC_KEYS=str(keys.path)) as started:
        yield started


@contextmanager
def joined(broker: Broker, name: str, credentials: Credentials | None, rank: int = -1) -> Iterator[Worker]:
    """A worker of a group that grows, without links to others of its host: all is relayed."""
    worker = Worker(broker.address, local=False, credentials=credentials)
    try:
        worker.join(name, None, rank)
        worker.start()
        yield worker
    finally:
        worker.close()


def try_to_join(broker: Broker, name: str, credentials: Credentials | None, rank: int = -1) -> None:
    with joined(broker, name, credentials, rank):
        pass


def test_a_broker_refuses_a_name_that_the_key_may_not_claim(broker: Broker, keys: Keys) -> None:
    """Also where nobody has it; its own name it may have."""
    thief = keys.new("thief")
    with pytest.raises(RefusedError, match=r"'first', rank -1, is refused: its key 'thief' may claim the name thief"):
        try_to_join(broker, "first", thief)
    with joined(broker, "thief", thief):
        pass


@pytest.mark.parametrize(
    ("rank", "text"), [(0, "may claim the name second and rank 1"), (-1, "start it with its rank")]
)
def test_a_broker_refuses_a_rank_that_the_key_may_not_claim(broker: Broker, keys: Keys, rank: int, text: str) -> None:
    second = keys.new("second", ranks="1")
    with pytest.raises(RefusedError, match=text):
        try_to_join(broker, "second", second, rank)
    with joined(broker, "second", second, 1) as worker:
        assert worker.members[0].info.id == 1


def test_a_broker_lets_in_no_key_that_is_not_listed(broker: Broker, keys: Keys) -> None:
    """Nor one that knows the group's secret alone."""
    for stranger in (keys.credentials(make_pair()), None):
        with pytest.raises(RefusedError, match=r"its keyring does not list this worker's key"):
            try_to_join(broker, "first", stranger)


def test_a_broker_takes_no_life_of_another_key(broker: Broker, keys: Keys) -> None:
    """By the life alone it would have the name and rank. Nothing that it says is taken, so nothing is answered."""
    thief = keys.new("thief")
    forged = Worker(broker.address, local=False, credentials=thief, life=keys.credentials_of("first").new_life())
    try:
        with pytest.raises(RendezvousError):
            forged.join("first", None, 0, timeout_s=2.0)
    finally:
        forged.close()
    with joined(broker, "first", keys.credentials_of("first"), 0):
        pass
    assert "over a connection of the key 'thief' is dropped: which is a life of the key 'first'" in broker.close()


def rejoin(broker: Broker, credentials: Credentials, name: str, rank: int) -> Message:
    """What the broker answers one that says it was a member before."""
    life = credentials.new_life()
    with zmq.Context() as context, ExitStack() as stack:
        made = [sockets.make_socket(context, zmq.DEALER, kind + life) for kind in (RECEIVER, SENDER)]
        for sock in made:
            stack.callback(sock.close)
            sockets.connect(sock, broker.address, credentials)
        receiver, sender = made
        receiver.send(b"")
        said = Rejoin(name, rank, 0, {}, "default", b"r" * 8, [], [])
        sender.send_multipart([BROKER, *encode(Envelope(said, 1))])
        while True:
            assert receiver.poll(20_000)
            answer = decode(list(receiver.recv_multipart()[1:])).message
            if not isinstance(answer, Heartbeat):  # as some connection went, all are asked whether they are there
                return answer


def test_a_member_comes_back_under_the_names_and_ranks_of_its_key_alone(broker: Broker, keys: Keys) -> None:
    """To a broker that knows nothing of it, too."""
    thief = keys.new("thief")
    refused = rejoin(broker, thief, "first", 0)
    assert isinstance(refused, Refused)
    assert "its key 'thief' may claim the name thief" in refused.reason
    assert isinstance(rejoin(broker, keys.credentials_of("first"), "first", 0), Welcome)


def test_workers_with_keys_come_back_to_a_broker_that_was_started_again(broker: Broker, keys: Keys) -> None:
    second = keys.new("second", ranks="1")
    with (
        joined(broker, "first", keys.credentials_of("first"), 0) as one,
        joined(broker, "second", second, 1) as other,
    ):
        broker.kill()
        until(lambda: not one.endpoint.is_resumed() and not other.endpoint.is_resumed(), "its death is noticed")
        with running_broker(bind=broker.address, ZRPC_KEYS=str(keys.path)):
            until(one.endpoint.is_resumed, "it is a member again")
            one.endpoint.send(other.incarnation, [b"hello"])
            other.seen.wait(lambda: other.seen.frames == [(one.incarnation, [b"hello"])])
            assert not one.seen.lost


def test_a_broker_relays_nothing_under_the_incarnation_of_another(broker: Broker, keys: Keys) -> None:
    """The thief is a member with a connection of its own; the victim's messages arrive."""
    first, second, thief = keys.credentials_of("first"), keys.new("second"), keys.new("thief")
    with (
        joined(broker, "first", first, 0) as victim,
        joined(broker, "second", second) as worker,
        joined(broker, "thief", thief) as member,
        sockets.make_context() as context,
        sockets.make_socket(context, zmq.DEALER, identity=SENDER + victim.incarnation) as forged,
        sockets.make_socket(context, zmq.DEALER, identity=SENDER + first.new_life()) as another,
        sockets.make_socket(context, zmq.DEALER, identity=SENDER + new_incarnation()) as unknown,
    ):
        for sock in (forged, another, unknown):
            sockets.connect(sock, broker.address, thief)
            sock.send_multipart([worker.incarnation, b"as the victim"])
            sock.send_multipart([worker.incarnation, b"as the victim"])
        assert broker.process.stderr is not None
        # ZeroMQ reads nothing of the first one: a connection has that identity.
        logged = [broker.process.stderr.readline() for _ in (another, unknown)]
        assert all("over a connection of the key 'thief' is dropped" in line for line in logged)
        member.endpoint.send(worker.incarnation, [b"as itself"])
        victim.endpoint.send(worker.incarnation, [b"of the victim"])
        worker.seen.wait(lambda: len(worker.seen.frames) >= 2)
        assert sorted(worker.seen.frames) == sorted(
            [(member.incarnation, [b"as itself"]), (victim.incarnation, [b"of the victim"])]
        )
    assert "is dropped" not in broker.close(), "it was said once of each"


def test_a_broker_loses_a_member_whose_key_is_revoked(broker: Broker, keys: Keys) -> None:
    """It says so to the others, and to the member; nothing that it sends is relayed, and it is not let in again."""
    thief = keys.new("thief")
    first = keys.credentials_of("first")
    with joined(broker, "first", first, 0) as worker, joined(broker, "thief", thief) as member:
        worker.seen.wait(lambda: len(worker.seen.joined) == 1)
        member.endpoint.send(worker.incarnation, [b"before"])
        worker.seen.wait(lambda: len(worker.seen.frames) == 1)
        keys.revoke("thief")
        worker.seen.wait(lambda: len(worker.seen.lost) == 1)
        ((lost, reason),) = worker.seen.lost
        assert lost == member.incarnation
        assert "its key 'thief' was revoked" in reason
        member.seen.wait(lambda: len(member.seen.lost) >= 1)
        assert "the broker lets this worker in no more" in member.seen.lost[0][1]
        with pytest.raises(PeerLostError, match="no more"):
            member.endpoint.send(worker.incarnation, [b"after"])
        with pytest.raises(RefusedError, match="has it revoked"):
            try_to_join(broker, "thief", thief)
        assert [frames for _, frames in worker.seen.frames] == [[b"before"]]
    with joined(broker, "thief", keys.new("thief-2", "thief")):  # the name is free
        pass


# ---- whole workers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What a worker process is told: its name and environment, and the size of its group."""

    name: str
    environment: dict[str, str]
    init_method: str
    world_size: int | None


def start(told: Told, rank: int) -> None:
    """Be a worker of the group."""
    os.environ.pop("WORLD_SIZE", None)
    os.environ.update(told.environment)
    options = rpc.RpcBackendOptions(init_method=told.init_method, rpc_timeout=20)
    rpc.init_rpc(told.name, rank=rank, world_size=told.world_size, rpc_backend_options=options)


def double(value: int) -> int:
    return 2 * value


def call_all(rank: int, tolds: list[Told]) -> list[int]:
    start(tolds[rank], rank)
    try:
        return [rpc.rpc_sync(told.name, double, (rank,)) for told in tolds]
    finally:
        rpc.shutdown()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(getattr(request, "param", "file"), tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("cluster", MODES, indirect=True)
@pytest.mark.parametrize("shared", [False, True], ids=["a key each", "one key"])
def test_workers_with_keys_call_each_other(cluster: Cluster, keys: Keys, shared: bool) -> None:
    """In each mode; a key may be of several workers."""
    labels = ["all"] * 3 if shared else ["a", "b", "c"]
    if shared:
        keys.new("all", "[abc]", ranks="0-2")
    else:
        for rank, label in enumerate(labels):
            keys.new(label, ranks=str(rank))
    method = cluster.new_init_method(ZRPC_KEYS=str(keys.path))
    tolds = [Told(name, keys.environment(label), method, 3) for name, label in zip("abc", labels, strict=True)]
    assert cluster.run(call_all, 3, args=(tolds,), init=False) == [[0, 0, 0], [2, 2, 2], [4, 4, 4]]


def try_to_start(rank: int, tolds: list[Told]) -> str:
    try:
        start(tolds[rank], rank)
    except ZrpcError as error:
        return f"{type(error).__name__}: {error}"
    rpc.shutdown(graceful=False)
    return "started"


def attacker(keys: Keys, **claims: str) -> dict[str, str]:
    """The environment of a member with a keyring of its own making, by which its key may claim what it likes."""
    keys.new("thief", ranks="5")
    own = Keys(keys.folder / "own")
    keys.copy_to(own)
    own.path.write_text(re.sub(r'"thief"\s*\],\s*"ranks": "5"', '"*"], "ranks": "any"', own.path.read_text()))
    return own.environment("thief")


@pytest.mark.parametrize("cluster", ["file", "tcp"], indirect=True)
def test_a_static_group_with_a_stolen_name_is_refused_by_the_others(cluster: Cluster, keys: Keys) -> None:
    """The thief has the rank and name of a worker that has not come yet. The store believes it; the workers do not."""
    keys.new("a", ranks="0")
    keys.new("b", ranks="1")
    method = cluster.new_init_method(ZRPC_KEYS=str(keys.path))
    tolds = [Told("a", keys.environment("a"), method, 2), Told("b", attacker(keys), method, 2)]
    honest, _ = cluster.run(try_to_start, 2, args=(tolds,), init=False)
    assert re.match(r"RefusedError: 'b', rank 1, is refused: its key 'thief' may claim the name thief", honest)


@pytest.mark.parametrize("cluster", MODES, indirect=True)
def test_a_worker_that_has_the_wrong_key_is_told_so_at_once(cluster: Cluster, keys: Keys) -> None:
    """By itself, or by the broker: before it waits for the others."""
    keys.new("a", ranks="0")
    method = cluster.new_init_method(ZRPC_KEYS=str(keys.path))
    tolds = [Told("other", keys.environment("a"), method, 2)]
    (outcome,) = cluster.run(try_to_start, 1, args=(tolds,), init=False)
    assert "RefusedError: 'other', rank 0, is refused: its key 'a' may claim the name a and rank 0" in outcome


def test_half_of_what_a_worker_needs_is_an_error_in_words(cluster: Cluster, keys: Keys) -> None:
    keys.new("a")
    keys.new("revoked")
    keys.revoke("revoked")
    method = cluster.new_init_method(ZRPC_KEYS=str(keys.path))
    both = keys.environment("a")
    cases = {
        "ZRPC_KEY is not": {"ZRPC_KEYS": both["ZRPC_KEYS"]},
        "ZRPC_KEYS is not": {"ZRPC_KEY": both["ZRPC_KEY"]},
        "was revoked": keys.environment("revoked"),
        "insecure lets in anybody": {**both, "ZRPC_INSECURE": "1"},
    }
    for text, environment in cases.items():
        (outcome,) = cluster.run(try_to_start, 1, args=([Told("a", environment, method, 1)],), init=False)
        assert outcome.startswith("ConfigError"), outcome
        assert text in outcome


# ---- a group that grows, without a broker ---------------------------------------------------------------------------


def be_called(value: str) -> str:
    _calls.append(value)
    return value


_calls: list[str] = []


def wait_for_file(path: str) -> None:
    until(lambda: os.path.exists(path), f"{path} is there")


def serve_and_report(rank: int, tolds: list[Told], folder: str) -> dict[str, Any]:
    """Rank 0 is honest; what it has seen once the other has done its worst."""
    if rank:
        return act(tolds[1], folder)
    start(tolds[0], 0)
    try:
        open(f"{folder}/ready", "w").close()
        wait_for_file(f"{folder}/done")
        return {"member": is_member(tolds[1].name), "calls": list(_calls)}
    finally:
        open(f"{folder}/seen", "w").close()
        rpc.shutdown(graceful=False)


def act(told: Told, folder: str) -> dict[str, Any]:
    """Come in under a name, and call the honest one."""
    wait_for_file(f"{folder}/ready")
    start(told, 1)
    try:
        return {"answer": rpc.rpc_sync("a", be_called, ("served",), timeout=3)}
    except ZrpcError as error:
        return {"error": str(error)}
    finally:
        open(f"{folder}/done", "w").close()
        wait_for_file(f"{folder}/seen")
        rpc.shutdown(graceful=False)


@pytest.mark.parametrize("is_thief", [True, False], ids=["a stolen name", "its own"])
def test_a_newcomer_with_a_name_that_it_may_not_have_is_no_member(
    cluster: Cluster, keys: Keys, tmp_path: Path, is_thief: bool
) -> None:
    """And is not served; with a key of its own for that name the same is."""
    keys.new("a")
    keys.new("b")
    method = cluster.new_init_method(ZRPC_KEYS=str(keys.path))
    environment = attacker(keys) if is_thief else keys.environment("b")
    tolds = [Told("a", keys.environment("a"), method, None), Told("b", environment, method, None)]
    honest, other = cluster.run(serve_and_report, 2, args=(tolds, str(tmp_path)), init=False)
    assert honest == {"member": not is_thief, "calls": [] if is_thief else ["served"]}
    assert ("answer" in other) == (not is_thief)


def lose_and_report(rank: int, tolds: list[Told], folder: str) -> dict[str, Any]:
    """Rank 0 sees rank 1 lose its key, while it waits for an answer of it."""
    start(tolds[rank], rank)
    try:
        if rank:
            open(f"{folder}/started", "w").close()
            wait_for_file(f"{folder}/lost")
            return {}
        wait_for_file(f"{folder}/started")
        rpc.rpc_sync("b", double, (1,))
        future = rpc.rpc_async("b", wait_for_file, (f"{folder}/lost",))
        open(f"{folder}/calling", "w").close()
        try:
            future.wait()
        except PeerLostError as error:
            return {"error": str(error)}
        finally:
            open(f"{folder}/lost", "w").close()
        return {}
    finally:
        rpc.shutdown(graceful=False)


@pytest.mark.parametrize("cluster", MODES, indirect=True)
@pytest.mark.parametrize("world_size", [2, None], ids=["static", "grows"])
def test_calls_to_a_worker_whose_key_is_revoked_end(
    cluster: Cluster, keys: Keys, tmp_path: Path, world_size: int | None
) -> None:
    keys.new("a")
    keys.new("b")
    method = cluster.new_init_method(ZRPC_KEYS=str(keys.path))
    tolds = [Told(name, keys.environment(name), method, world_size) for name in "ab"]
    running = cluster.start(lose_and_report, 2, args=(tolds, str(tmp_path)), init=False)
    wait_for_file(f"{tmp_path}/calling")
    keys.revoke("b")
    honest, _ = running.wait(100)
    assert honest.error is None, honest.error
    assert "its key 'b' was revoked" in honest.result["error"]
