"""Lines of many processes on one screen."""

from __future__ import annotations

import io

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zrpc.cli.output import LineSplitter, Screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def split(*chunks: bytes) -> list[tuple[str, bool]]:
    splitter = LineSplitter()
    lines = [line for chunk in chunks for line in splitter.feed(chunk)]
    return lines + splitter.finish()


def test_lines_are_cut_wherever_the_chunks_end() -> None:
    assert split(b"on", b"e\ntwo\r", b"\nthr", b"ee") == [("one", True), ("two", True), ("three", True)]


def test_a_progress_bar_is_written_over() -> None:
    assert split(b"\r10%", b"\r20%\r", b"100%\ndone\n") == [
        ("10%", False),
        ("20%", False),
        ("100%", True),
        ("done", True),
    ]


def test_empty_lines_stay_and_bad_bytes_are_shown() -> None:
    assert split(b"a\n\nb\xff\n") == [("a", True), ("", True), ("b\ufffd", True)]


@given(st.lists(st.text(alphabet="ab c", max_size=5), max_size=6), st.data())
def test_no_cut_changes_the_lines(lines: list[str], data: st.DataObject) -> None:
    raw = "".join(line + "\n" for line in lines).encode()
    cut = data.draw(st.integers(0, len(raw)))
    assert split(raw[:cut], raw[cut:]) == [(line, True) for line in lines]


def test_a_file_gets_names_without_colour_and_no_passing_lines() -> None:
    stream = io.StringIO()
    screen = Screen(stream, 8, {})
    screen.show("worker 0", 0, "hello", True)
    screen.show("worker 0", 0, "10%", False)
    screen.show("broker", 1, "hi", True)
    screen.end_line()
    assert stream.getvalue() == "worker 0 | hello\n  broker | hi\n"


def test_a_terminal_gets_colour_and_passing_lines_are_cleared() -> None:
    stream = Terminal()
    screen = Screen(stream, 1, {"TERM": "xterm"})
    screen.show("a", 0, "10%", False)
    screen.show("a", 0, "20%", False)
    screen.end_line()
    assert stream.getvalue() == "\x1b[36ma | \x1b[0m10%\r\x1b[K\x1b[36ma | \x1b[0m20%\n"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_refused(environment: dict[str, str]) -> None:
    stream = Terminal()
    Screen(stream, 1, environment).show("a", 0, "x", True)
    assert stream.getvalue() == "a | x\n"


def test_a_reader_that_has_gone_is_no_error() -> None:
    stream = io.StringIO()
    screen = Screen(stream, 1, {})
    stream.close()
    screen.show("a", 0, "x", True)
