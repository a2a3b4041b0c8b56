"""Each limit, hit over real sockets: the one who goes too far is told, and nobody else is hurt."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from kohakuriver._frame import build_frame
from kohakuriver.cli.pki import Authority
from kohakuriver.errors import UnavailableError, UsageError
from kohakuriver.host.services import tunnel_proxy
from kohakuriver.limits import LEAST_RATE, Limits
from kohakuriver.tls import ServerCertificate, client_context
from kohakuriver.tunnel.accept import serve_ws
from kohakuriver.tunnel.protocol import CONNECT, DATA, TUNNEL_V2
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from kohakuriver.web.app import bind, new_app
from kohakuriver.web.request_limits import body_is_of_a_user
from kohakuriver.web.server import Server
from tests.support.hops import CLIENTS, asked, chain, dial, echo, service, until
from tests.support.peers.wire import Wire

Run = Callable[[Coroutine[Any, Any, None]], None]
clients = pytest.mark.parametrize("kind", CLIENTS)
DIRECT = "vm-1"


async def forwarded(user: UserEndpoint, port: int) -> int:
    return (await user.listen_tcp("127.0.0.1", 0, port)).port


async def reset(port: int) -> None:
    """A connection to this port is reset."""
    async with dial(port) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await reader.read()


def test_a_user_with_too_many_sessions_is_refused_one_more_until_one_ends(run: Run) -> None:
    async def main() -> None:
        async with chain(Limits(max_sessions=2)) as hops, service(echo) as port:
            await hops.tunnel("python")
            first = await hops.user(token="ann")
            await hops.user(token="ann")
            with pytest.raises(UnavailableError, match="ann has 2 sessions open") as refused:
                await hops.user(token="ann")
            assert (refused.value.status, refused.value.code) == (429, "too_many_sessions")
            assert await asked(await forwarded(await hops.user(token="bob"), port), b"x") == b"x"
            await first.close()
            await until(lambda: len(hops.proxy.sessions) == 2)
            await hops.user(token="ann")

    run(main())


def test_a_session_that_could_not_be_opened_does_not_count(run: Run) -> None:
    async def main() -> None:
        async with chain(Limits(max_sessions=1)) as hops:
            for _ in range(3):
                with pytest.raises(UnavailableError, match="not connected"):
                    await hops.user(token="ann")
            await hops.tunnel("python")
            await hops.user(token="ann")

    run(main())


@pytest.mark.parametrize("where", ["in a container", "at an address"])
def test_a_session_with_too_many_streams_is_refused_one_more_until_one_ends(run: Run, where: str) -> None:
    async def main() -> None:
        async with chain(Limits(max_streams=2)) as hops, service(echo) as port:
            hops.addresses[DIRECT] = "127.0.0.1"
            await hops.tunnel("python")
            task = DIRECT if where == "at an address" else "1"
            greedy, other = await hops.user(task=task), await hops.user(task=task)
            local = await forwarded(greedy, port)
            async with dial(local) as (reader, writer):
                async with dial(local) as (_, second):
                    for each in (writer, second):
                        each.write(b"x")
                    assert await reader.readexactly(1) == b"x"
                    await until(lambda: greedy.totals.opened == 2)
                    await reset(local)
                    number, text = await hops.errors.get()
                    assert (number, text.partition(":")[0]) == (port, "EMFILE")
                    assert await asked(await forwarded(other, port), b"y") == b"y"
                await until(lambda: hops.server.snapshot()["streams"] == 1)
                assert await asked(local, b"z") == b"z"
                writer.write(b"w")
                assert await reader.readexactly(1) == b"w"

    run(main())


@pytest.mark.parametrize("where", ["in a container", "at an address"])
def test_a_user_who_opens_streams_too_fast_is_refused_in_every_session_and_others_are_not(run: Run, where: str) -> None:
    async def main() -> None:
        # A rate at which no test is slow enough for a token to come back.
        async with chain(Limits(max_connects=3)) as hops, service(echo) as port:
            hops.addresses[DIRECT] = "127.0.0.1"
            await hops.tunnel("python")
            task = DIRECT if where == "at an address" else "1"
            hasty = [await hops.user(task=task, token="eve") for _ in range(2)]
            other = await hops.user(task=task, token="ann")
            ports, calm = [await forwarded(each, port) for each in hasty], await forwarded(other, port)
            asking = (asked(local, b"x") for local in ports for _ in range(30))
            answers = await asyncio.gather(*asking, return_exceptions=True)
            refused = [answer for answer in answers if isinstance(answer, ConnectionResetError)]
            assert 3 <= answers.count(b"x") <= 6
            assert refused
            assert len(refused) + answers.count(b"x") == 60
            assert "EAGAIN: your forwards open more than 3 connections a second" in (await hops.errors.get())[1]
            assert await asked(calm, b"y") == b"y"

    run(main())


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send without end."""
    with contextlib.suppress(OSError):
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()


