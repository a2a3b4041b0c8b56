"""Addresses of a task's ports: real HTTP servers behind the four hops, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.server
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from aiohttp import web as server
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from kohakuriver.client.events import Served
from kohakuriver.errors import LocalAddressError
from kohakuriver.gateway import gateway, visit
from tests.support.hops import CLIENTS, CONTAINER, kill, service, until
from tests.support.web import Visitor, Web, web

Run = Callable[[Coroutine[Any, Any, None]], None]
SIZE = 200 << 20
PIECE = bytes(range(256)) * 4096


class App:
    """An aiohttp server with what browsers' programs do."""

    def __init__(self) -> None:
        self.connections: set[Any] = set()
        self.next_event = asyncio.Event()
        self.left = asyncio.Event()
        self.sent = 0

    async def told(self, request: server.Request) -> server.Response:
        """What the service was told."""
        self.connections.add(request.transport)
        return server.json_response({"fields": list(request.headers.items()), "path": request.path_qs})

    async def upload(self, request: server.Request) -> server.Response:
        digest, size = hashlib.sha256(), 0
        async for piece in request.content.iter_any():
            digest.update(piece)
            size += len(piece)
        return server.json_response({"size": size, "sha256": digest.hexdigest()})

    async def download(self, request: server.Request) -> server.StreamResponse:
        size = int(request.query["size"])
        answer = server.StreamResponse()
        if "chunked" in request.query:
            answer.enable_chunked_encoding()
        else:
            answer.content_length = size
        await answer.prepare(request)
        self.sent = 0
        while self.sent < size:
            await answer.write(PIECE[: size - self.sent])
            self.sent += min(len(PIECE), size - self.sent)
        return answer

    async def events(self, request: server.Request) -> server.StreamResponse:
        answer = server.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        try:
            for number in (1, 2):
                await answer.write(b"data: %d\n\n" % number)
                await self.next_event.wait()
            await asyncio.get_running_loop().create_future()
        finally:
            self.left.set()
        return answer

    async def socket(self, request: server.Request) -> server.WebSocketResponse:
        answer = server.WebSocketResponse(max_msg_size=0)
        await answer.prepare(request)
        async for message in answer:
            if message.type is aiohttp.WSMsgType.BINARY:
                await answer.send_bytes(message.data)
            else:
                await answer.send_str(message.data)
        self.left.set()
        return answer

    async def status(self, request: server.Request) -> server.Response:
        return server.Response(status=int(request.match_info["status"]), headers={"ETag": '"x"'})

    async def moved(self, request: server.Request) -> server.Response:
        raise server.HTTPFound(f"http://{request.host}/there")

    async def cookie(self, request: server.Request) -> server.Response:
        answer = server.Response(text="set")
        answer.set_cookie("theirs", "1", domain="localhost")
        answer.set_cookie("kohakuriver-web-1", "1")
        return answer


