"""Sockets of another network namespace, and what the kernel says is served there."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kohakuriver._frame import HEADER_SIZE, FrameWalker
from kohakuriver.runner.backends.namespace import ContainerNetwork
from kohakuriver.tunnel.container_endpoint import ContainerEndpoint
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.listeners import listening
from kohakuriver.tunnel.protocol import PROTO_TCP, PROTO_UDP
from tests.support.descriptors import without_descriptors
from tests.support.peers.fake_transport import FakeTransport

FREE = 40001  # in a network of one's own nobody else has it


@pytest.fixture
def other_network() -> Iterator[int]:
    """The pid of a process in a network of its own, whose loopback is up."""
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    command = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process.pid
        process.kill()


@pytest.mark.parametrize(
    ("bound", "found"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.7", "127.0.0.7"), ("::1", "::1"), ("::", "::1")],
)
@pytest.mark.parametrize("udp", [False, True])
def test_what_is_served_is_found_on_whichever_address_it_is(bound: str, found: str, udp: bool) -> None:
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as sock:
        sock.bind((bound, 0))
        if not udp:
            sock.listen()
        assert listening(Path("/proc/self/net"), sock.getsockname()[1], udp=udp) == [found]


def test_sockets_are_the_other_networks_and_this_process_stays_in_its_own(other_network: int) -> None:
    async def check() -> None:
        ours = Path("/proc/self/ns/net").readlink()
        with closing(ContainerNetwork(other_network)) as network:
            server = await network.open_socket(socket.AF_INET, socket.SOCK_STREAM)
            client = await network.open_socket(socket.AF_INET, socket.SOCK_STREAM)
            with server, client:
                server.bind(("127.0.0.9", FREE))
                server.listen()
                assert list(await network.addresses(FREE, udp=False)) == ["127.0.0.9"]
                await asyncio.get_running_loop().sock_connect(client, ("127.0.0.9", FREE))
        with socket.socket() as here, pytest.raises(ConnectionRefusedError):
            here.connect(("127.0.0.9", FREE))
        assert Path("/proc/self/ns/net").readlink() == ours

    asyncio.run(check())


def test_a_network_that_was_left_is_dialled_no_more(other_network: int) -> None:
    async def check() -> None:
        network = ContainerNetwork(other_network)
        network.close()
        with pytest.raises(ConnectionResetError):
            await network.open_socket(socket.AF_INET, socket.SOCK_STREAM)

    asyncio.run(check())


def test_a_process_that_is_gone_has_no_network() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(OSError, match="No such"):
        ContainerNetwork(process.pid)


class Heard(Link):
    """A link that tells a test what is said on it."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.said: asyncio.Queue[str] = asyncio.Queue()

    def send(self, data: Any, inside: bool = False) -> None:
        self.said.put_nowait(bytes(data)[2 + HEADER_SIZE :].decode())

    def post(self, frame: bytes) -> None:
        self.send(frame)


@pytest.mark.parametrize("proto", [PROTO_TCP, PROTO_UDP])
def test_a_runner_without_descriptors_says_so_of_a_port_in_another_network_and_goes_on(
    other_network: int, proto: int
) -> None:
    async def check() -> None:
        with closing(ContainerNetwork(other_network)) as network:
            endpoint = ContainerEndpoint(network=network)
            link = Heard(endpoint, FrameWalker(masked=True), masks=False)
            transport = FakeTransport()
            link.start(transport)
            endpoint.attach(link)
            with without_descriptors():
                endpoint.accept(1, proto, FREE, b"")
                assert await link.said.get() == "EMFILE: this end of the tunnel has too many open files"
            endpoint.accept(3, PROTO_TCP, FREE, b"")
            assert (await link.said.get()).startswith("ECONNREFUSED")
            transport.abort()

    asyncio.run(check())
