"""A browser's connection and its stream, without sockets: what is held, what is dropped, and what is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.gateway import visit as visits
from kohakuriver.gateway.destination import Destination
from kohakuriver.gateway.gate import Door, Gate
from kohakuriver.gateway.gateway import Gateway
from kohakuriver.gateway.heads import MAX_HEAD
from kohakuriver.gateway.names import Place
from kohakuriver.gateway.upstream import MOST_INTERIM, Phase, Upstream
from kohakuriver.gateway.visit import Visit
from kohakuriver.host.apps.sessions import Places
from kohakuriver.tunnel.protocol import ErrorText
from kohakuriver.tunnel.stream import Reading
from kohakuriver.tunnel.user_endpoint import UserEndpoint

Run = Callable[[Coroutine[Any, Any, None]], None]
LAB, OTHER = Place("lab", 8888, 7777), Place("lab", 6006, 7777)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
STRANGE = b"GET / HTTP/1.1\r\nHost: lab-8888.localhost:7777\r\n\r\n"


class Transport(asyncio.Transport):
    """The browser's socket: what is written to it, and whether it is read."""

    def __init__(self, *, reads: bool = True) -> None:
        super().__init__()
        self.protocol: Visit | None = None
        self.reads = reads
        self.written = b""
        self.writes = 0
        self.paused = False
        self.closed = False
        self.aborted = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        self.written += bytes(data)
        self.writes += 1
        if not self.reads and self.protocol is not None:
            self.protocol.pause_writing()

    def write_eof(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


class Scene:
    """A gateway with two addresses, of which nothing is reached: its streams wait for a link."""

    def __init__(self) -> None:
        gate = Gate(lambda place: "Run it again.")
        self.gateway = Gateway(UserEndpoint(), gate, lambda: None)
        self.doors = gate.add([LAB, OTHER])
        self.time = 0.0
        self.gateway.now = lambda: self.time  # type: ignore[method-assign]

    def visit(self, *, reads: bool = True) -> tuple[Visit, Transport]:
        visit, transport = self.gateway.visit(), Transport(reads=reads)
        transport.protocol = visit
        visit.connection_made(transport)
        return visit, transport

    def path(self, door: Door) -> bytes:
        return door.link().removeprefix(door.place.origin).encode()

    def cookie(self, door: Door) -> bytes:
        cookie = door.entrance.enter(door.entrance.code().encode())
        assert cookie
        return cookie.split(b";")[0]


def request(scene: Scene, line: bytes = b"GET /", fields: bytes = b"", *, door: int = 0) -> bytes:
    """The head of a request of a browser that is in."""
    host = scene.doors[door].place.host.encode()
    cookie = scene.cookie(scene.doors[door])
    return line + b" HTTP/1.1\r\nHost: " + host + b"\r\nCookie: " + cookie + b"\r\n" + fields + b"\r\n"


def come(visit: Visit, data: bytes) -> None:
    """Have the browser's bytes read."""
    while data:
        view = visit.get_buffer(-1)
        size = min(len(view), len(data))
        view[:size] = data[:size]
        visit.buffer_updated(size)
        data = data[size:]


def stream_of(visit: Visit) -> Upstream:
    assert visit._stream is not None
    return visit._stream


def say(stream: Upstream, *pieces: bytes) -> None:
    """Have the service's bytes arrive."""
    stream.write([memoryview(piece) for piece in pieces], sum(map(len, pieces)))


@pytest.fixture
def within(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Scene], Coroutine[Any, Any, None]]], None]:
    """Run something with a scene. What a service's bytes cost its window is not looked at."""
    monkeypatch.setattr(Upstream, "taken", lambda stream, size: None)

    def within(check: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            scene = Scene()
            try:
                await check(scene)
            finally:
                scene.gateway.close()
                await scene.gateway.endpoint.close()

        run(main())

    return within


Within = Callable[[Callable[[Scene], Coroutine[Any, Any, None]]], None]


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


BODIES = {
    "of a known size": (b"Content-Length: 2", [b"ok"]),
    "in chunks": (b"Transfer-Encoding: chunked", [b"2\r\nok\r\n", b"0\r\n\r\n"]),
    "up to the end": (b"Connection: close", [b"ok"]),
}


@pytest.mark.parametrize(("field", "body"), BODIES.values(), ids=BODIES)
def test_a_head_is_written_with_what_has_come_of_its_body(within: Within, field: bytes, body: list[bytes]) -> None:
    async def check(scene: Scene) -> None:
        head = b"HTTP/1.1 200 OK\r\n" + field + b"\r\n\r\n"
        for pieces in ([head, body[0]], [head + body[0]], [head[:9], head[9:], body[0]]):
            visit, transport = scene.visit()
            come(visit, request(scene))
            for piece in pieces:  # each a message, all read from the link at once
                say(stream_of(visit), piece)
            assert (transport.writes, transport.written[-len(body[0]) :]) == (1, body[0])
            say(stream_of(visit), *body[1:])
            await turns()
            assert transport.written.endswith(b"\r\n\r\n" + b"".join(body))

    within(check)


@pytest.mark.parametrize(("field", "body"), BODIES.values(), ids=BODIES)
def test_a_head_whose_body_is_yet_to_come_is_not_waited_with(within: Within, field: bytes, body: list[bytes]) -> None:
    async def check(scene: Scene) -> None:
        for how in ("waits", "breaks", "ends"):
            visit, transport = scene.visit()
            come(visit, request(scene))
            stream = stream_of(visit)
            say(stream, b"HTTP/1.1 200 OK\r\n" + field + b"\r\n\r\n")
            {"waits": lambda: None, "breaks": stream.reset, "ends": stream.shut}[how]()
            await turns()
            assert transport.writes == 1, how
            assert transport.written.startswith(b"HTTP/1.1 200 OK\r\n"), how
            assert transport.aborted == (how == "breaks" or (how == "ends" and field != b"Connection: close")), how

    within(check)


@pytest.mark.parametrize("reads", [True, False])
def test_a_stranger_who_asks_faster_than_is_answered_is_not_read(within: Within, reads: bool) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit(reads=reads)
        come(visit, STRANGE * (2 * MAX_HEAD // len(STRANGE)))
        assert transport.paused
        assert len(visit._head) < 3 * MAX_HEAD
        while reads and len(visit._head) >= MAX_HEAD:
            assert transport.paused
            await asyncio.sleep(0)
        await turns()
        assert transport.paused is not reads

    within(check)


def test_a_body_that_came_with_its_head_does_not_stop_the_rest_of_it(within: Within) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        come(visit, request(scene))
        come(visit, request(scene, b"POST /", b"Content-Length: 200000\r\nSec-Fetch-Site: none\r\n") + b"x" * MAX_HEAD)
        assert transport.paused
        stream = stream_of(visit)
        say(stream, OK)
        await turns()
        assert visit._left == 200_000 - MAX_HEAD
        assert not visit._held_by_queue

    within(check)


@pytest.mark.parametrize("sent", [STRANGE, STRANGE * 2, b"GARBAGE\r\n\r\n"])
def test_who_never_reads_a_page_of_the_gateway_is_dropped(within: Within, sent: bytes) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit(reads=False)
        come(visit, sent)
        scene.time = visits.UNREAD_SECONDS
        visit.overdue(scene.time)
        assert not transport.aborted
        scene.time += 0.1
        visit.overdue(scene.time)
        assert transport.aborted

    within(check)


def test_who_reads_an_answer_of_a_service_slowly_is_waited_for(within: Within) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit(reads=False)
        come(visit, request(scene) + request(scene))
        say(stream_of(visit), OK)
        for _ in range(5):
            scene.time += 100
            visit.overdue(scene.time)
        assert not transport.is_closing()
        assert b"408" not in transport.written

    within(check)


def test_what_is_open_ends_when_its_link_is_used_again(within: Within) -> None:
    async def check(scene: Scene) -> None:
        path = scene.path(scene.doors[0])
        stranger, heard = scene.visit()
        login = b"GET " + path + b" HTTP/1.1\r\nHost: " + LAB.host.encode() + b"\r\n\r\n"
        come(stranger, login)
        await turns()
        assert heard.written.startswith(b"HTTP/1.1 303 ")
        inside, beside = scene.visit(), scene.visit()
        come(inside[0], request(scene))
        come(beside[0], request(scene, door=1))
        come(stranger, login)
        await turns()
        assert b"HTTP/1.1 403 " in heard.written
        assert inside[1].aborted
        assert not beside[1].aborted
        again = scene.visit()
        come(again[0], request(scene))
        come(stranger, login)
        await turns()
        assert not again[1].aborted

    within(check)


@pytest.mark.parametrize("fields", [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_an_upload_waits_for_a_stream_that_was_waiting_before_it(within: Within, fields: bytes) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        come(visit, request(scene))
        await turns()
        say(stream_of(visit), OK)
        await turns()
        stream_of(visit).core.reading = Reading.PAUSED
        come(visit, request(scene, b"POST /", fields + b"Sec-Fetch-Site: none\r\n"))
        assert transport.paused

    within(check)


def test_a_websocket_waits_for_a_stream_that_was_waiting_before_it(within: Within) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        come(visit, request(scene))
        say(stream_of(visit), OK)
        await turns()
        stream_of(visit).core.reading = Reading.PAUSED
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        come(visit, request(scene, fields=upgrade + b"Origin: " + LAB.origin.encode() + b"\r\n"))
        say(stream := stream_of(visit), b"HTTP/1.1 101 Switching Protocols\r\n" + upgrade + b"\r\n")
        assert stream.phase is Phase.RAW
        assert transport.paused

    within(check)


def test_a_failure_that_answers_head_has_no_body(within: Within) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        come(visit, request(scene, b"HEAD /"))
        stream_of(visit).refused(ErrorText("ECONNREFUSED", ""))
        stream_of(visit).reset()
        await turns()
        assert transport.written.startswith(b"HTTP/1.1 502 ")
        assert transport.written.endswith(b"\r\n\r\n")
        come(visit, request(scene))
        stream_of(visit).refused(ErrorText("ECONNREFUSED", ""))
        stream_of(visit).reset()
        await turns()
        assert transport.written.endswith(b"</html>\n")

    within(check)


@pytest.mark.parametrize("answer", [b"NONSENSE\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n"])
def test_a_service_that_has_said_something_did_take_the_request(within: Within, answer: bytes) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        come(visit, request(scene))
        say(stream_of(visit), OK)
        await turns()
        come(visit, request(scene))
        say(stream := stream_of(visit), answer)
        stream.reset()
        await turns()
        assert b"HTTP/1.1 50" in transport.written

    within(check)


def test_a_service_that_left_while_it_stood_idle_looks_so(within: Within) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        come(visit, request(scene))
        say(stream_of(visit), OK)
        await turns()
        come(visit, request(scene))
        stream_of(visit).reset()
        await turns()
        assert transport.written == OK
        assert transport.closed

    within(check)


def test_heads_before_an_answer_are_bounded(within: Within) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        for _ in range(2):
            come(visit, request(scene))
            say(stream_of(visit), b"HTTP/1.1 103 Early Hints\r\n\r\n" * MOST_INTERIM + OK)
            await turns()
        assert transport.written.count(b"200 OK") == 2
        come(visit, request(scene))
        say(stream_of(visit), b"HTTP/1.1 103 Early Hints\r\n\r\n" * (MOST_INTERIM + 1))
        await turns()
        assert b"HTTP/1.1 502 " in transport.written

    within(check)


def test_nothing_ends_no_answer(within: Within) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        come(visit, request(scene))
        say(stream := stream_of(visit))
        say(stream, b"")
        assert stream.phase is Phase.HEAD
        say(stream, OK)
        assert transport.written == OK

    within(check)


@pytest.mark.parametrize("early", [True, False])
def test_what_was_asked_before_a_half_close_is_answered(within: Within, early: bool) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        come(visit, (STRANGE if early else request(scene)) + request(scene) + STRANGE + b"GET /cut")
        assert visit.eof_received()
        await turns()
        if not early:
            say(stream_of(visit), OK)
            await turns()
        assert not transport.closed
        say(stream_of(visit), OK)
        await turns()
        assert transport.written.count(b"HTTP/1.1 ") == 3
        assert transport.written.endswith(b"</html>\n")
        assert transport.closed

    within(check)


def test_half_a_body_before_a_half_close_is_cut_off(within: Within) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        half = request(scene, b"POST /", b"Content-Length: 9\r\nSec-Fetch-Site: none\r\n") + b"half"
        come(visit, request(scene) + half)
        visit.eof_received()
        say(stream_of(visit), OK)
        await turns()
        assert transport.aborted

    within(check)


def test_a_silent_service_keeps_no_connection_of_a_browser_that_has_left(within: Within) -> None:
    async def check(scene: Scene) -> None:
        visit, transport = scene.visit()
        come(visit, request(scene))
        scene.time = 1000.0
        visit.eof_received()
        visit.overdue(scene.time + visits.LEFT_SECONDS)
        assert not transport.is_closing()
        visit.overdue(scene.time + visits.LEFT_SECONDS + 1)
        assert transport.is_closing()

    within(check)


def test_only_so_many_connections_lead_to_services_and_each_gives_its_place_back(within: Within) -> None:
    async def check(scene: Scene) -> None:
        all_places = Places(3)
        places = [Places(2, all_places), Places(2, all_places)]

        def connect(of: int) -> tuple[Visit, Transport]:
            visit, transport = scene.visit()
            to = Destination(LAB, scene.gateway.endpoint, lambda: None, places=places[of])
            scene.gateway.judge = lambda *_args, **_more: to  # type: ignore[method-assign]
            come(visit, request(scene))
            return visit, transport

        first, second = connect(0), connect(0)
        refused, full = connect(0)
        assert full.written.startswith(b"HTTP/1.1 503 ")
        assert refused.destination is None
        connect(1)
        assert connect(1)[1].written.startswith(b"HTTP/1.1 503 ")  # the other's own has room, that of all has none
        say(stream_of(first[0]), OK)
        assert first[1].written.endswith(b"ok")
        come(first[0], request(scene))  # the same connection once more takes no other place
        second[0].connection_lost(None)
        assert not connect(1)[1].written
        for each in list(scene.gateway.visits):
            each.connection_lost(None)
        assert [place._left for place in (all_places, *places)] == [3, 2, 2]

    within(check)
