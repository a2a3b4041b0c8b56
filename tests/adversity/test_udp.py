"""UDP through the four hops: borders, sources, expiry, drops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

import pytest

from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.udp import HELD_BYTES, HELD_DATAGRAMS, HeldDatagrams, family_of
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from tests.support.hops import CLIENTS, Chain, asked, chain, echo, service, until

Run = Callable[[Coroutine[Any, Any, None]], None]
clients = pytest.mark.parametrize("kind", CLIENTS)


class Echo(asyncio.DatagramProtocol):
    """A service that sends back what comes, and knows whom it came from."""

    def __init__(self) -> None:
        self.sources: dict[object, int] = {}
        self.sock: socket.socket

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.sources[addr] = self.sources.get(addr, 0) + 1
        self.sock.sendto(data, addr)


@contextlib.asynccontextmanager
async def udp_echo(port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[tuple[Echo, int]]:
    sock = socket.socket(family_of(host), socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.setblocking(False)
    sock.bind((host, port))
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(Echo, sock=sock)
    protocol.sock = sock
    try:
        yield protocol, sock.getsockname()[1]
    finally:
        transport.close()
        await asyncio.sleep(0)


class Peer(asyncio.DatagramProtocol):
    """One local source address."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.received.put_nowait(data)

    async def ask(self, data: bytes) -> bytes:
        self.sock.send(data)
        return await self.received.get()


@contextlib.asynccontextmanager
async def peer(port: int) -> AsyncIterator[Peer]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.connect(("127.0.0.1", port))
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(lambda: Peer(sock), sock=sock)
    try:
        yield protocol
    finally:
        transport.close()
        await asyncio.sleep(0)


async def forwarded(user: UserEndpoint, port: int) -> int:
    return (await user.listen_udp("127.0.0.1", 0, port)).port


async def ready(hops: Chain, kind: str, config: EndpointConfig | None = None) -> UserEndpoint:
    await hops.tunnel(kind)
    return await hops.user(config=config)


