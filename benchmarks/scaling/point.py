"""What is measured of one group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Point:
    """One mode with `n` workers. What is None was not reached; `error` then says why."""

    mode: str
    n: int
    init_s: float | None = None
    first_fan_out_ms: float | None = None
    fan_out_ms: float | None = None
    fan_out_calls_per_s: float | None = None
    first_all_to_all_s: float | None = None
    all_to_all_calls_per_s: float | None = None
    fds_max: int | None = None
    shutdown_s: float | None = None
    error: str | None = None