@contextlib.asynccontextmanager
async def serving(app: App, files: Path) -> AsyncIterator[int]:
    made = server.Application(client_max_size=0)
    made.router.add_get("/download", app.download)
    made.router.add_post("/upload", app.upload)
    made.router.add_get("/events", app.events)
    made.router.add_get("/socket", app.socket)
    made.router.add_get("/moved", app.moved)
    made.router.add_get("/cookie", app.cookie)
    made.router.add_get("/status/{status}", app.status)
    made.router.add_static("/files", files)
    made.router.add_route("*", "/{path:.*}", app.told)
    runner = server.AppRunner(made, shutdown_timeout=0.1, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        site = server.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port: int = runner.addresses[0][1]
        yield port
    finally:
        await runner.cleanup()


@pytest.fixture
def visited(run: Run, tmp_path: Path) -> Callable[[Callable[[App, Web, int], Coroutine[Any, Any, None]]], None]:
    """Run something with an aiohttp server that has an address."""

    def visited(scene: Callable[[App, Web, int], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            app = App()
            async with serving(app, tmp_path) as port, web(port) as addresses:
                await scene(app, addresses, port)

        run(main())

    return visited


Visited = Callable[[Callable[[App, Web, int], Coroutine[Any, Any, None]]], None]


@contextlib.asynccontextmanager
async def session(addresses: Web, port: int) -> AsyncIterator[aiohttp.ClientSession]:
    """A client that is let in, and asks for the address."""
    fields = {"Host": addresses.host(port), "Cookie": await addresses.login(port), "Sec-Fetch-Site": "same-origin"}
    base = f"http://127.0.0.1:{addresses.port}"
    async with aiohttp.ClientSession(base, headers=fields, cookie_jar=aiohttp.DummyCookieJar()) as client:
        yield client


def test_the_service_is_told_that_it_is_on_localhost_and_who_asked_for_what(visited: Visited) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        async with addresses.visitor(port) as browser:
            own = f"http://{browser.host}"
            answer = await browser.ask("GET /a?b=%20c", f"Origin: {own}", f"Referer: {own}/x", "Authorization: token t")
            told = json.loads(answer.body)
            assert told["path"] == "/a?b=%20c"
            assert dict(told["fields"]) == {
                "Host": f"localhost:{port}",
                "Origin": f"http://localhost:{port}",
                "Referer": f"http://localhost:{port}/x",
                "Authorization": "token t",
                "X-Forwarded-For": "127.0.0.1",
                "X-Forwarded-Host": browser.host,
                "X-Forwarded-Proto": "http",
            }
            assert "kohakuriver" not in answer.body.decode().lower()

    visited(scene)


def test_the_address_is_told_with_its_link_when_it_is_served(visited: Visited) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        (served,) = [event for event in addresses.events if isinstance(event, Served)]
        assert (served.url, served.remote_port) == (f"http://{addresses.host(port)}/", port)
        async with addresses.stranger(port) as browser:
            path = served.link.removeprefix(served.url)
            assert (await browser.ask(f"GET /{path}")).status == 303

    visited(scene)


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_download_of_any_size_arrives_as_it_was_sent(run: Run, tmp_path: Path, kind: str, chunked: bool) -> None:
    async def main() -> None:
        async with serving(App(), tmp_path) as port, web(port, kind=kind) as addresses:
            digest, size = hashlib.sha256(), 0
            async with session(addresses, port) as client:
                async with client.get(f"/download?size={SIZE}{'&chunked' if chunked else ''}") as answer:
                    async for piece in answer.content.iter_any():
                        digest.update(piece)
                        size += len(piece)
            assert size == SIZE
            assert digest.hexdigest() == hashlib.sha256(PIECE * (SIZE // len(PIECE))).hexdigest()

    run(main())


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_of_any_size_arrives_as_it_was_sent(run: Run, tmp_path: Path, kind: str, chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(SIZE // len(PIECE)):
            yield PIECE

    async def main() -> None:
        async with serving(App(), tmp_path) as port, web(port, kind=kind) as addresses:
            length = {} if chunked else {"Content-Length": str(SIZE)}
            async with session(addresses, port) as client:
                async with client.post("/upload", data=pieces(), headers=length) as answer:
                    told = await answer.json()
            assert told == {"size": SIZE, "sha256": hashlib.sha256(PIECE * (SIZE // len(PIECE))).hexdigest()}

    run(main())


def test_a_download_waits_for_a_browser_that_does_not_read(visited: Visited) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        async with addresses.visitor(port) as browser:
            browser.send(browser.head(f"GET /download?size={SIZE}"))
            head = await browser.reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head
            sent = -1
            while app.sent != sent:
                sent = app.sent
                await asyncio.sleep(0.3)
            assert sent < SIZE // 2
            left = SIZE
            while left:
                left -= len(await browser.reader.read(1 << 20))
            assert app.sent == SIZE

    visited(scene)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_waits_for_a_service_that_does_not_read(run: Run, chunked: bool) -> None:
    reads = asyncio.Event()
    piece = b"%x\r\n%s\r\n" % (len(PIECE), PIECE) if chunked else PIECE
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {SIZE}"

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reads.wait()
        await reader.readuntil(b"\r\n\r\n")
        left = len(piece) * (SIZE // len(PIECE)) + (5 if chunked else 0)
        while left:
            left -= len(await reader.read(1 << 20))
        writer.write(OK)
        writer.close()

    async def main() -> None:
        async with service(slow) as port, web(port) as addresses, addresses.visitor(port) as browser:
            browser.send(browser.head("POST /", framing, "Sec-Fetch-Site: same-origin"))
            sent = 0

            async def upload() -> None:
                nonlocal sent
                for _ in range(SIZE // len(PIECE)):
                    browser.send(piece)
                    await browser.writer.drain()
                    sent += 1
                browser.send(b"0\r\n\r\n" if chunked else b"")

            uploading, before = asyncio.ensure_future(upload()), -1
            while sent != before:
                before = sent
                await asyncio.sleep(0.3)
            assert sent * len(PIECE) < SIZE // 2
            reads.set()
            await uploading
            assert (await browser.answer()).body == b"ok"

    run(main())


def test_many_browsers_at_a_time_get_their_own_answers(visited: Visited) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        cookie = await addresses.login(port)

        async def one(number: int) -> None:
            async with addresses.stranger(port, cookie) as browser:
                for turn in range(5):
                    answer = await browser.ask(f"GET /{number}/{turn}")
                    assert json.loads(answer.body)["path"] == f"/{number}/{turn}"

        await asyncio.gather(*(one(number) for number in range(150)))

    visited(scene)


def test_an_event_arrives_at_once_and_a_browser_that_leaves_is_missed(visited: Visited) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        async with addresses.visitor(port) as browser:
            browser.send(browser.head("GET /events"))
            await browser.reader.readuntil(b"data: 1\n\n")
            app.next_event.set()
            await browser.reader.readuntil(b"data: 2\n\n")
            assert not app.left.is_set()
        await app.left.wait()

    visited(scene)


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_websocket_carries_messages_of_any_size_both_ways(run: Run, tmp_path: Path, kind: str) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, tmp_path) as port, web(port, kind=kind) as addresses:
            host, cookie = addresses.host(port), await addresses.login(port)
            async with connect(
                f"ws://{host}/socket",
                host="127.0.0.1",
                port=addresses.port,
                origin=f"http://{host}",  # type: ignore[arg-type]
                additional_headers={"Cookie": cookie},
                max_size=None,
                proxy=None,
            ) as socket:
                for message in ("text", b"", PIECE * 8):
                    await socket.send(message)
                    assert await socket.recv() == message
            await app.left.wait()

    run(main())


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://lab-1.localhost"])
def test_a_page_of_another_origin_opens_no_websocket(visited: Visited, origin: str | None) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        host, cookie = addresses.host(port), await addresses.login(port)
        with pytest.raises(InvalidStatus) as refused:
            await connect(
                f"ws://{host}/socket",
                host="127.0.0.1",
                port=addresses.port,
                origin=origin,  # type: ignore[arg-type]
                additional_headers={"Cookie": cookie},
                proxy=None,
            )
        assert refused.value.response.status_code == 403

    visited(scene)


def test_requests_follow_one_another_on_one_connection(visited: Visited) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        async with addresses.visitor(port) as browser:
            for number in range(50):
                answer = await browser.ask(f"GET /{number}")
                assert json.loads(answer.body)["path"] == f"/{number}"
            many = [f"/p{number}" for number in range(200)]
            browser.send(b"".join(browser.head(f"GET {path}") for path in many))
            assert [json.loads((await browser.answer()).body)["path"] for _ in many] == many
        assert len(app.connections) == 1

    visited(scene)


def test_head_and_answers_without_a_body_leave_the_connection_in_order(visited: Visited, tmp_path: Path) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        (tmp_path / "file").write_bytes(PIECE)
        async with addresses.visitor(port) as browser:
            head = await browser.ask("HEAD /files/file")
            assert (head.status, head.fields["content-length"]) == (200, str(len(PIECE)))
            assert (await browser.ask("GET /status/204")).status == 204
            assert (await browser.ask("GET /status/304")).status == 304
            assert (await browser.ask("HEAD /status/404")).status == 404
            part = await browser.ask("GET /files/file", "Range: bytes=1000-1999")
            assert (part.status, part.body) == (206, PIECE[1000:2000])
            assert (await browser.ask("GET /files/file")).body == PIECE

    visited(scene)


def test_a_redirection_and_a_cookie_of_the_service_stay_at_its_address(visited: Visited) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        async with addresses.visitor(port) as browser:
            assert (await browser.ask("GET /moved")).fields["location"] == f"http://{browser.host}/there"
            answer = await browser.ask("GET /cookie")
            assert answer.fields["set-cookie"] == "theirs=1; Path=/"
            assert answer.raw.lower().count(b"set-cookie") == 1

    visited(scene)


def test_expect_100_continue_is_the_services_to_answer(visited: Visited) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        async with addresses.visitor(port) as browser:
            fields = ("Expect: 100-continue", "Content-Length: 5", "Sec-Fetch-Site: same-origin")
            browser.send(browser.head("POST /upload", *fields))
            assert (await browser.answer()).status == 100
            browser.send(b"hello")
            assert json.loads((await browser.answer()).body)["size"] == 5
            assert (await browser.ask("GET /")).status == 200

    visited(scene)


def test_a_download_goes_on_over_another_link(visited: Visited) -> None:
    async def scene(app: App, addresses: Web, port: int) -> None:
        async with addresses.visitor(port) as browser:
            browser.send(browser.head(f"GET /download?size={SIZE}"))
            await browser.reader.readuntil(b"\r\n\r\n")
            digest, left = hashlib.sha256(), SIZE
            while left:
                if left < SIZE // 2 and addresses.link.accepted == 1:
                    addresses.link.cut()
                    await until(lambda: addresses.link.accepted == 2)
                piece = await browser.reader.read(1 << 20)
                assert piece
                digest.update(piece)
                left -= len(piece)
            assert digest.hexdigest() == hashlib.sha256(PIECE * (SIZE // len(PIECE))).hexdigest()

    visited(scene)


# -- other servers -------------------------------------------------------------------------------------------------


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[int]:
    """The standard library's, which speaks HTTP/1.0."""
    (tmp_path / "file").write_bytes(PIECE)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made.server_port
    made.shutdown()
    thread.join()
    made.server_close()


def test_a_server_that_ends_each_connection_is_asked_over_another_one(run: Run, file_server: int) -> None:
    async def main() -> None:
        async with web(file_server) as addresses, addresses.visitor(file_server) as browser:
            for _ in range(20):
                assert (await browser.ask("GET /file")).body == PIECE
                assert (await browser.ask("HEAD /file")).status == 200

    run(main())


def test_uvicorn_serves_through_its_address(run: Run) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            body = b""
            while (message := await receive()).get("more_body"):
                body += message["body"]
            body += message["body"]
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [(b"x-host", dict(scope["headers"])[b"host"])],
                }
            )
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"!"})

    async def main() -> None:
        made = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        serving = asyncio.ensure_future(made.serve())
        await until(lambda: made.started)
        port = made.servers[0].sockets[0].getsockname()[1]
        async with web(port) as addresses, addresses.visitor(port) as browser:
            for size in (0, 1, 1 << 20):
                fields = (f"Content-Length: {size}", "Sec-Fetch-Site: same-origin")
                answer = await browser.ask("PUT /", *fields, body=b"x" * size)
                assert answer.body == b"x" * size + b"!"
                assert answer.fields["x-host"] == f"localhost:{port}"
        made.should_exit = True
        await serving

    run(main())


# -- services of a few bytes, and what goes wrong ------------------------------------------------------------------


class Said:
    """A service that hears everything, and says what it was told to, a piece for each request's head."""

    def __init__(self, *answers: bytes, ends: bool = False) -> None:
        self.answers = answers
        self.ends = ends
        self.heard = b""
        self.connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        answers = list(self.answers)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                self.heard += data
                if answers and self.heard.endswith(b"\r\n\r\n"):
                    writer.write(answers.pop(0))
                    if self.ends and not answers:
                        break
        writer.close()


@contextlib.asynccontextmanager
async def behind(said: Said) -> AsyncIterator[tuple[Web, Visitor]]:
    async with service(said) as port, web(port) as addresses, addresses.visitor(port) as browser:
        yield addresses, browser


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_a_port_on_which_nothing_listens_is_named(run: Run, unused_ports: list[int]) -> None:
    async def main() -> None:
        port = unused_ports[0]
        async with web(port) as addresses, addresses.visitor(port) as browser:
            for _ in range(2):
                answer = await browser.ask("GET /")
                assert answer.status == 502
                assert f"Nothing listens on port {port} of task lab." in answer.body.decode()
            answer = await browser.ask("POST /", "Content-Length: 5", "Sec-Fetch-Site: none", body=b"hello")
            assert answer.status == 502

    run(main())


def test_a_task_that_is_gone_is_told(run: Run) -> None:
    async def main() -> None:
        said = Said(OK, OK)
        async with service(said) as port, web(port, kind="rust") as addresses:
            async with addresses.visitor(port) as browser:
                assert (await browser.ask("GET /")).status == 200
            addresses.forwarder._not_running = "Task lab is not running."
            async with addresses.visitor(port) as browser:
                answer = await browser.ask("GET /")
                assert answer.status == 503
                assert "Task lab is not running." in answer.body.decode()
                addresses.forwarder._not_running = None
                assert (await browser.ask("GET /")).status == 200

    run(main())


def test_a_container_without_its_tunnel_is_told(run: Run) -> None:
    async def main() -> None:
        async with service(Said(OK)) as port, web(port) as addresses:
            await kill(addresses.client)
            await addresses.hops.changed(CONTAINER, False)
            async with addresses.visitor(port) as browser:
                answer = await browser.ask("GET /")
                assert answer.status == 503
                assert b"is the task running?</p>" in answer.body

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nraw",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_is_none_is_told(run: Run, answer: bytes) -> None:
    async def main() -> None:
        async with behind(Said(answer, ends=True)) as (_, browser):
            assert (await browser.ask("GET /")).status == 502

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\n",
    ],
)
def test_an_answer_that_is_cut_off_looks_cut_off(run: Run, answer: bytes) -> None:
    async def main() -> None:
        async with behind(Said(answer, ends=True)) as (_, browser):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await browser.ask("GET /")

    run(main())


def test_a_body_that_ends_with_its_connection_ends_the_browsers(run: Run) -> None:
    async def main() -> None:
        async with behind(Said(b"HTTP/1.1 200 OK\r\n\r\n" + PIECE, ends=True)) as (_, browser):
            answer = await browser.ask("GET /")
            assert answer.body == PIECE
            assert answer.fields["connection"] == "close"

    run(main())


def test_a_program_that_speaks_http_1_0_is_sent_no_chunks(run: Run) -> None:
    async def main() -> None:
        pieces = [PIECE, b"a", b"bc", PIECE, b"d" * 1000]
        body = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in pieces)
        answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\nX: y\r\n\r\n"
        async with behind(Said(answer)) as (_, browser):
            browser.send(browser.head("GET /").replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\n", 1))
            head, _, came = (await browser.reader.read(-1)).partition(b"\r\n\r\n")
            assert (b"chunked" in head, b"Connection: close" in head, came == b"".join(pieces)) == (False, True, True)

    run(main())


def test_a_service_that_left_in_between_is_called_again(run: Run) -> None:
    async def main() -> None:
        said = Said(OK, ends=True)
        async with behind(said) as (addresses, browser):
            for _ in range(5):
                assert (await browser.ask("GET /")).body == b"ok"
                await until(lambda: addresses.forwarder.stats().streams == 0)
            assert said.connections == 5

    run(main())


def test_an_answer_before_the_end_of_its_request_is_read(run: Run) -> None:
    async def main() -> None:
        answer = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig"
        async with behind(Said(answer, ends=True)) as (_, browser):
            browser.send(browser.head("POST /", "Content-Length: 9000000000", "Sec-Fetch-Site: none"))
            assert (await browser.answer()).status == 413
            with contextlib.suppress(ConnectionError):
                while not browser.reader.at_eof():
                    browser.send(PIECE)
                    await browser.writer.drain()
                    await asyncio.sleep(0)

    run(main())


def test_all_ends_with_the_forward(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        app = App()
        async with serving(app, tmp_path) as port:
            async with web(port) as addresses, addresses.visitor(port) as browser:
                browser.send(browser.head("GET /events"))
                await browser.reader.readuntil(b"data: 1\n\n")
                await addresses.forwarder.close()
                await browser.ended()
            app.next_event.set()
            await app.left.wait()

    run(main())


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: lab"])
def test_a_connection_that_asks_for_nothing_is_ended(run: Run, monkeypatch: pytest.MonkeyPatch, begun: bytes) -> None:
    monkeypatch.setattr(visit, "HEAD_SECONDS", 0.0)
    monkeypatch.setattr(visit, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(gateway, "LOOK_EVERY", 0.05)

    async def main() -> None:
        async with service(Said()) as port, web(port) as addresses, addresses.stranger(port) as browser:
            browser.send(begun)
            if begun:
                assert (await browser.answer()).status == 408
            assert await browser.ended()

    run(main())


# -- attacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        "POST /a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled",
        "POST /a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        "POST /a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST /a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "POST /a\r\nX: y\r\n Content-Length: 5\r\n\r\nhello",
        "GET /a\r\nX: y\nContent-Length: 5\r\n\r\nhello",
        "GET http://evil.example/\r\n\r\n",
        "GET /a\r\nHost: evil.example\r\n\r\n",
        "GET /a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_no_request_can_be_smuggled_in_another(run: Run, request_: str) -> None:
    async def main() -> None:
        said = Said(OK)
        async with behind(said) as (_, browser):
            line, rest = request_.split("\r\n", 1)
            fields = f"Host: {browser.host}\r\nCookie: {browser.cookie}\r\nSec-Fetch-Site: none\r\n"
            browser.send(f"{line} HTTP/1.1\r\n{fields}{rest}".encode())
            assert 400 <= (await browser.answer()).status < 600
            browser.writer.write_eof()
            await browser.ended()
            assert said.heard == b""

    run(main())


@pytest.mark.parametrize("chunk", [b"5\nhello", b"5\r\nhello0\r\n\r\n", b"fffffffffffffffff\r\n", b"0\r\nX y\r\n\r\n"])
def test_no_request_can_be_smuggled_in_chunks(run: Run, chunk: bytes) -> None:
    async def main() -> None:
        said = Said()
        async with behind(said) as (_, browser):
            browser.send(browser.head("POST /", "Transfer-Encoding: chunked", "Sec-Fetch-Site: none"))
            await until(lambda: said.heard.endswith(b"\r\n\r\n"))
            head = said.heard
            browser.send(chunk + b"\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n")
            assert (await browser.answer()).status == 400
            browser.writer.write_eof()
            await browser.ended()
            assert b"smuggled" not in said.heard.removeprefix(head)

    run(main())


def test_a_request_behind_another_is_judged_for_itself(run: Run) -> None:
    async def main() -> None:
        said = Said(OK)
        async with behind(said) as (_, browser):
            other = f"GET /second HTTP/1.1\r\nHost: evil.example\r\nCookie: {browser.cookie}\r\n\r\n".encode()
            browser.send(browser.head("POST /first", "Content-Length: 0", "Sec-Fetch-Site: none") + other)
            assert (await browser.answer()).status == 200
            assert (await browser.answer()).status == 421
            assert b"second" not in said.heard

    run(main())


def test_what_follows_a_refused_upgrade_is_a_request_and_nothing_raw(run: Run) -> None:
    async def main() -> None:
        said = Said(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n")
        async with behind(said) as (_, browser):
            fields = ("Connection: Upgrade", "Upgrade: websocket", f"Origin: http://{browser.host}")
            browser.send(browser.head("GET /", *fields) + b"GET /raw HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await browser.answer()).status == 426
            assert (await browser.answer()).status == 421
            assert b"raw" not in said.heard

    run(main())


def test_no_other_protocol_than_a_websocket_is_switched_to(run: Run) -> None:
    async def main() -> None:
        said = Said(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        async with behind(said) as (_, browser):
            answer = await browser.ask(
                "GET /", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: x"
            )
            assert answer.status == 502
            assert b"h2c" not in said.heard
            assert b"HTTP2-Settings" not in said.heard

    run(main())


def test_another_name_gets_nothing_from_a_service(run: Run) -> None:
    async def main() -> None:
        said = Said(OK)
        async with behind(said) as (addresses, browser):
            for host in ("evil.example", f"127.0.0.1:{addresses.port}", f"localhost:{addresses.port}", "lab.localhost"):
                browser.host = host
                answer = await browser.ask("GET /")
                assert answer.status == 421
                assert (b"lab-" in answer.body) == (str(addresses.port) in host)
            assert said.heard == b""

    run(main())


def test_no_address_is_served_beside_a_stranger_on_the_other_loopback_address(run: Run) -> None:
    async def main() -> None:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(LocalAddressError) as refused:
                async with web(80, web_port=port):
                    pass
        assert refused.value.taken is not None
        assert refused.value.taken[1:] == (port, "tcp")  # of ::1; of both where yet another program has the first

    run(main())


def test_the_cookie_of_a_sibling_and_a_code_of_a_sibling_open_nothing(run: Run) -> None:
    async def main() -> None:
        said, other = Said(OK), Said(OK)
        async with service(said) as one, service(other) as two, web(one, two) as addresses:
            cookie = await addresses.login(one)
            async with addresses.stranger(two, cookie) as browser:
                assert (await browser.ask("GET /")).status == 403
                door = addresses.forwarder.doors[0]
                assert (await browser.ask(f"GET {door.link().removeprefix(door.place.origin)}")).status == 403
            async with addresses.visitor(one) as browser:
                assert (await browser.ask("GET /")).status == 200
                browser.host, browser.cookie = addresses.host(two), await addresses.login(two)
                assert (await browser.ask("GET /")).status == 200
            assert b"kohakuriver" not in said.heard.lower() + other.heard.lower()
            assert (said.connections, other.connections) == (1, 1)

    run(main())


def test_a_form_of_another_page_reaches_no_service(run: Run) -> None:
    async def main() -> None:
        said = Said(OK)
        async with behind(said) as (_, browser):
            for fields in (
                ("Origin: http://evil.example", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"),
                ("Origin: http://evil.example",),
                ("Origin: null",),
                (),
            ):
                browser.send(browser.head("POST /", "Content-Length: 0", *fields))
                assert (await browser.answer()).status == 403
            assert said.heard == b""

    run(main())


def test_a_header_of_the_answer_can_not_be_split(run: Run) -> None:
    async def main() -> None:
        async with behind(Said(b"HTTP/1.1 302 Found\r\nLocation: /\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")) as (
            _,
            browser,
        ):
            answer = await browser.ask("GET /")
            assert answer.status == 502
            assert b"a=b" not in answer.raw

    run(main())
