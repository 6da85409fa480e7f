"""What several workers see is put together."""

from __future__ import annotations

from typing import Any

from zrpc.ids import WorkerInfo
from zrpc.membership.found import FoundGroup
from zrpc.membership.group import Member
from zrpc.sight.observer import Answer
from zrpc.sight.report import report

A, B = b"a" * 8, b"b" * 8
GROUP = FoundGroup(
    [Member(WorkerInfo("b", 1), B, {"pid": 7, "host": "h"}), Member(WorkerInfo("a", 0), A)], 2, "complete"
)


def call(number: int, function: str = "PythonCall", age_s: float = 2.0) -> dict[str, Any]:
    return {"id": number, "to": "b", "life": B, "function": function, "age_s": age_s, "limit_s": 0.0}


def request(number: int, state: str = "runs", *, is_cancelled: bool = False, age_s: float = 1.0) -> dict[str, Any]:
    return {
        "id": number, "from": "a", "life": A, "function": "m.f", "age_s": age_s, "left_s": None, "state": state,
        "is_cancelled": is_cancelled,
    }  # fmt: skip


def calls(a: dict[str, Any] | None, b: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    answers = {A: Answer(a), B: Answer(b)}
    shown = report(GROUP, answers, {})["calls"]
    return [(one["function"], one["caller"], one["callee"], one["age_s"], one["state"]) for one in shown]


def test_a_call_has_its_age_from_the_caller_and_its_function_from_the_callee() -> None:
    assert calls({"calls": [call(1)]}, {"requests": [request(1)]}) == [("m.f", "a", "b", 2.0, "runs")]


def test_calls_of_the_same_number_are_told_apart_by_the_life_of_the_caller() -> None:
    """Each worker counts its own calls."""
    of_b = {"id": 1, "to": "a", "life": A, "function": "PythonCall", "age_s": 5.0, "limit_s": 1.0}
    found = calls({"calls": [call(1)]}, {"calls": [of_b], "requests": [request(1, "queued")]})
    assert found == [("PythonCall", "b", "a", 5.0, "on its way"), ("m.f", "a", "b", 2.0, "queued")]


def test_a_callee_that_does_not_answer_is_named_as_the_reason() -> None:
    assert calls({"calls": [call(1, "m.g")]}, None) == [("m.g", "a", "b", 2.0, "callee does not answer")]


def test_a_call_whose_caller_does_not_answer_is_shown_as_its_callee_sees_it() -> None:
    found = calls(None, {"requests": [request(1), request(2, is_cancelled=True)]})
    assert found == [("m.f", "a", "b", 1.0, "runs"), ("m.f", "a", "b", 1.0, "cancelled")]


def test_workers_stand_in_the_order_of_ranks_and_silent_ones_say_why() -> None:
    shown = report(GROUP, {A: Answer(None), B: Answer(None)}, {B: "it is stopped"})
    assert [(row["name"], row["answers"], row["why"]) for row in shown["workers"]] == [
        ("a", False, ""), ("b", False, "it is stopped"),
    ]  # fmt: skip
    assert shown["silent"] == ["a", "b"]
    assert shown["group"] == {"world_size": 2, "phase": "complete", "here": 2}
