"""`kohakuriver forward TASK LOCAL:HOST:PORT`, `LOCAL:unix:PATH` and `--reverse REMOTE:LOCAL`: beyond a task's ports."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.addresses import free_port, own_address
from tests.support.up import Apart, broken, connect, echoes

HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    cluster = Apart(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.task = cluster.service().task  # type: ignore[attr-defined]
        yield cluster
    finally:
        cluster.run("forward", "--stop", "--all")
        cluster.close()


class Listener:
    """Takes connections one by one, on a port of `host` or on the Unix socket at `path`."""

    def __init__(self, host: str = HERE, path: Path | None = None) -> None:
        if path is None:
            self._sock = socket.create_server((host, 0))
            self.port = self._sock.getsockname()[1]
        else:
            self._sock = socket.socket(socket.AF_UNIX)
            self._sock.bind(str(path))
            self._sock.listen()
        self._sock.settimeout(60)

    def taken(self) -> socket.socket:
        connection, _ = self._sock.accept()
        connection.settimeout(60)
        return connection

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def beyond() -> Iterator[Listener]:
    listener = Listener(own_address())
    yield listener
    listener.close()


def connect_unix(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def swap(one: socket.socket, other: socket.socket, size: int = 3_000_000) -> None:
    """Send much both ways at once, and half-close both; what arrives must be what was sent."""
    data = os.urandom(size), os.urandom(size)
    got: list[bytes] = [b"", b""]

    def send(sock: socket.socket, what: bytes) -> None:
        sock.sendall(what)
        sock.shutdown(socket.SHUT_WR)

    def receive(sock: socket.socket, at: int) -> None:
        pieces = []
        while piece := sock.recv(1 << 16):
            pieces.append(piece)
        got[at] = b"".join(pieces)

    threads = [
        threading.Thread(target=send, args=(one, data[0])),
        threading.Thread(target=send, args=(other, data[1])),
        threading.Thread(target=receive, args=(other, 0)),
        threading.Thread(target=receive, args=(one, 1)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (got[0] == data[0], got[1] == data[1]) == (True, True)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    sock.close()


# -- on from the task ------------------------------------------------------------------------------------------------


def test_another_address_is_reached_through_the_task_beside_its_own_ports(cluster: Apart, beyond: Listener) -> None:
    host, service = own_address(), cluster.service()
    forward = cluster.start("forward", service.task, f"0:{service.port}", f"0:{host}:{beyond.port}", "--json")
    ports: dict[str | None, int] = {}
    while len(ports) < 2:
        event = forward.event("listening")
        ports[event.get("remote_host")] = event["local_port"]
    with connect(ports[None]) as connection:
        assert echoes(connection)
    with connect(ports[host]) as connection, beyond.taken() as there:
        swap(connection, there)
    assert forward.stop() == 0
    lines = [json.loads(line) for line in (cluster.directory / "host" / "audit.jsonl").read_text().splitlines()]
    assert [line["command"] for line in lines if "command" in line][-1] == f"forward to {host} {beyond.port}"


def test_a_reset_passes_through_in_both_directions(cluster: Apart, beyond: Listener) -> None:
    forward = cluster.start("forward", cluster.task, f"0:{own_address()}:{beyond.port}", "--json")  # type: ignore[attr-defined]
    port = forward.listening()
    with connect(port) as connection, beyond.taken() as there:
        connection.sendall(b"x")
        assert there.recv(1) == b"x"
        reset(there)
        assert broken(connection)
    with connect(port) as connection, beyond.taken() as there:
        connection.sendall(b"x")
        assert there.recv(1) == b"x"
        reset(connection)
        assert broken(there)
    assert forward.stop() == 0


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:{}", "is no address that a forward may go on to"),
        ("localhost:{}", "is no address that a forward may go on to"),
        ("169.254.169.254:80", "is no address that a forward may go on to"),
        ("no-such-host.invalid:80", "finds no address for no-such-host.invalid"),
    ],
)
def test_the_tasks_own_loopback_and_link_are_not_reached_and_a_name_that_is_none_is_told(
    cluster: Apart, listener: Listener, address: str, words: str
) -> None:
    task = cluster.task  # type: ignore[attr-defined]
    forward = cluster.start("forward", task, "0:" + address.format(listener.port), "--json")
    with connect(forward.listening()) as connection:
        assert broken(connection)
        assert words in forward.event("stream_error")["message"]
    assert forward.stop() == 0


def test_nobody_but_admins_goes_on_from_a_task_on_its_nodes_network(cluster: Apart) -> None:
    token = json.loads(cluster.succeed("user", "add", "ann", "--json"))["token"]
    made = cluster.run(
        "vps", "create", "--name=anns", "--backend=process", "--", "sleep", "infinity", KOHAKURIVER_TOKEN=token
    )
    assert made.returncode == 0, made.stderr
    done = cluster.run("forward", "anns", "0:192.0.2.1:80", KOHAKURIVER_TOKEN=token)
    assert (done.returncode, done.stdout) == (5, "")
    assert "only admins may forward" in done.stderr
    cluster.succeed("vps", "share", cluster.task, "ann")  # type: ignore[attr-defined]
    done = cluster.run("forward", cluster.task, "0:192.0.2.1:80", KOHAKURIVER_TOKEN=token)  # type: ignore[attr-defined]
    assert (done.returncode, done.stdout) == (5, "")
    assert "only its owner" in done.stderr


# -- Unix sockets of the task ----------------------------------------------------------------------------------------


def test_a_unix_socket_of_the_task_is_reached_by_a_port_and_by_a_unix_socket_here(
    cluster: Apart, tmp_path: Path
) -> None:
    there, here = Listener(path=tmp_path / "there.sock"), tmp_path / "here.sock"
    wanted = [f"0:unix:{tmp_path}/there.sock", f"unix:{here}:unix:{tmp_path}/there.sock"]
    forward = cluster.start("forward", cluster.task, *wanted, "--json")  # type: ignore[attr-defined]
    listening = [forward.event("listening")]
    while "local_path" not in listening[-1]:  # one or two loopback addresses before
        listening.append(forward.event("listening"))
    assert {each["remote_path"] for each in listening} == {str(tmp_path / "there.sock")}
    assert listening[-1]["local_path"] == str(here)
    port = listening[0]["local_port"]
    with connect(port) as connection, there.taken() as service:
        swap(connection, service)
    # Only now: of two that are opened at once either may arrive first.
    with connect_unix(here) as connection, there.taken() as service:
        swap(connection, service)
    with connect(port) as connection, there.taken() as service:
        service.close()
        assert connection.recv(1) == b""
    assert forward.stop() == 0
    there.close()
    lines = [json.loads(line) for line in (cluster.directory / "host" / "audit.jsonl").read_text().splitlines()]
    assert [line["command"] for line in lines if "command" in line][-1] == f"forward at {tmp_path}/there.sock"


def test_a_unix_socket_that_is_not_there_or_that_nobody_listens_on_is_told_and_resets_the_connection(
    cluster: Apart, tmp_path: Path
) -> None:
    Listener(path=tmp_path / "left.sock").close()
    cases = {
        "none.sock": "the task has no",
        "left.sock": "nothing listens on",
        "x" * 120: "can't be the path of a socket",
    }
    for name, words in cases.items():
        forward = cluster.start("forward", cluster.task, f"0:unix:{tmp_path}/{name}", "--json")  # type: ignore[attr-defined]
        with connect(forward.listening()) as connection:
            assert broken(connection)
        assert words in forward.event("stream_error")["message"]
        assert forward.stop() == 0


def test_a_command_finds_the_port_of_a_unix_socket_by_that_ones_name(cluster: Apart, tmp_path: Path) -> None:
    done = cluster.run(
        "forward", cluster.task, f"0:unix:{tmp_path}/my-db.sock", "--", "sh", "-c", "echo $KOHAKURIVER_PORT_MY_DB_SOCK"  # type: ignore[attr-defined]
    )  # fmt: skip
    told, port = done.stderr.splitlines()[0], done.stdout.strip()
    assert told == f"Forwarding 127.0.0.1:{port} -> {cluster.task}:{tmp_path}/my-db.sock (tcp)"  # type: ignore[attr-defined]


def test_who_may_open_a_terminal_may_reach_the_tasks_unix_sockets_and_nobody_else(
    cluster: Apart, tmp_path: Path
) -> None:
    token = json.loads(cluster.succeed("user", "add", "eve", "--json"))["token"]
    there = Listener(path=tmp_path / "there.sock")
    wanted = ("forward", cluster.task, f"0:unix:{tmp_path}/there.sock")  # type: ignore[attr-defined]
    done = cluster.run(*wanted, KOHAKURIVER_TOKEN=token)
    assert (done.returncode, done.stdout) == (5, "")
    cluster.succeed("vps", "share", cluster.task, "eve")  # type: ignore[attr-defined]
    forward = cluster.start(*wanted, "--json", KOHAKURIVER_TOKEN=token)
    with connect(forward.listening()) as connection, there.taken() as service:
        connection.sendall(b"x")
        assert service.recv(1) == b"x"
        cluster.succeed("vps", "unshare", cluster.task, "eve")  # type: ignore[attr-defined]
        assert broken(connection)
    assert forward.ended() == 5
    there.close()


# -- back from the task ----------------------------------------------------------------------------------------------


def test_programs_in_the_task_reach_this_machine_with_half_closes_and_many_at_once(
    cluster: Apart, listener: Listener
) -> None:
    remote = free_port()
    forward = cluster.start("forward", cluster.task, "--reverse", f"{remote}:{listener.port}", "--json")  # type: ignore[attr-defined]
    assert forward.event("reversed") == {
        "event": "reversed", "remote_port": remote, "local_host": HERE, "local_port": listener.port,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:  # more than wait for somebody
        inside = [stack.enter_context(connect(remote)) for _ in range(20)]
        for number, each in enumerate(inside):
            each.sendall(bytes([number]))
        outside = {}
        for _ in inside:
            there = stack.enter_context(listener.taken())
            outside[there.recv(1)[0]] = there
        for number, each in enumerate(inside[:3]):
            swap(each, outside[number], 1_000_000)
    with connect(remote) as inner, listener.taken() as there:
        inner.sendall(b"x")
        assert there.recv(1) == b"x"
        reset(there)
        assert broken(inner)
    assert forward.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        connect(remote)


def test_a_unix_socket_of_the_task_leads_back_to_one_here_for_the_tasks_user_alone_and_goes_with_the_forward(
    cluster: Apart, tmp_path: Path
) -> None:
    here, there = Listener(path=tmp_path / "agent.sock"), tmp_path / "there.sock"
    Listener(path=there).close()  # left of a program that has gone
    wanted = f"unix:{there}:unix:{tmp_path}/agent.sock"
    forward = cluster.start("forward", cluster.task, "--reverse", wanted, "--json")  # type: ignore[attr-defined]
    told = {"event": "reversed", "remote_path": str(there), "local_path": f"{tmp_path}/agent.sock"}
    assert forward.event("reversed") == told
    assert stat.S_IMODE(there.stat().st_mode) == 0o600
    with contextlib.ExitStack() as stack:
        pairs = [(stack.enter_context(connect_unix(there)), stack.enter_context(here.taken())) for _ in range(12)]
        for inner, outer in pairs:
            swap(inner, outer, 100_000)
    assert forward.stop() == 0
    with pytest.raises(FileNotFoundError):
        connect_unix(there)
    here.close()


def test_what_is_in_the_place_of_a_unix_socket_in_the_task_stays_and_ends_the_start_in_one_sentence(
    cluster: Apart, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    used = Listener(path=tmp_path / "used.sock")
    for name in ("file", "used.sock"):
        done = cluster.run("forward", cluster.task, "--reverse", f"unix:{tmp_path}/{name}:1")  # type: ignore[attr-defined]
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr.count("\n") == 1
        assert f"{tmp_path}/{name} is in use in the task" in done.stderr
    with connect_unix(tmp_path / "used.sock"), used.taken():
        assert (tmp_path / "file").read_text() == "kept"
    used.close()


def test_ways_back_in_the_background_are_listed_with_their_connections_and_those_that_wait_are_none(
    cluster: Apart, listener: Listener, tmp_path: Path
) -> None:
    remote = free_port()
    ways = ("-R", f"{remote}:{listener.port}", "-R", f"unix:{tmp_path}/a.sock:unix:{tmp_path}/b.sock")
    cluster.succeed("forward", cluster.task, *ways, "--detach")  # type: ignore[attr-defined]
    with connect(remote), listener.taken():
        (told,) = json.loads(cluster.succeed("forward", "--list", "--json"))["forwards"]
        assert (told["ports"], told["connections"]) == ([], 1)
        assert told["reversed"] == [
            {"remote_port": remote, "local_host": HERE, "local_port": listener.port},
            {"remote_path": f"{tmp_path}/a.sock", "local_path": f"{tmp_path}/b.sock"},
        ]
        row = cluster.succeed("forward", "--list").splitlines()[1]
        assert f"{HERE}:{listener.port}<-{remote}/tcp" in row
    cluster.succeed("forward", "--stop", cluster.task)  # type: ignore[attr-defined]


def test_who_connects_while_nothing_listens_here_is_reset(cluster: Apart) -> None:
    remote = free_port()
    forward = cluster.start("forward", cluster.task, "-R", f"{remote}:{free_port()}", "--json")  # type: ignore[attr-defined]
    forward.event("reversed")
    with connect(remote) as inner:
        assert broken(inner)
    assert forward.stop() == 0


def test_a_port_that_is_in_use_in_the_task_ends_the_start_in_one_sentence(cluster: Apart, listener: Listener) -> None:
    done = cluster.run("forward", cluster.task, "--reverse", f"{listener.port}:1")  # type: ignore[attr-defined]
    assert (done.returncode, done.stdout) == (4, "")
    assert f"port {listener.port} is in use in the task" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_connections_go_on_and_new_ones_wait_while_the_host_is_away(cluster: Apart, listener: Listener) -> None:
    remote = free_port()
    forward = cluster.start("forward", cluster.task, "--reverse", f"{remote}:{listener.port}", "--json")  # type: ignore[attr-defined]
    forward.event("reversed")
    with connect(remote) as inner, listener.taken() as there:
        inner.sendall(b"before")
        assert there.recv(6) == b"before"
        cluster.host.process.kill()
        cluster.host.ended()
        assert forward.event("reconnecting")["waiting"] == 1  # those that wait for somebody are no connections
        inner.sendall(b"while")
        with connect(remote) as another:
            another.sendall(b"another")
            cluster.start_host()
            assert there.recv(5) == b"while"
            with listener.taken() as theirs:
                assert theirs.recv(7) == b"another"
        swap(inner, there, 500_000)
    assert forward.stop() == 0
