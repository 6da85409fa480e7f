"""An object's attributes are assigned by its own module: others give them to its constructor, or call its methods."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("zrpc", "broker")

RECORDS = ("zrpc/wire/envelope.py", "zrpc/wire/payload.py")
"""Modules of records that are filled in on their way: what a value is made of, and the message that it travels in."""

STAY = {
    ("zrpc/agent/client.py", "num_sent"): "a hint that each asynchronous call counts up, for which a method is slow",
    ("zrpc/agent/server.py", "answered"): "of a request, under the server's lock: once a request, on the way of each",
    ("zrpc/wire/pickling.py", "receiving"): "of the tables of this thread's pickling, at each stream that is read",
    ("zrpc/wire/pickling.py", "received_exceptions"): "the same",
    ("zrpc/autograd/functions.py", "info"): "of a context of torch's, which is made to be given attributes",
    ("zrpc/profiling/watching.py", "node_id"): "of an event of torch's profiler",
}
"""What is assigned from outside all the same, as module and attribute, and why."""


def modules() -> dict[str, ast.Module]:
    """The syntax trees by their paths."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def targets(tree: ast.AST) -> Iterator[ast.expr]:
    """Everything in `tree` that is assigned to."""
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            found += node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.AsyncFor):
            found.append(node.target)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            found.append(node.optional_vars)
        elif isinstance(node, ast.Delete):
            found += node.targets
        while found:
            target = found.pop()
            if isinstance(target, ast.Tuple | ast.List):
                found += target.elts
            elif isinstance(target, ast.Starred):
                found.append(target.value)
            else:
                yield target


def is_own(target: ast.Attribute) -> bool:
    """Whether it is an attribute of the object whose method assigns it."""
    return isinstance(target.value, ast.Name) and target.value.id in ("self", "cls")


def declared(tree: ast.Module) -> set[str]:
    """The attributes of the classes of a module: those that are annotated or assigned there, and those of `self`."""
    names = set()
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        names |= {target.attr for target in targets(cls) if isinstance(target, ast.Attribute) and is_own(target)}
        for statement in cls.body:
            if isinstance(statement, ast.AnnAssign | ast.Assign):
                names |= {target.id for target in targets(statement) if isinstance(target, ast.Name)}
    return names


def assigned_from_outside(trees: dict[str, ast.Module]) -> dict[tuple[str, str], list[int]]:
    """The lines that assign an attribute which a class of another module declares, and none of this one."""
    by_module = {path: declared(tree) for path, tree in trees.items()}
    everywhere = set().union(*by_module.values())
    records = set().union(*(by_module[path] for path in RECORDS if path in by_module))
    found = defaultdict(list)
    for path, tree in trees.items():
        for target in targets(tree):
            if isinstance(target, ast.Attribute) and not is_own(target):
                name = target.attr
                if name in everywhere and name not in by_module[path] | records:
                    found[path, name].append(target.lineno)
    return dict(found)


def test_an_assignment_from_outside_is_told_from_others() -> None:
    mine = "class A:\n  x: int\n  def __init__(self): self.y, self.z = 1, 2\nmade = A()\nmade.x = 1\n"
    others = "a.x = 1\nb.a.y += 1\n(c, a.z) = 1, 2\nself.x = 1\na.unknown = 1\ndel a.x\n"
    trees = {"mine": ast.parse(mine), "others": ast.parse(others)}
    assert assigned_from_outside(trees) == {("others", "x"): [1, 6], ("others", "y"): [2], ("others", "z"): [3]}


def test_no_attribute_is_assigned_by_another_module() -> None:
    """What an object needs of others is given to its constructor, or registered by a method of its own."""
    found = assigned_from_outside(modules())
    new = {f"{path}:{lines}: .{name}" for (path, name), lines in found.items() if (path, name) not in STAY}
    assert not new, f"give it to the constructor, or add a method that says when it is called: {sorted(new)}"
    gone = sorted(STAY.keys() - found.keys())
    assert not gone, f"these are not assigned from outside any more: take them off the list: {gone}"
