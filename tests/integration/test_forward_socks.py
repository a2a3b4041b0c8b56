"""`kohakuriver forward TASK --socks`: one local port for all ports of a task."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support.up import Cluster, Service, connect, echoes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.run("forward", "--stop", "--all")
    cluster.close()


@pytest.fixture(scope="module")
def services(cluster: Cluster) -> list[Service]:
    return [cluster.service() for _ in range(2)]


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that nothing listens on, nor can while the test runs."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a web server, which a task that is a process of this machine has as well."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def asked(port: int, host: str, destination: int) -> tuple[int, socket.socket]:
    """What a SOCKS port replies to the wish for a destination, and the connection."""
    connection = connect(port)
    connection.sendall(b"\x05\x01\x00" + b"\x05\x01\x00\x03" + bytes((len(host),)) + host.encode())
    connection.sendall(struct.pack(">H", destination))
    assert _exactly(connection, 2) == b"\x05\x00"
    return _exactly(connection, 10)[1], connection


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := connection.recv(size - len(data))):
        data += more
    return data


@pytest.mark.parametrize("resume", [[], ["--no-resume"]], ids=["kept", "not kept"])
def test_any_port_of_the_task_is_reached_by_one_local_port(
    cluster: Cluster, services: list[Service], resume: list[str]
) -> None:
    task = services[0].task
    forward = cluster.start("forward", task, "--socks=0", "--json", *resume)
    listening = forward.event("listening")
    assert listening == {
        "event": "listening", "local_host": "127.0.0.1", "local_port": listening["local_port"], "proto": "socks5",
    }  # fmt: skip
    data = os.urandom(1 << 20)
    for service in services:  # both are processes of this machine, and so ports of either task
        for host in ("localhost", task.upper()):
            code, connection = asked(listening["local_port"], host, service.port)
            with connection:
                assert code == 0
                assert echoes(connection, data)
    assert forward.stop() == 0


def test_what_nothing_listens_on_is_refused_in_the_words_of_socks(
    cluster: Cluster, services: list[Service], dead_port: int
) -> None:
    forward = cluster.start("forward", services[0].task, "--socks=0", "--json")
    port = forward.listening()
    code, connection = asked(port, "localhost", dead_port)
    with connection:
        assert code == 5
        assert connection.recv(1) == b""
    assert forward.event("stream_error")["remote_port"] == dead_port
    assert forward.stop() == 0


def test_what_is_beyond_the_task_is_not_allowed_and_one_line_says_so(cluster: Cluster, services: list[Service]) -> None:
    forward = cluster.start("forward", services[0].task, f"0:{services[0].port}", "--socks=0")
    forward.line("(tcp)")
    port = int(forward.line("(socks5)").split()[1].rpartition(":")[2])
    for _ in range(3):
        code, connection = asked(port, "example.com", 443)
        connection.close()
        assert code == 2
    said = "example.com is not to be had by SOCKS"
    assert said in forward.line(said, err=True)
    assert forward.stop() == 0
    assert forward.rest(err=True) == []


def test_a_real_program_goes_by_it(cluster: Cluster, services: list[Service], web: int) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("there is no curl")
    task = services[0].task
    script = f"{curl} -sS -m 20 --proxy socks5h://127.0.0.1:$KOHAKURIVER_SOCKS http://{task}:{web}/there"
    done = cluster.run("forward", task, "--socks=0", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "/there"), done.stderr


def test_a_taken_socks_port_is_6_or_the_next_free_one(cluster: Cluster, services: list[Service]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cluster.run("forward", services[0].task, f"--socks={port}")
        assert done.returncode == 6
        assert f"127.0.0.1:{port} is already in use by" in done.stderr
        forward = cluster.start("forward", services[0].task, f"--socks={port}", "--local-port-fallback", "--json")
        listening = forward.event("listening")
        assert listening["instead_of"] == port
        code, connection = asked(listening["local_port"], "localhost", services[0].port)
        connection.close()
        assert code == 0
        assert forward.stop() == 0


def test_in_the_background_its_connections_go_on_and_are_counted(cluster: Cluster, services: list[Service]) -> None:
    done = cluster.succeed("forward", services[0].task, "--socks=0", "--detach", "--json")
    events = [json.loads(line) for line in done.splitlines()]
    port = next(event["local_port"] for event in events if event["event"] == "listening")
    code, connection = asked(port, "localhost", services[0].port)
    with connection:
        assert code == 0
        assert echoes(connection)
        (forward,) = json.loads(cluster.succeed("forward", "--list", "--json"))["forwards"]
        assert forward["connections"] == 1
        assert forward["ports"][0] == {"local_host": "127.0.0.1", "local_port": port, "proto": "socks5"}
        assert f"{port}:*/socks5" in cluster.succeed("forward", "--list")
        cluster.succeed("forward", "--stop", events[-1]["id"])
