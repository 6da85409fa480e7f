"""A note: a small slab of its own, whose content stays while it goes to its receiver again and again.

It tells of memory that does not itself travel (`zrpc.staging.exports`). Whoever is told of it holds that memory until
he lets go of the note, by the protocol of slabs; both sides may write into it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from zrpc.transport.slab import Slab

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from zrpc.transport.slab import Descriptor


class Note:
    """See `zrpc.staging.note.Note`.

    Raises:
        OSError: there is not enough memory, or too many files are open.
    """

    def __init__(self, nbytes: int) -> None:
        self._slab = Slab.make(nbytes)
        self.view: npt.NDArray[np.uint8] = self._slab.memory.view(nbytes)
        self.descriptor: Descriptor = [os.getpid(), self._slab.fd, self._slab.number, nbytes]

    def hold(self) -> None:
        """See `zrpc.staging.note.Note.hold`."""
        self._slab.memory.hold()

    def free(self) -> None:
        """See `zrpc.staging.note.Note.free`."""
        self._slab.memory.free()

    def is_free(self) -> bool:
        """See `zrpc.staging.note.Note.is_free`."""
        return self._slab.memory.is_free()

    def retire(self) -> None:
        """See `zrpc.staging.note.Note.retire`."""
        self._slab.retire()