def unread(host_port: int, port: int, token: str, window: int) -> Wire:
    """A session whose one stream has room for so many bytes, none of which is ever read."""
    wire = Wire(host_port, f"/ws/forward/1/{port}", token)
    assert wire.receive() == (0x81, b"CONNECTED")
    wire.send(build_frame(CONNECT, 0, 1, 0, window.to_bytes(8, "big"), 7))
    return wire


@pytest.mark.parametrize(
    "limits", [Limits(max_backlog=24 << 20), Limits(max_user_backlog=16 << 20)], ids=["all", "one"]
)
def test_windows_that_nobody_reads_cost_their_user_the_session_and_no_other(run: Run, limits: Limits) -> None:
    async def main() -> None:
        async with chain(limits) as hops, service(flood) as port:
            await hops.tunnel("rust")
            calm = await asyncio.to_thread(unread, hops.host_port, port, "ann", 6 << 20)
            greedy = [await asyncio.to_thread(unread, hops.host_port, port, "eve", 60 << 20) for _ in range(3)]
            await until(lambda: len(hops.server.hub.sessions) == 1)
            for wire in greedy:
                assert await asyncio.to_thread(wire.close_code) == 1006
                wire.sock.close()
            got = 0
            while got < 6 << 20:
                first, payload = await asyncio.to_thread(calm.receive)
                got += len(payload) - 8 if (first, payload[0]) == (0x82, DATA) else 0
            assert got == 6 << 20
            calm.sock.close()

    run(main())


