"""Every name of torch's RPC modules is there, or docs/compatibility.md says why it is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zrpc.compat.missing import MISSING

MODULES = (
    *(
        f"torch.distributed.rpc{name}"
        for name in (
            "",
            "._testing",
            "._utils",
            ".api",
            ".backend_registry",
            ".constants",
            ".functions",
            ".internal",
            ".options",
            ".rref_proxy",
            ".server_process_global_profiler",
        )
    ),
    "torch.distributed.autograd",
    "torch.distributed.optim",
    "torch.distributed.optim.optimizer",
    "torch.distributed.optim.utils",
    "torch.distributed.nn",
    "torch.distributed.nn.api.remote_module",
    "torch.distributed.nn.jit.instantiator",
    "torch._C._distributed_rpc",
    "torch._C._distributed_autograd",
)

LIST_NAMES = """
import importlib, inspect, json, sys
from typing import TypeVar
if sys.argv[1] == "zrpc":
    import zrpc.compat
    zrpc.compat.install()
import torch.distributed.optim, torch.distributed.rpc
HOMES = ("torch.distributed.rpc", "torch.distributed.autograd", "torch.distributed.optim", "torch.distributed.nn",
         "torch._C._distributed", "zrpc", "builtins", "None")
USUAL = ("TYPE_CHECKING", "logger")
MEMBERS = ("RRef", "WorkerInfo", "TensorPipeAgent", "RpcAgent", "DistAutogradContext", "RPCExecMode")

def find(name):
    if name.startswith("torch._C."):
        return getattr(torch._C, name.removeprefix("torch._C."))
    return importlib.import_module(name)

def is_own(name, value):  # what a module merely imports from elsewhere is no name of RPC
    if name[:2] == "__" or name in USUAL or inspect.ismodule(value) or isinstance(value, TypeVar):
        return False
    return str(getattr(value, "__module__", "None")).startswith(HOMES)

names = {}
for module in sys.argv[2:]:
    found = vars(find(module))
    names[module] = {name: None for name, value in found.items() if is_own(name, value)}
    for name in names[module]:
        if name in MEMBERS:
            names[module][name] = [member for member in dir(found[name]) if not member.startswith("__")]
    if sys.argv[1] == "torch":
        names[module].update(dict.fromkeys(getattr(find(module), "__all__", ())))
asked = json.loads(sys.stdin.read() or "{}")
for module, wanted in asked.items():
    for name in wanted:
        if hasattr(find(module), name):
            names[module].setdefault(name, None)
print(json.dumps(names))
"""
OF_PYBIND = "_pybind11_conduit_v1_"
ABSENT_MEMBERS = {"TensorPipeAgent": {"_update_group_membership"}}


def names_of(peer: str, asked: dict[str, Any]) -> dict[str, dict[str, list[str] | None]]:
    done = subprocess.run(
        [sys.executable, "-c", LIST_NAMES, peer, *MODULES],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, dict[str, list[str] | None]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def names() -> tuple[dict[str, Any], dict[str, Any]]:
    torchs = names_of("torch", {})
    return torchs, names_of("zrpc", torchs)


def test_names_of_torch_are_there_or_are_listed_as_missing(names: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """What torch's modules define and zrpc's lack is exactly what `MISSING` lists."""
    torchs, ours = names
    lacking = {module: sorted(set(torchs[module]) - set(ours[module])) for module in MODULES}
    listed = {
        module: sorted(set(MISSING.get(module, {})) & set(torchs[module]) - set(ours[module])) for module in MODULES
    }
    assert lacking == listed


def test_what_is_listed_as_missing_is_missing(names: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """No name of `MISSING` is there after all."""
    _, ours = names
    assert not {f"{module}.{name}" for module, lacking in MISSING.items() for name in lacking if name in ours[module]}


def test_classes_have_the_members_of_torchs(names: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Methods and attributes of torch's public RPC classes are there too."""
    torchs, ours = names
    for module in MODULES:
        for name, members in torchs[module].items():
            if members and name in ours[module]:
                lacking = set(members) - set(ours[module][name] or ()) - {OF_PYBIND} - ABSENT_MEMBERS.get(name, set())
                assert not lacking, f"{module}.{name}"


def test_documentation_lists_the_missing_names() -> None:
    """docs/compatibility.md names each of them with its reason."""
    text = (Path(__file__).parents[3] / "docs" / "compatibility.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for module, lacking in MISSING.items():
        for name, why in lacking.items():
            listed = [row for row in rows if re.search(rf"`{re.escape(name)}`", row) and f"`{module}`" in row]
            assert listed, f"{module}.{name} is not in the table"
            assert any(why in row for row in listed), f"{module}.{name}: the table gives another reason"


def test_a_missing_name_says_why() -> None:
    """The AttributeError of a missing name gives the reason."""
    import zrpc.compat.rpc as rpc

    with pytest.raises(AttributeError, match=r"_enable_jit_rref_pickle.*torch\.jit\.save cannot store"):
        rpc._enable_jit_rref_pickle  # noqa: B018
    assert not hasattr(rpc, "no_such_name")
