"""A real virtual machine as a task: by its address alone, or with a tunnel client in it; rebooted meanwhile."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.machine import GATEWAY, Machine, a_machine
from tests.support.processes import Cluster, a_cluster, ask, eventually

pytestmark = pytest.mark.timeout(300)

ADDRESS = "127.77.0.2"
PORT = 8800
INNER_PORT = 8801

# The second service listens where only a tunnel client in the machine gets to.
START = f"""
echo-service 0.0.0.0 {PORT}
echo-service 127.0.0.1 {INNER_PORT}
"""
CLIENT = "(while :; do tunnel-client --runner-url {url} --container-id {container} --token-file /token; done) &\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with a_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        yield cluster


@pytest.fixture(scope="module")
def machine(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine whose tunnel client is that of the task `inside`."""
    status, agent = cluster.call("GET", f"/api/tasks/{adopted(cluster, 'inside')}/agent")
    assert status == 200, agent
    client = CLIENT.format(url=agent["runner_url"].replace("127.0.0.1", GATEWAY), container=agent["container"])
    files = {"token": agent["token"].encode()}
    directory = tmp_path_factory.mktemp("vm")
    with a_machine(directory, START + client, address=ADDRESS, ports=[PORT], files=files) as machine:
        yield machine


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


def test_a_tunnel_client_in_the_machine_reaches_its_loopback_and_comes_back_after_a_reboot(
    cluster: Cluster, machine: Machine
) -> None:
    with cluster.forward("inside", INNER_PORT) as forward:
        assert eventually(lambda: asked(forward.local_port, b"loopback")) == b"loopback"
        machine.reset()
        machine.wait_until_up()
        assert eventually(lambda: asked(forward.local_port, b"again")) == b"again"
    with cluster.forward("inside", PORT) as forward:
        assert eventually(lambda: asked(forward.local_port, b"any address")) == b"any address"


def asked(port: int, question: bytes) -> bytes | None:
    """The answer of an echoing service, None where it is not reached."""
    try:
        return ask(port, question) or None
    except OSError:
        return None