@clients
def test_a_session_with_a_rate_moves_everything_and_holds_up_nobody(
    run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * LEAST_RATE
    asleep: list[float] = []

    async def main() -> None:
        async with chain(Limits(max_rate=LEAST_RATE)) as hops, service(echo) as port:
            await hops.tunnel(kind)
            slow, other = await hops.user(), await hops.user()
            loop = asyncio.get_running_loop()
            began = loop.time()
            transfer = asyncio.ensure_future(asked(await forwarded(slow, port), bytes(size)))
            assert await asked(await forwarded(other, port), b"x") == b"x"
            assert not transfer.done()
            assert await transfer == bytes(size)
            asleep.append(loop.time() - began)

    run(main())
    # Not a matter of how fast this machine is: less time would be more bytes than the rate lets through.
    assert asleep[0] >= size / LEAST_RATE - 1


def test_without_a_rate_nothing_of_it_is_in_the_way(run: Run) -> None:
    async def main() -> None:
        async with chain() as hops:
            await hops.tunnel("python")
            await hops.user()
            for session in hops.proxy.sessions:
                for side in (session.user, session.container_side):
                    assert type(side) is tunnel_proxy.Splice

    run(main())


def test_a_message_above_the_limit_ends_its_session_with_1009_and_no_other(run: Run) -> None:
    async def main() -> None:
        async with chain(Limits(max_message=1 << 20)) as hops, service(echo) as port:
            await hops.tunnel("python")
            calm = await forwarded(await hops.user(), port)
            url = f"ws://127.0.0.1:{hops.host_port}/ws/forward/1/1"
            async with connect(url, subprotocols=[TUNNEL_V2], max_size=None) as peer:  # type: ignore[list-item]
                assert await peer.recv() == "CONNECTED"
                await peer.send(bytes((1 << 20) + 1))
                with pytest.raises(ConnectionClosed) as closed:
                    await peer.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009
            assert "1048576 bytes" in closed.value.rcvd.reason
            assert await asked(calm, b"x") == b"x"

    run(main())


def test_a_session_in_which_nothing_passes_is_closed_with_4001_and_a_busy_one_is_not(run: Run) -> None:
    async def main() -> None:
        async with chain(Limits(idle_timeout=0.4)) as hops, service(echo) as port:
            await hops.tunnel("python")
            busy, idle = await hops.user(), await hops.user()
            assert idle.link is not None
            link = idle.link
            async with dial(await forwarded(busy, port)) as (reader, writer):
                while hops.detached.empty():
                    writer.write(b"x")
                    assert await reader.readexactly(1) == b"x"
                    await asyncio.sleep(0.01)  # a busy loop would keep the looks from being taken
            assert (link.closing.code, await hops.detached.get()) == (
                4001,
                "nothing passed for 0.4 s, which is as long as this host waits",
            )
            assert busy.link is not None

    run(main())


@asynccontextmanager
async def http_server(limits: Limits, certificate: ServerCertificate | None = None) -> AsyncIterator[int]:
    """A program's HTTP port: paths that take a body, take their time, and answer once another path was asked for."""
    app: FastAPI = new_app("host", "1")
    told, held = asyncio.Event(), asyncio.Event()

    @app.post("/take")
    async def take(request: Request) -> int:
        return len(await request.body())

    @app.post("/ponder")
    async def ponder() -> int:
        await asyncio.sleep(3 * limits.handshake_timeout)
        return 42

    @app.post("/wait")
    async def wait() -> int:
        await told.wait()
        return 42

    @app.post("/large/{user}")
    async def large(request: Request, user: str) -> Response:
        body_is_of_a_user(request.scope, user)
        return Response(bytes(10_000_000))

    @app.post("/hold")
    async def hold(request: Request) -> int:
        size = len(await request.body())
        held.set()
        await told.wait()
        return size

    @app.post("/held")
    async def is_held() -> int:
        await held.wait()
        return 1

    @app.post("/tell")
    async def tell() -> int:
        told.set()
        return 2

    async def nothing() -> None:
        pass

    sock = bind("127.0.0.1", 0)
    ready = asyncio.Event()

    async def on_ready() -> None:
        ready.set()

    server = Server(app, ws=serve_ws([]), on_ready=on_ready, on_stop=nothing, certificate=certificate, limits=limits)
    serving = asyncio.ensure_future(server.serve([sock]))
    await ready.wait()
    try:
        yield sock.getsockname()[1]
    finally:
        server.stop()
        await serving


async def answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and JSON of the last answer on a connection that is closed behind it."""
    head, _, body = (await reader.read()).rpartition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


POST = b"POST /take HTTP/1.1\r\nHost: x\r\n"
UPGRADE = b"GET /ws/forward/1/1 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET", b"\r\n\r\n", POST, POST + b"Content-Length: 5\r\n\r\n1234", UPGRADE],
    ids=["nothing", "half a word", "empty lines", "half a head", "half a body", "half a handshake"],
)
def test_a_request_that_never_gets_whole_is_ended(run: Run, sent: bytes) -> None:
    async def main() -> None:
        async with http_server(Limits(handshake_timeout=0.3)) as port, dial(port) as (reader, writer):
            writer.write(sent)
            status, answer = await answered(reader)
            assert (status, answer["error"]) == (408, "timed_out")
            assert "0.3 s" in answer["message"]
            async with dial(port) as (other, asking):
                asking.write(POST + b"Content-Length: 2\r\nConnection: close\r\n\r\nab")
                assert (await other.read()).endswith(b"\r\n\r\n2")

    run(main())


def test_requests_that_come_before_the_first_is_answered_are_few(run: Run) -> None:
    wait, told = (b"POST /" + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n" for path in (b"wait", b"tell"))

    async def main() -> None:
        async with http_server(Limits()) as port:
            async with dial(port) as (reader, writer):
                writer.write(wait * 400)
                status, answer = await answered(reader)
                assert (status, answer["error"]) == (400, "bad_request")
            async with dial(port) as (reader, writer), dial(port) as (_, telling):
                writer.write(wait * 8)
                telling.write(told)
                for _ in range(8):
                    assert (await reader.readuntil(b"\r\n\r\n42")).startswith(b"HTTP/1.1 200 ")

    run(main())


def test_who_hangs_up_before_the_answers_is_no_error(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    hold, held, tell = (
        b"POST /" + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" for path in (b"hold", b"held", b"tell")
    )

    async def main() -> None:
        async with http_server(Limits()) as port:
            async with dial(port) as (_, writer), dial(port) as (reader, other):
                writer.write(hold * 3)
                other.write(held)
                await reader.readuntil(b"\r\n\r\n1")
                writer.transport.abort()
                for answer in (b"1", b"2", b"1"):
                    other.write(tell if answer == b"2" else held)
                    await reader.readuntil(b"\r\n\r\n" + answer)

    run(main())
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (POST + b"X: " + b"x" * 5000 + b"\r\n\r\n", 431),
        (POST + b"X: " + b"x" * 5000, 431),
        (b"GET /" + b"x" * 5000, 431),
        (POST + b"".join(b"X-%d: y\r\n" % i for i in range(900)), 431),
        (POST + b"a:\r\n" * 101, 431),
        (UPGRADE + b"a:\r\n" * 101, 431),
        (UPGRADE + b"X: " + b"x" * 5000 + b"\r\n\r\n", 431),
        (POST + b"Content-Length: 70000\r\n\r\n" + bytes(70_000), 413),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n11170\r\n" + bytes(70_000), 413),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 2000, 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
    ids=[
        "header",
        "endless header",
        "endless path",
        "headers",
        "empty ones",
        "empty ones of a handshake",
        "handshake",
        "body",
        "chunks",
        "tiny chunks",
        "TLS",
    ],
)
def test_a_request_that_is_too_large_is_refused_with_a_sentence(run: Run, sent: bytes, status: int) -> None:
    async def main() -> None:
        async with http_server(Limits(max_header=4096, max_body=65536)) as port:
            async with dial(port) as (reader, writer):
                writer.write(sent)
                found, answer = await answered(reader)
                assert found == status
                assert set(answer) == {"error", "message"}
            async with dial(port) as (reader, writer):  # as much as is allowed, in two requests on one connection
                for _ in range(2):
                    writer.write(POST + b"X: " + b"x" * 4000 + b"\r\nContent-Length: 65536\r\n\r\n" + bytes(65536))
                    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                    assert await reader.readexactly(5) == b"65536"

    run(main())


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01\x00"], ids=["nothing", "half a hello"])
def test_a_tls_handshake_that_never_gets_whole_is_ended_and_others_are_served(
    run: Run, tmp_path: Path, sent: bytes
) -> None:
    made = Authority(tmp_path).issue(["127.0.0.1"], 1)
    trusted = client_context("https:", tmp_path / "ca.pem")

    async def main() -> None:
        limits = Limits(handshake_timeout=0.3)
        async with http_server(limits, ServerCertificate(made.cert, made.key)) as port:
            async with dial(port) as (silent, writer):
                writer.write(sent)
                reader, asking = await asyncio.open_connection("127.0.0.1", port, ssl=trusted)
                asking.write(POST + b"Content-Length: 2\r\nConnection: close\r\n\r\nab")
                assert (await reader.read()).endswith(b"\r\n\r\n2")
                asking.close()
                with contextlib.suppress(ConnectionResetError):
                    assert await silent.read() == b""
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusted)
            status, _ = await answered(reader)  # of a peer that is slow only afterwards
            assert status == 408
            writer.close()

    run(main())


def test_a_request_that_takes_long_to_answer_is_not_hurried(run: Run) -> None:
    async def main() -> None:
        async with http_server(Limits(handshake_timeout=0.2)) as port, dial(port) as (reader, writer):
            for _ in range(2):
                writer.write(b"POST /ponder HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab")
                assert (await reader.readuntil(b"\r\n\r\n42")).startswith(b"HTTP/1.1 200")

    run(main())


def body_of(size: int, path: str) -> bytes:
    head = f"POST /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + bytes(size)


async def answer_to(port: int, size: int, path: str) -> str:
    """What a request with a body of `size` bytes is answered with."""
    async with dial(port) as (reader, writer):
        writer.write(body_of(size, path))
        return (await reader.read()).rpartition(b"\r\n\r\n")[2].decode()


def test_bodies_together_have_a_limit_until_the_work_on_them_ends_and_small_ones_still_get_in(run: Run) -> None:
    async def main() -> None:
        limits = Limits(max_bodies=1 << 20)
        async with http_server(limits) as port:
            async with dial(port) as (_gone, writer):
                writer.write(body_of(700_000, "hold"))
                assert await answer_to(port, 0, "held") == "1"
                assert json.loads(await answer_to(port, 700_000, "take"))["error"] == "busy"
                assert await answer_to(port, 60_000, "take") == "60000"
            # The peer has gone, and its request is still worked on.
            assert json.loads(await answer_to(port, 700_000, "take"))["error"] == "busy"
            assert await answer_to(port, 0, "tell") == "2"
            while await answer_to(port, 700_000, "take") != "700000":
                pass

    run(main())


async def large_answer(port: int, user: str) -> int:
    """Bytes of the answer; all of it is read."""
    async with dial(port) as (reader, writer):
        writer.write(body_of(0, f"large/{user}"))
        return len((await reader.read()).partition(b"\r\n\r\n")[2])


def test_answers_that_their_user_does_not_read_have_a_share_and_are_free_once_they_are_read(run: Run) -> None:
    async def main() -> None:
        async with http_server(Limits(max_bodies=48 << 20)) as port, AsyncExitStack() as stack:
            unread = []
            for _ in range(3):  # a share is a quarter, 12 MiB
                reader, writer = await stack.enter_async_context(dial(port))
                writer.write(body_of(0, "large/eve"))
                unread.append(reader)
            heads = [await reader.readuntil(b"\r\n\r\n") for reader in unread]
            assert [head.split()[1] for head in heads] == [b"200", b"429", b"429"]
            assert json.loads(await unread[1].read())["error"] == "too_many_requests"
            assert await large_answer(port, "ann") == 10_000_000
            assert await large_answer(port, "eve") < 1000
            assert len(await unread[0].read()) == 10_000_000
            while await large_answer(port, "eve") < 10_000_000:
                pass

    run(main())


def test_what_half_a_body_held_is_free_when_its_connection_ends(run: Run) -> None:
    async def main() -> None:
        async with http_server(Limits(max_bodies=1 << 20)) as port:
            for _ in range(3):
                async with dial(port) as (_, writer):
                    writer.write(body_of(900_000, "take")[:-1])
                    await writer.drain()
            while await answer_to(port, 900_000, "take") != "900000":
                pass

    run(main())


REQUEST = POST + b"Content-Length: 2\r\n\r\nab"


@pytest.mark.parametrize("kind", ["silent", "half a head", "asked before", "at the TLS handshake"])
def test_of_those_who_have_no_request_under_way_the_first_goes_for_one_more(
    run: Run, tmp_path: Path, kind: str
) -> None:
    over_tls = kind == "at the TLS handshake"
    made = Authority(tmp_path).issue(["127.0.0.1"], 1)
    trusted = client_context("https:", tmp_path / "ca.pem") if over_tls else None
    certificate = ServerCertificate(made.cert, made.key) if over_tls else None

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            port = await stack.enter_async_context(http_server(Limits(max_waiting=16), certificate))
            working, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusted)
            writer.write(b"POST /wait HTTP/1.1\r\nHost: x\r\n\r\n")
            waiting = []
            for _ in range(17):
                reader, asking = await stack.enter_async_context(dial(port))
                if kind == "half a head":
                    asking.write(POST)
                if kind == "asked before":
                    asking.write(REQUEST)
                    assert (await reader.readuntil(b"\r\n\r\n2")).startswith(b"HTTP/1.1 200")
                waiting.append((reader, asking))
            with contextlib.suppress(ConnectionResetError):
                assert await waiting[0][0].read() == b""
            if not over_tls:
                reader, asking = waiting[-1]
                asking.write(REQUEST.removeprefix(POST) if kind == "half a head" else REQUEST)
                assert (await reader.readuntil(b"\r\n\r\n2")).startswith(b"HTTP/1.1 200")
            reader, asking = await asyncio.open_connection("127.0.0.1", port, ssl=trusted)
            asking.write(b"POST /tell HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).endswith(b"\r\n\r\n2")
            assert (await working.readuntil(b"\r\n\r\n42")).startswith(b"HTTP/1.1 200")
            asking.close()
            writer.close()

    run(main())


@pytest.mark.parametrize("where", ["in a container", "at an address"])
def test_a_session_reaches_the_ports_that_it_named_and_no_other(run: Run, where: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port, service(echo) as other:
            hops.addresses[DIRECT] = "127.0.0.1"
            await hops.tunnel("python")
            task = DIRECT if where == "at an address" else "1"
            user = await hops.user(task=task, query=f"?ports={port}")
            assert (await hops.audit.written.get())["ports"] == [str(port)]
            assert await asked(await forwarded(user, port), b"x") == b"x"
            await reset(await forwarded(user, other))
            assert (await hops.errors.get()) == (other, f"EACCES: port {other} is not part of this forward")
            with pytest.raises(UsageError, match="ports must be numbers"):
                await hops.user(task=task, query="?ports=80,http")
            with pytest.raises(UsageError, match="may name 256 ports; forward these 257 with several commands"):
                await hops.user(task=task, query="?ports=" + ",".join(map(str, range(1, 258))))

    run(main())


@clients
def test_the_audit_log_says_who_opened_what_for_how_long_and_how_it_ended(run: Run, kind: str) -> None:
    async def main() -> None:
        async with chain() as hops, service(echo) as port:
            await hops.tunnel(kind)
            user = await hops.user(token="ann")
            opened = await hops.audit.written.get()
            assert await asked(await forwarded(user, port), bytes(100_000)) == bytes(100_000)
            await user.close()
            closed = await hops.audit.written.get()
            assert opened["event"] == "session_opened"
            assert {**opened, "event": "session_closed"}.items() <= closed.items()
            known = {"user": "ann", "task": 1, "node": "node", "container": "kohakuriver-vps-1", "port": 1}
            assert known.items() <= opened.items()
            assert (opened["proto"], opened["ports"], opened["version"]) == ("tcp", None, 2)
            assert opened["from"].startswith("127.0.0.1:")
            assert closed["bytes_to_container"] >= 100_000
            assert closed["bytes_to_user"] >= 100_000
            assert closed["seconds"] >= 0
            assert (closed["ended_by"], closed["code"]) == ("user", 1000)

    run(main())


def test_the_audit_log_tells_who_ended_a_session(run: Run) -> None:
    async def main() -> None:
        async with chain() as hops:
            await hops.tunnel("python")
            await hops.user()
            first = await hops.audit.written.get()
            next(iter(hops.server.hub.sessions)).link.close(1008, "the task is over")
            ended = await hops.audit.written.get()
            assert (first["session"], "node", 1008, "the task is over") == tuple(
                ended[name] for name in ("session", "ended_by", "code", "reason")
            )
            await hops.user()
            await hops.audit.written.get()
            await hops.proxy.close()
            ended = await hops.audit.written.get()
            assert (ended["ended_by"], ended["reason"]) == ("host", "the host is shutting down")

    run(main())
