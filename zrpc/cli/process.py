"""One process of a cluster: in a process group of its own, its output read line by line, its end told."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING

from zrpc import threads
from zrpc.cli.output import LineSplitter, Screen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    OnLine = Callable[[str], None]
    OnExit = Callable[["ManagedProcess", int], None]

LAST_LINES = 20
DRAIN_S = 2.0
"""How long output may still come once the process and its group are gone."""
_CHUNK_NBYTES = 65_536
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class ManagedProcess:
    """A started process.

    Lines of its output that are among `answers` are not shown: what stands for them is written to its input.
    Two threads serve it: one reads its output, one waits for its end, then ends what is left of its group, and then
    calls `on_exit(process, code)`.

    Raises:
        OSError: it cannot be started.
        LimitError: the threads cannot be; it is ended then.
    """

    def __init__(
        self,
        name: str,
        colour: int,
        argv: list[str],
        environment: Mapping[str, str],
        screen: Screen,
        on_exit: OnExit,
        on_line: OnLine | None = None,
        answers: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._answers = dict(answers or {})
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._colour = colour
        self._screen = screen
        self._on_exit = on_exit
        self._on_line = on_line
        self._popen = subprocess.Popen(
            argv,
            env=dict(environment),
            stdin=subprocess.PIPE if answers else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
            preexec_fn=_die_with_parent if _prctl is not None else None,
        )
        self.pid = self._popen.pid
        self._lock = threading.Lock()  # owns what follows; held while a signal is sent
        self._is_over = False
        try:
            self._reader = threads.start(self._read, f"zrpc-launch-read-{name}")
            threads.start(self._wait, f"zrpc-launch-wait-{name}")
        except BaseException:
            self.kill()
            self._popen.wait()
            if not hasattr(self, "_reader") and self._popen.stdout is not None:
                self._popen.stdout.close()
            raise

    def terminate(self) -> None:
        """Ask the process and its children to end."""
        self._signal_group(signal.SIGTERM)

    def kill(self) -> None:
        """End the process and its children."""
        self._signal_group(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)

    def _signal_group(self, number: int) -> None:
        with self._lock:
            if not self._is_over:  # else the number may be another process's by now
                self._send(number)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self.pid, number)
            else:
                self._popen.terminate()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        splitter = LineSplitter()
        with self._popen.stdout as stream:
            while chunk := stream.read(_CHUNK_NBYTES):
                self._take(splitter.feed(chunk))
        self._take(splitter.finish())

    def _take(self, lines: list[tuple[str, bool]]) -> None:
        for text, stays in lines:
            answer = self._answers.pop(text.strip(), None) if stays and self._answers else None
            if answer is not None:
                self._say(answer)
                continue
            if stays:
                self.last_lines.append(text)
                if self._on_line is not None:
                    self._on_line(text)
            self._screen.show(self.name, self._colour, text, stays)

    def _say(self, text: str) -> None:
        """Write a line to the process, and no more if nothing else is to be asked."""
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._popen.stdin.write(text.encode() + b"\n")
            if not self._answers:
                self._popen.stdin.close()

    def _wait(self) -> None:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # until it is reaped no other group gets its number
        else:
            self._popen.wait()
        with self._lock:
            self._send(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
            self._is_over = True
        code = self._popen.wait()
        self._reader.join(DRAIN_S)
        if self._popen.stdin is not None:
            with contextlib.suppress(OSError):
                self._popen.stdin.close()
        self._on_exit(self, code)


def _die_with_parent() -> None:
    """Runs in the child before its program: the kernel kills it when the launcher dies, even of SIGKILL.

    The launcher's threads hold no lock that this needs: the function was looked up before.
    """
    assert _prctl is not None
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
