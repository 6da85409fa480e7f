"""Tests reach into private attributes of other objects less and less: `tests/private_access_ceiling.txt` only falls."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
CEILING = TESTS / "private_access_ceiling.txt"
OWN = ("self", "cls", "torch", "os", "sys")
"""Names whose private attributes are not counted."""


def private_accesses(source: str) -> list[int]:
    """The lines of `source` that use a private attribute of another object, once for each."""
    return sorted(
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in OWN)
    )


def test_private_attributes_are_told_from_others() -> None:
    source = "\n".join(["a._b", "a.b._c._d", "self._a", "torch._C", "torch._C._x", "a.__dict__", "a.b", "_a.b"])
    assert private_accesses(source) == [1, 2, 2, 5]


def test_private_accesses_do_not_become_more() -> None:
    """If there are fewer now, write their number into the file."""
    ceiling = int(CEILING.read_text())
    found = {path: private_accesses(path.read_text()) for path in TESTS.rglob("*.py")}
    count = sum(map(len, found.values()))
    assert count <= ceiling, f"{count} accesses to private attributes of other objects in tests, and {ceiling} before"