def test_datagrams_that_wait_for_a_link_keep_their_order_and_are_not_more_than_there_is_room_for() -> None:
    sent: list[int] = []
    held = HeldDatagrams()
    kept = [held.keep(100, partial(sent.append, number)) for number in range(HELD_DATAGRAMS + 5)]
    assert kept == [True] * HELD_DATAGRAMS + [False] * 5
    assert sent == []
    held.send()
    assert sent == list(range(HELD_DATAGRAMS))
    large = HeldDatagrams()
    assert [large.keep(HELD_BYTES // 2, lambda: None) for _ in range(3)] == [True, True, False]


@clients
def test_datagrams_keep_their_borders_up_to_the_largest_and_down_to_the_empty_one(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, udp_echo() as (_, port):
            async with peer(await forwarded(await ready(hops, kind), port)) as one:
                for size in (1, 0, 1400, 9000, 65_507, 0, 2):
                    data = os.urandom(size)
                    assert await one.ask(data) == data
                for number in range(50):
                    one.sock.send(b"%d" % number)
                assert [await one.received.get() for _ in range(50)] == [b"%d" % number for number in range(50)]

    run(main())


@clients
@pytest.mark.parametrize("host", ["::1", "127.0.0.77"])
def test_datagrams_reach_a_service_that_is_bound_to_one_address_alone(run: Run, kind: str, host: str) -> None:
    async def main() -> None:
        async with chain() as hops, udp_echo(host=host) as (_, port):
            async with peer(await forwarded(await ready(hops, kind), port)) as one:
                assert await one.ask(b"here?") == b"here?"

    run(main())


@clients
def test_two_sources_are_two_sources_to_the_service_and_never_mixed(run: Run, kind: str) -> None:
    async def talk(one: Peer, name: bytes) -> None:
        for number in range(100):
            assert await one.ask(name + b"%d" % number) == name + b"%d" % number

    async def main() -> None:
        async with chain() as hops, udp_echo() as (echoed, port):
            user = await ready(hops, kind)
            other = await hops.user()
            local = await forwarded(user, port)
            async with peer(local) as a, peer(local) as b, peer(await forwarded(other, port)) as c:
                await asyncio.gather(talk(a, b"a"), talk(b, b"b"), talk(c, b"c"))
            assert sorted(echoed.sources.values()) == [100, 100, 100]

    run(main())


@clients
def test_a_source_that_is_silent_is_forgotten_counted_from_its_last_datagram(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, udp_echo() as (echoed, port):
            user = await ready(hops, kind, EndpointConfig(udp_idle=0.4))
            async with peer(await forwarded(user, port)) as one:
                for _ in range(8):
                    await one.ask(b"still here")
                    await asyncio.sleep(0.1)  # well within the time, and longer than it in all
                assert len(echoed.sources) == 1
                await until(lambda: user.stream_count == 0)
                await hops.at_rest()
                assert await one.ask(b"back") == b"back"
                assert len(echoed.sources) == 2

    run(main())


@clients
def test_with_too_many_sources_the_one_idle_longest_goes(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, udp_echo() as (echoed, port), contextlib.AsyncExitStack() as stack:
            user = await ready(hops, kind, EndpointConfig(udp_peers=3))
            local = await forwarded(user, port)
            peers = [await stack.enter_async_context(peer(local)) for _ in range(4)]
            for one in (0, 1, 2, 0, 3):  # 1 is the one that was silent longest
                assert await peers[one].ask(b"x") == b"x"
            assert user.stream_count == 3
            for one in (2, 0, 3):
                assert await peers[one].ask(b"y") == b"y"
            assert len(echoed.sources) == 4
            assert await peers[1].ask(b"y") == b"y"
            assert len(echoed.sources) == 5

    run(main())


@clients
def test_a_service_that_dies_and_comes_back_is_reached_again(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, contextlib.AsyncExitStack() as stack:
            user = await ready(hops, kind)
            async with udp_echo() as (_, port):
                one = await stack.enter_async_context(peer(await forwarded(user, port)))
                assert await one.ask(b"first") == b"first"
            for _ in range(5):
                one.sock.send(b"into the void")
            link = user.link
            assert link is not None
            async with udp_echo(port):

                async def ask_until_answered() -> bytes:
                    while True:
                        one.sock.send(b"again")
                        with contextlib.suppress(asyncio.TimeoutError):
                            return await asyncio.wait_for(one.received.get(), 0.1)

                assert await ask_until_answered() in {b"again", b"into the void"}
            assert user.stream_count == 1
            assert user.totals.opened == 1

    run(main())


@clients
def test_datagrams_that_find_no_room_are_dropped_and_counted_and_stop_no_tcp_stream(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, udp_echo() as (_, port), service(echo) as tcp_port:
            user = await ready(hops, kind, EndpointConfig(udp_queue=0))
            local = await forwarded(user, port)
            tcp = (await user.listen_tcp("127.0.0.1", 0, tcp_port)).port
            async with peer(local) as one:
                assert await one.ask(b"x") == b"x"
                link = user.link
                assert link is not None
                link.pause_writing()
                link.send(b"")  # something waits
                link.out.queued += 1
                one.sock.send(b"no room")
                await until(lambda: user.totals.udp_dropped == 1)
                link.out.queued -= 1
                link.resume_writing()
                assert await one.ask(b"y") == b"y"
            assert await asked(tcp, b"tcp") == b"tcp"

    run(main())


@clients
def test_datagrams_that_no_service_takes_are_told_and_each_is_counted_once(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops:
            user = await ready(hops, kind)
            told: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
            user.on_stream_error = lambda port, text: told.put_nowait((port, text.code))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as freed:
                freed.bind(("127.0.0.1", 0))
                port = freed.getsockname()[1]
            async with peer(await forwarded(user, port)) as one:
                one.sock.send(b"is anybody there?")
                assert await told.get() == (port, "ECONNREFUSED")
                assert (user.totals.udp_refused, user.stream_count) == (1, 0)
                for _ in range(3):
                    one.sock.send(b"and now?")
                await until(lambda: user.stream_count == 1)
                assert await told.get() == (port, "ECONNREFUSED")  # later, and of all three
                assert (user.totals.udp_refused, user.stream_count) == (4, 0)
            # What the container's end counts reaches the runner; what it told the user's end is not counted again.
            assert user.totals.udp_dropped == 0
            await until(lambda: hops.server.snapshot()["udp_dropped"] == 4)

    run(main())


@clients
def test_the_user_is_told_of_a_service_that_has_answered_and_then_died_and_reaches_the_next_one(
    run: Run, kind: str
) -> None:
    async def main() -> None:
        async with chain() as hops, contextlib.AsyncExitStack() as stack:
            user = await ready(hops, kind)
            told: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
            user.on_stream_error = lambda port, text: told.put_nowait((port, text.code))
            async with udp_echo() as (_, port):
                one = await stack.enter_async_context(peer(await forwarded(user, port)))
                assert await one.ask(b"first") == b"first"
            failure = None
            while failure is None:
                one.sock.send(b"into the void")
                with contextlib.suppress(asyncio.TimeoutError):
                    failure = await asyncio.wait_for(told.get(), 0.1)
            assert failure == (port, "ECONNREFUSED")
            assert user.totals.udp_refused >= 2
            await until(lambda: hops.server.snapshot()["udp_dropped"] >= 2)
            async with udp_echo(port):
                assert await one.ask(b"again") == b"again"

    run(main())


@clients
def test_a_service_that_comes_to_another_address_is_found_by_a_stream_that_was_refused(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, contextlib.AsyncExitStack() as stack:
            user = await ready(hops, kind)
            async with udp_echo(host="127.0.0.7") as (_, port):
                one = await stack.enter_async_context(peer(await forwarded(user, port)))
                assert await one.ask(b"first") == b"first"
            async with udp_echo(port, host="127.0.0.8"):

                async def ask_until_answered() -> bytes:
                    while True:
                        one.sock.send(b"again")
                        with contextlib.suppress(asyncio.TimeoutError):
                            return await asyncio.wait_for(one.received.get(), 0.1)

                assert await ask_until_answered() == b"again"

    run(main())
