"""The four hops over real sockets: what such systems are known to get wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from kohakuriver.errors import NotFoundError, UnavailableError
from kohakuriver.tunnel.dial import Server, open_session
from kohakuriver.tunnel.protocol import TUNNEL_V2
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from tests.support.hops import CLIENTS, CONTAINER, asked, chain, dial, echo, kill, service, until
from tests.support.peers import v1

Run = Callable[[Coroutine[Any, Any, None]], None]
clients = pytest.mark.parametrize("kind", CLIENTS)


@pytest.fixture
def unused_port(unused_ports: list[int]) -> int:
    """A port on which nothing listens, and nothing will."""
    return unused_ports[0]


def pattern(seed: object, size: int) -> bytes:
    return random.Random(str(seed)).randbytes(size)


async def forwarded(user: UserEndpoint, port: int) -> int:
    """A local port that leads to ``port`` of the container."""
    return (await user.listen_tcp("127.0.0.1", 0, port)).port


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection ends, in whichever way."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            data += piece
    return data


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A service that reads and says nothing."""
    await ended(reader)
    writer.close()


@clients
def test_two_users_on_one_container_never_see_each_others_bytes(run: Run, kind: str) -> None:
    async def one(user: int, port: int, number: int) -> None:
        data = pattern((user, number), random.Random(number).randrange(200_000))
        assert await asked(port, data) == data

    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            users = [await hops.user() for _ in range(2)]
            ports = [await forwarded(user, port) for user in users]
            await asyncio.gather(*(one(i % 2, ports[i % 2], i) for i in range(60)))
            assert [user.totals.opened for user in users] == [30, 30]  # so both have had the ids 1 to 30
            await hops.at_rest()

    run(main())


@clients
def test_a_second_forward_of_a_container_outlives_the_first(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            first, second = await hops.user(), await hops.user()
            async with dial(await forwarded(second, port)) as (reader, writer):
                writer.write(b"before")
                assert await reader.readexactly(6) == b"before"
                await first.close()
                writer.write(b"after")
                assert await reader.readexactly(5) == b"after"

    run(main())


@clients
def test_a_stream_that_fails_ends_alone(run: Run, kind: str, unused_port: int) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            user = await hops.user()
            good, dead = await forwarded(user, port), await forwarded(user, unused_port)
            async with dial(good) as (reader, writer):
                for _ in range(20):
                    async with dial(dead) as (_, doomed):
                        doomed.write(b"x" * 100_000)
                        assert (await hops.errors.get())[0] == unused_port
                    async with dial(good) as (_, broken):
                        broken.write(b"y" * 100_000)  # and is reset
                writer.write(b"still here")
                assert await reader.readexactly(10) == b"still here"
            assert hops.detached.empty()
            await hops.at_rest()

    run(main())


@clients
def test_a_connection_to_a_dead_port_is_reset_and_its_reason_told(run: Run, kind: str, unused_port: int) -> None:
    async def main() -> None:
        async with chain() as hops:
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), unused_port)
            async with dial(local) as (reader, _):
                with pytest.raises(ConnectionResetError):
                    await reader.read()
            port, text = await hops.errors.get()
            assert port == unused_port
            assert text.startswith("ECONNREFUSED: ")
            assert f"nothing listens on port {unused_port}" in text

    run(main())


@clients
def test_streams_end_at_once_when_the_tunnel_client_is_killed_and_the_session_goes_on(run: Run, kind: str) -> None:
    async def download(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"z" * 65536)
                await writer.drain()

    async def main() -> None:
        async with chain() as hops, service(download) as endless, service(silent) as quiet, service(echo) as port:
            client = await hops.tunnel(kind)
            user = await hops.user()
            ports = [await forwarded(user, p) for p in (endless, quiet, port)]
            async with dial(ports[0]) as (busy, _), dial(ports[1]) as (idle, uploading):
                await busy.readexactly(1 << 20)
                uploading.write(b"u" * (1 << 20))
                await kill(client)
                await ended(busy)
                assert await ended(idle) == b""
            texts = [await hops.errors.get() for _ in range(2)]
            assert all("ECONNRESET: the task's tunnel went away" in text for _, text in texts)
            await hops.changed(CONTAINER, False)

            with pytest.raises(ConnectionResetError):
                await asked(ports[2], b"?")
            assert "ENOTCONN" in (await hops.errors.get())[1]

            await hops.tunnel(kind)
            assert await asked(ports[2], b"again") == b"again"
            assert hops.detached.empty()

    run(main())


