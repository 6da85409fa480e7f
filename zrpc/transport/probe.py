"""Trying whether other workers can open this one's memory.

Each worker has a probe: a small memory file, shown in its membership card with 16 random bytes, its nonce. Who meets a
worker opens that worker's probe, as it would open a slab, and appends its own nonce. So a sender knows who can open its
slabs. That it can open another's says nothing of it: /proc lets a privileged process open what an ordinary one has,
and not the other way round.
"""

from __future__ import annotations

import os
from typing import Any

from zrpc.transport.slab import path_of

_NONCE_NBYTES = 16
_READ_MAX_NBYTES = 1 << 20


class Probe:
    """One worker's probe. Any thread may use it.

    Raises:
        OSError: no memory file can be made.
    """

    def __init__(self) -> None:
        self._nonce = os.urandom(_NONCE_NBYTES)
        self._visitors: set[bytes] = set()  # only ever replaced as a whole
        self._fd = os.memfd_create("zrpc-probe", os.MFD_CLOEXEC)
        os.write(self._fd, self._nonce)

    def card(self) -> list[Any]:
        """What goes into the membership card."""
        return [os.getpid(), self._fd, self._nonce]

    def visit(self, card: Any) -> bytes | None:
        """Open the probe of `card` and leave word in it, if that can be done; the nonce of `card`, if it has one."""
        if not isinstance(card, list) or [type(part) for part in card] != [int, int, bytes]:
            return None
        pid, fd = card[:2]
        nonce: bytes = card[2]
        try:
            opened = os.open(path_of(pid, fd), os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError:
            return nonce
        try:
            if os.pread(opened, _NONCE_NBYTES, 0) == nonce:
                os.write(opened, self._nonce)
        except OSError:  # some other file
            pass
        finally:
            os.close(opened)
        return nonce

    def was_visited_by(self, nonce: bytes) -> bool:
        """Whether the worker with that nonce has opened this probe."""
        if nonce not in self._visitors:
            try:
                read = os.pread(self._fd, _READ_MAX_NBYTES, _NONCE_NBYTES)
            except OSError:  # closed meanwhile
                return False
            self._visitors = {read[at : at + _NONCE_NBYTES] for at in range(0, len(read), _NONCE_NBYTES)}
        return nonce in self._visitors

    def close(self) -> None:
        """Show nothing any more. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
