"""Feeds mutated messages to every decoder: `python -m tests.fuzz.run --count 1000000`.

Input n of a target is made of the number n, so what fails can be had again: `--target tensors --first 1234 --count 1`.
Each target runs in a process of its own, so that one which ends, or hangs, is noticed. Where atheris is installed,
`--atheris SECONDS` lets it look for new paths through each decoder as well.

Exit status: 0 if nothing failed; 1 with the target, the number and what happened at the first failure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import sys
import time
import traceback
import tracemalloc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.fuzz.targets import Target

HANG_S = 20.0
ADDRESS_SPACE_NBYTES = 96 << 20
"""What a target may map beyond what it has at the start: a claim that torch believes fails here."""
SPARE_NBYTES = 1 << 20


class Failed(Exception):
    """An input did what none may."""


def input_of(target: Target, number: int) -> list[bytes]:
    """The mutated message of that number."""
    from tests.fuzz.mutation import mutate

    rng = random.Random(f"{target.name} {number}")
    return mutate(rng, rng.choice(target.seeds), target.seeds)


def check(target: Target, frames: list[bytes]) -> str:
    """Decode `frames`; what became of them.

    Raises:
        Failed: something that may not happen.
    """
    allowed = 2 * sum(map(len, frames)) + SPARE_NBYTES
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    outcome, held = "read", 0
    try:
        held = target.run(frames)
    except target.raises as error:
        outcome = "refused"
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, MemoryError) or "allocate memory" in str(seen):
                raise Failed(f"it asked for too much memory: {seen}") from error
            seen = seen.__cause__ or seen.__context__
        if not str(error).replace("\n", "").replace("\t", "").isprintable():  # see `remote_text.lines`
            raise Failed(f"the error has control characters in it: {str(error)[:200]!r}") from error
    except Exception as error:
        raise Failed("".join(traceback.format_exception(error))) from error
    peak = tracemalloc.get_traced_memory()[1] - before
    if tracemalloc.is_tracing() and max(peak, held) > allowed:
        raise Failed(f"{sum(map(len, frames))} bytes took {peak} bytes of memory, and what was made of them {held}")
    return outcome


def _work(name: str, first: int, count: int, number: Any, results: Any) -> None:
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    for warm_up in range(50):
        input_of(target, warm_up)
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    spare = ADDRESS_SPACE_NBYTES * (24 if name == "chunks" else 1)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + spare, resource.RLIM_INFINITY))
    tracemalloc.start()
    outcomes: dict[str, int] = {}
    for current in range(first, first + count):
        number.value = current
        frames = input_of(target, current)
        try:
            outcome = check(target, frames)
        except Failed as failed:
            results.put(str(failed))
            sys.exit(1)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    results.put(outcomes)


def run_target(name: str, first: int, count: int) -> str | None:
    """Feed `count` inputs to a target in another process; what went wrong, if anything did."""
    context = multiprocessing.get_context("spawn")
    number, results = context.Value("q", -1, lock=False), context.SimpleQueue()
    began = time.monotonic()
    process = context.Process(target=_work, args=(name, first, count, number, results))
    process.start()
    last, since = number.value, time.monotonic()
    while process.is_alive() and results.empty():
        process.join(0.5)
        if number.value != last:
            last, since = number.value, time.monotonic()
        elif time.monotonic() - since > HANG_S + 40 * (last == -1):
            process.kill()
            return f"{name} {last}: it hangs"
    outcome = None if results.empty() else results.get()
    process.join()
    if not isinstance(outcome, dict):
        return f"{name} {last}: {outcome or f'the process ended with {process.exitcode}'}"
    elapsed = time.monotonic() - began
    shares = ", ".join(f"{outcome[key]} {key}" for key in sorted(outcome))
    print(f"{name:12} {count:8} inputs {count / elapsed:8.0f}/s   {shares}", flush=True)
    return None


def run_atheris(name: str, seconds: int) -> None:
    """Let atheris look for new paths through a decoder, for so long. It ends this process."""
    import atheris

    with atheris.instrument_imports(include=["zrpc", "zrpc_broker"]):
        from tests.fuzz.mutation import mutate
        from tests.fuzz.targets import TARGETS
    import msgpack

    target = TARGETS[name]

    def frames_of(data: bytes) -> list[bytes]:
        try:
            frames = msgpack.unpackb(data)
            assert type(frames) is list
            return [frame for frame in frames if type(frame) is bytes]
        except Exception:
            return [data]

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        frames = frames_of(data) if len(data) > 3 and rng.random() < 0.9 else rng.choice(target.seeds)
        packed: bytes = msgpack.packb(mutate(rng, frames, target.seeds))
        return packed[:max_size]

    arguments = [sys.argv[0], f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=70000"]
    tracemalloc.start()
    atheris.Setup(arguments, lambda data: check(target, frames_of(data)) and None, custom_mutator=mutator)
    atheris.Fuzz()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs of all targets together")
    parser.add_argument("--first", type=int, default=0, help="the number of each target's first input")
    parser.add_argument("--target", action="append", help="only these")
    parser.add_argument("--atheris", type=int, help="so many seconds, of one target")
    options = parser.parse_args(arguments)
    if options.atheris:
        run_atheris(options.target[0], options.atheris)
    from tests.fuzz.targets import TARGETS

    names = options.target or list(TARGETS)
    began = time.monotonic()
    for name in names:
        failure = run_target(name, options.first, -(-options.count // len(names)))
        if failure is not None:
            print(f"FAILED {failure}", flush=True)
            return 1
    print(f"{options.count} inputs, {time.monotonic() - began:.0f} s: nothing failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
