"""A runner as a program: what it says of itself, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import Queue

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

import kohakuriver
from kohakuriver.client.forward import Event, StreamError
from kohakuriver.tunnel.protocol import TUNNEL_V2
from tests.support.descriptors import without_descriptors
from tests.support.processes import PATIENCE, Cluster, a_cluster, ask, eventually
from tests.support.services import echo, port_in

NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
A_TASK = {"image": "busybox", "name": "lab"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with a_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def echo_port() -> Iterator[int]:
    with subprocess.Popen(echo(), stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        port = port_in(service.stdout.readline())
        assert port is not None
        yield port
        service.kill()


def adopt(cluster: Cluster) -> None:
    """Make this machine the task `machine`."""
    status, task = cluster.call("POST", "/api/tasks/adopt", {"address": "127.0.0.1", "name": "machine"})
    assert status == 201, task


def unavailable(cluster: Cluster) -> dict[str, str]:
    told: dict[str, str] = (cluster.node("n1") or {})["unavailable"]
    return told


def test_a_node_without_an_engine_says_so_and_gets_no_containers(cluster: Cluster) -> None:
    runner = cluster.start_runner("n1", "--backend", "docker", "--backend", "process", env=NO_ENGINE)
    assert "no Docker engine answers" in runner.log.read_text()
    assert unavailable(cluster) == {"docker": "no Docker engine answers (No such file or directory)"}
    status, answer = cluster.call("POST", "/api/tasks", A_TASK)
    assert (status, answer["error"]) == (409, "backend_not_offered")
    assert "(node n1: no Docker engine answers (No such file or directory));" in answer["message"]
    assert answer["message"].count(". ") == 0, "it is one sentence"


def test_a_node_without_the_tunnel_client_says_so_and_gets_no_containers(cluster: Cluster) -> None:
    env = {"KOHAKURIVER_TUNNEL_CLIENT": "/nowhere/tunnel-client"}
    runner = cluster.start_runner("n1", "--backend", "docker", env=env)
    assert "no static tunnel client" in runner.log.read_text()
    told = unavailable(cluster)["docker"]
    assert "tunnel client" in told or "engine" in told
    status, answer = cluster.call("POST", "/api/tasks", A_TASK | {"node": "n1"})
    assert (status, answer["error"]) == (409, "backend_not_offered")
    assert told in answer["message"]


def test_a_runner_is_ready_when_it_listens_and_registered_when_the_host_has_taken_it_in(cluster: Cluster) -> None:
    port = int(cluster.url.rpartition(":")[2])
    cluster.host.end()
    runner = cluster.start_program("n1", "--backend", "process")
    assert runner.ready["event"] == "ready"
    assert httpx.get(f"{runner.ready['url']}/health", trust_env=False).status_code == 200
    eventually(lambda: "does not take this node in" in runner.log.read_text())
    cluster.start_host(port)
    said = runner.next_event()
    assert (said["event"], said["name"], said["host"]) == ("registered", "n1", cluster.url)
    assert (cluster.node("n1") or {})["status"] != "offline"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_that_ends_a_runner_ends_what_it_started(cluster: Cluster, number: signal.Signals) -> None:
    runner = cluster.start_runner("n1", "--backend", "process")
    task = cluster.create("sh", "-c", "echo $$; exec sleep 100000", name="long")
    pid = int(eventually(lambda: _first_number(cluster.log_of(task))))
    assert runner.end(number) == 0
    assert not Path(f"/proc/{pid}").exists()


def test_no_session_is_refused_while_its_runner_is_started_again(cluster: Cluster) -> None:
    runner = cluster.start_runner("n1", "--backend", "process")
    adopt(cluster)
    over = threading.Event()

    def open_sessions() -> int:
        opened = 0
        while not over.is_set():
            with kohakuriver.forward_sync("machine", 9, host=cluster.url, token=cluster.token):
                opened += 1
        return opened

    with ThreadPoolExecutor(2) as threads:
        opening = [threads.submit(open_sessions) for _ in range(2)]
        try:
            for _ in range(2):
                assert runner.end() == 0
                runner = cluster.start_runner("n1", "--backend", "process")
        finally:
            over.set()
        assert all(each.result() for each in opening)


def _first_number(text: str) -> str | None:
    return next((line for line in text.splitlines() if line.isdigit()), None)


def test_a_runner_under_nohup_outlives_its_terminal(cluster: Cluster) -> None:
    runner = cluster.start_program("n1", "--backend", "process", under=("nohup",))
    os.kill(runner.pid, signal.SIGHUP)
    assert httpx.get(f"{runner.ready['url']}/health", trust_env=False).status_code == 200
    assert runner.next_event()["event"] == "registered"
    assert runner.process.poll() is None


def test_a_runner_without_descriptors_tells_the_user_of_each_dial_and_goes_on(cluster: Cluster, echo_port: int) -> None:
    runner = cluster.start_runner("n1", "--backend", "process")
    adopt(cluster)
    told: Queue[Event] = Queue()
    to = partial(kohakuriver.forward_sync, "machine", host=cluster.url, token=cluster.token, on_event=told.put)
    with to([f"0:{echo_port}", "0:9/udp"]) as forward:
        tcp, udp = forward.local_ports[echo_port], forward.local_ports[9]
        assert ask(tcp, b"before") == b"before"
        with without_descriptors(runner.pid), socket.socket(type=socket.SOCK_DGRAM) as peer:
            with contextlib.suppress(ConnectionResetError):
                ask(tcp, b"lost")
            assert failure(told) == "EMFILE: this end of the tunnel has too many open files"
            peer.sendto(b"lost", ("127.0.0.1", udp))
            assert failure(told) == "EMFILE: this end of the tunnel has too many open files"
        assert ask(tcp, b"after") == b"after"


def failure(told: Queue[Event]) -> str:
    """Why the next stream that fails does."""
    while True:
        event = told.get(timeout=PATIENCE)
        if isinstance(event, StreamError):
            return event.message


def test_a_host_without_descriptors_tells_the_user_that_it_lacks_them_and_goes_on(
    cluster: Cluster, echo_port: int
) -> None:
    cluster.start_runner("n1", "--backend", "process")
    adopt(cluster)
    place = cluster.url.removeprefix("http://").split(":")
    path = f"{cluster.url.replace('http', 'ws')}/ws/forward/machine/{echo_port}"
    headers = {"Authorization": f"Bearer {cluster.token}"}
    opening = partial(connect, path, additional_headers=headers, subprotocols=[Subprotocol(TUNNEL_V2)], proxy=None)
    with socket.create_connection((place[0], int(place[1])), PATIENCE) as accepted:
        accepted.sendall(b"GET /health HTTP/1.1\r\nHost: " + place[0].encode() + b"\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += accepted.recv(4096)
        with without_descriptors(cluster.host.pid), pytest.raises(InvalidStatus) as refused:
            opening(sock=accepted)
    told = json.loads(refused.value.response.body or b"")
    assert told["error"] == "runner_unreachable"
    assert told["message"].startswith("The host has too many open files and can't reach node n1;")
    with opening() as opened:
        assert opened.recv(PATIENCE) == "CONNECTED"


@pytest.mark.parametrize("which", ["host", "runner"])
def test_running_out_of_descriptors_is_said_once_and_passes(cluster: Cluster, which: str) -> None:
    runner = cluster.start_runner("n1", "--backend", "process")
    program = cluster.host if which == "host" else runner
    place = program.ready["url"].removeprefix("http://").split(":")
    with ExitStack() as waiting:
        with without_descriptors(program.pid):
            for _ in range(3):
                waiting.enter_context(socket.create_connection((place[0], int(place[1]))))
            eventually(lambda: "out of file descriptors" in program.log.read_text())
        eventually(lambda: "there are file descriptors again" in program.log.read_text())
    assert httpx.get(f"{program.ready['url']}/health", trust_env=False).status_code == 200
    assert program.log.read_text().count("out of file descriptors") == 1
