"""A runner as a program: what it says of itself, and how it ends."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.support.processes import Cluster, a_cluster, eventually

NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere/docker.sock"}
A_TASK = {"image": "busybox", "name": "lab"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with a_cluster(tmp_path) as cluster:
        yield cluster


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


def _first_number(text: str) -> str | None:
    return next((line for line in text.splitlines() if line.isdigit()), None)


def test_a_runner_under_nohup_outlives_its_terminal(cluster: Cluster) -> None:
    runner = cluster.start_program("n1", "--backend", "process", under=("nohup",))
    os.kill(runner.pid, signal.SIGHUP)
    assert httpx.get(f"{runner.ready['url']}/health", trust_env=False).status_code == 200
    assert runner.next_event()["event"] == "registered"
    assert runner.process.poll() is None


@pytest.mark.parametrize("which", ["host", "runner"])
def test_running_out_of_descriptors_is_said_once_and_passes(cluster: Cluster, which: str) -> None:
    runner = cluster.start_runner("n1", "--backend", "process")
    program = cluster.host if which == "host" else runner
    place = program.ready["url"].removeprefix("http://").split(":")
    before = resource.prlimit(program.pid, resource.RLIMIT_NOFILE)
    with ExitStack() as waiting:
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (1, before[1]))
        for _ in range(3):
            waiting.enter_context(socket.create_connection((place[0], int(place[1]))))
        eventually(lambda: "out of file descriptors" in program.log.read_text())
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, before)
        eventually(lambda: "there are file descriptors again" in program.log.read_text())
    assert httpx.get(f"{program.ready['url']}/health", trust_env=False).status_code == 200
    assert program.log.read_text().count("out of file descriptors") == 1
