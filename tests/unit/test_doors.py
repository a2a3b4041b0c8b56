from __future__ import annotations

import contextlib
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kohakuriver.runner.services.doors import SOCKET, Doors
from kohakuriver.runner.services.state import State
from kohakuriver.unix_sockets import address_of


class Listener:
    """Listens, as a runner does."""

    def __init__(self) -> None:
        self.socks: dict[str, socket.socket] = {}

    def listen(self, sock: socket.socket, container: str) -> Callable[[], None]:
        sock.listen(1)
        self.socks[container] = sock
        return sock.close


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    for sock in listener.socks.values():
        sock.close()


def for_nobody(folder: Path, path: Path) -> None:
    pass


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock, address_of(path) as address:
        return sock.connect_ex(address) == 0


def test_a_door_is_for_the_runners_user_alone_until_somebody_is_admitted(tmp_path: Path, listener: Listener) -> None:
    doors = Doors(State(tmp_path / "state"), listener.listen)
    seen: list[int] = []

    def admit(folder: Path, path: Path) -> None:
        seen.extend(stat.S_IMODE(each.stat().st_mode) for each in (folder, path))

    path = doors.open("c1", admit)
    assert path == doors.folder("c1") / SOCKET
    assert seen == [0o700, 0o600]
    assert connects(path)
    assert [each.name for each in path.parent.iterdir()] == [SOCKET]


def test_a_runner_started_again_listens_at_the_door_of_before_in_the_same_directory(
    tmp_path: Path, listener: Listener
) -> None:
    before = Doors(State(tmp_path), listener.listen).open("c1", for_nobody)
    assert before is not None
    directory = before.parent.stat().st_ino
    listener.socks["c1"].close()  # it was killed: its socket's file stays
    assert not connects(before)
    after = Doors(State(tmp_path), listener.listen).open("c1", for_nobody)
    assert after == before
    assert connects(before)
    assert before.parent.stat().st_ino == directory, "a container has this one mounted"


def test_a_door_that_is_open_stays_as_it_is(tmp_path: Path, listener: Listener) -> None:
    doors = Doors(State(tmp_path), listener.listen)
    first = doors.open("c1", for_nobody)
    sock = listener.socks["c1"]
    assert doors.open("c1", for_nobody) == first
    assert listener.socks["c1"] is sock


def test_nothing_is_left_of_a_door_that_is_closed(tmp_path: Path, listener: Listener) -> None:
    doors = Doors(State(tmp_path), listener.listen)
    doors.open("c1", for_nobody)
    doors.close("c1")
    doors.close("c1")
    assert listener.socks["c1"].fileno() == -1
    assert not doors.folder("c1").exists()


def test_a_door_that_was_opened_for_what_then_failed_is_closed_and_one_that_was_there_is_not(
    tmp_path: Path, listener: Listener
) -> None:
    doors = Doors(State(tmp_path), listener.listen)
    for expected in (False, True):
        with contextlib.suppress(KeyError), doors.unless_it_fails("c1"):
            doors.open("c1", for_nobody)
            raise KeyError
        assert doors.folder("c1").exists() is expected
        doors.open("c1", for_nobody)


def test_a_path_may_be_longer_than_a_sockets_address(tmp_path: Path, listener: Listener) -> None:
    path = Doors(State(tmp_path / ("d" * 120)), listener.listen).open("c1", for_nobody)
    assert path is not None
    assert connects(path)


def test_where_there_can_be_no_door_that_is_said_once(tmp_path: Path) -> None:
    def fails(sock: socket.socket, container: str) -> Callable[[], None]:
        raise OSError("no more sockets")

    doors = Doors(State(tmp_path), fails)
    with capture_logs() as lines:
        assert doors.open("c1", for_nobody) is None
        assert doors.open("c2", for_nobody) is None
    assert [line["reason"] for line in lines] == ["no more sockets"]
