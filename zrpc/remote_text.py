"""Text of another process on its way to a log, a terminal or an error message.

What: a terminal acts on escape sequences, and a log may be read line by line. So what others wrote is shown with every
character that is not printed replaced by its escape (`\\x1b`), as `repr` does, and cut to a bounded length.

Threads: any. Failure: none; surrogates, which cannot be encoded, are escaped too.
"""

from __future__ import annotations

LINE_MAX_LENGTH = 500
"""How many characters are kept of what should be one line."""
LINES_MAX_LENGTH = 200_000
"""How many are kept of tracebacks and other texts of several lines."""
_LAYOUT = str.maketrans("", "", "\n\t")


def line(text: str, max_length: int = LINE_MAX_LENGTH) -> str:
    """`text` as one line: no line ends, nothing that a terminal acts on, at most `max_length` characters and a note."""
    text = _cut(text, max_length)
    return text if text.isprintable() else "".join(map(_shown, text))


def lines(text: str, max_length: int = LINES_MAX_LENGTH) -> str:
    """The same, with its line ends and tabs as they are."""
    text = _cut(text, max_length)
    if text.translate(_LAYOUT).isprintable():
        return text
    return "".join([one if one in "\n\t" else _shown(one) for one in text])


def _cut(text: str, max_length: int) -> str:
    if len(text) <= max_length:
        return text
    return f"{text[:max_length]}... ({len(text) - max_length} more characters)"


def _shown(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]
