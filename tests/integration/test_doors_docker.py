"""Containers reach their runner by a socket of their own: without a network, as anybody, after any restart."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_docker_backend import ECHO, PORT, STAY, echoes, echoes_again, remove_all, with_docker
from tests.support import docker_images
from tests.support.docker_images import docker, make_image
from tests.support.doors import door_of
from tests.support.processes import PATIENCE, Cluster, a_cluster, eventually
from tests.support.ssh import Users, ours
from tests.support.up import connect
from tests.support.up import echoes as service_echoes

DATAGRAMS = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
while True:
    data, address = sock.recvfrom(65536)
    sock.sendto(data, address)
"""

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("engine")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with with_docker(tmp_path_factory.mktemp("doors")) as cluster:
        yield cluster


def interfaces(container: str) -> list[str]:
    """What network interfaces a container has."""
    table = docker("exec", container, "/bin/busybox", "cat", "/proc/net/dev")
    return [line.partition(":")[0].strip() for line in table.splitlines()[2:]]


@contextmanager
def datagrams_in(pid: str) -> Iterator[int]:
    """A port in a process' network that sends datagrams back."""
    command = ["nsenter", "-t", pid, "-n", sys.executable, "-c", DATAGRAMS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def test_a_container_without_a_network_has_forwards_terminals_copies_and_ssh(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    users = Users(tmp_path_factory.mktemp("ssh"), ours())
    with ExitStack() as stack:
        stack.callback(users.close)
        image = docker_images.busybox_image()
        create = ("vps", "create", "--name", "alone", "--image", image, "--network", "none", "--ssh")
        users.succeed(*create, "--", *ECHO)
        stack.callback(users.succeed, "vps", "rm", "alone")
        task = json.loads(users.succeed("vps", "status", "alone", "--json"))
        assert task["network"] == "none"
        assert interfaces(task["container"]) == ["lo"]
        with connect(users.start("forward", "alone", f"0:{PORT}", "--json").listening()) as connection:
            assert service_echoes(connection)
        assert users.succeed("connect", "alone", "--", "/bin/busybox", "echo", "by", "terminal") == "by terminal\n"
        by_ssh = users.ssh("-l", "root", "alone.kohakuriver", "/bin/busybox echo by ssh")
        assert by_ssh.stdout == b"by ssh\n", by_ssh.stderr
        (tmp_path / "file").write_bytes(os.urandom(1 << 16))
        users.succeed("cp", str(tmp_path / "file"), "alone:/file")
        users.succeed("cp", "alone:/file", str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
        if os.geteuid() == 0:  # else nobody enters its network, and the image has no program for datagrams
            port = stack.enter_context(datagrams_in(docker("inspect", "-f", "{{.State.Pid}}", task["container"])))
            local = users.start("forward", "alone", f"0:{port}", "--proto", "udp", "--json").listening()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(("127.0.0.1", local))
                sock.send(b"by datagram")
                assert sock.recv(100) == b"by datagram"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stream_by_a_door_goes_on_when_the_runner_was_restarted(
    tmp_path: Path, busybox: str, number: signal.Signals
) -> None:
    with with_docker(tmp_path) as cluster:
        task = cluster.create(*ECHO, image=busybox, name="web", network="none")
        cluster.connected("web")
        assert echoes(cluster, "web")
        with (
            cluster.forward("web", PORT) as forward,
            socket.create_connection(("127.0.0.1", forward.local_port)) as sock,
        ):
            sock.settimeout(60)
            sock.sendall(b"before")
            assert sock.recv(6, socket.MSG_WAITALL) == b"before"
            cluster.runners["n1"].end(number)
            sock.sendall(b"behind")
            cluster.start_runner("n1", "--backend", "docker")
            assert sock.recv(6, socket.MSG_WAITALL) == b"behind"
        assert docker("top", task["container"], "-o", "pid,args").count("tunnel-client") == 1


def test_a_door_is_there_after_every_restart_of_its_container_and_gone_with_its_task(
    cluster: Cluster, busybox: str
) -> None:
    task = cluster.create(*ECHO, image=busybox, name="again", network="none")
    cluster.connected("again")
    docker("restart", "-t", "0", task["container"])
    assert echoes_again(cluster, "again")
    assert cluster.call("POST", "/api/tasks/again/stop")[0] == 200
    cluster.ended("again")
    docker("start", task["container"])
    assert echoes_again(cluster, "again")
    docker("rm", "-f", task["container"])
    cluster.ended("again")
    assert cluster.call("POST", "/api/tasks/again/restart")[0] == 200  # made anew, from nothing
    assert echoes(cluster, "again")
    assert interfaces(task["container"]) == ["lo"]
    door = door_of(cluster, task["container"])
    assert door.is_socket()
    assert cluster.call("DELETE", "/api/tasks/again")[0] == 200
    eventually(lambda: not door.parent.parent.exists())  # later, where the engine was too slow to wait for


def test_whoever_a_container_runs_as_passes_its_door_and_other_users_of_the_node_do_not_get_there(
    cluster: Cluster,
) -> None:
    binary = Path("/bin/busybox").read_bytes()
    image = make_image("anybody", {"bin/busybox": binary}, "USER 12345:12345")
    task = cluster.create(*ECHO, image=image, name="anybody")
    cluster.connected("anybody")
    assert echoes(cluster, "anybody")
    door = door_of(cluster, task["container"])
    assert [stat.S_IMODE(each.stat().st_mode) for each in (door.parent, door)] == [0o755, 0o666]
    assert [stat.S_IMODE(each.stat().st_mode) & 0o077 for each in (door.parents[1], cluster.state_of("n1"))] == [0, 0]


def test_a_container_that_can_not_be_made_leaves_no_door(cluster: Cluster, busybox: str) -> None:
    status, answer = cluster.call(
        "POST", "/api/tasks", {"image": busybox, "command": ["/none"], "mounts": ["/none:/x"]}
    )
    assert status == 409, answer
    doors = {path.parent.name for path in (cluster.state_of("n1") / "tasks").glob("*/door")}
    assert doors == {task["container"] for task in cluster.call("GET", "/api/tasks")[1]}


@contextmanager
def an_engine_over_the_network(directory: Path) -> Iterator[dict[str, str]]:
    """The engine of this machine, at a TCP port: the environment that names it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listens = f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr"
    with subprocess.Popen(["socat", listens, "UNIX-CONNECT:/var/run/docker.sock"]) as relay:
        try:
            yield {"DOCKER_HOST": f"tcp://127.0.0.1:{port}"}
        finally:
            relay.terminate()


def test_containers_of_an_engine_over_the_network_reach_their_runner_over_tcp_which_is_said_once(
    tmp_path: Path, busybox: str
) -> None:
    with an_engine_over_the_network(tmp_path) as env, a_cluster(tmp_path) as cluster, ExitStack() as stack:
        stack.callback(remove_all, cluster)
        runner = cluster.start_runner("n1", "--backend", "docker", env=env)
        eventually(lambda: "docker" in (cluster.node("n1") or {})["backends"])
        for name in ("one", "two"):
            task = cluster.create(*ECHO, image=busybox, name=name)
            cluster.connected(name)
        assert docker("exec", task["container"], "/bin/sh", "-c", "echo $KOHAKURIVER_TUNNEL_URL").startswith("http://")
        assert echoes(cluster, "two")
        assert runner.log.read_text().count("containers reach this runner over TCP") == 1
        wanted = {"image": busybox, "command": list(STAY), "network": "none"}
        status, answer = cluster.call("POST", "/api/tasks", wanted)
        assert (status, answer["error"]) == (409, "no_door")
        assert "its engine is reached over the network" in answer["message"]


def test_a_container_that_was_made_with_a_door_keeps_it_where_new_ones_get_none(tmp_path: Path, busybox: str) -> None:
    with an_engine_over_the_network(tmp_path) as env, with_docker(tmp_path) as cluster:
        task: dict[str, Any] = cluster.create(*ECHO, image=busybox, name="before")
        cluster.connected("before")
        cluster.runners["n1"].end()
        cluster.start_runner("n1", "--backend", "docker", env=env)
        cluster.connected("before")
        assert echoes(cluster, "before")
        assert docker("top", task["container"], "-o", "pid,args").count("tunnel-client") == 1
