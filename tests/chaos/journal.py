"""What each life of a worker did, a line an event, in a file that outlives it.

made ID PEER            a call is about to be made
ran ID PEER             it runs at its callee, which writes this
answered ID PEER        it was answered
failed ID PEER ERROR    it raised that class; with " unsent" behind it where it says that it certainly did not run
wrong TEXT              something was not as it must be
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

UNSENT = "unsent"


class Journal:
    """One life's file. A line is one write, which the system keeps whatever becomes of this process."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = os.open(folder / f"{name}.{os.getpid()}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def write(self, *words: str) -> None:
        """Add a line."""
        os.write(self._file, f"{' '.join(words)}\n".encode())


@dataclass
class Tally:
    """What all journals of a run say together.

    Attributes:
        made: calls, each by its id and its callee.
        unended: made by a life that came to its end, and neither answered nor failed.
        failed: how many failed, by the class of the error.
        wrong: what was not as it must be.
    """

    made: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    unended: set[str] = field(default_factory=set)
    failed: Counter[str] = field(default_factory=Counter)
    unsent: set[str] = field(default_factory=set)
    ran: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def run_twice(self) -> set[str]:
        """Calls that ran more than once."""
        return {call for call, times in self.ran.items() if times > 1}

    @property
    def answered_but_not_run(self) -> set[str]:
        """Calls whose answer came from nowhere."""
        return self.answered - set(self.ran)

    @property
    def unsent_but_run(self) -> set[str]:
        """Calls that ran although their error says that they certainly did not."""
        return self.unsent & set(self.ran)


def read(folder: Path, killed: set[int]) -> Tally:
    """Read all journals. What lives that were killed did not end is not counted as unended."""
    tally = Tally()
    for path in sorted(folder.glob("*.log")):
        ended: set[str] = set()
        made: set[str] = set()
        for line in path.read_text().splitlines():
            kind, _, rest = line.partition(" ")
            words = rest.split(" ")
            call = " ".join(words[:2])
            if kind == "made":
                made.add(call)
            elif kind == "ran":
                tally.ran[call] += 1
            elif kind == "answered":
                tally.answered.add(call)
                ended.add(call)
            elif kind == "failed":
                tally.failed[words[2]] += 1
                ended.add(call)
                if words[3:] == [UNSENT]:
                    tally.unsent.add(call)
            else:
                tally.wrong.append(f"{path.stem}: {rest}")
        tally.made |= made
        if int(path.stem.rpartition(".")[2]) not in killed:
            tally.unended |= made - ended
    return tally
