"""Unix sockets of this host and user: where they are, who is let in, what is removed. Real sockets and processes."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from zrpc.ids import new_incarnation
from zrpc.transport import local_socket
from zrpc.transport.local_socket import PATH_MAX_NBYTES, STALE_S, connect, directory, is_listening, listen, path_in

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="such sockets are Linux's")


@pytest.fixture(autouse=True)
def where(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory, made for the test. Its path is short."""
    with tempfile.TemporaryDirectory(prefix="z") as made:
        monkeypatch.setenv(local_socket.VARIABLE, made)
        yield Path(made)


def set_age(path: str, age_s: float) -> None:
    then = time.time() - age_s
    os.utime(path, (then, then))


def leave_behind(where: Path) -> str:
    """The file of a process that listened and was killed."""
    path = path_in(where, new_incarnation())
    script = (
        "import os, sys; from zrpc.transport import local_socket; listener = local_socket.listen(sys.argv[1]); "
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, path], check=False, timeout=60)
    assert os.path.exists(path)
    return path


# ---- the directory ---------------------------------------------------------------------------------------------------


def test_it_is_the_one_that_is_named(where: Path) -> None:
    """One that is there already is taken as it is."""
    assert directory() == where


def test_it_is_made_with_those_above_it_for_this_user_alone(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named is not there."""
    monkeypatch.setenv(local_socket.VARIABLE, str(where / "above" / "it"))
    assert directory() == where / "above" / "it"
    assert stat.S_IMODE((where / "above" / "it").stat().st_mode) == 0o700


def test_without_a_name_it_is_this_users_in_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the variable is empty."""
    monkeypatch.setenv(local_socket.VARIABLE, "")
    assert directory() == Path(f"/tmp/zrpc-{os.geteuid()}")
    monkeypatch.delenv(local_socket.VARIABLE)
    assert directory() == Path(f"/tmp/zrpc-{os.geteuid()}")


def test_one_in_tmp_that_another_has_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes first may make a link of that name, to a place of this user's."""
    stranger = (1 << 31) + os.getpid()
    monkeypatch.setenv(local_socket.VARIABLE, "")
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    path = Path(f"/tmp/zrpc-{stranger}")
    with tempfile.TemporaryDirectory() as target:
        path.symlink_to(target)
        try:
            with pytest.raises(NotADirectoryError):
                directory()
        finally:
            path.unlink()
    path.mkdir()
    try:
        with pytest.raises(PermissionError):
            directory()
    finally:
        path.rmdir()


def test_another_users_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """That user could put sockets there that look like this one's."""
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(PermissionError, match=local_socket.VARIABLE):
        directory()


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o720])
def test_one_that_others_may_write_to_is_refused(where: Path, mode: int) -> None:
    """They could put sockets in the place of others."""
    where.chmod(mode)
    with pytest.raises(PermissionError, match=local_socket.VARIABLE):
        directory()


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777])
def test_one_where_others_can_replace_nothing_is_taken(where: Path, mode: int) -> None:
    """As /tmp is."""
    where.chmod(mode)
    assert directory() == where


