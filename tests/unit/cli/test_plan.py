"""Which commands the launcher makes of its options."""

from __future__ import annotations

import shlex

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zrpc.cli.plan import (
    SECRET_QUESTION,
    Place,
    Program,
    Reach,
    check_script,
    local_environment,
    meet_at_broker,
    meet_at_master,
    parse_hosts,
    place,
    remote_command,
    secret_environment,
    worker_environment,
)
from zrpc.errors import ConfigError

PROGRAM = Program("train.py", False, ("--name", "two words", "$HOME"), "/venv/bin/python", "/my work")


def test_ranks_are_spread_in_blocks() -> None:
    assert place(5, ["a", "b"]) == [
        Place(0, "a", 0, 3),
        Place(1, "a", 1, 3),
        Place(2, "a", 2, 3),
        Place(3, "b", 0, 2),
        Place(4, "b", 1, 2),
    ]


@given(st.integers(1, 60), st.integers(1, 12))
def test_every_rank_has_one_place_and_hosts_are_even(workers: int, hosts: int) -> None:
    names = [f"h{index}" for index in range(hosts)]
    if workers < hosts:
        with pytest.raises(ConfigError, match="cannot be spread"):
            place(workers, names)
        return
    places = place(workers, names)
    assert [spot.rank for spot in places] == list(range(workers))
    sizes = [sum(spot.host == name for spot in places) for name in names]
    assert max(sizes) - min(sizes) <= 1
    assert all(spot.local_world_size == sizes[names.index(spot.host)] for spot in places)
    for name in names:
        assert [spot.local_rank for spot in places if spot.host == name] == list(range(sizes[names.index(name)]))


def test_fewer_than_one_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        place(0, ["a"])


def test_hosts_are_read() -> None:
    assert parse_hosts(" a, user@b.example ,10.0.0.1,[fe80::1]") == ["a", "user@b.example", "10.0.0.1", "[fe80::1]"]


@pytest.mark.parametrize("text", ["", " , ", "a,-oProxyCommand=evil", "a;b", "a b", "a,a", "$(x)"])
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--hosts"):
        parse_hosts(text)


def test_a_worker_is_told_its_place_and_where_to_meet() -> None:
    told = worker_environment(Place(3, "b", 1, 2), 4, meet_at_broker("10.0.0.9", 5555))
    assert told == {
        "ZRPC_DRAIN_ON_SIGTERM": "3.5",
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "ZRPC_BROKER": "broker://10.0.0.9:5555",
        "ZRPC_INIT_METHOD": "broker://10.0.0.9:5555",
    }
    assert meet_at_broker("fe80::1", 5555)["ZRPC_BROKER"] == "broker://[fe80::1]:5555"


def test_without_a_broker_they_meet_at_rank_0() -> None:
    meeting = {"MASTER_ADDR": "a", "MASTER_PORT": "29500", "ZRPC_INIT_METHOD": "env://"}
    assert meet_at_master("a", 29500, spread=False) == meeting
    assert meet_at_master("a", 29500, spread=True) == {**meeting, "ZRPC_BIND": "tcp://0.0.0.0:0"}


def test_a_local_worker_inherits_all_but_an_outer_launchs_meeting_point() -> None:
    inherited = {"PATH": "/bin", "MASTER_ADDR": "elsewhere", "ZRPC_BROKER": "broker://elsewhere:1", "ZRPC_GROUP": "g"}
    told = {"RANK": "0", "ZRPC_BROKER": "broker://here:1"}
    environment = local_environment(inherited, told, local_world_size=3, cores=8)
    expected = {
        "PATH": "/bin",
        "ZRPC_GROUP": "g",
        "RANK": "0",
        "ZRPC_BROKER": "broker://here:1",
        "OMP_NUM_THREADS": "2",
    }
    assert environment == expected
    assert local_environment({"OMP_NUM_THREADS": "7"}, {}, 3, 8) == {"OMP_NUM_THREADS": "7"}
    assert local_environment({}, {}, 3, 2) == {"OMP_NUM_THREADS": "1"}


def test_the_command_of_a_script_and_of_a_module() -> None:
    assert PROGRAM.argv() == ["/venv/bin/python", "-u", "train.py", "--name", "two words", "$HOME"]
    assert Program("pkg.train", True, (), "python", "/").argv() == ["python", "-u", "-m", "pkg.train"]


def test_ssh_runs_one_quoted_line_in_a_terminal_of_its_own() -> None:
    inherited = {"ZRPC_GROUP": "my group", "SECRET": "x", "ZRPC_BROKER": "broker://elsewhere:1"}
    command = remote_command(Reach.SSH, "user@b", PROGRAM, {"RANK": "1"}, inherited)
    assert command[:2] == ["ssh", "-tt"]
    assert command[-3:-1] == ["--", "user@b"]
    directory, program = command[-1].split(" && exec ")
    assert shlex.split(directory) == ["cd", "/my work"]
    assert shlex.split(program) == ["env", "ZRPC_GROUP=my group", "RANK=1", *PROGRAM.argv()]


def test_a_secret_is_on_no_command_line() -> None:
    """All users of a host can read those."""
    inherited = {"ZRPC_SECRET": "of the user, all the time", "ZRPC_SECRET_FILE": "/run/secret"}
    for reach in (Reach.SSH, Reach.SRUN):
        for asks in (False, True):
            command = remote_command(reach, "b", PROGRAM, {"RANK": "1"}, inherited, asks_secret=asks)
            assert "of the user" not in " ".join(command)
            assert "ZRPC_SECRET_FILE=/run/secret" in " ".join(command)
    asking = remote_command(Reach.SSH, "b", PROGRAM, {}, {}, asks_secret=True)[-1]
    assert SECRET_QUESTION in asking
    assert asking.endswith(remote_command(Reach.SSH, "b", PROGRAM, {}, {})[-1])


def test_each_run_has_a_secret_of_its_own_unless_the_user_has_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZRPC_INSECURE", raising=False)
    first, second = secret_environment({}), secret_environment({})
    assert len(first["ZRPC_SECRET"]) == 64
    assert first != second
    assert secret_environment({"ZRPC_SECRET": "of the user, all the time"}) == {
        "ZRPC_SECRET": "of the user, all the time"
    }
    assert secret_environment({"ZRPC_SECRET_FILE": "/run/secret"}) == {}
    monkeypatch.setenv("ZRPC_INSECURE", "1")
    assert secret_environment({}) == {}


def test_srun_runs_one_task_on_the_host() -> None:
    command = remote_command(Reach.SRUN, "node7", PROGRAM, {"RANK": "1", "WORLD_SIZE": "2"}, {})
    assert command[0] == "srun"
    assert {"--nodes=1", "--ntasks=1", "--nodelist=node7", "--overlap", "--chdir=/my work"} <= set(command)
    assert command[command.index("env") :] == ["env", "RANK=1", "WORLD_SIZE=2", *PROGRAM.argv()]


def test_a_missing_script_is_seen_where_it_can_be() -> None:
    with pytest.raises(ConfigError, match=r"there is no script 'train.py'"):
        check_script(PROGRAM, Reach.LOCAL)
    check_script(PROGRAM, Reach.SSH)
    check_script(Program("pkg.train", True, (), "python", "/"), Reach.LOCAL)
