"""One container against another: what a hostile task can get at from inside, with a real engine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_docker_backend import ECHO, PORT, STAY, echoes, plain_container, remove_all
from tests.support import docker_images
from tests.support.docker_images import docker
from tests.support.doors import door_of, knock
from tests.support.processes import Cluster, a_cluster, eventually

pytestmark = pytest.mark.docker
BUSYBOX = "/bin/busybox"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    docker_images.require_engine()
    with a_cluster(tmp_path_factory.mktemp("isolation")) as cluster:
        cluster.start_runner("n1", "--backend", "docker")
        try:
            yield cluster
        finally:
            remove_all(cluster)


@pytest.fixture(scope="module")
def pair(cluster: Cluster) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two tasks: one that echoes, and one that is up to no good."""
    image = docker_images.busybox_image()
    victim = cluster.create(*ECHO, image=image, name="victim")
    hostile = cluster.create(*STAY, image=image, name="hostile")
    for name in ("victim", "hostile"):
        cluster.connected(name)
    return victim, hostile


def inside(task: dict[str, Any], *command: str) -> subprocess.CompletedProcess[str]:
    """What a command in the task's container comes to."""
    return subprocess.run(["docker", "exec", task["container"], *command], capture_output=True, text=True, timeout=60)


def variables(task: dict[str, Any]) -> dict[str, str]:
    """The environment that the task's own processes see."""
    return dict(line.split("=", 1) for line in inside(task, BUSYBOX, "env").stdout.splitlines() if "=" in line)


def token_of(cluster: Cluster, task: dict[str, Any]) -> str:
    """The task's token, which only its tunnel client and the runner have."""
    tasks = json.loads((cluster.state_of("n1") / "tasks.json").read_text())
    return next(str(each["tunnel_token"]) for each in tasks if each["task_id"] == task["task_id"])


def address_of(task: dict[str, Any]) -> str:
    networks = json.loads(docker("inspect", "-f", "{{json .NetworkSettings.Networks}}", task["container"]))
    return next(str(network["IPAddress"]) for network in networks.values())


def test_a_container_does_not_reach_another(cluster: Cluster, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    victim, hostile = pair
    assert echoes(cluster, "victim")  # so it does listen
    address = address_of(victim)
    tried = inside(hostile, BUSYBOX, "timeout", "2", BUSYBOX, "nc", address, str(PORT), "-e", BUSYBOX, "true")
    assert tried.returncode != 0
    assert inside(hostile, BUSYBOX, "ping", "-c", "1", "-W", "1", address).returncode != 0
    # From the node itself it is there: the refusal is no accident.
    with socket.create_connection((address, PORT), timeout=20):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="rules of the packet filter take root")
def test_a_container_reaches_nothing_of_its_node(cluster: Cluster, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, hostile = pair
    near = "169.254.77.7"  # where a cloud's own services would be, one per machine
    with (
        socket.create_server(("0.0.0.0", 0)) as service,
        plain_container(docker_images.busybox_image(), *STAY) as plain,
    ):
        port = str(service.getsockname()[1])
        gateway = docker("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", "kohakuriver")
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.connect(("192.0.2.1", 9))  # sends nothing
            nodes_own = sock.getsockname()[0]
        subprocess.run(["ip", "address", "add", f"{near}/32", "dev", "lo"], check=True)
        try:
            for address in (gateway, nodes_own, near):
                knock = (BUSYBOX, "timeout", "2", BUSYBOX, "nc", address, port, "-e", BUSYBOX, "true")
                assert inside(hostile, *knock).returncode != 0, address
                # It is there for a container on another network: the refusal is no accident.
                assert subprocess.run(["docker", "exec", plain, *knock], capture_output=True).returncode == 0, address
        finally:
            subprocess.run(["ip", "address", "del", f"{near}/32", "dev", "lo"], check=True)
    assert cluster.connected("hostile")["tunnel"]
    assert "CONTAINERS CAN REACH THE NODE" not in cluster.runners["n1"].log.read_text()


def listening(pid: int) -> set[str]:
    """Where a process listens over TCP: hexadecimal addresses and ports, as the kernel writes them."""
    links = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    table = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
    ]
    return {words[1] for words in table if words[3] == "0A" and f"socket:[{words[9]}]" in links}


