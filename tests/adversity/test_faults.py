"""Links that are cut, that fall silent, and peers that break the rules: what ends, ends at once and with a reason."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from kohakuriver._frame import build_frame
from kohakuriver.errors import KohakuRiverError
from kohakuriver.tunnel.dial import Server, open_session
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import TUNNEL_V2
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from tests.support.hops import CLIENTS, CONTAINER, Chain, asked, chain, dial, echo, service, until
from tests.support.network.faults import FaultProxy, fault_proxy
from tests.support.peers import v1

Run = Callable[[Coroutine[Any, Any, None]], None]
clients = pytest.mark.parametrize("kind", CLIENTS)
PLACES = ("host_seen_by_user", "runner_seen_by_host", "runner_seen_by_container")
places = pytest.mark.parametrize("place", PLACES)
V2 = [Subprotocol(TUNNEL_V2)]


async def forwarded(user: UserEndpoint, port: int) -> int:
    return (await user.listen_tcp("127.0.0.1", 0, port)).port


@contextlib.asynccontextmanager
async def faulty(hops: Chain, place: str) -> AsyncIterator[FaultProxy]:
    """A fault proxy between two hops."""
    async with fault_proxy(getattr(hops, place)) as proxy:
        setattr(hops, place, lambda: proxy.port)
        yield proxy


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()


async def ended(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass


async def close_code(websocket: ClientConnection) -> int:
    """Read until the other side closes, and return its code."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await websocket.recv()
    assert websocket.close_code is not None
    return websocket.close_code


async def recovered(hops: Chain, place: str, user: UserEndpoint) -> None:
    """After the link at ``place`` was lost: the user's session, or the container's tunnel, is there again."""
    if place == PLACES[2]:
        await hops.changed(CONTAINER, False)
        await hops.changed(CONTAINER, True)
    else:
        assert await hops.detached.get()
        await hops.attach(user)


@clients
@places
def test_an_orderly_close_by_whoever_is_on_the_way_is_never_taken_for_the_end_of_a_streams_data(
    run: Run, kind: str, place: str
) -> None:
    """Nobody can cut a stream short unnoticed: TLS or not, only a message of the protocol ends it in good order."""

    async def main() -> None:
        async with chain() as hops, faulty(hops, place) as proxy, service(endless) as port:
            await hops.tunnel(kind)
            async with dial(await forwarded(await hops.user(), port)) as (reader, _):
                await reader.readexactly(1 << 20)
                proxy.cut()
                with pytest.raises(ConnectionResetError):
                    await reader.read(-1)

    run(main())


@clients
@places
@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_a_link_that_is_lost_in_a_transfer_ends_its_streams_and_is_replaced(
    run: Run, kind: str, place: str, fault: str
) -> None:
    async def main() -> None:
        async with chain() as hops, faulty(hops, place) as proxy, service(endless) as port, service(echo) as echo_port:
            await hops.tunnel(kind)
            user = await hops.user()
            local, other = await forwarded(user, port), await forwarded(user, echo_port)
            async with dial(local) as (reader, _), dial(other) as (idle, _):
                await reader.readexactly(1 << 20)
                getattr(proxy, fault)()
                await ended(reader)
                await ended(idle)
            await recovered(hops, place, user)
            assert await asked(other, b"again") == b"again"

    run(main())


