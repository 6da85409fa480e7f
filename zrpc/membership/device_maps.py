"""Device maps of a whole group: whether they fit together, and what follows from them. Pure.

Devices are the strings that `str(torch.device)` gives. The rules and the errors' wording are those of
torch.distributed.rpc, so that programs which look for them find them: a map is 1-to-1, names workers of the group, and
devices that both have. Every worker checks the maps of all, so all say the same.

Which way a map is read. A request goes by the caller's map for the callee, and its answer by the same map reversed. A
worker that has no map for a peer uses the peer's map for it, reversed; torch refuses that. So whatever direction
a tensor went in, the other one leads back to where it came from (`Routes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zrpc.errors import ConfigError

if TYPE_CHECKING:
    from zrpc.membership.group import Member

DeviceMap = Mapping[str, str]
"""Device here -> device there."""

CPU = "cpu"
_CUDA = "cuda:"


@dataclass(frozen=True, slots=True)
class Placement:
    """What one worker says of its devices.

    Attributes:
        name: the worker's.
        device_count: how many CUDA devices it has.
        devices: those it was told to use; empty: those that maps name.
        maps: its device maps, by the peer's name.
    """

    name: str
    device_count: int = 0
    devices: Sequence[str] = ()
    maps: Mapping[str, DeviceMap] = field(default_factory=dict)

    @classmethod
    def of(cls, member: Member) -> Placement:
        """What the card of `member` says."""
        card: dict[str, Any] = member.card
        return cls(member.info.name, card.get("device_count", 0), card.get("devices", ()), card.get("device_maps", {}))

    def has(self, devices: Iterable[str]) -> bool:
        """Whether it has all of `devices`."""
        return all(device == CPU or 0 <= _index(device) < self.device_count for device in devices)


@dataclass(frozen=True, slots=True)
class Routes:
    """Where tensors arrive that one worker sends to another.

    Attributes:
        requests: for tensors of requests.
        replies: for tensors of answers.
    """

    requests: DeviceMap
    replies: DeviceMap


def check(placements: Sequence[Placement], *, is_complete: bool) -> None:
    """See whether the device maps of all workers fit together.

    Args:
        placements: what each says, in the order of ranks.
        is_complete: nobody else comes; else maps may name workers that are not here yet.

    Raises:
        ConfigError: they do not; the message says whose, and what it says.
    """
    by_name = {placement.name: placement for placement in placements}
    for one in placements:
        _check_devices(one)
    for one in placements:
        strangers = set(one.maps) - by_name.keys()
        if is_complete and strangers:
            raise ConfigError(
                f"Node {one.name} has invalid target node names in its device maps: {', '.join(sorted(strangers))}\n"
                f"device maps = {dict(one.maps)}\nnode names = {', '.join(by_name)}"
            )
        for target, device_map in one.maps.items():
            _check_map(one, target, by_name.get(target), device_map)


def devices_of(placement: Placement, others: Iterable[Placement]) -> list[str]:
    """The CUDA devices that a worker uses: those it was told to, else those that its maps and others' maps name."""
    if placement.devices:
        return sorted(placement.devices, key=_index)
    named = {device for device_map in placement.maps.values() for device in device_map}
    for other in others:
        named.update(other.maps.get(placement.name, {}).values())
    return sorted(named - {CPU}, key=_index)


def routes(here: Placement, there: Placement) -> Routes:
    """Where tensors arrive that `here` sends to `there`."""
    ours, theirs = here.maps.get(there.name), there.maps.get(here.name)
    back = None if theirs is None else {target: source for source, target in theirs.items()}
    return Routes(_first(ours, back), _first(back, ours))


def _first(*maps: DeviceMap | None) -> DeviceMap:
    return next((one for one in maps if one is not None), {})


def _index(device: str) -> int:
    """The number of a CUDA device; -1 where it has none, or is of another kind."""
    number = device.removeprefix(_CUDA)
    return int(number) if number != device and number.isdecimal() else -1


def _check_devices(one: Placement) -> None:
    if len(set(one.devices)) != len(one.devices):
        raise ConfigError(f"Node {one.name} has duplicated devices\ndevices = {', '.join(one.devices)}")
    if not one.has(one.devices):
        raise ConfigError(
            f"Node {one.name} has devices with invalid indices\n"
            f"devices = {', '.join(one.devices)}\ndevice count = {one.device_count}"
        )


def _check_map(source: Placement, target_name: str, target: Placement | None, device_map: DeviceMap) -> None:
    if len(set(device_map.values())) != len(device_map):
        raise _misfit(source, "duplicated target devices", target_name, device_map, "")
    _check_side(source, source, "source", target_name, device_map, device_map)
    if target is not None:
        _check_side(source, target, "target", target_name, device_map, device_map.values())


def _check_side(
    source: Placement, owner: Placement, side: str, target_name: str, device_map: DeviceMap, named: Iterable[str]
) -> None:
    """See whether `owner`, at the source's or the target's side of the map, has the devices `named` in it."""
    if owner.devices:
        if not set(named) <= {CPU, *owner.devices}:
            text = f"\ndevices of {owner.name} = {', '.join(owner.devices)}"
            raise _misfit(source, f"unexpected {side} devices", target_name, device_map, text)
    elif not owner.has(named):
        text = f"\ndevice count of {owner.name} = {owner.device_count}"
        raise _misfit(source, f"{side} devices with invalid indices", target_name, device_map, text)


def _misfit(source: Placement, what: str, target_name: str, device_map: DeviceMap, text: str) -> ConfigError:
    return ConfigError(
        f"Node {source.name} has {what} in its device map for {target_name}\ndevice map = {dict(device_map)}{text}"
    )
