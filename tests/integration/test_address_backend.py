"""Tasks that are addresses: the runner dials them itself, with no tunnel client anywhere."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

import kohakuriver
from kohakuriver.tunnel.protocol import PONG, TUNNEL_V2
from tests.support import forked
from tests.support.processes import PATIENCE, Cluster, a_cluster, ask, eventually
from tests.support.services import echo, port_in

ELSEWHERE = "127.0.0.5"
"""Stands for a virtual machine: an address that only the runner has to reach."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with a_cluster(tmp_path_factory.mktemp("address")) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        yield cluster


@pytest.fixture
def service() -> Iterator[int]:
    """The port of an echo service that listens on ELSEWHERE alone."""
    with subprocess.Popen(echo(ELSEWHERE), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = port_in(process.stdout.readline())
        assert port is not None
        yield port
        process.kill()


def adopt(cluster: Cluster, name: str, address: str = ELSEWHERE) -> None:
    status, task = cluster.call("POST", "/api/tasks/adopt", {"address": address, "node": "n1", "name": name})
    assert status == 201, task
    assert (task["status"], task["tunnel"], task["address"]) == ("running", True, address)


def test_a_forward_reaches_a_service_at_the_address(cluster: Cluster, service: int) -> None:
    adopt(cluster, "vm")
    assert cluster.connected("vm")["container"].startswith("vm-")
    with cluster.forward("vm", service) as forward:
        assert ask(forward.local_port, b"hello") == b"hello"


def test_a_tasks_status_and_the_audit_log_say_that_a_second_tunnel_client_came(cluster: Cluster) -> None:
    adopt(cluster, "vm-twice")
    agent = cluster.call("GET", "/api/tasks/vm-twice/agent")[1]
    url = f"{agent['runner_url'].replace('http', 'ws', 1)}/ws/tunnel/{agent['container']}"
    headers = {"Authorization": f"Bearer {agent['token']}"}
    client = partial(connect, url, additional_headers=headers, subprotocols=[Subprotocol(TUNNEL_V2)], proxy=None)
    with client() as first, ThreadPoolExecutor(1) as answering:
        question = answering.submit(lambda: first.send(bytes([PONG]) + first.recv(decode=False)[1:]))
        with pytest.raises(InvalidStatus) as refused:
            client()
        question.result()
        assert refused.value.response.status_code == 409
        eventually(lambda: "a second tunnel client came" in (cluster.task("vm-twice")["message"] or ""))
    task = cluster.task("vm-twice")["task_id"]

    def told() -> dict[str, Any] | None:
        events = cluster.call("GET", f"/api/audit?task={task}")[1]["events"]
        return next((event for event in events if event["event"] == "tunnel_refused"), None)

    event = eventually(told)
    assert (event["node"], event["from"], event["count"]) == ("n1", "127.0.0.1", 1)


def test_the_token_of_a_machines_tunnel_client_is_worth_nothing_after_an_unshare(cluster: Cluster) -> None:
    adopt(cluster, "vm-shared")
    agent = cluster.call("GET", "/api/tasks/vm-shared/agent")[1]
    assert cluster.call("POST", "/api/users", {"name": "ann"})[0] == 201
    assert cluster.call("POST", "/api/tasks/vm-shared/shares", {"user": "ann"})[0] == 201
    assert cluster.call("DELETE", "/api/tasks/vm-shared/shares/ann")[0] == 200
    url = f"{agent['runner_url'].replace('http', 'ws', 1)}/ws/tunnel/{agent['container']}"
    with pytest.raises(InvalidStatus) as refused:
        connect(url, additional_headers={"Authorization": f"Bearer {agent['token']}"}, proxy=None)
    assert refused.value.response.status_code == 403
    assert cluster.call("GET", "/api/tasks/vm-shared/agent")[1]["token"] != agent["token"]


def test_a_dead_port_at_the_address_ends_the_connection(cluster: Cluster) -> None:
    adopt(cluster, "vm-dead")
    with socket.socket() as unheard:
        unheard.bind((ELSEWHERE, 0))
        with cluster.forward("vm-dead", unheard.getsockname()[1]) as forward:
            with socket.create_connection(("127.0.0.1", forward.local_port), 20) as sock:
                with contextlib.suppress(ConnectionResetError):
                    assert sock.recv(1) == b""


@pytest.mark.parametrize("action", ["stop", "restart"])
def test_stop_and_restart_say_what_can_be_done_instead(cluster: Cluster, action: str) -> None:
    adopt(cluster, f"vm-{action}")
    status, answer = cluster.call("POST", f"/api/tasks/vm-{action}/{action}")
    assert (status, answer["error"]) == (409, "not_supported")
    assert f"vps rm vm-{action}" in answer["message"]
    assert cluster.task(f"vm-{action}")["status"] == "running"


def test_a_removed_address_can_no_longer_be_reached(cluster: Cluster, service: int) -> None:
    adopt(cluster, "vm-gone")
    assert cluster.call("DELETE", "/api/tasks/vm-gone")[0] == 200
    with pytest.raises(kohakuriver.NotFoundError), cluster.forward("vm-gone", service):
        pass


def test_an_address_is_known_again_after_a_restart_of_the_runner(tmp_path: Path, service: int) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        adopt(cluster, "vm")
        cluster.runners["n1"].end()
        cluster.start_runner("n1", "--backend", "process")
        cluster.connected("vm")
        with cluster.forward("vm", service) as forward:
            assert ask(forward.local_port, b"hello") == b"hello"


def test_the_status_of_an_address_says_whether_its_machine_answers(cluster: Cluster) -> None:
    adopt(cluster, "vm-there")
    assert cluster.call("GET", "/api/tasks/vm-there/answers") == (200, {"answers": True, "reason": None})
    environment = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}
    told = forked.run(["vps", "status", "vm-there"], env=environment, stdin="", timeout=PATIENCE).stdout
    assert re.search(r"answers: +yes\n", told)


def test_a_task_that_is_no_machine_is_not_knocked_at(cluster: Cluster) -> None:
    cluster.create("sleep", "1000", name="no-vm")
    assert cluster.call("GET", "/api/tasks/no-vm/answers")[1]["error"] == "not_supported"