@pytest.mark.parametrize("below", ["", "below/it"])
def test_a_file_in_its_place_is_refused(where: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    """Or in that of one above."""
    (where / "file").touch()
    monkeypatch.setenv(local_socket.VARIABLE, str(where / "file" / below))
    with pytest.raises(OSError, match="file"):
        directory()


def test_a_path_that_is_too_long_is_refused(where: Path) -> None:
    """It says what to set; the longest that may be is taken."""
    life = new_incarnation()
    room = PATH_MAX_NBYTES - len(path_in(where, life)) - 1
    longest = where / ("x" * room)
    longest.mkdir()
    with closing(listen(path_in(longest, life))), closing(connect(path_in(longest, life))):
        pass
    with pytest.raises(OSError, match=local_socket.VARIABLE) as caught:
        path_in(where / ("x" * (room + 1)), life)
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(OSError, match=local_socket.VARIABLE):
        path_in(where / ("ä" * (room // 2 + 1)), life)


# ---- listening and connecting ----------------------------------------------------------------------------------------


def test_messages_go_from_one_who_connects_to_one_who_listens(where: Path) -> None:
    """Whole, in order; neither end is inherited by programs that are started, and none is waited for."""
    path = path_in(where, new_incarnation())
    with closing(listen(path)) as listener, closing(connect(path)) as sender:
        receiver, _ = listener.accept()
        with receiver:
            sender.send(b"one")
            sender.send(b"two")
            assert [receiver.recv(100), receiver.recv(100)] == [b"one", b"two"]
        for sock in (listener, sender):
            assert not sock.getblocking()
            assert not sock.get_inheritable()


def test_a_socket_is_for_this_user_alone(where: Path) -> None:
    """So it is in a directory that others may read."""
    path = path_in(where, new_incarnation())
    with closing(listen(path)):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_place_that_is_taken_stays_as_it_is(where: Path) -> None:
    """The one who listens there goes on."""
    path = path_in(where, new_incarnation())
    with closing(listen(path)):
        with pytest.raises(OSError, match="in use"):
            listen(path)
        connect(path).close()


@pytest.mark.parametrize("how", ["never", "closed"])
def test_where_none_listens_connecting_says_so(where: Path, how: str) -> None:
    """There is no file, or one that was left."""
    path = path_in(where, new_incarnation())
    if how == "closed":
        listen(path).close()
    with pytest.raises(FileNotFoundError if how == "never" else ConnectionRefusedError):
        connect(path)


def test_another_users_process_is_refused(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose it is, is the kernel's word; here this process takes itself for another's."""
    path, own = path_in(where, new_incarnation()), os.geteuid()
    with closing(listen(path)):
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
        with pytest.raises(PermissionError, match=f"user {own}"):
            connect(path)


def test_where_all_strangers_look_the_same_none_is_let_in(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run as the user that stands for all those whom it does not know."""
    path = path_in(where, new_incarnation())
    with closing(listen(path)):
        monkeypatch.setattr(local_socket, "_overflow_uid", os.geteuid)
        with pytest.raises(PermissionError):
            connect(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user_is_seen_by_both(where: Path) -> None:
    """It may enter the directory, and has changed the mode of the file so that it may connect."""
    path = path_in(where, new_incarnation())
    where.chmod(0o755)
    with closing(listen(path)) as listener:
        os.chmod(path, 0o666)
        child = os.fork()
        if not child:
            try:
                os.setresuid(12_345, 12_345, 12_345)
                connect(path)
            except PermissionError as error:
                os._exit(7 if "user 0" in str(error) else 8)
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        sock, _ = listener.accept()
        with sock, pytest.raises(PermissionError, match="user 12345"):
            local_socket.check_user(sock)


# ---- whether it listens ----------------------------------------------------------------------------------------------


def test_a_life_listens_while_its_socket_is_open(where: Path) -> None:
    """Not before, not after, and no other one."""
    life = new_incarnation()
    assert not is_listening(life)
    listener = listen(path_in(where, life))
    assert is_listening(life)
    assert not is_listening(new_incarnation())
    listener.close()
    assert not is_listening(life)


def test_one_whose_queue_is_full_listens(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has not taken in those that connected before."""
    monkeypatch.setattr(local_socket, "BACKLOG", 1)
    life = new_incarnation()
    path = path_in(where, life)
    with ExitStack() as stack:
        stack.enter_context(closing(listen(path)))
        for _ in range(2):
            stack.enter_context(closing(connect(path)))
        with pytest.raises(BlockingIOError):
            connect(path)
        assert is_listening(life)


def test_where_there_can_be_no_socket_none_listens(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory cannot be used."""
    (where / "file").touch()
    monkeypatch.setenv(local_socket.VARIABLE, str(where / "file"))
    assert not is_listening(new_incarnation())


# ---- what is removed -------------------------------------------------------------------------------------------------


def test_the_file_of_a_process_that_was_killed_is_removed_by_the_next_that_starts(where: Path) -> None:
    """Once it is old enough."""
    path = leave_behind(where)
    set_age(path, STALE_S + 5)
    with closing(listen(path_in(where, new_incarnation()))):
        assert not os.path.exists(path)


def test_a_file_that_is_young_is_left(where: Path) -> None:
    """Its process may be about to listen."""
    path = path_in(where, new_incarnation())
    listen(path).close()
    with closing(listen(path_in(where, new_incarnation()))):
        assert os.path.exists(path)


def test_a_file_of_one_that_listens_is_left(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However old it is, and though its queue is full."""
    monkeypatch.setattr(local_socket, "BACKLOG", 1)
    path = path_in(where, new_incarnation())
    with ExitStack() as stack:
        stack.enter_context(closing(listen(path)))
        for _ in range(5):
            set_age(path, 10 * STALE_S)
            stack.enter_context(closing(listen(path_in(where, new_incarnation()))))
            assert os.path.exists(path)


def test_files_of_others_are_left(where: Path) -> None:
    """Their names are not of this module; a socket that none listens at is not enough."""
    others = [where / "zrpc.sock", where / "zrpc-x.txt", where / "other-x.sock"]
    for other in others:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(str(other))
        set_age(str(other), 10 * STALE_S)
    (where / "zrpc-dir.sock").mkdir()
    set_age(str(where / "zrpc-dir.sock"), 10 * STALE_S)
    with closing(listen(path_in(where, new_incarnation()))):
        assert all(other.exists() for other in [*others, where / "zrpc-dir.sock"])


def test_to_remove_what_is_gone_is_no_error(where: Path) -> None:
    """So it can be removed again."""
    path = path_in(where, new_incarnation())
    with closing(listen(path)):
        for _ in range(2):
            local_socket.remove(path)
            assert not os.path.exists(path)
