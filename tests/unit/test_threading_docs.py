"""docs/threading.md lists every thread and every lock as they are.

A row of the table of locks begins `| path | name | kind |`, one of the table of threads with the thread's name and ends
with the paths that start it. The other cells are prose. What fails says which rows to add and which to take out.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "threading.md"
FOLDERS = ("zrpc", "broker")
KINDS = ("Lock", "RLock", "Condition", "Semaphore", "BoundedSemaphore")
LOCK_ROW = re.compile(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \| (\w+) \| [^|]+ \| [^|]+ \|$", re.MULTILINE)
THREAD_ROW = re.compile(r"^\| `(zrpc-[\w-]+)` \| .* \| ([^|]+) \|$", re.MULTILINE)

Scoped = tuple[ast.AST, tuple[ast.AST, ...]]


def _nodes(node: ast.AST, around: tuple[ast.AST, ...] = ()) -> Iterator[Scoped]:
    """Every node, and those that it lies in, the outermost first."""
    for child in ast.iter_child_nodes(node):
        yield child, (*around, node)
        yield from _nodes(child, (*around, node))


def _files() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def _called(node: ast.AST) -> str:
    """The last part of the name of what a call calls."""
    if not isinstance(node, ast.Call):
        return ""
    return ast.unparse(node.func).rpartition(".")[2]


def _place(around: tuple[ast.AST, ...]) -> str:
    """Under which name a lock is kept: `Class._attribute`, `_global` or `function.local`."""
    target = next(
        (node.targets[0] if isinstance(node, ast.Assign) else node.target)
        for node in reversed(around)
        if isinstance(node, ast.Assign | ast.AnnAssign)
    )
    name = ast.unparse(target)
    classes = [node.name for node in around if isinstance(node, ast.ClassDef)]
    if name.startswith("self."):
        return f"{classes[-1]}.{name.removeprefix('self.')}"
    functions = [node.name for node in around if isinstance(node, ast.FunctionDef)]
    return ".".join([*classes, *functions, name])


def _locks() -> set[tuple[str, str, str]]:
    found = set()
    for path, tree in _files():
        for node, around in _nodes(tree):
            inner = any(_called(one) in KINDS for one in around)  # Condition(Lock()) is one
            if _called(node) in KINDS and not inner:
                found.add((path, _place(around), _called(node)))
    return found


def _text(node: ast.AST) -> str:
    """A string, with N for what is put into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "N" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def _names_in(nodes: list[ast.AST]) -> set[str]:
    within_strings = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    texts = {_text(node) for node in nodes if id(node) not in within_strings}
    return {text for text in texts if text.startswith("zrpc-")}


def _threads() -> set[tuple[str, str]]:
    """Names and paths of threads: of pools, and of what starts one itself."""
    found = set()
    for path, tree in _files():
        if path in ("zrpc/threads.py", "zrpc/agent/pool.py"):  # they start those of others
            continue
        for node, around in _nodes(tree):
            assert isinstance(node, ast.AST)
            is_pool = _called(node) == "HandlerPool"
            starts = isinstance(node, ast.Call) and ast.unparse(node.func) in ("threads.start", "threading.Thread")
            if not (is_pool or starts):
                continue
            names = _names_in(list(ast.walk(node)))
            if not names:  # it is given by a variable of the function
                function = next(one for one in reversed(around) if isinstance(one, ast.FunctionDef))
                names = _names_in(list(ast.walk(function)))
            assert names, f"{path}:{node.lineno}: the name of a thread begins with zrpc-"  # type: ignore[attr-defined]
            found |= {(f"{name}-N" if is_pool else name, path) for name in names}
    return found


def _check(listed: list[tuple[str, ...]], there: set[tuple[str, ...]], what: str) -> None:
    assert len(listed) == len(set(listed)), f"docs/threading.md lists a {what} twice"
    missing, gone = sorted(there - set(listed)), sorted(set(listed) - there)
    assert not missing, f"docs/threading.md lacks these {what}s: {missing}"
    assert not gone, f"docs/threading.md lists {what}s that are not there: {gone}"


def test_every_lock_is_listed_with_what_it_guards_and_what_is_waited_for_under_it() -> None:
    """One row for each place of the code that makes a lock, a condition or a semaphore."""
    _check(LOCK_ROW.findall(PAGE.read_text()), _locks(), "lock")  # type: ignore[arg-type]


def test_every_thread_is_listed_with_where_it_is_started() -> None:
    """One row for each name of a thread."""
    rows = THREAD_ROW.findall(PAGE.read_text())
    listed = [(name, path) for name, cell in rows for path in re.findall(r"`([\w/]+\.py)`", cell)]
    _check(listed, _threads(), "thread")  # type: ignore[arg-type]
