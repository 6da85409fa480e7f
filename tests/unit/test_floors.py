"""The floors of the house: a module imports only what is below it, and nothing imports in a circle."""

from __future__ import annotations

import ast
import configparser
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"zrpc": ROOT / "zrpc", "zrpc_broker": ROOT / "broker"}

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "zrpc.errors",
        "zrpc.exception_text",
        "zrpc.finalizers",
        "zrpc.control",
        "zrpc.config",
        "zrpc.exposed",
        "zrpc.ids",
        "zrpc.functions",
        "zrpc.gathering",
        "zrpc.interrupts",
        "zrpc.protocol_errors",
        "zrpc.remote_text",
        "zrpc.keyring",
        "zrpc.keyring_file",
        "zrpc.secret",
        "zrpc.threads",
        "zrpc.wakeups",
    ),
    ("zrpc.wire",),
    ("zrpc.staging",),
    ("zrpc.transport",),
    ("zrpc.membership",),
    ("zrpc.agent",),
    ("zrpc.profiling",),
    ("zrpc.rref",),
    ("zrpc.autograd",),
    ("zrpc.api", "zrpc.draining", "zrpc.gather"),
    ("zrpc.optim", "zrpc.nn", "zrpc.sight", "zrpc.ending"),
    ("zrpc.lifecycle",),
    ("zrpc.session",),
    ("zrpc",),
    ("zrpc.compat",),
    ("zrpc.cli",),
    ("zrpc.__main__",),
)
"""From the ground up. Rooms on one floor do not import each other, but for the leaves at the very bottom."""

BROKER_MAY_IMPORT = (
    "zrpc.wire", "zrpc.transport", "zrpc.errors", "zrpc.ids", "zrpc.keyring", "zrpc.protocol_errors",
    "zrpc.remote_text", "zrpc.secret",
)  # fmt: skip

ONLY_IN = {
    "zmq": ("zrpc.transport",),
    "torch.distributed.rpc": ("zrpc.compat",),
    "torch.distributed.autograd": ("zrpc.compat",),
    "torch._C._distributed_rpc": ("zrpc.compat",),
    "torch._C._distributed_autograd": ("zrpc.compat",),
}
"""What a few rooms alone may import."""


@dataclass(frozen=True)
class Import:
    """`source` imports `target`: at import time, when a function runs, or when a type checker reads it."""

    source: str
    target: str
    line: int


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()


def _imports(module: str, path: Path) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner in MODULES or inner in ONLY_IN
                yield Import(module, inner if is_module else base, node.lineno)


IMPORTS = [found for module, path in MODULES.items() for found in _imports(module, path)]


def _is_in(module: str, room: str) -> bool:
    return module == room or (room != "zrpc" and module.startswith(f"{room}."))


def _room(module: str) -> tuple[int, str]:
    for height, floor in enumerate(FLOORS):
        for room in floor:
            if _is_in(module, room):
                return height, room
    raise AssertionError(f"{module} is on no floor: give it one in FLOORS, as DESIGN.md says")


def _is_ours(target: str) -> bool:
    return target.split(".")[0] in PACKAGES


@pytest.mark.parametrize("module", sorted(module for module in MODULES if not module.startswith("zrpc_broker")))
def test_a_module_imports_only_floors_below(module: str) -> None:
    height, room = _room(module)
    for found in IMPORTS:
        if found.source != module or not _is_ours(found.target) or _is_in(found.target, room):
            continue
        if found.target.startswith("zrpc_broker"):
            assert room == "zrpc.cli", f"{module}:{found.line} imports the broker, which only the command line starts"
            continue
        below, target_room = _room(found.target)
        leaves = height == below == 0
        allowed = below < height or leaves
        assert allowed, f"{module}:{found.line} imports {found.target}, and {target_room} is not below {room}"


def test_the_broker_imports_only_wire_transport_and_leaves() -> None:
    for found in IMPORTS:
        if found.source.startswith("zrpc_broker") and found.target.startswith("zrpc."):
            allowed = any(_is_in(found.target, room) for room in BROKER_MAY_IMPORT)
            assert allowed, f"{found.source}:{found.line} imports {found.target}"


@pytest.mark.parametrize("name", sorted(ONLY_IN))
def test_some_imports_are_for_a_few_rooms_alone(name: str) -> None:
    for found in IMPORTS:
        if _is_in(found.target, name):
            allowed = any(_is_in(found.source, room) for room in ONLY_IN[name])
            assert allowed, f"{found.source}:{found.line} imports {found.target}, which is for {ONLY_IN[name]} alone"


def _circle(imports: list[Import]) -> list[str] | None:
    """Modules that import each other in a circle, if any do; every import counts."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in imports:
        if not _is_ours(found.target):
            continue
        # Importing a.b.c runs a and a.b first; they are already under way if the importing module lies in them.
        parts = found.target.split(".")
        chain = {".".join(parts[: end + 1]) for end in range(len(parts))}
        under_way = {parent for parent in chain if found.source.startswith(f"{parent}.") and parent != found.target}
        graph[found.source] |= (chain - under_way) & MODULES.keys()
    for module, targets in graph.items():
        targets.discard(module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [*error.args[1]]
    return None


def test_no_module_imports_in_a_circle() -> None:
    """Not within functions either, nor for the type checker alone."""
    circle = _circle(IMPORTS)
    assert circle is None, "import circle: " + " -> ".join(circle)


@pytest.mark.parametrize("before", ["", "if TYPE_CHECKING:\n    ", "def later():\n    "])
@pytest.mark.parametrize("line", ["from zrpc.rref.rref import RRef", "from zrpc.rref import rref"])
def test_a_circle_is_found_wherever_the_import_stands(before: str, line: str, tmp_path: Path) -> None:
    """`rref` imports `proxy`: so `proxy` must not import `rref`, however it does."""
    proxy = tmp_path / "proxy.py"
    proxy.write_text(before + line)
    circle = _circle([*IMPORTS, *_imports("zrpc.rref.proxy", proxy)])
    assert circle is not None
    assert {"zrpc.rref.proxy", "zrpc.rref.rref"} <= {*circle}


def test_every_package_is_installed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    there = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    assert listed == there
