"""With a broker, a host that vanishes is noticed within 5 s, and is told from a process that stands still."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.integration.broker_harness import WORKER_SCRIPT, Broker, running_broker, workers
from tests.integration.networks import Network, is_permitted, network
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

NOTICED_S = 5.0

pytestmark = pytest.mark.skipif(not is_permitted(), reason="needs to make networks")


@pytest.fixture
def cable() -> Iterator[Network]:
    with network() as made:
        yield made


@pytest.fixture
def broker(cable: Network) -> Iterator[Broker]:
    with running_broker(bind=f"tcp://{cable.here}:0") as started:
        yield started


def start_there(cable: Network, address: str, name: str, ends_when_alone: str = "") -> subprocess.Popen[str]:
    """A worker of two, in the other network. It echoes."""
    command = cable.command([sys.executable, "-c", WORKER_SCRIPT, address, name, "2", ends_when_alone])
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_worker_whose_host_vanishes_is_lost_within_5_s_though_it_is_idle(cable: Network, broker: Broker) -> None:
    """The broker sees that nothing is acknowledged."""
    process = start_there(cable, broker.address, "far")
    try:
        with workers(broker.address, "near", world_size=2) as (near,):
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
            cable.cut()
            cut_at = time.monotonic()
            near.seen.wait(lambda: len(near.seen.lost) == 1, timeout_s=20)
            assert time.monotonic() - cut_at < NOTICED_S
            assert "nothing that it is sent is acknowledged" in near.seen.lost[0][1]
    finally:
        process.kill()
        process.communicate()


def test_workers_notice_within_5_s_that_the_brokers_host_vanished(cable: Network, broker: Broker) -> None:
    """They look for a broker then."""
    with workers(broker.address, "near", world_size=1):  # of the same host as the broker: it notices nothing
        pass
    port = broker.address.rpartition(":")[2]
    with subprocess.Popen(
        cable.command([sys.executable, "-m", "zrpc_broker", "--bind", f"tcp://{cable.there}:{port}"]),
        stdout=subprocess.PIPE, text=True,
    ) as far:  # fmt: skip
        try:
            assert far.stdout is not None
            address = far.stdout.readline().split()[-1]
            with workers([address, broker.address], "a", "b", local=False) as (a, b):
                assert a.endpoint.address == address
                cable.cut()
                cut_at = time.monotonic()
                until(lambda: not a.endpoint.is_resumed() and not b.endpoint.is_resumed(), "it is noticed")
                assert time.monotonic() - cut_at < NOTICED_S
        finally:
            far.kill()


def test_a_worker_that_stands_still_is_suspected_and_comes_back(cable: Network) -> None:
    """The log names it; after that it answers, and nobody was lost."""
    with running_broker(bind=f"tcp://{cable.here}:0") as broker:
        process = start_there(cable, broker.address, "still")
        try:
            with workers(broker.address, "near", world_size=2) as (near,):
                assert process.stdout is not None
                assert process.stdout.readline() == "joined\n"
                (still,) = [member.incarnation for member in near.members if member.info.name == "still"]
                process.send_signal(signal.SIGSTOP)
                assert broker.process.stderr is not None
                said = broker.process.stderr.readline()
                assert "'still'" in said
                assert "its host acknowledges: it stands still, or is busy" in said
                process.send_signal(signal.SIGCONT)
                near.endpoint.send(still, [b"echo"])
                near.seen.wait(lambda: len(near.seen.frames) == 1)
                assert not near.seen.lost
        finally:
            process.kill()
            process.communicate()
