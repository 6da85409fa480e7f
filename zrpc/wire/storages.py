"""How storages travel: as the bytes that they are, through the tensor table, like any other large memory.

torch pickles a storage by saving it into the stream, which copies it twice (and fails for an `UntypedStorage`). Tensor
subclasses pickle as their storage and what to make of it, so they gain by this too. Importing this module is what
makes storages travel.
"""

from __future__ import annotations

from typing import Any

import torch

from zrpc.wire.reducers import Reduced, register_reducer


def _reduce_untyped(storage: torch.UntypedStorage) -> Reduced:
    seen = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return _storage_of, (seen.set_(storage),)


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _reduce_typed(storage: torch.TypedStorage) -> Reduced:
    return _typed, (storage._untyped_storage, storage.dtype)


def _typed(storage: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


register_reducer(torch.UntypedStorage, _reduce_untyped)
register_reducer(torch.TypedStorage, _reduce_typed)
