"""The output of many processes on one terminal: each line with the name of its process before it."""

from __future__ import annotations

import os
import re
import threading
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

COLOURS = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)
_END = re.compile(rb"\r\n|\n|\r")
_CLEAR_LINE = "\r\x1b[K"


class LineSplitter:
    """Cuts a stream into lines. Pure: chunks in, lines out.

    A line that ends with a carriage return alone, as a progress bar's does, is one that will be written over.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[tuple[str, bool]]:
        """The lines that `chunk` completes, each with whether it stays (and is not written over)."""
        lines = []
        data = self._rest + chunk
        start = 0
        for match in _END.finditer(data):
            if match.group() == b"\r" and match.end() == len(data):
                break  # it may be the first half of \r\n
            lines.append((_text(data[start : match.start()]), match.group() != b"\r"))
            start = match.end()
        self._rest = data[start:]
        return [(text, stays) for text, stays in lines if text or stays]

    def finish(self) -> list[tuple[str, bool]]:
        """What is left when the stream ends."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        return [(_text(rest), True)] if rest else []


class Screen:
    """Where all processes' lines go. Its lock keeps lines whole.

    Args:
        stream: the terminal or file.
        width: the longest name's length.
        environment: asked for NO_COLOR and TERM.
    """

    def __init__(self, stream: TextIO, width: int, environment: Mapping[str, str] = os.environ) -> None:
        self._stream = stream
        self._width = width
        self._is_terminal = stream.isatty()
        self._has_colour = self._is_terminal and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
        self._lock = threading.Lock()
        self._overwritable = False

    def show(self, name: str, colour: int, text: str, stays: bool) -> None:
        """Write one line; one that will be written over is shown on a terminal only. Does nothing if nobody reads."""
        if not stays and not self._is_terminal:
            return
        prefix = name.rjust(self._width) + " | "
        if self._has_colour:
            prefix = f"\x1b[{COLOURS[colour % len(COLOURS)]}m{prefix}\x1b[0m"
        with self._lock:
            clear = _CLEAR_LINE if self._overwritable else ""
            self._overwritable = not stays
            try:
                self._stream.write(f"{clear}{prefix}{text}" + ("\n" if stays else ""))
                self._stream.flush()
            except (OSError, ValueError):
                return  # the reader of a pipe has gone: the cluster's end is decided elsewhere

    def end_line(self) -> None:
        """Leave a line that would be written over."""
        with self._lock:
            if self._overwritable:
                self._overwritable = False
                self._stream.write("\n")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