def test_a_runner_listens_on_no_network_for_the_containers_that_it_made(tmp_path: Path) -> None:
    docker_images.require_engine()
    with a_cluster(tmp_path) as cluster:
        runner = cluster.start_runner("n1", "--backend", "docker", "--bind", "0.0.0.0")
        try:
            task = cluster.create(*STAY, image=docker_images.busybox_image(), name="inside")
            cluster.connected("inside")
            own_port = runner.ready["url"].rpartition(":")[2]
            assert listening(runner.pid) == {f"00000000:{int(own_port):04X}"}
            gateway = docker("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", "kohakuriver")
            if os.geteuid() == 0:
                knock = (BUSYBOX, "timeout", "2", BUSYBOX, "nc", gateway, own_port, "-e", BUSYBOX, "true")
                assert inside(task, *knock).returncode != 0
        finally:
            remove_all(cluster)


def test_a_container_can_not_register_as_another(cluster: Cluster, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    victim, hostile = pair
    own, others = token_of(cluster, hostile), token_of(cluster, victim)
    assert own
    assert others
    assert own != others
    door = door_of(cluster, hostile["container"])
    assert knock(door, victim["container"], own) == 403
    assert knock(door, victim["container"], others) == 403
    assert knock(door, victim["container"], None) == 401
    assert knock(door, "kohakuriver-vps-1", own) == 403
    assert knock(door, hostile["container"], own) == 403  # nor twice as itself


def test_a_container_finds_its_own_door_alone_and_can_put_nothing_there(
    cluster: Cluster, pair: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    _, hostile = pair
    url = variables(hostile)["KOHAKURIVER_TUNNEL_URL"]
    assert url == "unix:/.kohakuriver/runner/tunnel.sock"
    assert inside(hostile, BUSYBOX, "ls", "-A", "/.kohakuriver/runner").stdout.split() == ["tunnel.sock"]
    for change in (("touch", "/.kohakuriver/runner/more"), ("rm", "-f", "/.kohakuriver/runner/tunnel.sock")):
        tried = inside(hostile, BUSYBOX, *change)
        assert tried.returncode != 0
        assert "Read-only" in tried.stderr


def test_a_containers_token_is_in_no_place_that_others_see(
    cluster: Cluster, pair: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    victim, _ = pair
    token = token_of(cluster, victim)
    assert token not in docker("inspect", victim["container"])
    assert token not in docker("top", victim["container"], "-eo", "pid,args")
    assert token not in docker("logs", victim["container"])
    pids = docker("top", victim["container"], "-eo", "pid").split()[1:]
    for pid in pids:
        for name in ("cmdline", "environ"):
            assert token.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
    if os.geteuid() == 0:
        # On the node, its file is behind a directory that is the runner's user's alone.
        state = cluster.state_of("n1")
        assert state.stat().st_mode & 0o077 == 0
        found = subprocess.run(["grep", "-rlF", token, str(state)], capture_output=True, text=True, check=False).stdout
        assert [Path(line).name for line in found.splitlines()] == ["tasks.json"]


def test_a_removed_tasks_token_opens_nothing(cluster: Cluster, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    gone = cluster.create(*STAY, image=docker_images.busybox_image(), name="gone")
    cluster.connected("gone")
    token, door = token_of(cluster, gone), door_of(cluster, gone["container"])
    assert cluster.call("DELETE", "/api/tasks/gone")[0] == 200
    eventually(lambda: not door.parent.parent.exists())  # later, where the engine was too slow to wait for
    assert knock(door_of(cluster, pair[1]["container"]), gone["container"], token) == 403
