"""What the workers of a group see, put together: which calls are under way between them, and who does not answer. Pure.

A call is seen at its caller, which knows since when, and at its callee, which knows its function and whether it runs.
Both are joined by the life of the caller and the number that it gave to the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zrpc.membership.found import FoundGroup
    from zrpc.membership.group import Member
    from zrpc.sight.observer import Answer

UNNAMED = ("PythonCall", "BuiltinCall", "PythonRemote", "BuiltinRemote")
"""What stands for a function that could not be told."""
ON_ITS_WAY = "on its way"
SILENT = "callee does not answer"


def report(group: FoundGroup, answers: dict[bytes, Answer], why_silent: dict[bytes, str]) -> dict[str, Any]:
    """The whole group, of values that JSON can carry.

    Args:
        group: who is in it.
        answers: to `status`, by life.
        why_silent: of those that did not answer, why, as far as it is known.

    Returns:
        `group`, `workers` (by rank), `calls` (the oldest first) and `silent` (names).
    """
    members = sorted(group.members, key=lambda member: member.info.id)
    seen = {life: answer.seen for life, answer in answers.items() if answer.seen is not None}
    workers = [_worker(member, answers.get(member.incarnation), why_silent) for member in members]
    return {
        "group": {"world_size": group.world_size, "phase": group.phase, "here": len(members)},
        "workers": workers,
        "calls": calls({member.incarnation: member.info.name for member in members}, seen),
        "silent": [worker["name"] for worker in workers if not worker["answers"]],
    }


def calls(names: dict[bytes, str], seen: dict[bytes, dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls under way between workers, the oldest first."""
    served = {
        (request["life"], request["id"]): (callee, request)
        for callee, status in seen.items()
        for request in status.get("requests", [])
    }
    found = []
    for caller, status in seen.items():
        for call in status.get("calls", []):
            _, request = served.pop((caller, call["id"]), (b"", None))
            state = ON_ITS_WAY if call["life"] in seen else SILENT
            found.append(_joined(names.get(caller, "?"), call["to"], call, request, state))
    for callee, request in served.values():  # their callers do not answer, or have given them up
        found.append(_joined(request["from"], names.get(callee, "?"), None, request, ""))
    return sorted(found, key=lambda one: -one["age_s"])


def _joined(
    caller: str, callee: str, call: dict[str, Any] | None, request: dict[str, Any] | None, state: str
) -> dict[str, Any]:
    function = "" if call is None else call["function"]
    if request is not None:
        state = "cancelled" if request["is_cancelled"] else request["state"]
        function = function if function and function not in UNNAMED else request["function"]
    first = call or request or {}
    return {
        "id": first["id"],
        "function": function,
        "caller": caller,
        "callee": callee,
        "age_s": first["age_s"],
        "limit_s": None if call is None else call["limit_s"],
        "state": state,
    }


def _worker(member: Member, answer: Answer | None, why_silent: dict[bytes, str]) -> dict[str, Any]:
    card = member.card
    row: dict[str, Any] = {
        "name": member.info.name,
        "rank": member.info.id,
        "life": member.incarnation.hex(),
        "pid": card.get("pid"),
        "host": card.get("host"),
        "address": card.get("address"),
        "answers": answer is not None and answer.seen is not None,
        "why": why_silent.get(member.incarnation, ""),
    }
    if answer is not None and answer.seen is not None and "worker" in answer.seen:
        row.update(_seen(answer.seen), ping_s=answer.took_s)
    return row


def _seen(status: dict[str, Any]) -> dict[str, Any]:
    worker, counts = status["worker"], status.get("counts", {})
    states = [request["state"] for request in status.get("requests", [])]
    life = worker["life"]
    draining = [entry[0] for entry in status.get("members", []) if len(entry) > 4 and entry[4]]
    windows = status.get("windows", {}).values()
    return {
        "up_s": worker["time"] - worker["began"],
        "program": worker["program"],
        "python": worker["python"],
        "torch": worker["torch"],
        "allow": worker["allow"],
        "is_draining": life in draining,
        "calls_out": len(status.get("calls", [])),
        "calls_made": counts.get("client_calls_made", 0),
        "runs": states.count("runs"),
        "queued": states.count("queued"),
        "handler_threads": worker["handler_threads"],
        "threads": len(status.get("threads", [])),
        "rrefs_owned": status.get("rrefs", {}).get("owned", 0),
        "rrefs_owned_types": status.get("rrefs", {}).get("owned_types", {}),
        "rrefs_used_by_owner": status.get("rrefs", {}).get("used_by_owner", {}),
        "contexts": status.get("contexts", {}).get("count", 0),
        "contexts_shown": status.get("contexts", {}).get("shown", []),
        "windows": status.get("windows", {}),
        "window_calls": sum(window["calls"] for window in windows),
        "window_nbytes": sum(window["nbytes"] for window in windows),
        "waiting": sum(window["waiting"] for window in windows),
        "queued_nbytes": sum(window["queued_nbytes"] for window in windows),
        "memory": status.get("memory", {}),
        "sent_nbytes": sum(connection[2] for connection in status.get("connections", [])),
        "received_nbytes": sum(connection[3] for connection in status.get("connections", [])),
        "connections": status.get("connections", []),
        "counts": counts,
        "ended": [[one.hex(), reason] for one, reason in status.get("ended", [])],
    }
