"""Names of functions are read from calls without loading anything."""

from __future__ import annotations

import os
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zrpc.rref.proxy import _local_invoke
from zrpc.wire import pickling
from zrpc.wire.naming import function_in


def plain(x: object) -> object:
    return x


class Loud:
    """To load one would be seen."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


HERE = __name__


def stream(*call: Any) -> bytes:
    return bytes(pickling.dumps_call(call).data)


def test_a_function_of_a_module_is_named() -> None:
    """Packed, as calls with plain arguments are, and pickled."""
    assert function_in(stream(plain, (1,), {})) == f"{HERE}.plain"
    assert function_in(stream(plain, ({1, 2},), {})) == f"{HERE}.plain"
    assert function_in(stream(plain, (torch.ones(2),), {})) == f"{HERE}.plain"


def test_the_method_of_a_value_is_named_that_an_rref_calls() -> None:
    """What runs first is a function of zrpc's, which is of no interest."""
    assert function_in(pickle.dumps((_local_invoke, (None, "forward", (1,), {}), {}))) == "RRef.forward"


def test_nothing_is_loaded_to_tell_a_name() -> None:
    assert function_in(pickle.dumps((plain, (Loud(),), {}))) == f"{HERE}.plain"
    assert function_in(pickle.dumps(Loud())) in ("posix._exit", "nt._exit")


def test_of_a_long_stream_the_beginning_is_read() -> None:
    assert function_in(pickle.dumps((plain, (list(range(100_000)),), {}))) == f"{HERE}.plain"


@pytest.mark.parametrize("nothing", [b"", b"\xc1\x00", b"\xc1\x02", b"\x80\x05", b"\x80\x05N.", b"text"])
def test_a_stream_without_a_function_has_no_name(nothing: bytes) -> None:
    assert function_in(nothing) is None


@given(st.binary(max_size=200), st.integers(0, 200))
def test_damaged_streams_give_a_short_line_or_nothing(noise: bytes, at: int) -> None:
    """Whatever a caller sends, what is shown has no control characters."""
    for whole in (pickle.dumps((partial(plain, 1), (), {})), stream(plain, (1,), {})):
        found = function_in(whole[:at] + noise + whole[at:])
        assert found is None or (len(found) <= 200 and found.isprintable())
