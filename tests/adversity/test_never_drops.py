"""Connections through a forward, over real sockets, while the links between the hops are cut."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.client.forward import Reconnecting, Resumed, StreamError
from kohakuriver.relay import hub
from kohakuriver.tunnel import doubt
from tests.support.hops import CLIENTS, CONTAINER, dial, echo, kill, service, until
from tests.support.stage import LINKS, stage

Run = Callable[[Coroutine[Any, Any, None]], None]
clients = pytest.mark.parametrize("kind", CLIENTS)


async def back_and_forth(port: int, data: bytes) -> bytes:
    """What an echo service answers, while it is still being written to."""
    async with dial(port) as (reader, writer):

        async def write() -> None:
            for start in range(0, len(data), 1 << 16):
                writer.write(data[start : start + (1 << 16)])
                await writer.drain()
            writer.write_eof()

        _, answer = await asyncio.gather(write(), reader.read())
        return answer


@clients
@pytest.mark.parametrize("link", LINKS)
def test_a_connection_goes_on_when_a_link_is_cut(run: Run, kind: str, link: str) -> None:
    async def main() -> None:
        async with service(echo) as port, stage(kind, port) as there, dial(there.port) as (reader, writer):
            for number in range(5):
                said = f"message {number}".encode()
                writer.write(said)
                assert await reader.readexactly(len(said)) == said
                there.relays[link].cut()
                await there.back(number + 1)
            lost = [event for event in there.events if isinstance(event, Reconnecting)]
            assert lost[0].waiting == 1
            resumed = next(event for event in there.events if isinstance(event, Resumed))
            assert resumed.waiting == 1
            writer.write_eof()
            assert await reader.read() == b""
            await there.hops.at_rest()

    run(main())


@clients
def test_a_connection_that_is_opened_while_the_tunnel_is_away_works_once_it_is_back(
    run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BACK_WITHIN", 60.0)

    async def main() -> None:
        async with service(echo) as port, stage(kind, port) as there:
            there.relays["container"].lets_in = False
            there.relays["container"].cut()
            await there.hops.changed(CONTAINER, False)
            answer = asyncio.ensure_future(back_and_forth(there.port, b"hello" * 50_000))
            (session,) = there.hops.server.hub.sessions
            await until(lambda: session._held is not None)
            there.relays["container"].lets_in = True
            assert await answer == b"hello" * 50_000
            assert not [event for event in there.events if isinstance(event, (Reconnecting, StreamError))]
            await there.hops.at_rest()

    run(main())


@clients
def test_every_byte_arrives_once_and_in_order_while_links_are_cut_at_random(run: Run, kind: str) -> None:
    chance = random.Random(kind)

    async def main() -> None:
        async with service(echo) as port, stage(kind, port) as there:
            data = [chance.randbytes(chance.choice([1, 1000, 1 << 16, 16 << 20])) for _ in range(20)]
            moving = asyncio.gather(*(back_and_forth(there.port, each) for each in data))
            cuts = 0
            while not moving.done() and cuts < 30:
                there.relays[chance.choice(LINKS)].cut()
                cuts += 1
                await asyncio.wait({moving}, timeout=0.2)
            assert await moving == data
            await there.hops.at_rest()

    run(main())


@clients
@pytest.mark.parametrize("link", ["user", "host"])
def test_a_connection_goes_on_beside_a_link_that_is_dead_and_tells_nobody(
    run: Run, kind: str, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubt, "TICK", 0.05)
    monkeypatch.setattr(doubt, "UNACKED", 0.2)
    monkeypatch.setattr(doubt, "ANSWER", 0.2)

    async def main() -> None:
        async with service(echo) as port, stage(kind, port) as there, dial(there.port) as (reader, writer):
            for said in (b"before", b"behind", b"at last"):
                writer.write(said)
                assert await reader.readexactly(len(said)) == said
                there.relays[link].freeze()
            writer.write(b"!")
            assert await reader.readexactly(1) == b"!"
            assert not [event for event in there.events if isinstance(event, Reconnecting)]
            writer.write_eof()
            assert await reader.read() == b""

    run(main())


@clients
def test_connections_are_reset_when_the_tunnel_client_is_no_more(run: Run, kind: str) -> None:
    async def main() -> None:
        async with service(echo) as port, stage(kind, port) as there, dial(there.port) as (reader, writer):
            writer.write(b"here")
            assert await reader.readexactly(4) == b"here"
            await kill(there.client)
            await there.hops.changed(CONTAINER, False)
            await there.hops.tunnel(kind)
            with pytest.raises(ConnectionResetError):
                await reader.read()

    run(main())


@clients
def test_what_a_forward_had_open_ends_in_the_task_when_it_ends_without_a_link(run: Run, kind: str) -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def wait_for_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"!")
            with contextlib.suppress(OSError):
                await reader.read()
            ended.set()
            writer.close()

        async with service(wait_for_the_end) as port, stage(kind, port) as there:
            async with dial(there.port) as (reader, _):
                assert await reader.readexactly(1) == b"!"
            await ended.wait()
            ended.clear()
            async with dial(there.port) as (reader, writer):
                assert await reader.readexactly(1) == b"!"
                there.relays["user"].cut()
                writer.transport.abort()
            await ended.wait()

    run(main())


@clients
def test_connections_that_may_not_all_go_on_at_once_all_go_on(run: Run, kind: str) -> None:
    async def main() -> None:
        async with service(echo) as port, stage(kind, port) as there, contextlib.AsyncExitStack() as stack:
            ends = [await stack.enter_async_context(dial(there.port)) for _ in range(200)]

            async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes) -> None:
                writer.write(text)
                assert await reader.readexactly(len(text)) == text

            await asyncio.gather(*(said(*each, b"before") for each in ends))
            there.hops.server._shares.rates.rate = 50  # from the next session on
            there.relays["user"].cut()
            await asyncio.gather(*(said(*each, b"behind it") for each in ends))
            assert not [event for event in there.events if isinstance(event, StreamError)]

    run(main())


@clients
def test_a_forward_that_ends_takes_connections_along_that_may_not_go_on_yet(run: Run, kind: str) -> None:
    served = ended = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served, ended
        served += 1
        writer.write(b"!")
        with contextlib.suppress(OSError):
            await reader.read()
        ended += 1
        writer.close()

    async def main() -> None:
        async with service(serve) as port, stage(kind, port) as there, contextlib.AsyncExitStack() as stack:
            for _ in range(50):
                reader, _ = await stack.enter_async_context(dial(there.port))
                assert await reader.readexactly(1) == b"!"
            there.hops.server._shares.rates.rate = 10  # from the next session on
            there.relays["user"].cut()
            await there.back(1)
            kept = there.forwarder._endpoint.kept
            assert kept is not None
            await until(lambda: kept.waiting > 10)
            await there.forwarder.close()
            await until(lambda: ended == served == 50)

    run(main())
