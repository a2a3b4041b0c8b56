"""A real virtual machine as a task: by its address alone, with services, an SSH server and reboots."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.machine import Machine, a_machine
from tests.support.processes import Cluster, a_cluster, ask, eventually

pytestmark = pytest.mark.timeout(300)

ADDRESS = "127.77.0.2"
PORT = 8800
START = f"echo-service 0.0.0.0 {PORT}\n"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with a_machine(tmp_path_factory.mktemp("vm"), START, address=ADDRESS, ports=[PORT]) as machine:
        yield machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with a_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        yield cluster


def adopted(cluster: Cluster, name: str) -> str:
    status, task = cluster.call("POST", "/api/tasks/adopt", {"address": ADDRESS, "node": "n1", "name": name})
    assert status == 201, task
    return name


def datagram(port: int, data: bytes) -> bytes | None:
    """The answer to one datagram, None where none comes within half a second."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        sock.sendto(data, ("127.0.0.1", port))
        try:
            return sock.recv(len(data) + 1)
        except (TimeoutError, ConnectionRefusedError):
            return None


def test_a_forward_reaches_tcp_and_udp_services_of_a_virtual_machine(cluster: Cluster, machine: Machine) -> None:
    task = adopted(cluster, "vm")
    payload = bytes(range(256)) * 4096
    with cluster.forward(task, PORT) as forward:
        assert ask(forward.local_port, payload) == payload
    with cluster.forward(task, PORT, proto="udp") as forward:
        assert eventually(lambda: datagram(forward.local_port, b"datagram")) == b"datagram"


def test_an_open_forward_works_again_after_the_machine_was_rebooted(cluster: Cluster, machine: Machine) -> None:
    with cluster.forward(adopted(cluster, "vm-reboot"), PORT) as forward:
        assert ask(forward.local_port, b"before") == b"before"
        machine.reset()
        machine.wait_until_up()
        assert ask(forward.local_port, b"after") == b"after"
