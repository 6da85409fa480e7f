"""One line of the results, and the table of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line of the results."""

    what: str
    measured: str
    goal: str = ""
    is_met: bool | None = None

    @property
    def verdict(self) -> str:
        """Whether the goal is met."""
        return {True: "met", False: "MISSED", None: "-"}[self.is_met]

    def __str__(self) -> str:
        goal = f"  [goal {self.goal}: {self.verdict}]" if self.goal else ""
        return f"{self.what}: {self.measured}{goal}"


def markdown(figures: list[Figure], facts: str) -> str:
    """The results file."""
    lines = ["| what | measured | goal | |", "|---|---|---|---|"]
    lines += [f"| {one.what} | {one.measured} | {one.goal} | {one.verdict} |" for one in figures]
    return f"{facts}.\n\n" + "\n".join(lines) + "\n"
