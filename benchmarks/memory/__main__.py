"""What zrpc takes of memory, processors at rest and open files, beside the goal of each figure.

    python -m benchmarks.memory                     everything, about 10 minutes on 2 cores, up to 10 GB of memory
    python -m benchmarks.memory idle flight         some of it
    python -m benchmarks.memory slow --brokered     through a broker

Every worker is a process of its own, made from nothing, with its bytecode cached as an installed package's is. MB are
10^6 bytes. A figure "after" is taken once garbage is gone and the C allocator has given back what it can. `shm` needs
the right to mount (`unshare -m`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import facts, record
from benchmarks.memory.figure import Figure, markdown
from benchmarks.memory.group import group
from benchmarks.memory.parts import INSIDE, PARTS, inside_shm

if TYPE_CHECKING:
    from collections.abc import Iterator


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--brokered", action="store_true", help="workers reach each other through a broker")
    parser.add_argument("--idle-s", type=float, default=20, help="how long idle workers are watched")
    parser.add_argument("--calls", type=int, default=100_000, help="small calls in flight")
    parser.add_argument("--large-calls", type=int, default=1000, help="calls of 10 MB to a callee that sleeps")
    parser.add_argument("--workers", type=int, default=32, help="workers that may open few files")
    parser.add_argument("--files", type=int, default=256, help="how many files they may open")
    parser.add_argument("--rrefs", type=int, default=200_000, help="RRefs made and dropped")
    parser.add_argument("--held", type=int, default=100, help="of them held at a time")
    parser.add_argument("--objects", action="store_true", help="say of what classes there are most objects")
    parser.add_argument("--out", type=Path, help="where the table is written, as memory.md")
    args = parser.parse_args()
    if args.parts == [INSIDE]:
        print(inside_shm(args))
        return
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"not {', '.join(sorted(unknown))}, but some of {', '.join(PARTS)}")
    found: list[Figure] = []
    with bytecode():
        for name in args.parts or PARTS:
            for figure in PARTS[name](args):
                print(figure, flush=True)
                found.append(figure)
    record(markdown(found, facts()), args.out, "memory.md")


@contextlib.contextmanager
def bytecode() -> Iterator[None]:
    """Workers find their modules compiled, as installed ones are: to compile them takes memory that stays."""
    with tempfile.TemporaryDirectory(prefix="zrpc-bench-") as cache:
        os.environ["PYTHONPYCACHEPREFIX"] = cache
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        with group(brokered=False):
            pass
        yield


if __name__ == "__main__":
    main()
