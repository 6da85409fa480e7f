"""What becomes of a valid message in the hands of chance: bits, lengths, numbers, types and nesting are changed."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    import random

Frames = list[bytes]

NUMBERS = [
    0, 1, -1, 2, 3, 7, 8, 63, 64, 127, 128, 255, 256, 4095, 4096, 65_535, 65_536, 1 << 20, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 58, 1 << 59, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -2, -128,
    -(1 << 31), -(1 << 63),
]  # fmt: skip
"""What counters, sizes and offsets go wrong at."""
OTHERS: list[Any] = [
    None, True, False, 0.0, -1.5, float("nan"), float("inf"), 1e300, "", "cpu", "cuda:0", "float32", "quint4x2",
    "x" * 300, "\x1b[2J",
    "\ud800".encode("utf-8", "surrogatepass"), b"", b"\xc1", b"\x00" * 8, b"x" * 4097, [], [[]], {},
    {"a": 1},
]  # fmt: skip
MAX_NBYTES = 12 << 10
"""Of a frame that grows: Python's objects take up to 64 bytes for each byte of msgpack, and that may come to 1 MiB."""


def mutate(rng: random.Random, frames: Frames, others: list[Frames]) -> Frames:
    """`frames`, changed in one to four places. `others` are other valid messages, of which parts may come in."""
    changed = list(frames)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if not changed:
            changed = [b""]
        index = rng.randrange(len(changed)) if rng.random() < 0.4 else 0
        how = rng.random()
        if how < 0.55:
            changed[index] = _restructured(rng, changed[index], others)
        elif how < 0.92:
            changed[index] = _scrambled(rng, changed[index], others)
        elif how < 0.94:
            del changed[index]
        elif how < 0.96:
            changed.insert(index, changed[index])
        elif how < 0.98:
            rng.shuffle(changed)
        else:
            changed += rng.choice(others)[:3]
    return changed


def _scrambled(rng: random.Random, frame: bytes, others: list[Frames]) -> bytes:
    """`frame` with some bytes changed, whatever they mean."""
    raw = bytearray(frame)
    place = rng.randrange(len(raw) + 1)
    how = rng.randrange(7)
    if how == 0 and raw:
        raw[place % len(raw)] ^= 1 << rng.randrange(8)
    elif how == 1 and raw:
        raw[place % len(raw)] = rng.randrange(256)
    elif how == 2:
        del raw[place:]
    elif how == 3:
        raw[place:place] = rng.randbytes(rng.choice((1, 2, 5, 9, 64)))
    elif how == 4:
        form = rng.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
        size = struct.calcsize(form)
        raw[place : place + size] = struct.pack(form, rng.choice(NUMBERS) % (1 << 8 * size))
    elif how == 5:
        other = rng.choice(rng.choice(others) or [b""])
        start = rng.randrange(len(other) + 1)
        raw[place : place + rng.randrange(16)] = other[start : start + rng.randrange(1, 200)]
    else:  # an array or map that claims much, or many within each other
        raw[place:place] = rng.choice((b"\xdd\x00\x00\x10\x00", b"\xdc\x0f\xff", b"\xdf\x00\x00\x10\x00", b"\x91")) * (
            rng.choice((1, 2, 40, 700, 1100))
        )
    return bytes(raw[: max(MAX_NBYTES, len(frame))])


def _restructured(rng: random.Random, frame: bytes, others: list[Frames]) -> bytes:
    """`frame` with some of its msgpack values changed; scrambled if it has none."""
    try:
        value = msgpack.unpackb(frame, strict_map_key=False)
        return bytes(msgpack.packb(_changed(rng, value), default=str))[: max(MAX_NBYTES, len(frame))]
    except Exception:
        return _scrambled(rng, frame, others)


def _changed(rng: random.Random, value: Any) -> Any:
    """`value`, one part of which is another."""
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        how = rng.random()
        if how < 0.8:
            return [*value[:place], _changed(rng, value[place]), *value[place + 1 :]]
        if how < 0.87:
            return value[:place] + value[place + 1 :]
        if how < 0.94:
            return [*value, value[place]]
        return value * rng.choice((2, 3, 40))
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.8:
            return {**value, key: _changed(rng, value[key])}
        return {**value, rng.choice(("x", b"y", 3, True)): value[key]}
    if isinstance(value, msgpack.ExtType) and rng.random() < 0.8:
        code = value.code if rng.random() < 0.7 else rng.randrange(-128, 128)
        return msgpack.ExtType(code, _inner(rng, value.data))
    if isinstance(value, bytes) and rng.random() < 0.6:
        return _inner(rng, value)
    if type(value) is int and rng.random() < 0.4:
        return max(-(1 << 63), min(value + rng.choice((-1, 1, 8, -8)), (1 << 64) - 1))
    return _any_value(rng)


def _inner(rng: random.Random, raw: bytes) -> bytes:
    """Bytes within a value, which may be msgpack themselves."""
    return _restructured(rng, raw, [[b"\x93\x01\x02\x03"]])


def _any_value(rng: random.Random) -> Any:
    if rng.random() < 0.6:
        return rng.choice(NUMBERS)
    value = rng.choice(OTHERS)
    if rng.random() < 0.15:
        for _ in range(rng.choice((1, 3, 60, 400))):
            value = [value]
    return value
