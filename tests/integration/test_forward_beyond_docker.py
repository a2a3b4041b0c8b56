"""What leads beyond a task's ports, with containers of a real engine: other addresses, ways back, Unix sockets."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator

import pytest

from tests.support import docker_images
from tests.support.docker_images import docker
from tests.support.up import Apart, connect

pytestmark = pytest.mark.docker
BUSYBOX = "/bin/busybox"
PING = b"GET /_ping HTTP/1.0\r\n\r\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    docker_images.require_engine()
    cluster = Apart(tmp_path_factory.mktemp("cluster"), runner_options=("--backend=docker",))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def task(cluster: Apart) -> Iterator[str]:
    """A container that was made as a task, and has the node's engine mounted."""
    image = docker_images.busybox_image()
    mount = "--mount=/var/run:/node"
    cluster.succeed("vps", "create", "--name=made", f"--image={image}", mount, "--", BUSYBOX, "sleep", "1000")
    yield "made"
    cluster.succeed("vps", "rm", "made")


@pytest.fixture
def beside(cluster: Apart) -> Iterator[tuple[str, str]]:
    """A container that was there before it was a task, and the name of one beside it on its own network."""
    image, name = docker_images.busybox_image(), f"kohakuriver-test-{uuid.uuid4().hex[:8]}"
    docker("network", "create", name)
    try:
        for each, command in ((f"{name}-db", ("httpd", "-f", "-p", "8081", "-h", "/etc")), (name, ("sleep", "1000"))):
            docker("run", "-d", f"--name={each}", f"--hostname={each}", f"--network={name}", image, BUSYBOX, *command)
        cluster.succeed("vps", "adopt", name, "--name=app")
        yield "app", f"{name}-db"
        cluster.succeed("vps", "rm", "app")
    finally:
        docker("rm", "-f", name, f"{name}-db")
        docker("network", "rm", name)


def answer(port: int, request: bytes) -> bytes:
    with connect(port) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_service_of_another_container_is_reached_by_the_name_that_its_network_has_for_it(
    cluster: Apart, beside: tuple[str, str]
) -> None:
    app, other = beside
    forward = cluster.start("forward", app, f"0:{other}:8081", "--json")
    told = answer(forward.listening(), b"GET /hostname HTTP/1.0\r\n\r\n")
    assert told.endswith(f"\r\n\r\n{other}\n".encode())
    assert forward.stop() == 0


def test_a_task_is_led_neither_to_its_node_nor_to_its_own_loopback(cluster: Apart, task: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as node:
        port = node.getsockname()[1]
        gateway = cluster.succeed("connect", task, "-T", "--", BUSYBOX, "ip", "route").split()[2]
        forward = cluster.start("forward", task, f"0:{gateway}:{port}", f"0:127.0.0.1:{port}", "--json")
        ports: dict[str, int] = {}
        while len(ports) < 2:
            event = forward.event("listening")
            ports[event["remote_host"]] = event["local_port"]
        for host, words in ((gateway, "did not answer the task"), ("127.0.0.1", "is no address that a forward may")):
            with connect(ports[host]):
                assert words in forward.event("stream_error")["message"]
        assert forward.stop() == 0


def test_the_nodes_engine_answers_by_its_socket_where_a_task_has_that(cluster: Apart, task: str) -> None:
    forward = cluster.start("forward", task, "0:unix:/node/docker.sock", "--json")
    assert answer(forward.listening(), PING).endswith(b"OK")
    assert forward.stop() == 0


def test_programs_in_a_container_reach_this_machine_by_a_port_and_by_a_unix_socket(cluster: Apart, task: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as here:
        here.settimeout(60)
        port = here.getsockname()[1]
        ways = ("-R", f"9000:{port}", "-R", f"unix:/back.sock:{port}")
        forward = cluster.start("forward", task, *ways, "0:unix:/back.sock", "--json")
        by_socket = forward.listening()  # who reaches that is in the container
        with cluster.start("connect", task, "-T", "--", BUSYBOX, "nc", "127.0.0.1", "9000").process as inside:
            with here.accept()[0] as came:
                came.sendall(b"hello\n")
            assert inside.stdout is not None
            assert inside.wait(60) == 0
        with connect(by_socket) as inner, here.accept()[0] as came:
            came.sendall(b"there")
            assert inner.recv(5) == b"there"
        assert forward.stop() == 0
