"""Which ports listen: tunnel clients of both kinds look at services of real processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from kohakuriver.tunnel.protocol import PROTO_TCP, PROTO_UDP, PortsAnswer, PortScope
from tests.support.hops import CLIENTS, CONTAINER, Chain, chain

Run = Callable[[Coroutine[Any, Any, None]], None]

MARK = "KOHAKURIVER_TEST_MARK=4711"
LISTENS = """
import socket, sys
tcp = socket.create_server(("127.0.0.1", 0))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 0))
print(tcp.getsockname()[1], udp.getsockname()[1], flush=True)
sys.stdin.read()
"""

both_clients = pytest.mark.parametrize("kind", CLIENTS)


@contextlib.contextmanager
def a_service(**environment: str) -> Iterator[tuple[int, int]]:
    """Another process, in a session of its own; its TCP port and its UDP port."""
    command, env = [sys.executable, "-c", LISTENS], {**os.environ, **environment}
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as service:
        assert service.stdout is not None
        tcp, udp = map(int, service.stdout.readline().split())
        yield tcp, udp
        service.kill()


async def looked(hops: Chain, scope: PortScope, mark: str = "") -> PortsAnswer:
    tunnel = hops.server.hub.tunnel_of(CONTAINER)
    assert tunnel is not None
    answer = await tunnel.ask_ports(scope, mark.encode())
    assert answer is not None
    return answer


def among(answer: PortsAnswer) -> dict[tuple[int, int], tuple[str, bytes]]:
    return {(port.proto, port.port): (str(port.address), port.program) for port in answer.ports}


@both_clients
def test_a_port_is_told_while_it_listens_with_its_address_and_program(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops:
            await hops.tunnel(kind)
            with a_service() as (tcp, udp):
                for scope in (PortScope.NETWORK, PortScope.SEEN):
                    found = among(await looked(hops, scope))
                    for place in ((PROTO_TCP, tcp), (PROTO_UDP, udp)):
                        address, program = found[place]
                        assert address == "127.0.0.1"
                        assert program.startswith(b"python")
            assert (PROTO_TCP, tcp) not in among(await looked(hops, PortScope.NETWORK))

    run(main())


@both_clients
def test_of_a_tasks_own_ports_no_other_process_of_the_node_is_told(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops:
            await hops.tunnel(kind)
            name, _, value = MARK.partition("=")
            with (
                a_service(**{name: value}) as (own, _),
                a_service() as (other, _),
                a_service(**{name: value + "2"}) as (
                    like_it,
                    _,
                ),
            ):
                found = among(await looked(hops, PortScope.OWN, MARK))
                assert (PROTO_TCP, own) in found
                assert (PROTO_TCP, other) not in found
                assert (PROTO_TCP, like_it) not in found

    run(main())


@both_clients
def test_what_the_client_itself_has_open_is_not_told(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops:
            await hops.tunnel(kind)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]  # the Python client runs in this process
                found = among(await looked(hops, PortScope.NETWORK))
                assert ((PROTO_TCP, port) in found) == (kind == "rust")

    run(main())
