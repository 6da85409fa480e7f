"""Running programs for torch.distributed.rpc unchanged.

```python
import zrpc.compat

zrpc.compat.install()
```

From then on `torch.distributed.rpc`, `torch.distributed.autograd`, `torch.distributed.optim.DistributedOptimizer` and
`torch.distributed.nn.RemoteModule` are zrpc's, however and wherever in this process they are imported, or were before.
`zrpc run script.py` does it for a program and all processes that it starts. docs/compatibility.md says what differs.
"""

from __future__ import annotations

__all__ = ["install", "is_installed"]

_installed = False


def install(children: bool = True) -> None:
    """Put zrpc where torch's RPC is looked up. Idempotent.

    What a program took out of torch's modules before, and keeps anywhere else than as a module's global name (as the
    default of an argument, say), stays torch's.

    Args:
        children: also in the processes that this one starts from now on, however it starts them: a folder is put into
            PYTHONPATH. Forked ones have it in any case.
    """
    global _installed
    if _installed:
        return
    import torch

    torch.jit._builtins._find_builtin(torch.add)  # type: ignore[no-untyped-call]  # its table is to hold torch's own
    from zrpc.compat import installation, script_calls, scripting
    from zrpc.compat.children import reach_children
    from zrpc.compat.exceptions import as_torch_raises
    from zrpc.wire.exceptions import translate_with

    translate_with(as_torch_raises)
    scripting.install()  # first: importing the rest of torch compiles functions
    script_calls.install()
    replaced = installation.replace_native()
    replaced += installation.replace_modules()
    replaced += installation.replace_attributes()
    installation.rebind(replaced)
    if children:
        reach_children()
    _installed = True


def is_installed() -> bool:
    """Whether `install` was called in this process."""
    return _installed