@clients
def test_a_replaced_tunnels_clean_up_leaves_the_newer_one(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            first = await hops.tunnel(kind, anonymous=True)
            user = await hops.user()
            local = await forwarded(user, port)
            async with dial(local) as (reader, writer):
                writer.write(b"1")
                assert await reader.readexactly(1) == b"1"
                await hops.tunnel(kind, anonymous=True)
                await ended(reader)
            assert "replaced by a newer one" in (await hops.errors.get())[1]
            assert await (first if isinstance(first, asyncio.Task) else first.wait()) == 0
            assert hops.server.hub.tunnel_of(CONTAINER)
            assert hops.changes.empty()  # nobody was told that the tunnel had gone
            assert await asked(local, b"2") == b"2"

    run(main())


@clients
def test_500_connections_at_once_are_all_served(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), port)
            answers = await asyncio.gather(*(asked(local, b"%d" % i) for i in range(500)))
            assert answers == [b"%d" % i for i in range(500)]
            await hops.at_rest()

    run(main())


@pytest.mark.parametrize("where", ["host", "runner", "tunnel"])
def test_a_text_frame_is_answered_with_1003_and_a_reason(run: Run, where: str) -> None:
    async def main() -> None:
        async with chain() as hops, v1.v1_tunnel_client(hops.runner_port, CONTAINER):
            await hops.changed(CONTAINER, True)
            url = {
                "host": f"ws://127.0.0.1:{hops.host_port}/ws/forward/1/80",
                "runner": f"ws://127.0.0.1:{hops.runner_port}/ws/forward/{CONTAINER}/80",
                "tunnel": f"ws://127.0.0.1:{hops.runner_port}/ws/tunnel/another",
            }[where]
            async with connect(url) as websocket:
                if where != "tunnel":
                    assert await websocket.recv() == "CONNECTED"
                await websocket.send("hello?")
                # AttributeError: the library aborts a connection that is closed already, which asyncio does not like.
                with contextlib.suppress(ConnectionClosed, AttributeError):
                    while True:
                        await websocket.send(b"\x03" + bytes(100_000))  # it goes on sending, and is still told
                with pytest.raises(ConnectionClosed) as closed:
                    await websocket.recv()
                assert closed.value.rcvd is not None
                assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1003, "text where binary is due")

    run(main())


@clients
def test_a_reply_after_the_half_close_arrives(run: Run, kind: str) -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        writer.write(b"%d bytes" % len(data))
        writer.close()

    async def main() -> None:
        async with chain() as hops, service(count) as port:
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), port)
            for size in (0, 1, 3_000_000):
                assert await asked(local, bytes(size)) == b"%d bytes" % size
            await hops.at_rest()

    run(main())


@clients
def test_what_a_service_sent_before_it_closed_arrives(run: Run, kind: str) -> None:
    data = pattern("goodbye", 3_000_000)

    async def goodbye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        writer.close()

    async def main() -> None:
        async with chain() as hops, service(goodbye) as port:
            await hops.tunnel(kind)
            async with dial(await forwarded(await hops.user(), port)) as (reader, _):
                assert await reader.read() == data

    run(main())


