"""What ends connections that wait for their network: real programs, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.network.wall import Wall, wall
from tests.support.processes import Cluster, a_cluster, eventually
from tests.support.up import Apart, Commands, Program, Service, broken, connect, echoes

GONE = "ESTALE: the container's end does not have that connection"
SOON = 5.0
"""Seconds in which what waits in a task ends with the right to it: two, and what a busy machine needs."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    cluster = Apart(tmp_path_factory.mktemp("cluster"))
    eventually(lambda: json.loads(cluster.run("node", "list", "--json").stdout)["nodes"])
    yield cluster
    cluster.close()


@pytest.fixture
def service(cluster: Apart) -> Service:
    return cluster.service()


@pytest.fixture
def before_host(cluster: Apart) -> Iterator[Wall]:
    with wall(int(cluster.url.rpartition(":")[2])) as made:
        yield made


def connections(service: Service) -> int:
    """How many the service in the task has."""
    (process,) = psutil.Process(service.tunnel_client).children()
    return sum(
        each.status == psutil.CONN_ESTABLISHED and each.laddr.port == service.port
        for each in process.net_connections("tcp")
    )


def waiting(
    cluster: Commands, service: Service, before_host: Wall, **environment: str
) -> tuple[Program, socket.socket]:
    """A forward with a connection that has lost its host, and that connection."""
    at = f"--host=http://127.0.0.1:{before_host.port}"
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json", at, **environment)
    connection = connect(forward.listening())
    assert echoes(connection)
    assert connections(service) == 1
    before_host.cut()
    while forward.event("reconnecting")["waiting"] != 1:
        pass  # it goes straight until the host has told the runner, too, that its user is gone
    return forward, connection


def test_a_share_that_is_taken_back_ends_what_waits_in_the_task_for_its_user(
    cluster: Apart, service: Service, before_host: Wall
) -> None:
    bob = f"bob-of-{service.task}"
    cluster.succeed("user", "add", bob)
    bobs = json.loads(cluster.succeed("token", "create", "--user", bob, "--json"))["token"]
    cluster.succeed("vps", "share", service.task, bob)
    forward, connection = waiting(cluster, service, before_host, KOHAKURIVER_TOKEN=bobs)
    with connection:
        cluster.succeed("vps", "unshare", service.task, bob)
        began = time.monotonic()
        eventually(lambda: connections(service) == 0)
        assert time.monotonic() - began < SOON
        before_host.open()
        assert broken(connection)
        assert forward.ended() == 5
        assert "is not yours" in " ".join(forward.rest(err=True))


def test_connections_that_wait_end_where_the_task_was_stopped_meanwhile(
    cluster: Apart, service: Service, before_host: Wall
) -> None:
    forward, connection = waiting(cluster, service, before_host)
    with connection:
        cluster.succeed("vps", "stop", service.task)
        before_host.open()
        assert broken(connection)
        assert "is stopped" in forward.event("stream_error")["message"]
        assert forward.stop() == 0


def test_connections_that_wait_end_where_the_task_was_started_again_meanwhile(
    cluster: Apart, service: Service, before_host: Wall
) -> None:
    forward, connection = waiting(cluster, service, before_host)
    with connection:
        cluster.succeed("vps", "restart", service.task)
        service.wait_started()
        before_host.open()
        assert broken(connection)
        assert forward.event("stream_error")["message"] == GONE
        assert forward.stop() == 0


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A machine's service that sends back what comes."""

    def serve(accepted: socket.socket) -> None:
        with accepted, contextlib.suppress(OSError):
            while data := accepted.recv(65536):
                accepted.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_connections_to_an_address_end_with_the_runner_that_made_them_and_a_line_says_so(
    tmp_path: Path, echo_port: int, number: signal.Signals
) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.start_runner("n1", "--backend", "address")
        status, task = cluster.call("POST", "/api/tasks/adopt", {"name": "box", "address": "127.0.0.1"})
        assert status == 201, task
        commands = Commands(tmp_path)
        commands.environment |= {"KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}
        forward = commands.start("forward", "box", f"0:{echo_port}", "--json")
        try:
            with connect(forward.listening()) as connection:
                assert echoes(connection)
                restart_runner(cluster, number)
                assert broken(connection)
                said = {GONE}
                if number == signal.SIGTERM:  # what it says at last is lost where its link goes first
                    said.add("ECONNRESET: the runner has ended, which had made this connection")
                assert forward.event("stream_error")["message"] in said
        finally:
            commands.close()


def restart_runner(cluster: Cluster, number: signal.Signals) -> None:
    cluster.runners["n1"].end(number)
    cluster.start_runner("n1", "--backend", "address")
