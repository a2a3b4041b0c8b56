from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver._frame import WS_TEXT, FrameViolation, FrameWalker, Message, RelayWalker, SpliceWalker, build_frame
from kohakuriver.host.services.tunnel_proxy import ProxySession, TunnelProxy
from kohakuriver.limits import Limits
from kohakuriver.relay.hub import Hub
from kohakuriver.relay.legs import TunnelLeg
from kohakuriver.session.carried import Route
from kohakuriver.tunnel.accept import Ignore
from kohakuriver.tunnel.buffers import Assembler
from kohakuriver.tunnel.container_endpoint import ContainerEndpoint
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import DATA, PING, PROTO_TCP, ws_close, ws_ping, ws_pong, ws_text
from kohakuriver.tunnel.send_queue import SendQueue
from kohakuriver.tunnel.turns import TURN
from tests.support.hops import until
from tests.support.peers.fake_transport import FakeTransport

Run = Callable[[Coroutine[Any, Any, None]], None]


class Handler:
    """Keeps what a link tells it."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, bytes]] = []
        self.closed: list[tuple[int, str]] = []
        self.drained = 0

    def link_received(self, link: Link, start: int, stop: int) -> int:
        while True:
            messages, consumed = link.walker.walk(link.intake.buffer.data, start, stop)
            for message in messages:
                self._message(link, message)
            if not messages:
                return consumed
            start = consumed

    def _message(self, link: Link, message: Message) -> None:
        if message[0] >= WS_TEXT:
            link.control(message)
        else:
            self.messages.append((message[2], bytes(link.intake.buffer.view[message[4] : message[5]])))

    def link_drained(self, link: Link) -> None:
        self.drained += 1

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        self.closed.append((code, reason))


def started(room: int = 1 << 30) -> tuple[Link, FakeTransport, Handler]:
    """A server's link: its peer's frames come without a mask here, so that they can be read."""
    transport, handler = FakeTransport(room), Handler()
    link = Link(handler, FrameWalker(masked=False), masks=False)
    link.start(transport)
    return link, transport, handler


async def turns(count: int = 4) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def frame(payload: bytes, client_id: int = 1) -> bytes:
    return build_frame(DATA, PROTO_TCP, client_id, 0, payload)


def test_messages_arrive_however_they_are_split(run: Run) -> None:
    async def main() -> None:
        _, transport, handler = started()
        stream = frame(b"one") + build_frame(PING, 0, 0, 0, b"12345") + frame(b"three", 3)
        for i in range(len(stream)):
            transport.feed(stream[i : i + 1])
        joined = b"".join(payload for _, payload in handler.messages)
        assert joined == b"one12345three"

    run(main())


def test_bytes_that_came_with_the_handshake_come_first(run: Run) -> None:
    async def main() -> None:
        transport, handler = FakeTransport(), Handler()
        link = Link(handler, FrameWalker(masked=False), masks=False)
        stream = frame(b"a") + frame(b"b")
        link.start(transport, stream[:15])
        transport.feed(stream[15:])
        await turns()
        assert b"".join(payload for _, payload in handler.messages) == b"ab"

    run(main())


def test_frames_that_the_kernel_does_not_take_follow_in_order(run: Run) -> None:
    async def main() -> None:
        link, transport, handler = started(room=10)
        frames = [frame(bytes([i]) * 50) for i in range(5)]
        for data in frames:
            link.send(data)
        assert (link.out.blocked, link.out.queued) == (True, sum(map(len, frames[1:])))
        sent = b""
        while transport.sent:
            sent += transport.take(7)
        assert sent == b"".join(frames)
        assert (link.out.blocked, link.out.queued, handler.drained) == (False, 0, 1)

    run(main())


def test_a_small_frame_goes_ahead_of_queued_bulk(run: Run) -> None:
    async def main() -> None:
        link, transport, _ = started(room=10)
        first, second, urgent = frame(b"1" * 50), frame(b"2" * 50), frame(b"!")
        for data in (first, second):
            link.send(data)
        link.post(urgent)
        sent = b""
        while transport.sent:
            sent += transport.take(9)
        assert sent == first + urgent + second

    run(main())


def test_a_ping_is_answered_while_a_send_is_blocked_before_what_is_queued(run: Run) -> None:
    async def main() -> None:
        link, transport, _ = started(room=10)
        first, second = frame(b"1" * 50), frame(b"2" * 50)
        link.send(first)
        link.send(second)
        transport.feed(ws_ping(b"there?"))
        sent = b""
        while transport.sent:
            sent += transport.take(100)
        assert sent == first + ws_pong(b"there?") + second

    run(main())


def test_who_waits_for_a_link_is_told_once_also_when_it_goes(run: Run) -> None:
    class Source:
        told = 0

        def link_writable(self) -> None:
            self.told += 1

    async def main() -> None:
        link, transport, _ = started(room=1)
        source = Source()
        link.send(frame(b"x"))
        link.out.wait_drained(source)
        link.out.wait_drained(source)
        while transport.sent:
            transport.take(100)
        assert source.told == 1
        link.send(frame(b"x"))
        link.out.wait_drained(source)
        transport.abort()
        await turns()
        assert source.told == 2
        link.out.wait_drained(source)  # it is gone already
        await turns()
        assert source.told == 3

    run(main())


def test_reading_goes_on_when_everybody_who_paused_it_has_resumed(run: Run) -> None:
    async def main() -> None:
        link, transport, _ = started()
        for why in ("a", "b"):
            link.intake.pause(why)
        link.intake.resume("a")
        link.intake.resume("c")
        assert not transport.reading
        link.intake.resume("b")
        assert transport.reading

    run(main())


@pytest.mark.parametrize("payload", [b"", b"\x03\xe8", b"\x0f\xa0bye"])
def test_a_close_frame_is_answered_and_its_code_told(run: Run, payload: bytes) -> None:
    async def main() -> None:
        _, transport, handler = started()
        transport.feed(bytes([0x88, len(payload)]) + payload)
        await turns()
        assert transport.sent == bytes([0x88, min(2, len(payload))]) + payload[:2]
        code = int.from_bytes(payload[:2], "big") if payload else 1005
        assert handler.closed == [(code, payload[2:].decode())]

    run(main())


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000])
def test_a_close_code_that_may_not_be_sent_is_a_violation(run: Run, code: int) -> None:
    async def main() -> None:
        _, transport, handler = started()
        transport.feed(b"\x88\x02" + code.to_bytes(2, "big"))
        assert bytes(transport.sent[2:4]) == (1002).to_bytes(2, "big")
        transport.feed_eof()
        await turns()
        assert handler.closed[0][0] == 1002

    run(main())


def test_after_a_violation_the_rest_is_read_and_thrown_away(run: Run) -> None:
    async def main() -> None:
        link, transport, handler = started()
        transport.feed(frame(b"good") + ws_text("hello"))
        assert transport.sent == ws_close(1003, "text where binary is due")
        assert transport.feed(frame(b"late") * 100) == 100 * len(frame(b"late"))
        assert [payload for _, payload in handler.messages] == [b"good"]
        transport.feed_eof()
        await turns()
        assert handler.closed == [(1003, "text where binary is due")]
        link.send(frame(b"never"))
        link.close()
        assert transport.sent == ws_close(1003, "text where binary is due")

    run(main())


def test_nothing_is_sent_and_nobody_told_twice_after_the_end(run: Run) -> None:
    async def main() -> None:
        link, transport, handler = started()
        transport.fail(ConnectionResetError(104, "reset"))
        await turns()
        link.connection_lost(None)
        link.send(frame(b"x"))
        link.send_many([memoryview(frame(b"x"))])
        link.post(frame(b"x"))
        link.close()
        link.abort()
        await turns()
        assert len(handler.closed) == 1
        assert not transport.sent

    run(main())


def test_a_link_whose_transport_went_during_the_handshake_is_told_as_gone(run: Run) -> None:
    async def main() -> None:
        transport, handler = FakeTransport(), Handler()
        transport.closing = transport.lost = True
        Link(handler, FrameWalker(masked=False), masks=False).start(transport)
        await turns()
        assert [code for code, _ in handler.closed] == [1006]

    run(main())


def test_a_handler_that_takes_over_a_dead_link_is_told(run: Run) -> None:
    async def main() -> None:
        link, transport, _ = started()
        transport.abort()
        await turns()
        second = Handler()
        link.hand_over(second)
        await turns()
        assert [code for code, _ in second.closed] == [1006]

    run(main())


def test_a_peer_that_reads_nothing_of_what_it_asked_for_is_dropped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(SendQueue, "max_urgent", 1000)
        _, transport, handler = started(room=1)
        for _ in range(200):
            transport.feed(ws_ping(b"x" * 100))
        await turns()
        assert transport.aborted
        assert "does not read" in handler.closed[0][1]

    run(main())


def test_no_more_than_the_limit_is_ever_queued(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(SendQueue, "max_queued", 10_000)
        link, transport, _ = started(room=1)
        while not transport.aborted:
            link.send(frame(b"x" * 1000))
            assert link.out.queued <= 12_000

    run(main())


def test_a_fast_answer_to_a_ping_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(Link, "idle_ping", 0.001)
        monkeypatch.setattr(Link, "pong_wait", 0.02)
        _, transport, handler = started()
        for _ in range(20):
            await until(lambda: bool(transport.sent))
            assert transport.take(100).startswith(ws_ping())
            transport.feed(ws_pong())  # within the same tick of the clock
        assert not handler.closed

    run(main())


def test_an_unanswered_ping_ends_the_link_and_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(Link, "idle_ping", 0.001)
        monkeypatch.setattr(Link, "pong_wait", 0.02)
        _, transport, handler = started()
        await until(lambda: bool(handler.closed))
        assert transport.aborted
        assert handler.closed == [(1006, "no answer to a ping for 0.02 s")]

    run(main())


def test_a_peer_is_not_dropped_while_it_takes_bytes_that_wait_for_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(Link, "idle_ping", 0.001)
        monkeypatch.setattr(Link, "pong_wait", 0.05)
        link, transport, handler = started(room=1)
        link.send(frame(b"x" * 1000))
        taken = 0
        while taken < 100:
            taken += len(transport.take(1))
            await asyncio.sleep(0.005)
        assert not handler.closed

    run(main())


def test_a_link_that_is_not_read_is_not_dropped_and_shows_that_it_lives(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(Link, "idle_ping", 0.001)
        monkeypatch.setattr(Link, "pong_wait", 0.001)
        link, transport, handler = started()
        link.intake.pause("slow user")
        await until(lambda: len(transport.sent) >= 10 * len(ws_ping()))
        assert not handler.closed

    run(main())


def test_an_assembler_joins_pieces_and_refuses_too_many() -> None:
    assembler = Assembler(10)
    assert assembler.add(memoryview(b"whole"), 3) == b"whole"
    assert assembler.add(memoryview(b"a"), 1) is None
    assert assembler.add(memoryview(b"b"), 0) is None
    assert assembler.add(memoryview(b"c"), 2) == b"abc"
    assembler.add(memoryview(b"x" * 10), 1)
    with pytest.raises(FrameViolation) as refused:
        assembler.add(memoryview(b"y"), 0)
    assert refused.value.code == 1009


# -- the splice: a link that passes partial frames ---------------------------------------------------------------


async def nobody(*args: object) -> Any:
    raise AssertionError


def spliced(room: int) -> tuple[ProxySession, FakeTransport, FakeTransport]:
    """A session at the host: its user's side takes ``room`` bytes at a time."""

    session = ProxySession(TunnelProxy(authorize=nobody, authorize_terminal=nobody), Route("", "container", None))
    to_user, to_runner = FakeTransport(room), FakeTransport()
    session.user.walker = SpliceWalker(masked=False)
    session.user.link = Link(session.user, session.user.walker, masks=False)
    session.container_side.link = Link(session.container_side, session.container_side.walker, masks=False)
    session.user.link.start(to_user)
    session.container_side.link.start(to_runner)
    return session, to_user, to_runner