@clients
@places
def test_a_hop_that_falls_silent_is_dropped(run: Run, kind: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with chain() as hops, faulty(hops, place) as proxy, service(echo) as port:
            monkeypatch.setattr(Link, "idle_ping", 0.1)
            monkeypatch.setattr(Link, "pong_wait", 0.3)
            await hops.tunnel(kind)
            user = await hops.user()
            local = await forwarded(user, port)
            assert await asked(local, b"before") == b"before"
            async with dial(local) as (reader, writer):
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
                proxy.stall()
                await ended(reader)
            proxy.cut()
            proxy.resume()
            await recovered(hops, place, user)
            assert await asked(local, b"again") == b"again"

    run(main())


@clients
def test_an_idle_session_that_is_answered_lives(run: Run, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            monkeypatch.setattr(Link, "idle_ping", 0.01)
            monkeypatch.setattr(Link, "pong_wait", 1.0)
            await hops.tunnel(kind)
            user = await hops.user()
            link = user.link
            assert link is not None
            received = link.watch.received
            await until(lambda: link.watch.received >= received + 20)  # ten pings or pongs
            assert hops.detached.empty()
            assert await asked(await forwarded(user, port), b"alive") == b"alive"

    run(main())


@clients
def test_a_session_that_takes_nothing_for_a_while_is_kept_while_bytes_move(
    run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with chain() as hops, faulty(hops, PLACES[0]) as proxy, service(echo) as port:
            monkeypatch.setattr(Link, "idle_ping", 0.2)
            monkeypatch.setattr(Link, "pong_wait", 0.5)
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), port)
            data = os.urandom(1 << 20)
            proxy.slow = 1e6  # so that a frame of 1 MiB takes longer than both times together
            assert await asked(local, data) == data
            assert hops.detached.empty()

    run(main())


# -- broken rules ----------------------------------------------------------------------------------------------------


def urls(hops: Chain) -> dict[str, str]:
    return {
        "host": f"ws://127.0.0.1:{hops.host_port}/ws/forward/1/80",
        "runner": f"ws://127.0.0.1:{hops.runner_port}/ws/forward/{CONTAINER}/80",
        "tunnel": f"ws://127.0.0.1:{hops.runner_port}/ws/tunnel/another",
    }


@clients
@pytest.mark.parametrize("where", ["host", "runner", "tunnel"])
def test_garbage_ends_the_link_that_it_came_on_and_no_other(run: Run, kind: str, where: str) -> None:
    rng = random.Random(where)

    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), port)
            async with dial(local) as (reader, writer):
                for _ in range(20):
                    websocket = await connect(urls(hops)[where], subprotocols=V2)
                    if where != "tunnel":
                        assert await websocket.recv() == "CONNECTED"
                    websocket.transport.write(rng.randbytes(rng.randrange(1, 5000)) + b"\xff" * 16)
                    assert await close_code(websocket) in {1002, 1003, 1006, 1009}
                writer.write(b"unharmed")
                assert await reader.readexactly(8) == b"unharmed"
            assert hops.detached.empty()

    run(main())


@clients
def test_messages_that_make_no_sense_hurt_nobody_else(run: Run, kind: str) -> None:
    """Well-formed messages of random types, ids and payloads, from a user and from a tunnel client of another task."""
    rng = random.Random(kind)

    def message() -> bytes:
        kind, client_id = rng.randrange(16), rng.choice([0, 1, 2, 3, 1 << 31])
        payload = rng.randbytes(rng.choice([0, 1, 7, 8, 9, 2000]))
        return build_frame(kind, rng.randrange(3), client_id, rng.choice([0, 1]), payload, rng.randrange(1 << 32))

    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), port)
            async with dial(local) as (reader, writer):
                for where in ("host", "tunnel"):
                    for _ in range(50):
                        websocket = await connect(urls(hops)[where], subprotocols=V2)
                        websocket.transport.write(b"".join(message() for _ in range(20)))
                        await (await websocket.ping())
                        websocket.transport.abort()
                        await websocket.wait_closed()
                writer.write(b"unharmed")
                assert await reader.readexactly(8) == b"unharmed"
            assert hops.detached.empty()

    run(main())


