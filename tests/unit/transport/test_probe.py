"""Probes: who can open one says so in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from zrpc.transport.probe import Probe

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def probes() -> Iterator[list[Probe]]:
    made = [Probe() for _ in range(3)]
    yield made
    for probe in made:
        probe.close()
        probe.close()


def test_a_visit_is_seen_by_whom_it_was_paid_to(probes: list[Probe]) -> None:
    host, guest, other = probes
    nonce = guest.card()[2]
    assert not host.was_visited_by(nonce)
    assert guest.visit(host.card()) == host.card()[2]
    assert host.was_visited_by(nonce)
    assert not host.was_visited_by(other.card()[2])
    assert not guest.was_visited_by(host.card()[2])
    other.visit(host.card())
    assert host.was_visited_by(other.card()[2])
    assert host.was_visited_by(nonce)


@pytest.mark.parametrize(
    "card", [None, [], [1], [1, 2, "x"], ["a", "b", b"c"], {}, 5, [True, 3, b"x" * 16], [1, 2.0, b"x" * 16]]
)
def test_cards_that_show_nothing_are_not_visited(probes: list[Probe], card: Any) -> None:
    assert probes[0].visit(card) is None


@pytest.mark.parametrize(("at", "part"), [(0, 1 << 30), (1, 1 << 20), (2, b"?" * 16), (0, -1)])
def test_what_is_not_what_its_card_says_is_left_alone(probes: list[Probe], at: int, part: Any) -> None:
    host, guest, _ = probes
    card = host.card()
    card[at] = part
    assert guest.visit(card) == card[2]
    assert not host.was_visited_by(guest.card()[2])


def test_other_files_are_not_written_to(probes: list[Probe], tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    with path.open("rb+") as file:
        probes[0].visit([os.getpid(), file.fileno(), b"y" * 16])
    assert path.read_bytes() == b"x" * 100
    reader, writer = os.pipe()
    probes[0].visit([os.getpid(), writer, b"y" * 16])
    os.close(writer)
    assert os.read(reader, 10) == b""
    os.close(reader)


def test_a_closed_probe_knows_no_visitors(probes: list[Probe]) -> None:
    host, guest, _ = probes
    host.close()
    assert not host.was_visited_by(guest.card()[2])