@pytest.mark.parametrize("room", [1, 100, 5000])
def test_a_ping_is_answered_at_the_next_frame_border_of_a_splice_that_is_always_busy(run: Run, room: int) -> None:
    async def main() -> None:
        _, to_user, to_runner = spliced(room)
        big = frame(b"z" * 3000)
        stream = big * 30
        position, sent = 0, b""
        for i in range(60_000):
            if to_runner.reading:  # there is always more, in pieces that end inside frames
                position += to_runner.feed(stream[position : position + 1000])
            if i == 1:
                to_user.feed(ws_ping(b"me"))
            sent += to_user.take(room)
            if ws_pong(b"me") in sent:
                break
        at = sent.index(ws_pong(b"me"))
        assert at % len(big) == 0
        assert at <= 3 * len(big)

    run(main())


def test_an_urgent_frame_does_not_go_where_a_queue_begins_inside_a_frame(run: Run) -> None:
    async def main() -> None:
        session, to_user, to_runner = spliced(10)
        big = frame(b"z" * 3000)
        to_runner.feed(big[:1000])  # blocked inside the frame
        to_runner.reading = True  # a read that was under way already
        to_runner.feed(big[1000:])  # what waits now begins inside a frame and ends at a border
        session.user.link.post(ws_pong(b"!"))
        sent = b""
        while to_user.sent:
            sent += to_user.take(100)
        assert sent == big + ws_pong(b"!")

    run(main())