@pytest.mark.parametrize("where", ["host", "runner", "tunnel"])
@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x82\xff" + (16 * 1024 * 1024 + 1).to_bytes(8, "big") + bytes(12), 1009),
        (b"\x82\xff" + (1 << 63).to_bytes(8, "big") + bytes(12), 1002),
        (b"\x82\x87" + bytes(11), 1002),
        (b"\x82\x08" + bytes(8), 1002),
        (b"\x81\x88" + bytes(12), 1003),
    ],
    ids=["too large", "2^63", "short", "unmasked", "text"],
)
def test_a_frame_that_breaks_the_rules_is_answered_with_its_code(run: Run, where: str, frame: bytes, code: int) -> None:
    async def main() -> None:
        async with chain() as hops:
            await hops.tunnel("python")
            websocket = await connect(urls(hops)[where], subprotocols=V2)
            websocket.transport.write(frame)
            assert await close_code(websocket) == code
            assert websocket.close_reason

    run(main())


@pytest.mark.parametrize("greeting", [b"CONNECTED", "what?", "x" * 5000, "Error: no such task: 7", None])
def test_a_host_that_makes_no_sense_is_an_error_of_its_own_kind(run: Run, greeting: str | bytes | None) -> None:
    async def host(websocket: ServerConnection) -> None:
        if greeting is not None:
            await websocket.send(greeting)
        await websocket.close()

    async def main() -> None:
        async with serve(host, "127.0.0.1", 0) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            with pytest.raises(KohakuRiverError):
                await open_session(Server(f"ws://127.0.0.1:{port}/ws/forward/7/80"))

    run(main())


@clients
def test_a_user_that_sends_beyond_its_window_harms_nobody_else(run: Run, kind: str) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        try:
            await asyncio.Event().wait()
        finally:
            writer.transport.abort()

    async def main() -> None:
        async with chain() as hops, service(silent) as deaf, service(echo) as port:
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), port)
            async with dial(local) as (reader, writer):
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
                async with connect(
                    f"ws://127.0.0.1:{hops.host_port}/ws/forward/1/{deaf}", subprotocols=V2
                ) as websocket:
                    assert await websocket.recv() == "CONNECTED"
                    await websocket.send(v1.pack(v1.CONNECT, 1, (1 << 20).to_bytes(8, "big")))
                    with contextlib.suppress(ConnectionClosed, AttributeError):  # it may be told before it is done
                        for _ in range(20):
                            await websocket.send(v1.pack(v1.DATA, 1, bytes(1 << 18)))
                    assert await close_code(websocket) == 1002
                writer.write(b"unharmed")
                assert await reader.readexactly(8) == b"unharmed"

    run(main())


def test_a_container_that_sends_beyond_the_users_window_ends_that_session_with_1002(run: Run) -> None:
    async def main() -> None:
        async with (
            chain() as hops,
            connect(urls(hops)["tunnel"].replace("another", CONTAINER), subprotocols=V2) as tunnel,
        ):
            await hops.changed(CONTAINER, True)
            user = await hops.user()
            local = await forwarded(user, 80)
            async with dial(local) as (reader, _):
                connect_message = await tunnel.recv()
                assert isinstance(connect_message, bytes)
                client_id = v1.HEADER.unpack_from(connect_message)[2]
                await tunnel.send(v1.pack(v1.CONNECTED, client_id, bytes(8)))
                for _ in range(5):  # more than the first window, before anybody could have taken any of it
                    await tunnel.send(v1.pack(v1.DATA, client_id, bytes(900_000)))
                with contextlib.suppress(ConnectionError):
                    while await reader.read(1 << 16):
                        pass
            assert "window" in await hops.detached.get()
            assert hops.server.hub.tunnel_of(CONTAINER)

    run(main())


def test_a_peer_that_makes_us_answer_and_never_reads_is_dropped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr("kohakuriver.tunnel.send_queue.SendQueue.max_urgent", 1 << 20)
        async with chain() as hops:
            await hops.tunnel("python")
            user = await hops.user()
            link = user.link
            assert link is not None
            link.intake.pause("a user that does not read")
            ping = bytes(100_000)
            with contextlib.suppress(RuntimeError):
                while hops.server.hub.sessions:
                    link.send_message(6, 0, ping, urgent=True)
                    await asyncio.sleep(0)
            link.intake.resume("a user that does not read")
            assert await hops.detached.get()

    run(main())
