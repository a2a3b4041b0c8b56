"""Nobody takes a task's tunnel away: real containers, a real thief in another one."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_docker_backend import (
    ECHO,
    PORT,
    STAY,
    adopt,
    echoes,
    echoes_again,
    plain_container,
    with_docker,
)
from tests.support.docker_images import docker, make_image
from tests.support.doors import door_of, knock
from tests.support.processes import Cluster, ask, eventually

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("engine")]

TOKEN = "/.kohakuriver/tunnel/token"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with with_docker(tmp_path_factory.mktemp("token")) as cluster:
        yield cluster


def in_container(container: str, *command: str, user: str = "0", given: str = "") -> subprocess.CompletedProcess[str]:
    argv = ["docker", "exec", "-i", "-u", user, container, "/bin/busybox", *command]
    return subprocess.run(argv, input=given, capture_output=True, text=True, check=False)


def record_of(cluster: Cluster, container: str) -> dict[str, Any]:
    """What the runner keeps of a task: its token, too."""
    tasks = json.loads((cluster.state_of("n1") / "tasks.json").read_text())
    return next(dict(task) for task in tasks if task["container"] == container)


def token_of(cluster: Cluster, container: str) -> str:
    return str(record_of(cluster, container)["tunnel_token"])


def shown(cluster: Cluster, container: str, token: str, *, place: str) -> int:
    """The status that a tunnel client in the container `place` gets, which has the token of `container`."""
    return knock(door_of(cluster, place), container, token)


def refusals(cluster: Cluster, task_id: int) -> list[dict[str, Any]]:
    """What the audit log has of tunnel clients that a task's node refused."""
    events = cluster.call("GET", f"/api/audit?task={task_id}")[1]["events"]
    return [event for event in events if event["event"] == "tunnel_refused"]


@contextmanager
def open_stream(cluster: Cluster, task: str) -> Iterator[socket.socket]:
    """A connection to the echo service of a task, on which a byte went there and back."""
    with cluster.forward(task, PORT) as forward:
        eventually(lambda: _answers(forward.local_port))
        with socket.create_connection(("127.0.0.1", forward.local_port), 30) as sock:
            still_echoes(sock)
            yield sock


def _answers(port: int) -> bool:
    try:
        return ask(port, b"?") == b"?"
    except ConnectionError:
        return False


def still_echoes(sock: socket.socket) -> None:
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"


@pytest.mark.parametrize("user", ["", "12345:12345", "app"])
def test_no_user_of_a_container_reads_the_token_once_its_tunnel_client_has_it(
    cluster: Cluster, busybox: str, user: str
) -> None:
    binary = Path("/bin/busybox").read_bytes()
    files = {"bin/busybox": binary, "bin/sh": binary, "etc/passwd": b"root:x:0:0::/:\napp:x:4711:4711::/:\n"}
    image = make_image("user", files, *([f"USER {user}"] if user else []))
    seen = f"test -e {TOKEN} || echo none; exec /bin/busybox sleep 100000"
    task = cluster.create("/bin/sh", "-c", seen, image=image)
    cluster.connected(task["task_id"])
    assert docker("logs", task["container"]).endswith("none")  # it was gone before the command began
    for reader in ("65534", "0", user or "0"):
        assert in_container(task["container"], "cat", TOKEN, user=reader).returncode != 0
    environment = in_container(task["container"], "cat", "/proc/1/environ").stdout
    assert token_of(cluster, task["container"]) not in environment + docker("inspect", task["container"])


def test_a_stolen_token_opens_nothing_in_another_container_and_the_owner_hears_of_it(
    cluster: Cluster, busybox: str
) -> None:
    victim = cluster.create(*ECHO, image=busybox, name="victim")
    thief = cluster.create(*STAY, image=busybox, name="thief")
    cluster.connected("victim")
    cluster.connected("thief")
    token = token_of(cluster, victim["container"])
    with open_stream(cluster, "victim") as sock:
        assert shown(cluster, victim["container"], token, place=thief["container"]) == 403
        still_echoes(sock)
        message = eventually(lambda: cluster.task("victim")["message"])
        address = f"the socket of {thief['container']}"
        assert f"its tunnel's token was used from {address}, where it does not run" in message
        (event,) = eventually(lambda: refusals(cluster, victim["task_id"]))
        assert (event["node"], event["from"]) == ("n1", address)
        # Nor in its own, where its client has it:
        assert shown(cluster, victim["container"], token, place=victim["container"]) == 403
        still_echoes(sock)
        eventually(lambda: "a second tunnel client came" in cluster.task("victim")["message"])


