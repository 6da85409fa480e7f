"""Device maps of a group: what fits, what does not, and which way a tensor goes."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zrpc.errors import ConfigError
from zrpc.ids import WorkerInfo
from zrpc.membership.device_maps import DeviceMap, Placement, check, devices_of, routes
from zrpc.membership.group import Member

Maps = dict[str, DeviceMap]


def worker0(maps: Maps, count: int = 2, devices: tuple[str, ...] = ()) -> Placement:
    return Placement("worker0", count, devices, maps)


def worker1(count: int = 2, devices: tuple[str, ...] = ()) -> Placement:
    return Placement("worker1", count, devices)


FITTING: list[tuple[str, list[Placement]]] = [
    ("no maps", [worker0({}), worker1()]),
    ("no devices", [worker0({}, count=0), worker1(count=0)]),
    ("crossed", [worker0({"worker1": {"cuda:0": "cuda:1", "cuda:1": "cuda:0"}}), worker1()]),
    ("to itself", [worker0({"worker0": {"cuda:0": "cuda:1"}}), worker1()]),
    ("from and to the CPU", [worker0({"worker1": {"cpu": "cuda:1", "cuda:0": "cpu"}}), worker1()]),
    ("the CPU beside devices", [worker0({"worker1": {"cpu": "cpu"}}, devices=("cuda:1",)), worker1()]),
    ("devices named", [worker0({"worker1": {"cuda:1": "cuda:0"}}, devices=("cuda:1",)), worker1(devices=("cuda:0",))]),
    ("only the CPU without a GPU", [worker0({"worker1": {"cpu": "cpu"}}, count=0), worker1(count=0)]),
]

UNFIT: list[tuple[str, list[Placement]]] = [
    ("Node worker0 has duplicated devices", [worker0({}, devices=("cuda:0", "cuda:0")), worker1()]),
    ("Node worker1 has devices with invalid indices", [worker0({}), worker1(devices=("cuda:2",))]),
    ("Node worker0 has devices with invalid indices", [worker0({}, devices=("cuda",)), worker1()]),
    ("Node worker0 has invalid target node names in its device maps", [worker0({"w7": {"cuda:0": "cuda:0"}})]),
    (
        "Node worker0 has duplicated target devices in its device map for worker1",
        [worker0({"worker1": {"cuda:1": "cuda:0", "cuda:0": "cuda:0"}}), worker1()],
    ),
    (
        "Node worker0 has unexpected source devices in its device map for worker1",
        [worker0({"worker1": {"cuda:0": "cuda:0"}}, devices=("cuda:1",)), worker1()],
    ),
    (
        "Node worker0 has unexpected target devices in its device map for worker1",
        [worker0({"worker1": {"cuda:0": "cuda:1"}}), worker1(devices=("cuda:0",))],
    ),
    (
        "Node worker0 has source devices with invalid indices in its device map for worker1",
        [worker0({"worker1": {"cuda:2": "cuda:0"}}), worker1()],
    ),
    (
        "Node worker0 has target devices with invalid indices in its device map for worker1",
        [worker0({"worker1": {"cuda:0": "cuda:2"}}), worker1()],
    ),
    (
        "Node worker0 has source devices with invalid indices in its device map for worker1",
        [worker0({"worker1": {"cuda": "cuda:0"}}), worker1()],
    ),
    (
        "Node worker0 has target devices with invalid indices in its device map for worker1",
        [worker0({"worker1": {"cuda:0": "xpu:0"}}), worker1()],
    ),
    (
        "Node worker0 has target devices with invalid indices in its device map for worker1",
        [worker0({"worker1": {"cuda:0": "cuda:0"}}), worker1(count=0)],
    ),
]


@pytest.mark.parametrize("group", [pytest.param(group, id=name) for name, group in FITTING])
def test_maps_that_fit(group: list[Placement]) -> None:
    check(group, is_complete=True)
    check(group, is_complete=False)


@pytest.mark.parametrize(("text", "group"), UNFIT)
def test_maps_that_do_not_fit(text: str, group: list[Placement]) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        check(group, is_complete=True)
    assert isinstance(caught.value, ValueError), "which is what torch raises"


def test_a_group_that_grows_may_have_maps_for_workers_to_come() -> None:
    maps: Maps = {"later": {"cuda:0": "cuda:7"}}
    check([worker0(maps)], is_complete=False)
    with pytest.raises(ConfigError, match="target devices with invalid indices"):
        check([worker0(maps), Placement("later", 1)], is_complete=False)
    with pytest.raises(ConfigError, match="source devices with invalid indices"):
        check([worker0(maps, count=0)], is_complete=False)


def test_devices_are_those_that_were_named() -> None:
    other = Placement(
        "worker1", 16, (), {"worker0": {"cuda:0": "cuda:10", "cuda:1": "cpu"}, "worker2": {"cpu": "cuda:3"}}
    )
    mapped = worker0({"worker1": {"cuda:2": "cuda:1", "cpu": "cuda:5"}}, count=16)
    assert devices_of(mapped, [mapped, other]) == ["cuda:2", "cuda:10"]
    assert devices_of(worker0({}, devices=("cuda:4", "cuda:3")), [other]) == ["cuda:3", "cuda:4"]
    assert devices_of(worker0({}), []) == []


def test_a_member_that_says_nothing_has_no_devices() -> None:
    assert Placement.of(Member(WorkerInfo("w", 0), b"i", {"address": None})) == Placement("w")


DEVICES = ["cpu", "cuda:0", "cuda:1", "cuda:2"]


@st.composite
def one_to_one(draw: st.DrawFn) -> DeviceMap:
    count = draw(st.integers(0, len(DEVICES)))
    return dict(zip(draw(st.permutations(DEVICES))[:count], draw(st.permutations(DEVICES))[:count], strict=True))


@given(st.none() | one_to_one(), st.none() | one_to_one(), st.sampled_from(["worker0", "worker1"]))
def test_what_went_one_way_comes_back_the_other(ours: DeviceMap | None, theirs: DeviceMap | None, peer: str) -> None:
    here = Placement("worker0", 3, (), {} if ours is None else {peer: ours})
    there = here if peer == "worker0" else Placement("worker1", 3, (), {} if theirs is None else {"worker0": theirs})
    out, back = routes(here, there), routes(there, here)
    assert back.replies == {target: source for source, target in out.requests.items()}
    assert back.requests == {target: source for source, target in out.replies.items()}
    if ours is not None:
        assert out.requests == ours
