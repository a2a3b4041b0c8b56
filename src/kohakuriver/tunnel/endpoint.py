"""What both ends of a tunnel have in common: the streams of one link (docs/protocol.md §2–§3)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TypeAlias

from kohakuriver._frame import HEADROOM, WS_TEXT, FrameViolation, FrameWalker, Message
from kohakuriver.tunnel import stream as rules
from kohakuriver.tunnel.buffers import Assembler
from kohakuriver.tunnel.error_text import user_error
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import (
    CLOSE,
    CONNECT,
    CONNECTED,
    DATA,
    EOF,
    ERROR,
    KNOWN,
    PING,
    PONG,
    PROTO_TCP,
    PROTO_UDP,
    WINDOW,
    CloseCode,
    Counts,
    ErrorText,
    pack_limit,
    parse_limit,
)
from kohakuriver.tunnel.reporting import Reporter
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.stream import State
from kohakuriver.tunnel.tcp import TcpStream
from kohakuriver.tunnel.udp import UdpStream

BULK_READ = (1 << 20) - HEADROOM
SHARED_READ = 256 * 1024  # with several busy streams no one of them takes more than this at a time
SHARED_FOR = 1.0  # seconds in which the streams that receive have to change as often as this
SHARED_TURNS = 8
ALONE = 16  # reads in a row of one stream after which it counts as the only busy one
MAX_CONTROL = 1 << 20


@dataclass
class EndpointStats:
    """Totals of one endpoint since it was made; ``streams`` is the number open now."""

    streams: int = 0
    opened: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    udp_dropped: int = 0
    stalls: int = 0
    unknown_messages: int = 0


AnyStream: TypeAlias = TcpStream | UdpStream


class Endpoint:
    """The streams of one link, whichever side opened them."""

    awaits_replies = False  # a stream of v1 goes on for a while after our CLOSE

    def __init__(self, config: EndpointConfig | None = None) -> None:
        self.config = config or EndpointConfig()
        self.link: Link | None = None
        self.streams: dict[int, AnyStream] = {}
        self.budget = rules.Budget(self.config.budget, self.config.first_window, self.config.max_window)
        self.read_size = BULK_READ
        self.opened = self.bytes_sent = self.bytes_received = 0
        self.udp_dropped = self.stalls = self.unknown_messages = 0
        self._busy: TcpStream | None = None
        self._in_a_row = 0
        self._receiving = 0  # the stream that received last
        self._turns = 0
        self._limits: dict[int, int] = {}  # to be sent at the end of this turn of the loop
        self._assembler = Assembler(MAX_CONTROL)
        self._sweeper: asyncio.TimerHandle | None = None
        self._reporter = Reporter(lambda: Counts(self.udp_dropped, self.stalls), lambda: bool(self.streams))

    def stats(self) -> EndpointStats:
        """The totals so far."""
        return EndpointStats(
            len(self.streams), self.opened, self.bytes_sent, self.bytes_received,
            self.udp_dropped, self.stalls, self.unknown_messages,
        )  # fmt: skip

    # -- link handler -----------------------------------------------------------------------------------------

    def link_received(self, link: Link, start: int, stop: int) -> int:
        walker: FrameWalker = link.walker
        data, view = link.intake.buffer.data, link.intake.buffer.view
        count = 0
        while True:
            messages, consumed = walker.walk(data, start, stop)
            if not messages:
                return consumed
            start = consumed
            self._dispatch(link, messages, view)
            count += len(messages)
            if link.intake.turn_over(count):
                return consumed

    def _dispatch(self, link: Link, messages: list[Message], view: memoryview) -> None:
        count, i = len(messages), 0
        while i < count:
            kind, proto, client_id, _, start, stop, _ = message = messages[i]
            i += 1
            if kind != DATA or proto != PROTO_TCP:
                self._message(link, message, view)
                continue
            if client_id != self._receiving:
                self._takes_turn(client_id)
            stream = self.streams.get(client_id)
            views = [view[start:stop]]
            while i < count and messages[i][:3] == (DATA, PROTO_TCP, client_id):
                views.append(view[messages[i][4] : messages[i][5]])
                i += 1
            if isinstance(stream, TcpStream) and stream.state not in rules.REMOTE_DONE:
                stream.receive(views)

    def _takes_turn(self, client_id: int) -> None:
        """Another stream receives than the last one: if that goes on, bulk leaves small messages more room."""
        self._receiving = client_id
        self._turns += 1
        if self._turns == SHARED_TURNS:
            self.budget.shared = True
        elif self._turns == 1:
            asyncio.get_running_loop().call_later(SHARED_FOR, self._count_turns)

    def _count_turns(self) -> None:
        self.budget.shared = self._turns >= SHARED_TURNS
        if self._turns > 1 and self.link is not None:
            asyncio.get_running_loop().call_later(SHARED_FOR, self._count_turns)
            self._turns = 1  # no other timer is needed
        else:
            self._turns = 0

    def _message(self, link: Link, message: Message, view: memoryview) -> None:
        kind, proto, client_id, port, start, stop, flags = message
        if kind >= WS_TEXT:
            link.control(message)
            return
        payload = self._assembler.add(view[start:stop], flags)
        if payload is None:
            return
        stream = self.streams.get(client_id)
        if kind == PING:
            link.send_message(PONG, client_id, payload, proto=proto, urgent=True)
        elif kind == CONNECT:
            self.accept(client_id, proto, port, payload)
        elif isinstance(stream, TcpStream):
            self._tcp_message(stream, kind, payload)
        elif isinstance(stream, UdpStream):
            self._udp_message(stream, kind, payload)
        elif kind not in KNOWN:
            self.unknown_messages += 1

    def _tcp_message(self, stream: TcpStream, kind: int, payload: bytes) -> None:
        if kind == WINDOW and (limit := parse_limit(payload)) is not None:
            stream.window(limit)
        elif kind == PONG:
            stream.pong()
        elif kind == CONNECTED:
            self.connected(stream, payload)
        elif kind == EOF and stream.receiving is not None:  # v1 has no such message
            stream.remote_eof()
        elif kind == CLOSE:
            stream.remote_close()
        elif kind == ERROR:
            self.stream_failed(stream, ErrorText.parse(payload))
            if stream.receiving is None and stream.state is not State.HALF_CLOSED:
                self.send_message(CLOSE, stream.id)
            stream.reset()
        else:
            self.unknown_messages += 1

    def _udp_message(self, stream: UdpStream, kind: int, payload: bytes) -> None:
        if kind == DATA:
            self._takes_turn(stream.id)
            stream.from_link(payload)
        elif kind == CLOSE:
            stream.over()
        elif kind == ERROR:
            self.stream_failed(stream, ErrorText.parse(payload))
            stream.refused()
        elif kind not in KNOWN:
            self.unknown_messages += 1

    def link_drained(self, link: Link) -> None:
        pass  # each stream waits for the link by itself

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        if self.link is link:
            self.detach(reason or _why_closed(code))

    def detach(self, reason: str) -> None:
        """The link is gone: every stream on it ends at once."""
        self.link = None
        self._limits.clear()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self._reporter.stop()
        for stream in list(self.streams.values()):
            if isinstance(stream, TcpStream):
                stream.reset()
            else:
                stream.over()
        self._assembler = Assembler(MAX_CONTROL)

    # -- what streams ask for ---------------------------------------------------------------------------------

    def send_message(self, kind: int, client_id: int, payload: bytes = b"", proto: int = PROTO_TCP) -> None:
        """Send one message of a stream, in order with its data."""
        if self.link is not None:
            self.link.send_message(kind, client_id, payload, proto=proto, urgent=kind in (PING, CONNECTED))

    def send_limit(self, client_id: int, limit: int) -> None:
        """Send WINDOW: ahead of bulk, since the peer may be waiting for it.

        Those of all streams that have read something in one turn of the loop go out together, as with a thousand
        streams they would otherwise be most of what is sent and read at every hop.
        """
        if not self._limits:
            asyncio.get_running_loop().call_soon(self._send_limits)
        self._limits[client_id] = limit

    def _send_limits(self) -> None:
        limits, self._limits = self._limits, {}
        link = self.link
        if link is not None and limits:
            link.post(b"".join(link.build_message(WINDOW, each, pack_limit(limit)) for each, limit in limits.items()))

    def mark_busy(self, stream: TcpStream) -> None:
        """Note which stream sends; while two or more take turns, each gets less at a time."""
        if self._busy is not stream:
            self._busy, self._in_a_row = stream, 0
            self.read_size = SHARED_READ if len(self.streams) > 1 else BULK_READ
        else:
            self._in_a_row += 1
            if self._in_a_row == ALONE:
                self.read_size = BULK_READ

    def check_hold(self, stream: TcpStream) -> None:
        """v1: stop reading the link while one stream holds too much (§3 rule 6)."""
        link = self.link
        if link is None:
            return
        if stream.held > self.config.v1_hold:
            link.intake.pause(stream)
        elif stream.held <= self.config.v1_hold // 2:
            link.intake.resume(stream)

    def stream_over(self, stream: AnyStream) -> None:
        """The id is free; the socket may still be delivering."""
        if self.streams.get(stream.id) is stream:
            del self.streams[stream.id]
            self._limits.pop(stream.id, None)
        if self._busy is stream:
            self._busy = None
            self.read_size = BULK_READ
        if isinstance(stream, TcpStream) and stream.receiving is not None and not stream.held:
            stream.receiving.close()  # else once it has delivered, so that what it holds stays paid for

    def add(self, stream: AnyStream) -> None:
        """Enter a stream under its id."""
        self.streams[stream.id] = stream
        self.opened += 1
        if isinstance(stream, UdpStream) and self._sweeper is None:
            self._sweep()
        if self.link is not None:
            self._reporter.begin(self.link)

    def _sweep(self) -> None:
        """Close the UDP streams on which nothing came for a while."""
        oldest = time.monotonic() - self.config.udp_idle
        alive = False
        for stream in list(self.streams.values()):
            if isinstance(stream, UdpStream):
                if stream.last <= oldest:
                    self.send_message(CLOSE, stream.id, proto=PROTO_UDP)
                    stream.over()
                else:
                    alive = True
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(self.config.udp_idle / 4, self._sweep) if alive else None

    # -- what the two sides do differently --------------------------------------------------------------------

    def accept(self, client_id: int, proto: int, port: int, payload: bytes) -> None:
        """A CONNECT came."""
        self.unknown_messages += 1

    def connected(self, stream: TcpStream, payload: bytes) -> None:
        """A CONNECTED came."""
        self.unknown_messages += 1

    def socket_ready(self, stream: TcpStream) -> None:
        """A stream's local socket is connected."""

    def socket_error(self, stream: TcpStream, exc: Exception) -> ErrorText:
        """What the other end is told of a local socket that broke."""
        return user_error(exc)

    def forget_waiting(self, stream: TcpStream) -> None:
        """A local socket went before its stream was opened."""

    def window_passed(self, stream: TcpStream) -> None:
        """More came than was granted: the link is one session's, and it ends (§3 rule 5)."""
        raise FrameViolation(CloseCode.PROTOCOL_ERROR, f"stream {stream.id} was sent more than its window allows")

    def stream_failed(self, stream: AnyStream, text: ErrorText) -> None:
        """An ERROR came."""


def _why_closed(code: int) -> str:
    """A close without a reason, in words."""
    return (
        "the connection was lost"
        if code in (CloseCode.NO_CODE, CloseCode.ABNORMAL)
        else f"the connection was closed (code {code})"
    )
