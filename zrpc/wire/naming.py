"""The name of the function in a pickled or packed call, read without loading anything.

What: for people who look at calls that wait or run. Only the beginning of the stream is read. What it says is the
caller's word, and nothing is done with it but to show it.

Threads: any. Failure: a stream that says no name, or is damaged, has none.
"""

from __future__ import annotations

import pickletools
from typing import TYPE_CHECKING

import msgpack

from zrpc import remote_text

if TYPE_CHECKING:
    from zrpc.wire.envelope import Buffer

READ_MAX_NBYTES = 4096
NAME_MAX_LENGTH = 200
PACKED_CALL = b"\xc1\x02"
PICKLE = b"\x80"
METHOD_CALLER = "_local_invoke"
"""How functions begin that call a method of an RRef's value: its name is the first text among the arguments."""
_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE", "BINUNICODE8")


def function_in(stream: Buffer) -> str | None:
    """The function that the call in `stream` names, as `module.name`; None: it cannot be seen there."""
    start = bytes(memoryview(stream)[:READ_MAX_NBYTES])
    try:
        if start.startswith(PACKED_CALL):
            names = _packed_names(start[len(PACKED_CALL) :])
        elif start.startswith(PICKLE):
            names = _pickled_names(start)
        else:
            return None
    except Exception:  # whatever a damaged stream does
        return None
    return remote_text.line(".".join(filter(None, names)))[:NAME_MAX_LENGTH] if names else None


def _packed_names(packed: bytes) -> list[str]:
    unpacker = msgpack.Unpacker(max_buffer_size=READ_MAX_NBYTES)
    unpacker.feed(packed)
    if unpacker.read_array_header() < 2:
        return []
    names = [unpacker.unpack(), unpacker.unpack()]
    return names if all(type(name) is str for name in names) else []


def _pickled_names(pickled: bytes) -> list[str]:
    """The first global of a stream, and the method if that function calls one of an RRef's value.

    Pickles of calls are `(function, args, kwargs)`.
    """
    names: list[str] = []
    strings: list[str] = []  # that are no part of a global
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in _STRINGS:
                strings.append(str(argument))
            elif opcode.name == "STACK_GLOBAL":
                named, strings = strings[-2:], strings[:-2]
                names = names or named
            elif opcode.name == "GLOBAL":
                names = names or str(argument).split(" ")
            if names and not names[-1].startswith(METHOD_CALLER):
                return names
    except ValueError:  # it goes on behind what is read here
        pass
    return ["RRef", strings[0]] if names and strings else names
