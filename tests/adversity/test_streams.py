"""Streams that stall, that are slow, that are many: none of them hurts another, and no byte is lost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from kohakuriver.tunnel.windows import ReceiveWindow
from tests.support.hops import CLIENTS, asked, chain, dial, echo, service, until
from tests.support.network.faults import fault_proxy

Run = Callable[[Coroutine[Any, Any, None]], None]
clients = pytest.mark.parametrize("kind", CLIENTS)
SMALL = EndpointConfig(first_window=16_384, max_window=16_384)


def pattern(seed: object, size: int) -> bytes:
    return random.Random(str(seed)).randbytes(size)


async def forwarded(user: UserEndpoint, port: int) -> int:
    return (await user.listen_tcp("127.0.0.1", 0, port)).port


def tcp_streams(endpoint: UserEndpoint) -> list[TcpStream]:
    members = [] if endpoint.streams is None else endpoint.streams.by_id.values()
    return [stream for stream in members if isinstance(stream, TcpStream)]


def is_full(stream: TcpStream) -> bool:
    """Whether the peer has sent all that it was granted."""
    window = stream.core.inbound
    return isinstance(window, ReceiveWindow) and window.received == window.granted


@contextlib.asynccontextmanager
async def slow_reader(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that reads nothing by itself and for which the kernel keeps little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@clients
def test_readers_that_stop_stop_nobody_else_and_go_on_where_they_stopped(run: Run, kind: str) -> None:
    data = pattern("torrent", 6 << 20)

    async def torrent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
            writer.close()

    async def main() -> None:
        async with (
            chain() as hops,
            service(torrent) as port,
            service(echo) as echo_port,
            contextlib.AsyncExitStack() as s,
        ):
            await hops.tunnel(kind)
            user, other = await hops.user(config=SMALL), await hops.user()
            local = await forwarded(user, port)
            stalled = [(await s.enter_async_context(slow_reader(local)))[0] for _ in range(20)]
            await until(lambda: len(streams) == 20 if (streams := tcp_streams(user)) else False)
            streams = tcp_streams(user)
            # Each has got all that its window allows, and its reader takes nothing.
            await until(lambda: all(is_full(x) for x in streams))

            async with dial(local) as (reader, _):
                assert await reader.readexactly(len(data)) == data
            for endpoint in (user, other):
                assert await asked(await forwarded(endpoint, echo_port), b"echo" * 50_000) == b"echo" * 50_000

            assert all(stream.core.held <= SMALL.first_window for stream in streams)
            tunnels, sessions = hops.server.hub.tunnels.values(), hops.server.hub.sessions
            queued = sum(tunnel.link.out.queued for tunnel in tunnels) + sum(user.link.out.queued for user in sessions)
            assert queued <= 20 * SMALL.first_window
            for session in hops.proxy.sessions:
                assert session.user.link.out.queued <= 20 * SMALL.first_window

            assert [await reader.read() for reader in stalled[:5]] == [data] * 5

    run(main())


@clients
def test_services_that_stop_reading_stop_nobody_else(run: Run, kind: str) -> None:
    gate = asyncio.Event()
    sums: list[str] = []

    async def lazy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await gate.wait()
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        sums.append(hashlib.sha256(await reader.read()).hexdigest())
        writer.close()

    async def upload(port: int, data: bytes) -> None:
        async with dial(port) as (reader, writer):
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == b""

    async def main() -> None:
        async with chain() as hops, service(lazy) as port, service(echo) as echo_port:
            await hops.tunnel(kind)
            user, other = await hops.user(), await hops.user()
            local = await forwarded(user, port)
            data = pattern("upload", 8 << 20)
            uploads = [asyncio.ensure_future(upload(local, data)) for _ in range(5)]
            await until(lambda: user.totals.stalls >= 5)
            for endpoint in (user, other):
                assert await asked(await forwarded(endpoint, echo_port), b"echo" * 50_000) == b"echo" * 50_000
            gate.set()
            await asyncio.gather(*uploads)
            assert sums == [hashlib.sha256(data).hexdigest()] * 5

    run(main())


@clients
def test_a_window_of_one_byte_deadlocks_nothing(run: Run, kind: str) -> None:
    async def main() -> None:
        tiny = EndpointConfig(first_window=1, max_window=1, budget=1)
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind, config=tiny)
            local = await forwarded(await hops.user(config=tiny), port)
            data = pattern("tiny", 70_000 if kind == "python" else 3000)
            answers = await asyncio.gather(*(asked(local, data[i : i + 1000]) for i in range(0, 3000, 1000)))
            assert b"".join(answers) == data[:3000]
            if kind == "python":  # more than early data, so that both directions go a byte at a time
                async with dial(local) as (reader, writer):
                    writer.write(data)
                    assert await reader.readexactly(2000) == data[:2000]

    run(main())


@clients
@pytest.mark.parametrize("size", [1, 7, 100])
def test_frames_may_be_split_anywhere(run: Run, kind: str, size: int) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port, contextlib.AsyncExitStack() as stack:
            proxies = []
            for name in ("host_seen_by_user", "runner_seen_by_host", "runner_seen_by_container"):
                proxy = await stack.enter_async_context(fault_proxy(getattr(hops, name)))
                proxy.slicer = size
                setattr(hops, name, lambda proxy=proxy: proxy.port)
                proxies.append(proxy)
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), port)
            data = pattern("split", 1500 * size)
            parts = [data[i::3] for i in range(3)]
            assert await asyncio.gather(*(asked(local, part) for part in parts)) == parts

    run(main())


@clients
def test_a_peer_that_reads_one_byte_at_a_time_gets_them_all(run: Run, kind: str) -> None:
    data = pattern("byte by byte", 20_000)

    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            async with slow_reader(await forwarded(await hops.user(config=SMALL), port)) as (reader, writer):
                writer.write(data)
                assert b"".join([await reader.readexactly(1) for _ in range(len(data))]) == data

    run(main())


@clients
@pytest.mark.parametrize("streams", [1, 100])
def test_64_mib_each_way_at_once_arrive_whole(run: Run, kind: str, streams: int) -> None:
    size = (64 << 20) // streams
    up, down = os.urandom(size), os.urandom(size)
    sums = []

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sums.append(await exchange(reader, writer, down))
        writer.close()

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
        async def send() -> None:
            for start in range(0, len(data), 1 << 18):
                writer.write(data[start : start + (1 << 18)])
                await writer.drain()
            writer.write_eof()

        sending = asyncio.ensure_future(send())
        digest = hashlib.sha256()
        while piece := await reader.read(1 << 18):
            digest.update(piece)
        await sending
        return digest.digest()

    async def one(port: int) -> bytes:
        async with dial(port) as (reader, writer):
            return await exchange(reader, writer, up)

    async def main() -> None:
        async with chain() as hops, service(both) as port:
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), port)
            received = await asyncio.gather(*(one(local) for _ in range(streams)))
            assert set(received) == {hashlib.sha256(down).digest()}
            await until(lambda: len(sums) == streams)
            assert set(sums) == {hashlib.sha256(up).digest()}
            await hops.at_rest()

    run(main())


@clients
def test_1000_streams_at_once_all_work(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port, contextlib.AsyncExitStack() as stack:
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), port)
            ends = [await stack.enter_async_context(dial(local)) for _ in range(1000)]
            for i, (_, writer) in enumerate(ends):
                writer.write(b"%04d" % i)
            answers = await asyncio.gather(*(reader.readexactly(4) for reader, _ in ends))
            assert answers == [b"%04d" % i for i in range(1000)]
            assert hops.server.snapshot()["streams"] == 1000

    run(main())


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@clients
def test_5000_connections_leave_nothing_behind(run: Run, kind: str) -> None:
    async def cycle(port: int, number: int) -> None:
        async with dial(port) as (reader, writer):
            writer.write(b"x")
            if number % 3:
                assert await reader.readexactly(1) == b"x"
            if number % 3 == 1:
                writer.write_eof()
                assert await reader.read() == b""
            # else it is reset, at any stage

    async def cycles(port: int, count: int) -> None:
        for number in range(count):
            await cycle(port, number)

    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            user = await hops.user()
            local = await forwarded(user, port)
            await cycles(local, 3)
            await hops.at_rest()
            await until(lambda: user.stream_count == 0)
            before = descriptors(), len(asyncio.all_tasks()), user.budget.left
            await asyncio.gather(*(cycles(local, 100) for _ in range(50)))
            await hops.at_rest()
            await until(lambda: user.stream_count == 0)
            await until(lambda: (descriptors(), len(asyncio.all_tasks()), user.budget.left) == before)
            assert user.totals.opened == 5003
            assert user.link is not None
            assert not user.link.out._waiters
            assert not user.link.intake._pauses

    run(main())
