"""Time: a stream that stood still for long goes on where it stopped."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.windows import ReceiveWindow
from tests.support.hops import CLIENTS, asked, chain, dial, echo, service, until

Run = Callable[[Coroutine[Any, Any, None]], None]
clients = pytest.mark.parametrize("kind", CLIENTS)


@clients
def test_a_stalled_stream_goes_on_where_it_stopped_after_many_keepalive_intervals(
    run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Link, "idle_ping", 0.02)
    monkeypatch.setattr(Link, "pong_wait", 5.0)
    pings: Counter[Link] = Counter()
    ping = Link._ping

    def counted(link: Link) -> None:
        pings[link] += 1
        ping(link)

    monkeypatch.setattr(Link, "_ping", counted)
    size = 32 << 20
    data = b"".join(number.to_bytes(8, "big") for number in range(size // 8))

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def main() -> None:
        async with chain() as hops, service(send) as port, service(echo) as other:
            await hops.tunnel(kind)
            user = await hops.user()
            local, beside = [(await user.listen_tcp("127.0.0.1", 0, p)).port for p in (port, other)]
            async with dial(local) as (reader, _):
                got = await reader.readexactly(1 << 16)
                assert user.streams is not None
                (stream,) = user.streams.by_id.values()
                assert isinstance(stream, TcpStream)
                core = stream.core
                await until(lambda: core.held > 0)
                window = core.inbound
                assert isinstance(window, ReceiveWindow)
                await until(lambda: window.received == window.granted)  # the whole window waits
                # Ten minutes have forty keepalive intervals: so many pass on every link, by each one's own count.
                pings.clear()
                await until(lambda: len(pings) >= 5 and min(pings.values()) >= 40)
                assert await asked(beside, b"beside") == b"beside"
                got += await reader.readexactly(size - len(got))
                assert got == data
                assert hops.detached.empty()

    run(main())