def test_a_restart_makes_the_token_of_before_worthless(cluster: Cluster, busybox: str) -> None:
    task = cluster.create(*ECHO, image=busybox, name="restarted")
    cluster.connected("restarted")
    before = token_of(cluster, task["container"])
    assert cluster.call("POST", "/api/tasks/restarted/restart")[0] == 200
    cluster.connected("restarted")
    assert token_of(cluster, task["container"]) != before
    assert shown(cluster, task["container"], before, place=task["container"]) == 403
    assert echoes(cluster, "restarted")


def test_a_container_that_is_restarted_past_us_gets_a_new_token(cluster: Cluster, busybox: str) -> None:
    task = cluster.create(*ECHO, image=busybox, name="past-us")
    cluster.connected("past-us")
    before = token_of(cluster, task["container"])
    docker("restart", "-t", "0", task["container"])
    eventually(lambda: token_of(cluster, task["container"]) != before)
    assert echoes_again(cluster, "past-us")
    assert in_container(task["container"], "cat", TOKEN).returncode != 0


def test_an_unshare_makes_the_token_of_before_worthless_and_interrupts_nobody(cluster: Cluster, busybox: str) -> None:
    task = cluster.create(*ECHO, image=busybox, name="unshared")
    cluster.connected("unshared")
    before = token_of(cluster, task["container"])
    assert cluster.call("POST", "/api/users", {"name": "ann"})[0] == 201
    with open_stream(cluster, "unshared") as sock:
        assert cluster.call("POST", "/api/tasks/unshared/shares", {"user": "ann"})[0] == 201
        assert cluster.call("DELETE", "/api/tasks/unshared/shares/ann")[0] == 200
        assert token_of(cluster, task["container"]) != before
        eventually(lambda: in_container(task["container"], "cat", TOKEN).returncode != 0)  # its client has it
        assert shown(cluster, task["container"], before, place=task["container"]) == 403
        still_echoes(sock)


def test_a_runner_that_was_killed_takes_its_containers_clients_in_again_by_the_same_tokens(
    tmp_path: Path, busybox: str
) -> None:
    with with_docker(tmp_path) as cluster, plain_container(busybox, *ECHO) as container:
        ours = cluster.create(*ECHO, image=busybox, name="ours")
        theirs = adopt(cluster, container, "theirs")
        for name in ("ours", "theirs"):
            cluster.connected(name)
        kept = ("tunnel_token", "tunnel_client", "tunnel_from", "token_start", "exec_id")
        records = [record_of(cluster, task["container"]) for task in (ours, theirs)]
        assert all(record["tunnel_client"] and record["tunnel_from"] for record in records)
        cluster.runners["n1"].end(signal.SIGKILL)
        cluster.start_runner("n1", "--backend", "docker")
        for name in ("ours", "theirs"):
            cluster.connected(name)
            assert echoes(cluster, name)
        for record in records:
            now = record_of(cluster, record["container"])
            assert {name: now[name] for name in kept} == {name: record[name] for name in kept}


def test_a_runner_that_ended_while_it_renewed_a_token_renews_it_when_it_is_back(tmp_path: Path, busybox: str) -> None:
    with with_docker(tmp_path) as cluster, plain_container(busybox, *ECHO) as container:
        ours = cluster.create(*ECHO, image=busybox, name="ours")
        theirs = adopt(cluster, container, "theirs")
        for name in ("ours", "theirs"):
            cluster.connected(name)
        cluster.runners["n1"].end(signal.SIGKILL)
        file = cluster.state_of("n1") / "tasks.json"
        due = {"tunnel_token": "laid down nowhere", "tunnel_client": "", "token_start": None}
        file.write_text(json.dumps([{**task, **due} for task in json.loads(file.read_text())]))
        cluster.start_runner("n1", "--backend", "docker")
        for task in (ours, theirs):
            cluster.connected(task["task_id"])
            assert echoes(cluster, task["name"])
            assert token_of(cluster, task["container"]) != "laid down nowhere"
        assert docker("top", container).count("--container-id") == 1


def test_a_container_on_the_nodes_own_network_is_taken_in_from_the_node_alone(cluster: Cluster, busybox: str) -> None:
    with plain_container(busybox, *STAY, options=("--network", "host")) as container:
        task = adopt(cluster, container, "hosted")
        cluster.connected("hosted")
        record = record_of(cluster, task["container"])
        assert record["tunnel_from"] == []
        thief = cluster.create(*STAY, image=busybox)
        cluster.connected(thief["task_id"])
        assert shown(cluster, task["container"], record["tunnel_token"], place=thief["container"]) == 403
