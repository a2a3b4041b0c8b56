"""The forwards in the background: what is left of those that are gone, and who may get at them."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from kohakuriver.cli import detached
from kohakuriver.errors import NotFoundError, UsageError
from kohakuriver.unix_sockets import address_of


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(tmp_path))
    return tmp_path / "forwards"


def at(directory: Path, name: str, kind: str) -> Path:
    """Where the socket is of a forward of this machine."""
    return directory / detached.socket_name(name, kind)


def bind(sock: socket.socket, path: Path) -> None:
    with address_of(path) as address:
        sock.bind(address)


def of_the_dead(path: Path, *, age: float = 0.0) -> Path:
    """The socket of a process that is gone."""
    with socket.socket(socket.AF_UNIX) as sock:
        bind(sock, path)
    _grow_old(path, age)
    return path


def _grow_old(path: Path, age: float) -> None:
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))


def test_what_a_process_left_that_is_gone_is_no_forward_and_is_removed(directory: Path) -> None:
    assert detached.listed() == []
    left = of_the_dead(at(directory, "gone", ".sock"))
    assert detached.listed() == []
    assert not left.exists()
    with pytest.raises(NotFoundError):
        detached.find("gone", detached.listed())


@pytest.mark.parametrize("reset", [False, True])
def test_one_that_ends_while_it_is_asked_is_no_forward_any_more(directory: Path, reset: bool) -> None:
    detached.listed()
    with socket.socket(socket.AF_UNIX) as server:
        bind(server, at(directory, "ends", ".sock"))
        server.listen()

        def end() -> None:
            peer, _ = server.accept()
            if not reset:  # else what it was sent lies there unread, and its end resets the connection
                peer.recv(100)
            peer.close()

        for ask in (detached.listed, lambda: detached.stop("ends")):
            ending = threading.Thread(target=end)
            ending.start()
            if ask is detached.listed:
                assert ask() == []
            else:
                with pytest.raises(NotFoundError, match="has ended meanwhile"):
                    ask()
            ending.join()


@pytest.mark.parametrize("answer", [b"\n", b"no JSON\n", b"[]\n", b"{}", b"x" * 1000 + b"\n"])
def test_one_that_answers_nonsense_is_there_and_does_not_answer(directory: Path, answer: bytes) -> None:
    detached.listed()
    with socket.socket(socket.AF_UNIX) as server:
        bind(server, at(directory, "odd", ".sock"))
        server.listen()

        def talk() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(100)
                peer.sendall(answer)

        talking = threading.Thread(target=talk)
        talking.start()
        (found,) = detached.listed()
        talking.join()
    assert (found["id"], found["pid"]) == ("odd", os.getpid())
    assert found["state"] == ("not answering" if answer != b"{}" else found["state"])
    assert found["ports"] == []


def test_sockets_of_other_machines_with_the_same_directory_stay_and_those_of_an_earlier_start_of_this_one_go(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detached.listed()
    machine, run = detached._machine()
    monkeypatch.setattr(detached, "_machine", lambda: ("another", "run"))
    others = {of_the_dead(at(directory, "far", kind), age=3600) for kind in (".sock", ".new", ".ab.hold")}
    monkeypatch.setattr(detached, "_machine", lambda: (machine, "earlier"))
    for kind in (".sock", ".new", ".ab.hold"):
        of_the_dead(at(directory, "early", kind))
    monkeypatch.setattr(detached, "_machine", lambda: (machine, run))
    assert detached.listed() == []
    detached.Place().leave(log=True)
    assert set(directory.iterdir()) == others


def test_all_are_asked_before_any_is_waited_for(directory: Path) -> None:
    detached.listed()
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as other:
        for name, server in (("one", one), ("other", other)):
            bind(server, at(directory, name, ".sock"))
            server.listen()

        def talk() -> None:
            peers = [server.accept()[0] for server in (one, other)]
            for peer in peers:
                with peer:
                    peer.recv(100)
                    peer.sendall(b'{"state": "connected"}\n')

        talking = threading.Thread(target=talk)
        talking.start()
        assert [(each["id"], each["state"]) for each in detached.listed()] == [
            ("one", "connected"),
            ("other", "connected"),
        ]
        talking.join()


def test_what_a_process_left_that_took_forwards_over_is_removed_and_one_that_is_there_stays(directory: Path) -> None:
    detached.listed()
    left = of_the_dead(at(directory, "1", ".2.hold"))
    with socket.socket(socket.AF_UNIX) as server:
        bind(server, at(directory, "3", ".4.hold"))
        server.listen()
        assert detached.listed() == []
        assert [path.name for path in directory.iterdir()] == [detached.socket_name("3", ".4.hold")]
    assert not left.exists()


def test_the_newest_logs_of_those_that_have_ended_are_kept_and_those_of_others(directory: Path) -> None:
    detached.listed()
    for number in range(30):
        log = directory / f"log{number}.log"
        log.touch()
        (directory / f"log{number}.log.1").touch()
        _grow_old(log, 100 + number)
    of_the_dead(at(directory, "log29", ".sock"))  # as if it still ran: only asking would tell
    place = detached.Place()
    kept = {path.stem for path in directory.glob("*.log")}
    assert kept == {*(f"log{number}" for number in range(20)), "log29", place.id}
    assert len(list(directory.glob("*.log.1"))) == 21
    place.leave()
    assert place.log.exists()


def test_what_was_being_made_when_its_process_ended_is_removed_and_what_is_being_made_is_not(directory: Path) -> None:
    detached.listed()
    old, new = of_the_dead(at(directory, "old", ".new"), age=3600), of_the_dead(at(directory, "new", ".new"))
    place = detached.Place()
    assert (old.exists(), new.exists()) == (False, True)
    place.leave(log=True)
    assert list(directory.iterdir()) == [new]


def test_a_directory_that_can_not_be_made_is_told_in_one_sentence(directory: Path) -> None:
    directory.write_text("a file")
    with pytest.raises(UsageError, match="can't be used for what runs in the background"):
        detached.Place()
