"""Each task's own way to its runner, without an engine: process tasks, and who else knocks at their doors."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.doors import answer, door_of, knock, request
from tests.support.processes import Cluster, a_cluster, ask, eventually
from tests.support.services import echo, port_in

FOR_LONG = (sys.executable, "-c", "import time; time.sleep(10**6)")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with a_cluster(tmp_path_factory.mktemp("doors")) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        yield cluster


def record_of(cluster: Cluster, task: dict[str, Any]) -> dict[str, Any]:
    tasks = json.loads((cluster.state_of("n1") / "tasks.json").read_text())
    return next(dict(each) for each in tasks if each["task_id"] == task["task_id"])


def echo_port(cluster: Cluster, task: dict[str, Any]) -> int:
    return eventually(lambda: port_in(cluster.log_of(task)))


@pytest.mark.parametrize("client", ["rust", "python"])
def test_a_process_task_goes_to_its_runner_by_a_socket_of_its_own_that_is_gone_with_it(
    client: str, tmp_path: Path
) -> None:
    env = {} if client == "rust" else {"KOHAKURIVER_TUNNEL_CLIENT": "/nowhere/tunnel-client"}
    with a_cluster(tmp_path) as cluster:
        cluster.start_runner("n1", "--backend", "process", env=env)
        task = cluster.create(*echo(), name="web")
        cluster.connected("web")
        door = door_of(cluster, task["container"])
        assert record_of(cluster, task)["tunnel_url"] == f"unix:{door}"
        with cluster.forward("web", echo_port(cluster, task)) as forward:
            assert ask(forward.local_port, b"hello") == b"hello"
        assert [stat.S_IMODE(each.stat().st_mode) for each in (door.parent, door)] == [0o700, 0o600]
        assert cluster.call("POST", "/api/tasks/web/restart")[0] == 200
        cluster.connected("web")
        assert cluster.call("DELETE", "/api/tasks/web")[0] == 200
        assert not door.parent.exists()


def test_a_good_token_at_the_door_of_another_task_is_refused_and_told_of(cluster: Cluster) -> None:
    victim, thief = (cluster.create(*FOR_LONG, name=name) for name in ("victim", "thief"))
    for name in ("victim", "thief"):
        cluster.connected(name)
    token = record_of(cluster, victim)["tunnel_token"]
    own, others = (door_of(cluster, task["container"]) for task in (victim, thief))
    assert knock(others, victim["container"], token) == 403
    message = eventually(lambda: cluster.task("victim")["message"])
    assert f"its tunnel's token was used from the socket of {thief['container']}, where it does not run" in message
    assert knock(own, victim["container"], token) == 403, "its own client has it"
    assert knock(own, victim["container"], None) == 401
    assert knock(own, thief["container"], record_of(cluster, thief)["tunnel_token"]) == 403
    assert cluster.task("victim")["tunnel"]


def test_a_good_token_of_a_task_with_a_door_opens_nothing_over_the_network(cluster: Cluster) -> None:
    task = cluster.create(*FOR_LONG, name="at-its-door")
    cluster.connected("at-its-door")
    host, _, port = cluster.runners["n1"].ready["url"].removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), 30) as sock:
        sock.sendall(request(f"/ws/tunnel/{task['container']}", record_of(cluster, task)["tunnel_token"]))
        assert sock.recv(4096).split()[1] == b"403"
    assert "from 127.0.0.1, where it does not run" in eventually(lambda: cluster.task("at-its-door")["message"])


def test_there_is_nothing_behind_a_door_but_the_tunnel(cluster: Cluster) -> None:
    task = cluster.create(*FOR_LONG, name="curious")
    cluster.connected("curious")
    door = door_of(cluster, task["container"])
    for path in ("/health", "/api/tasks", "/docs", "/openapi.json"):
        assert answer(door, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) == 404
    assert answer(door, request(f"/ws/forward/{task['container']}/80", None)) == 404


def test_a_client_without_a_token_is_let_in_at_its_own_door_alone(tmp_path: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.start_runner("n1", "--backend", "process", "--allow-anonymous")
        task = cluster.create(*FOR_LONG, name="web")
        cluster.connected("web")
        door = door_of(cluster, task["container"])
        assert knock(door, "kohakuriver-vps-1", None) == 403


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files take root")
def test_other_users_of_the_node_do_not_reach_a_door(cluster: Cluster) -> None:
    task = cluster.create(*FOR_LONG, name="closed")
    cluster.connected("closed")
    door = door_of(cluster, task["container"])
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            knock(door, task["container"], None)
        except PermissionError:
            os._exit(0)
        except BaseException:
            os._exit(1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
