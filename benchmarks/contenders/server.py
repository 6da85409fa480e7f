"""The server's process: started from nothing, says where it listens, ends when told."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

START_S = 60.0
END_S = 20.0


class Server:
    """Runs `serve(pipe, *args)`, a function of a module, in a process of its own."""

    def __init__(self, serve: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=serve, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def address(self) -> Any:
        """What `serve` sends through its pipe once it can be called.

        Raises:
            TimeoutError: it does not.
            EOFError: it died.
        """
        if not self._pipe.poll(START_S):
            raise TimeoutError(f"the server did not start within {START_S:g} s")
        return self._pipe.recv()

    def wait(self) -> None:
        """Wait until it has ended by itself; else end it."""
        self._process.join(END_S)
        self.kill()

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()
        self._pipe.close()