def test_a_session_that_ends_inside_a_frame_is_not_closed_with_a_frame_inside_it(run: Run) -> None:
    async def main() -> None:
        _, to_user, to_runner = spliced(1 << 20)
        big = frame(b"z" * 3000)
        to_runner.feed(big[:1000])
        to_runner.abort()
        await turns()
        assert to_user.sent == big[:1000]
        assert to_user.lost

    run(main())


FLOOD = 50_000


@pytest.mark.parametrize("where", ["splice", "endpoint", "refused", "relay"])
def test_a_flood_of_small_messages_leaves_others_their_turn(run: Run, where: str) -> None:
    async def main() -> None:
        transport = flooded(where)
        transport.feed(ws_ping(b"") * FLOOD)
        answered = 0
        while answered < FLOOD:
            now = len(transport.sent) // len(ws_pong(b""))
            assert now - answered <= TURN, "others have had to wait for longer than one turn"
            assert transport.reading == (now == FLOOD), "nothing more is read until all that was read is worked off"
            answered = now
            await asyncio.sleep(0)
        await turns()
        assert transport.reading
        transport.feed(ws_ping(b"still here"))
        assert transport.sent.endswith(ws_pong(b"still here"))

    run(main())


def test_a_link_that_reads_little_keeps_all_that_comes_while_a_turn_is_due(run: Run) -> None:
    async def main() -> None:
        transport = flooded("endpoint")
        link: Any = transport.get_protocol()
        link.intake.limit_reads(4096)
        pings, fed = ws_ping(b"") * FLOOD, 0
        while fed < len(pings):  # as TLS does that delivers all it has decrypted, paused or not
            view = link.get_buffer(-1)
            size = min(len(view), len(pings) - fed)
            assert size > 0, "there is always room"
            view[:size] = pings[fed : fed + size]
            link.buffer_updated(size)
            fed += size
        await turns(FLOOD // TURN + 1)
        assert transport.sent == ws_pong(b"") * FLOOD
        assert transport.reading

    run(main())


def flooded(where: str) -> FakeTransport:
    """The transport of a link with one of the handlers that look at every message."""
    transport = FakeTransport()
    handler: Any
    walker: FrameWalker = FrameWalker(masked=False)
    if where == "splice":
        session = ProxySession(TunnelProxy(authorize=nobody, authorize_terminal=nobody), Route("", "container", None))
        handler, walker = session.container_side, session.container_side.walker
        session.user.link = Link(Handler(), FrameWalker(masked=False), masks=False)
    elif where == "relay":
        handler = TunnelLeg(Hub(), "container", Limits().max_message)
        handler.walker = walker = RelayWalker(masked=False)
    else:
        handler = ContainerEndpoint() if where == "endpoint" else Ignore()
    link = Link(handler, walker, masks=False)
    if where == "relay":
        handler.link = link
    link.start(transport)
    return transport
