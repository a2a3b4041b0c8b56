"""Opening a tunnel WebSocket on uvicorn's port, and everything else that may come to that port instead."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from fastapi import Request
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from kohakuriver._frame import FrameWalker, build_frame
from kohakuriver.errors import KohakuRiverError, NotFoundError, UnauthenticatedError, UnavailableError
from kohakuriver.tunnel.accept import Ignore, TunnelRoute, UpgradeRequest, greet, serve_ws
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import DATA, TUNNEL_V2
from kohakuriver.web.app import bearer, new_app
from kohakuriver.web.server import Server
from tests.support.hops import dial, until
from tests.support.serving import a_server

Run = Callable[[Coroutine[Any, Any, None]], None]
V2 = [Subprotocol(TUNNEL_V2)]
HEAD = (
    "GET {path} HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: {version}\r\n{more}\r\n"
)

app = new_app("test", "1")


@app.get("/page")
async def page() -> str:
    return "a page"


@app.get("/credential")
async def credential(request: Request) -> str | None:
    return bearer(request)


class Gate(Ignore):
    """A route that opens, refuses, or makes its peer wait, and keeps what it saw."""

    def __init__(self) -> None:
        self.requests: list[UpgradeRequest] = []
        self.error: Exception | None = None
        self.waits = asyncio.Event()
        self.waits.set()
        self.received = bytearray()
        self.more = asyncio.Event()
        self.ended: list[str] = []
        self.parts: tuple[str, ...] = ()
        self.routes = [TunnelRoute(f"/ws/gate{rest}", self.open) for rest in ("", "/{task}/{port}")]

    async def open(self, request: UpgradeRequest, *parts: str) -> None:
        self.parts = parts
        self.requests.append(request)
        try:
            await self.waits.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        if self.error is not None:
            raise self.error
        link = request.accept(FrameWalker(masked=True), self)
        greet(link, "CONNECTED")

    def link_received(self, link: Link, start: int, stop: int) -> int:
        messages, consumed = link.walker.walk(link.intake.buffer.data, start, stop)
        for message in messages:
            if message[0] > 0x101:
                link.control(message)
            else:
                self.received += link.intake.buffer.view[message[4] : message[5]]
        self.more.set()
        return consumed

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        self.ended.append(f"{code} {reason}")


@contextlib.asynccontextmanager
async def serving(gate: Gate) -> AsyncIterator[tuple[Server, int]]:
    async with a_server(app, serve_ws(gate.routes)) as (server, sock):
        yield server, sock.getsockname()[1]


async def answer(port: int, request: bytes) -> tuple[int, bytes]:
    """The status and the body of the answer to raw bytes; 0 if the server only hung up."""
    async with dial(port) as (reader, writer):
        writer.write(request)
        data = await reader.read()
        head, _, body = data.partition(b"\r\n\r\n")
        return (int(head.split()[1]), body) if head else (0, b"")


def upgrade(path: str = "/ws/gate", version: str = "13", more: str = "") -> bytes:
    return HEAD.format(path=path, version=version, more=more).encode()


def test_a_route_gets_the_request_as_it_was_made(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as (_, port):
            url = f"ws://127.0.0.1:{port}/ws/gate/a%20b/80?proto=udp&x="
            headers = {"Authorization": "bearer  secret "}
            async with connect(url, subprotocols=V2, additional_headers=headers) as websocket:
                assert websocket.subprotocol == TUNNEL_V2
                assert await websocket.recv() == "CONNECTED"
            request = gate.requests[0]
            assert (request.path, request.query) == ("/ws/gate/a b/80", {"proto": "udp"})
            assert gate.parts == ("a b", "80")
            assert (request.token, request.offers_v2) == ("secret", True)
            assert request.peer.startswith("127.0.0.1:")

    run(main())


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ("Basic YTpi", 401),
        ("Bearer", 401),
        ("Bearer  ", 401),
        ("secret", 401),
        ("Bearer one\r\nAuthorization: Bearer two", 400),
    ],
)
def test_a_credential_that_is_no_bearer_token_gets_the_same_answer_from_a_page_and_a_websocket(
    run: Run, lines: str, status: int
) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as (_, port):
            plain = (
                f"GET /credential HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {lines}\r\n\r\n".encode()
            )
            of_page = await answer(port, plain)
            of_websocket = await answer(port, upgrade(more=f"Authorization: {lines}\r\n"))
            assert of_page[0] == of_websocket[0] == status
            assert json.loads(of_page[1]) == json.loads(of_websocket[1])
            assert not gate.requests

    run(main())


def test_no_subprotocol_is_v1_and_an_unknown_one_is_not_ours(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as (_, port):
            for offered in (None, [Subprotocol("kohakuriver.tunnel.v9")]):
                async with connect(f"ws://127.0.0.1:{port}/ws/gate", subprotocols=offered) as websocket:
                    assert websocket.subprotocol is None
            assert [request.offers_v2 for request in gate.requests] == [False, False]

    run(main())


def test_a_websocket_at_a_path_that_is_not_ours_is_refused_and_pages_are_served(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as (_, port):
            for path in ("/nothing/there", "/page", "/ws/gate/a", "/ws/gate/a/80/more", "/ws/gate/a%2Fb/80"):
                status, body = await answer(port, upgrade(path))
                assert (status, json.loads(body)["error"]) == (404, "no_such_path")
            assert gate.requests == []
            status, body = await answer(port, b"GET /page HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
            assert (status, json.loads(body)) == (200, "a page")

    run(main())


@pytest.mark.parametrize(
    "request_",
    [
        upgrade(version="7"),
        upgrade(more="Sec-WebSocket-Key: another\r\n"),
        upgrade(more="Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"),
        upgrade().replace(b"dGhlIHNhbXBsZSBub25jZQ==", b"short"),
        upgrade().replace(b"GET", b"POST"),
    ],
    ids=["version", "two keys", "two credentials", "bad key", "method"],
)
def test_a_handshake_that_is_wrong_is_refused_before_any_route_hears_of_it(run: Run, request_: bytes) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as (_, port):
            assert (await answer(port, request_))[0] == 400
            assert gate.requests == []

    run(main())


@pytest.mark.parametrize("garbage", [b"\x00" * 100, b"GET\r\n\r\n", b"\x82\x85" * 50, b"GET /ws/gate HTTP/9.9\r\n\r\n"])
def test_garbage_is_answered_or_hung_up_on_and_hurts_nothing(run: Run, garbage: bytes) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as (_, port):
            assert (await answer(port, garbage))[0] in (0, 400)
            async with connect(f"ws://127.0.0.1:{port}/ws/gate") as websocket:
                assert await websocket.recv() == "CONNECTED"

    run(main())


ERRORS = [
    (NotFoundError("no such task"), 404, 1008),
    (UnavailableError("it is not running", code="task_not_running"), 409, 1008),
    (UnavailableError("no tunnel", code="tunnel_not_connected"), 409, 1011),
    (KohakuRiverError("broken", status=502), 502, 1011),
]


@pytest.mark.parametrize(("error", "status", "code"), ERRORS)
def test_a_refusal_is_an_http_status_in_v2_and_a_text_and_a_close_in_v1(
    run: Run, error: KohakuRiverError, status: int, code: int
) -> None:
    async def main() -> None:
        gate = Gate()
        gate.error = error
        async with serving(gate) as (_, port):
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"ws://127.0.0.1:{port}/ws/gate", subprotocols=V2)
            assert refused.value.response.status_code == status
            told = json.loads(refused.value.response.body or b"")
            assert (len(told.pop("request_id", "")) == 32) == (status >= 500)
            assert told == error.to_json()
            async with connect(f"ws://127.0.0.1:{port}/ws/gate") as websocket:
                assert await websocket.recv() == f"Error: {error}"
                with pytest.raises(ConnectionClosed):
                    await websocket.recv()
                assert (websocket.close_code, websocket.close_reason) == (code, str(error))

    run(main())


@pytest.mark.parametrize("offered", [None, V2])
def test_missing_credentials_are_401_in_either_version(run: Run, offered: list[Subprotocol] | None) -> None:
    async def main() -> None:
        gate = Gate()
        gate.error = UnauthenticatedError("who are you?")
        async with serving(gate) as (_, port):
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"ws://127.0.0.1:{port}/ws/gate", subprotocols=offered)
            assert refused.value.response.status_code == 401
            assert refused.value.response.headers["WWW-Authenticate"] == "Bearer"

    run(main())


def test_a_route_that_fails_is_a_500(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        gate = Gate()
        gate.error = ZeroDivisionError()
        async with serving(gate) as (_, port):
            assert (await answer(port, upgrade()))[0] == 500
            assert "the opening of '/ws/gate' failed" in caplog.text

    run(main())


def test_frames_that_come_before_our_answer_are_kept(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        gate.waits.clear()
        async with serving(gate) as (_, port), dial(port) as (reader, writer):
            writer.write(upgrade())
            await until(lambda: bool(gate.requests))
            writer.write(build_frame(DATA, 0, 1, 0, b"early", 7))
            await until(lambda: bool(gate.requests[0]._upgrade._early))
            gate.waits.set()
            await gate.more.wait()
            assert gate.received == b"early"
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")

    run(main())


def test_too_much_before_our_answer_ends_the_connection(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        gate.waits.clear()
        async with serving(gate) as (_, port), dial(port) as (reader, writer):
            writer.write(upgrade())
            await until(lambda: bool(gate.requests))
            writer.write(bytes(1 << 20))
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            await until(lambda: bool(gate.ended))
            assert gate.ended == ["cancelled"]

    run(main())


def test_a_peer_that_hangs_up_while_it_waits_is_not_opened(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        gate.waits.clear()
        async with serving(gate) as (server, port):
            async with dial(port) as (_, writer):
                writer.write(upgrade())
                await until(lambda: bool(gate.requests))
            await until(lambda: bool(gate.ended))
            assert gate.ended == ["cancelled"]
            assert gate.requests[0].gone
            with pytest.raises(KohakuRiverError, match="hung up"):
                gate.requests[0].accept(FrameWalker(masked=True), gate)
            assert not server.server_state.connections

    run(main())


def test_a_server_that_goes_down_says_so_to_links_and_to_those_that_wait(run: Run) -> None:
    async def main() -> None:
        gate = Gate()
        async with serving(gate) as (server, port):
            async with connect(f"ws://127.0.0.1:{port}/ws/gate") as websocket:
                assert await websocket.recv() == "CONNECTED"
                gate.waits.clear()
                waiting = asyncio.ensure_future(answer(port, upgrade()))
                await until(lambda: len(gate.requests) == 2)
                await asyncio.gather(server.shutdown(), websocket.wait_closed())
                assert (websocket.close_code, (await waiting)[0]) == (1001, 503)

    run(main())
