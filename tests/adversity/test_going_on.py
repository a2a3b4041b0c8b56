"""Whose connections go on over another link, where, and for how long: real sockets on every hop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.client.forward import Reconnecting, Resumed, StreamError
from kohakuriver.tunnel.keeper import Keeper
from kohakuriver.tunnel.protocol import (
    CONNECT,
    CONNECTED,
    DATA,
    ERROR,
    RESUME,
    RESUMED,
    UNKNOWN_TOTAL,
    ErrorText,
    Opening,
    Resuming,
    parse_pair,
)
from kohakuriver.tunnel.windows import FIRST_WINDOW
from tests.support.hops import CLIENTS, chain, dial, echo, service, until
from tests.support.stage import DIRECT, LINKS, Stage, stage
from tests.unit.test_relay_kept import Got, Peer, session

Run = Callable[[Coroutine[Any, Any, None]], None]
clients = pytest.mark.parametrize("kind", CLIENTS)
KEYS = [bytes([number]) * 16 for number in range(1, 4)]


async def heard(peer: Peer, kind: int) -> Got:
    """The next message of this kind."""
    while (got := await peer.hear()).kind != kind:
        assert got.kind != ERROR, got
    return got


async def opened(peer: Peer, stream: int, key: bytes) -> None:
    """Open a kept stream whose service echoes, and use it."""
    await peer.say(CONNECT, stream, Opening(65_536, key, 3600).pack())
    await heard(peer, CONNECTED)
    await said(peer, stream, b"mine")


async def said(peer: Peer, stream: int, text: bytes) -> None:
    await peer.say(DATA, stream, text)
    assert (await heard(peer, DATA)).payload == text


async def answer(peer: Peer, key: bytes, epoch: int, port: int = 0) -> str:
    """What a RESUME of a stream that has said and heard `mine` leads to."""
    await peer.say(RESUME, 9, Resuming(key, epoch, 4, 65_536, UNKNOWN_TOTAL).pack(), port=port)
    while (got := await peer.hear()).kind not in (ERROR, RESUMED):
        pass
    return "resumed" if got.kind == RESUMED else ErrorText.parse(got.payload).code


@clients
def test_a_stolen_key_is_worth_nothing_to_another_user_nor_for_another_port(run: Run, kind: str) -> None:
    async def main() -> None:
        async with service(echo) as port, service(echo) as other, chain() as hops:
            await hops.tunnel(kind)
            async with session(hops, "ann", port=str(port)) as ann, session(hops, "bob", port=str(port)) as bob:
                await opened(ann, 1, KEYS[0])
                assert await answer(bob, KEYS[0], 1) == "ESTALE"
                async with session(hops, "ann", port=str(port)) as again:
                    assert await answer(again, KEYS[0], 1, other) == "ESTALE"
                    await said(ann, 1, b"nobody noticed")
                async with session(hops, "ann", f"?ports={other}", port=str(other)) as confined:
                    assert await answer(confined, KEYS[0], 1, port) == "EACCES"
                async with session(hops, "ann", port=str(port)) as again:
                    assert await answer(again, KEYS[0], 1) == "resumed"

    run(main())


@clients
def test_of_more_connections_than_may_wait_the_first_ends_and_says_why(
    run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKURIVER_DETACHED_STREAMS", "2")
    defaults = Keeper.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "most_held", 2)
    ends: asyncio.Queue[bool] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await echo(reader, writer)
        finally:
            ends.put_nowait(True)

    async def main() -> None:
        async with service(serve) as port, chain() as hops:
            await hops.tunnel(kind)
            async with contextlib.AsyncExitStack() as stack:
                anns = [await stack.enter_async_context(session(hops, "ann", port=str(port))) for _ in KEYS]
                for ann, key in zip(anns, KEYS, strict=True):
                    await opened(ann, 1, key)
                for left, ann in zip((2, 1, 0), anns, strict=True):
                    ann.socket.transport.abort()
                    await until(lambda left=left: len(hops.server.hub.sessions) == left)  # type: ignore[misc]
                await ends.get()
                async with session(hops, "ann", port=str(port)) as again:
                    assert await answer(again, KEYS[0], 1) == "ENOBUFS"
                for key in KEYS[1:]:
                    async with session(hops, "ann", port=str(port)) as again:
                        assert await answer(again, key, 1) == "resumed"

    run(main())


@clients
def test_connections_that_wait_take_no_windows_from_those_of_others(run: Run, kind: str) -> None:
    async def granted(peer: Peer, stream: int, key: bytes) -> int:
        await peer.say(CONNECT, stream, Opening(65_536, key, 3600).pack())
        grant = parse_pair((await heard(peer, CONNECTED)).payload)
        assert grant is not None
        return grant[0]

    async def main() -> None:
        async with service(echo) as port, chain() as hops:
            await hops.tunnel(kind)
            async with session(hops, "ann", port=str(port)) as ann, session(hops, "bob", port=str(port)) as bob:
                limits = [await granted(ann, n, n.to_bytes(16, "big")) for n in range(1, 301)]
                assert await granted(bob, 1, KEYS[0]) == min(limits) < FIRST_WINDOW
                ann.socket.transport.abort()
                await until(lambda: len(hops.server.hub.sessions) == 1)
                assert await granted(bob, 2, KEYS[1]) == FIRST_WINDOW

    run(main())


@clients
def test_a_connection_that_waited_for_longer_than_it_may_ends_at_both_ends(run: Run, kind: str) -> None:
    ended: list[Exception | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
            ended.append(None)
        except OSError as error:
            ended.append(error)

    async def main() -> None:
        async with (
            service(serve) as port,
            stage(kind, port, resume_for=1) as there,
            dial(there.port) as (reader, writer),
        ):
            writer.write(b"here")
            assert await reader.readexactly(4) == b"here"
            there.relays["user"].lets_in = False
            there.relays["user"].cut()
            with pytest.raises(ConnectionResetError):
                await reader.read()
            (told,) = [event for event in there.events if isinstance(event, StreamError)]
            assert told.message == "ETIMEDOUT: the connection to the host was lost for too long"
            await until(lambda: bool(ended))
            assert isinstance(ended[0], ConnectionResetError)

    run(main())


class Datagrams(asyncio.DatagramProtocol):
    """Keeps what comes, with where it came from, and sends it back if it is a service."""

    def __init__(self, *, echoes: bool) -> None:
        self._echoes = echoes
        self.came: asyncio.Queue[bytes] = asyncio.Queue()
        self.sources: set[Any] = set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.came.put_nowait(data)
        self.sources.add(addr)
        if self._echoes:
            self.transport.sendto(data, addr)


@contextlib.asynccontextmanager
async def datagrams(**where: Any) -> AsyncIterator[Datagrams]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(lambda: Datagrams(echoes="local_addr" in where), **where)
    try:
        yield protocol
    finally:
        transport.close()


@pytest.mark.parametrize("kind", [*CLIENTS, DIRECT])
def test_datagrams_come_from_the_same_source_after_every_loss_and_those_that_were_lost_are_told(
    run: Run, kind: str
) -> None:
    async def main() -> None:
        async with datagrams(local_addr=("127.0.0.1", 0)) as serving:
            port = serving.transport.get_extra_info("sockname")[1]
            async with stage(kind, port, proto="udp") as there:
                async with datagrams(remote_addr=("127.0.0.1", there.port)) as user:

                    async def said(text: bytes) -> None:
                        user.transport.sendto(text)
                        assert await user.came.get() == text
                        assert await serving.came.get() == text

                    await said(b"first")
                    links = LINKS if kind != DIRECT else LINKS[:2]
                    for number, link in enumerate(links):
                        there.relays[link].cut()
                        await there.back(number + 1)
                        await said(link.encode())
                    await away(there)
                    for _ in range(3):
                        user.transport.sendto(b"lost")
                    await until(lambda: there.forwarder.stats().udp_dropped == 3)
                    there.relays["user"].lets_in = True
                    await there.back(len(links) + 1)
                    await said(b"last")
                    assert len(serving.sources) == 1

    run(main())


def test_a_host_that_is_away_is_tried_again_within_a_second_each(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port, stage(DIRECT, port) as there:
            await away(there)
            await until(lambda: sum(isinstance(event, Reconnecting) for event in there.events) == 14)
            delays = [event.delay for event in there.events if isinstance(event, Reconnecting)]
            assert max(delays) <= 1.0

    run(main())


async def away(there: Stage) -> None:
    """The host can't be reached any more, and the forward has noticed."""
    lost = sum(isinstance(event, Reconnecting) for event in there.events)
    there.relays["user"].lets_in = False
    there.relays["user"].cut()
    await until(lambda: sum(isinstance(event, Reconnecting) for event in there.events) > lost)


def test_connections_that_a_runner_dials_itself_go_on_and_end_with_the_runner_which_says_so(run: Run) -> None:
    async def main() -> None:
        async with service(echo) as port, stage(DIRECT, port) as there, dial(there.port) as (reader, writer):
            for number, link in enumerate(("user", "host", "user")):
                writer.write(b"here")
                assert await reader.readexactly(4) == b"here"
                there.relays[link].cut()
                await there.back(number + 1)
            writer.write(b"here")
            assert await reader.readexactly(4) == b"here"
            assert not [event for event in there.events if isinstance(event, StreamError)]
            assert all(event.waiting == 1 for event in there.events if isinstance(event, Resumed))
            await there.hops.server.close()
            with pytest.raises(ConnectionResetError):
                await reader.read()
            (told,) = [event for event in there.events if isinstance(event, StreamError)]
            assert told.message == "ECONNRESET: the runner has ended, which had made this connection"

    run(main())