@clients
def test_what_is_sent_before_the_stream_is_open_arrives(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            user = await hops.user()
            local = await forwarded(user, port)
            data = pattern("early", 200_000)
            assert await asked(local, data) == data
            link = user.link
            assert link is not None
            link.abort()
            await hops.detached.get()
            answer = asyncio.ensure_future(asked(local, data))  # half-closed before there is a link again
            await until(lambda: len(user._waiting) == 1)
            await hops.attach(user)
            assert await answer == data

    run(main())


@clients
def test_a_connection_that_finds_no_link_in_time_is_reset(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            user = await hops.user()
            user.config.reattach_wait = 0.0
            local = await forwarded(user, port)
            link = user.link
            assert link is not None
            link.abort()
            await hops.detached.get()
            async with dial(local) as (reader, _):
                with pytest.raises(ConnectionResetError):
                    await reader.read()
            assert (await hops.errors.get())[1].startswith("ENOTCONN: ")

    run(main())


@clients
def test_a_service_that_listens_on_one_other_address_alone_is_reached(run: Run, kind: str) -> None:
    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.77", 0)
        async with chain() as hops, server:
            await hops.tunnel(kind)
            local = await forwarded(await hops.user(), server.sockets[0].getsockname()[1])
            assert await asked(local, b"here?") == b"here?"

    run(main())


# -- v1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_an_existing_tunnel_client_serves_our_command_line(run: Run, version: int, unused_port: int) -> None:
    async def main() -> None:
        async with (
            chain() as hops,
            v1.v1_tunnel_client(hops.runner_port, CONTAINER) as container,
            service(echo) as port,
        ):
            await hops.changed(CONTAINER, True)
            config = EndpointConfig(v1_linger=0.2)
            users = [await hops.user(version=version, config=config) for _ in range(2)]
            assert all(user.link is not None and user.link.version == 1 for user in users)
            ports = [await forwarded(user, port) for user in users]

            async def one(number: int) -> None:
                data = pattern(number, 100_000)
                async with dial(ports[number % 2]) as (reader, writer):
                    writer.write(data)
                    assert await reader.readexactly(len(data)) == data

            await asyncio.gather(*(one(i) for i in range(20)))
            with pytest.raises(ConnectionResetError):
                await asked(await forwarded(users[0], unused_port), b"?")
            await hops.at_rest()
            await until(lambda: container.queues == {})  # it was sent CLOSE for each, also for the one that failed

    run(main())


def test_a_reply_after_the_half_close_arrives_from_an_existing_tunnel_client_too(run: Run) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readexactly(4)
            writer.write(b"pong")
        writer.close()

    async def main() -> None:
        async with (
            chain() as hops,
            v1.v1_tunnel_client(hops.runner_port, CONTAINER) as container,
            service(slow) as port,
        ):
            await hops.changed(CONTAINER, True)
            local = await forwarded(await hops.user(), port)
            assert await asked(local, b"ping") == b"pong"
            await hops.at_rest()
            await until(lambda: container.queues == {})

    run(main())


def test_the_reply_to_an_upload_arrives_from_an_existing_tunnel_client(run: Run) -> None:
    async def upload(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await reader.read()  # to the end of its input
        writer.write(b"got %d" % len(body))
        writer.close()

    async def main() -> None:
        async with (
            chain() as hops,
            v1.v1_tunnel_client(hops.runner_port, CONTAINER) as container,
            service(upload) as port,
        ):
            await hops.changed(CONTAINER, True)
            user = await hops.user(config=EndpointConfig(v1_linger=0.5))
            assert await asked(await forwarded(user, port), bytes(100_000)) == b"got 100000"
            await hops.at_rest()
            await until(lambda: container.queues == {})

    run(main())


def test_a_reply_that_does_not_come_is_waited_for_no_longer_than_the_linger(run: Run) -> None:
    never = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await never.wait()
        writer.close()

    async def main() -> None:
        async with (
            chain() as hops,
            v1.v1_tunnel_client(hops.runner_port, CONTAINER),
            service(mute) as port,
        ):
            await hops.changed(CONTAINER, True)
            user = await hops.user(config=EndpointConfig(v1_linger=0.1))
            assert await asked(await forwarded(user, port), b"hello?") == b""
            await hops.at_rest()  # the runner keeps no id either
            never.set()

    run(main())


@clients
def test_an_existing_command_line_works_at_our_host(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            async with v1.v1_command_line(hops.host_port, port) as user:
                await user.send(v1.CONNECT, 1)
                await user.send(v1.DATA, 1, b"early")  # v1 does not wait for CONNECTED
                assert await user.receive() == (v1.CONNECTED, 1, b"")
                assert await user.receive_data(1, 5) == b"early"
                data = pattern("v1", 900_000)
                await user.send(v1.DATA, 1, data)
                assert await user.receive_data(1, len(data)) == data
                await user.send(v1.PING, 0, b"there?")
                assert await user.receive() == (v1.PONG, 0, b"there?")
                await user.send(v1.CLOSE, 1)
                await hops.at_rest()
                await user.send(v1.CONNECT, 1)  # the id is free again
                assert (await user.receive())[:2] in {(v1.CONNECTED, 1), (v1.CLOSE, 1)}

    run(main())


@clients
def test_an_existing_command_line_gets_no_message_of_v2(run: Run, kind: str, unused_port: int) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            async with v1.v1_command_line(hops.host_port, port) as user:
                await user.send(v1.CONNECT, 7)
                await user.receive()
                for _ in range(30):  # enough for windows and their PINGs, were there any
                    await user.send(v1.DATA, 7, bytes(1 << 18))
                    assert await user.receive_data(7, 1 << 18) == bytes(1 << 18)
            async with v1.v1_command_line(hops.host_port, unused_port) as user:
                await user.send(v1.CONNECT, 1)
                kind_, client_id, text = await user.receive()
                assert (kind_, client_id) == (v1.ERROR, 1)
                assert b"nothing listens" in text

    run(main())


@clients
def test_an_existing_command_line_is_given_no_message_that_it_refuses_for_its_size(run: Run, kind: str) -> None:
    async def torrent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(8 << 20))
        writer.close()

    async def main() -> None:
        async with chain() as hops, service(torrent) as port:
            await hops.tunnel(kind)
            async with v1.v1_command_line(hops.host_port, port) as user:  # refuses one byte more than 1 MiB
                await user.send(v1.CONNECT, 1)
                assert (await user.receive())[0] == v1.CONNECTED
                assert len(await user.receive_data(1, 8 << 20)) == 8 << 20

    run(main())


def test_an_existing_command_line_and_an_existing_tunnel_client_work_together(run: Run) -> None:
    async def main() -> None:
        async with (
            chain() as hops,
            v1.v1_tunnel_client(hops.runner_port, CONTAINER) as container,
            service(echo) as port,
        ):
            await hops.changed(CONTAINER, True)
            async with v1.v1_command_line(hops.host_port, port) as user:
                await user.send(v1.CONNECT, 1)
                assert await user.receive() == (v1.CONNECTED, 1, b"")
                await user.send(v1.DATA, 1, b"old friends")
                assert await user.receive_data(1, 11) == b"old friends"
                await user.send(v1.CLOSE, 1)
                await until(lambda: container.queues == {})

    run(main())


@pytest.mark.parametrize(
    ("task", "code", "text"), [("missing", 1008, "Error: no such task: missing"), ("1", 1011, "is not connected")]
)
def test_an_existing_command_line_is_refused_in_text_and_then_closed(run: Run, task: str, code: int, text: str) -> None:
    async def main() -> None:
        async with chain() as hops, connect(f"ws://127.0.0.1:{hops.host_port}/ws/forward/{task}/80") as websocket:
            greeting = await websocket.recv()
            assert isinstance(greeting, str)
            assert greeting.startswith("Error: ")
            assert text in greeting
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == code

    run(main())


@pytest.mark.parametrize(
    ("task", "status", "code"), [("missing", 404, "not_found"), ("1", 409, "tunnel_not_connected")]
)
def test_a_v2_command_line_is_refused_with_an_http_status(run: Run, task: str, status: int, code: str) -> None:
    async def main() -> None:
        async with chain() as hops:
            url = f"ws://127.0.0.1:{hops.host_port}/ws/forward/{task}/80"
            with pytest.raises(InvalidStatus) as refused:
                await connect(url, subprotocols=[TUNNEL_V2])  # type: ignore[list-item]
            assert refused.value.response.status_code == status
            answer = json.loads(refused.value.response.body or b"")
            assert answer["error"] == code
            with pytest.raises({404: NotFoundError, 409: UnavailableError}[status]) as error:
                await open_session(Server(url))
            assert (error.value.code, str(error.value)) == (code, answer["message"])

    run(main())


def test_sessions_of_v2_open_anew_when_an_older_tunnel_client_takes_over(run: Run) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel("python", anonymous=True)
            user = await hops.user()
            local = await forwarded(user, port)
            async with v1.v1_tunnel_client(hops.runner_port, CONTAINER):
                assert "another version" in await hops.detached.get()
                await hops.attach(user)
                assert user.link is not None
                assert user.link.version == 1
                async with dial(local) as (reader, writer):
                    writer.write(b"hi")
                    assert await reader.readexactly(2) == b"hi"

    run(main())


@clients
def test_sessions_of_v1_take_up_v2_when_a_newer_tunnel_client_takes_over(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port, contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(v1.v1_tunnel_client(hops.runner_port, CONTAINER))
            await hops.changed(CONTAINER, True)
            user = await hops.user()
            old = await stack.enter_async_context(v1.v1_command_line(hops.host_port, port))
            await hops.tunnel(kind)
            assert "another version" in await hops.detached.get()
            await hops.attach(user)
            assert user.link is not None
            assert user.link.version == 2
            assert await asked(await forwarded(user, port), b"hi") == b"hi"
            await old.send(v1.CONNECT, 1)  # what speaks v1 alone stays
            assert await old.receive() == (v1.CONNECTED, 1, b"")

    run(main())


def test_bytes_arrive_unchanged_after_a_link_got_a_receive_buffer_of_its_own(run: Run) -> None:
    """A link takes one when it reads little at a time, or when TLS delivers more than fits the loop's."""
    data = pattern("own buffer", 1_000_000)

    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel("python")
            user = await hops.user()
            assert user.link is not None
            user.link.intake.limit_reads(8192)
            assert await asked(await forwarded(user, port), data) == data

    run(main())
