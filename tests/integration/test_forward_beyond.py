"""`kohakuriver forward TASK LOCAL:HOST:PORT` and `--reverse REMOTE:LOCAL`: beyond the task, and back from it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator

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
    """Takes connections one by one on a port of `host`."""

    def __init__(self, host: str = HERE) -> None:
        self._sock = socket.create_server((host, 0))
        self._sock.settimeout(60)
        self.port = self._sock.getsockname()[1]

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
        inner.sendall(b"while")
        with connect(remote) as another:
            another.sendall(b"another")
            cluster.start_host()
            assert there.recv(5) == b"while"
            with listener.taken() as theirs:
                assert theirs.recv(7) == b"another"
        swap(inner, there, 500_000)
    assert forward.stop() == 0
