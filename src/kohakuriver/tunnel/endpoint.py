"""What both ends of a tunnel have in common: messages of a link find their stream (docs/protocol.md §2–§3)."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TypeAlias

from kohakuriver._frame import WS_TEXT, FrameViolation, FrameWalker, Message
from kohakuriver.tunnel.buffers import WHOLE_MESSAGE, Assembler
from kohakuriver.tunnel.error_text import user_error
from kohakuriver.tunnel.kept import KeptCore
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import (
    CLOSE,
    CONNECT,
    CONNECTED,
    DATA,
    DETACH,
    EOF,
    ERROR,
    GOAWAY,
    KNOWN,
    NOTICE,
    PING,
    PONG,
    PORTS,
    PROTO_TCP,
    RESUME,
    REVOKE,
    SESSION_ENDED,
    SESSION_ID,
    STRAIGHT,
    WINDOW,
    CloseCode,
    Counts,
    ErrorText,
    parse_limit,
)
from kohakuriver.tunnel.reporting import Reporter
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.states import Role
from kohakuriver.tunnel.stream import Rules
from kohakuriver.tunnel.streams import Streams, Totals
from kohakuriver.tunnel.udp import UdpStream
from kohakuriver.tunnel.unacked import Store
from kohakuriver.tunnel.v1_rules import V1Rules
from kohakuriver.tunnel.windows import Budget, Pool

__all__ = ["AnyStream", "Endpoint", "EndpointStats", "Share"]

MAX_CONTROL = 1 << 20
_OF_SESSIONS = frozenset({RESUME, REVOKE, GOAWAY, NOTICE, STRAIGHT})


@dataclass
class EndpointStats(Totals):
    """Totals of one endpoint since it was made; ``streams`` is the number open now."""

    streams: int = 0


AnyStream: TypeAlias = TcpStream | UdpStream


class Share:
    """What the streams of several endpoints may hold together: bytes for their sockets, and as many for their peers.

    Args:
        total: bytes each way; None for any number.
        within: what it is a part of.
    """

    def __init__(self, total: int | None = None, within: Share | None = None) -> None:
        self.windows: Pool = Pool(total, None if within is None else within.windows)
        self.kept: Pool = Pool(total, None if within is None else within.kept)


class Endpoint:
    """The streams of one link, whichever side opened them.

    Large because both sides hook in at the same messages: a third of the methods are those hooks.
    """

    role = Role.OPENER
    linger = 2.0  # seconds, where the configuration does not say (§3 rule 4)

    def __init__(self, config: EndpointConfig | None = None, share: Share | None = None) -> None:
        """`share` is what its streams may hold together with those of other endpoints."""
        self.config = config or EndpointConfig()
        self._share = share  # lives as long as its streams, which know this endpoint
        windows, kept = (None, None) if share is None else (share.windows, share.kept)
        self.totals = Totals()
        self.budget = Budget(self.config.budget, self.config.first_window, self.config.max_window, windows)
        linger = self.linger if self.config.v1_linger is None else self.config.v1_linger
        self.rules = Rules(self.role, self.budget, V1Rules(self.config.v1_hold, linger), Store(within=kept))
        self.streams: Streams | None = None  # while there is a link
        self._ids = itertools.count(1)  # of all links: what comes late over one of them is for no other stream
        self._assembler = Assembler(MAX_CONTROL)
        self._reporter = Reporter(self._counts, lambda: self.stream_count > 0)

    def _counts(self) -> Counts:
        return Counts(self.totals.udp_dropped, self.totals.stalls)

    @property
    def link(self) -> Link | None:
        """What carries the streams now."""
        return None if self.streams is None else self.streams.link

    @property
    def stream_count(self) -> int:
        """How many streams there are."""
        return 0 if self.streams is None else len(self.streams)

    def stats(self) -> EndpointStats:
        """The totals so far."""
        return EndpointStats(**asdict(self.totals), streams=self.stream_count)

    def attach(self, link: Link) -> None:
        """Carry streams over ``link`` from now on."""
        self.budget.begin()
        self.streams = Streams(
            link,
            totals=self.totals,
            budget=self.budget,
            udp_idle=self.config.udp_idle,
            ids=self._ids,
            on_enter=self.entered,
        )
        link.hand_over(self)

    def entered(self, link: Link) -> None:
        """A stream has entered this link."""
        self._reporter.begin(link)

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
            if link.intake.turn_over(count) or consumed == stop:
                return consumed

    def _dispatch(self, link: Link, messages: list[Message], view: memoryview) -> None:
        streams = self.streams
        if streams is None or streams.link is not link:  # not in use yet, or not any more
            for message in messages:
                if message[0] >= WS_TEXT:
                    link.control(message)
                else:
                    self.beside(link, message, view)
            return
        turns = streams.turns
        count, i = len(messages), 0
        while i < count:
            kind, proto, client_id, _, start, stop, _ = message = messages[i]
            i += 1
            if kind != DATA or proto != PROTO_TCP:
                self._message(streams, message, view)
                continue
            if client_id != turns.receiving:
                turns.receives(client_id)
            stream = streams.by_id.get(client_id)
            views = [view[start:stop]]
            while i < count and messages[i][:3] == (DATA, PROTO_TCP, client_id):
                views.append(view[messages[i][4] : messages[i][5]])
                i += 1
            if isinstance(stream, TcpStream):
                stream.receive(views)

    def _message(self, streams: Streams, message: Message, view: memoryview) -> None:
        kind, proto, client_id, port, start, stop, flags = message
        if kind >= WS_TEXT:
            streams.link.control(message)
            return
        payload = bytes(view[start:stop]) if flags == WHOLE_MESSAGE else self._assembler.add(view[start:stop], flags)
        if payload is None:
            return
        stream = streams.by_id.get(client_id)
        if kind == PING:
            self.pinged(client_id, payload)
            streams.link.send_message(PONG, client_id, payload, proto=proto, urgent=True)
        elif kind == CONNECT:
            self.accept(client_id, proto, port, payload)
        elif kind == PORTS:
            self.asked_for_ports(client_id, payload)
        elif kind in _OF_SESSIONS:
            self.kept_message(kind, client_id, proto, port, payload)
        elif isinstance(stream, TcpStream):
            self._tcp_message(stream, kind, payload)
        elif isinstance(stream, UdpStream):
            self._udp_message(streams, stream, kind, payload)
        elif kind not in KNOWN:
            self.totals.unknown_messages += 1

    def beside(self, link: Link, message: Message, view: memoryview) -> None:
        """A message came over another link than that which carries the streams."""

    def pinged(self, client_id: int, payload: bytes) -> None:
        """A PING came; it is answered whatever is made of it."""

    def asked_for_ports(self, client_id: int, payload: bytes) -> None:
        """A PORTS came; a tunnel client answers it, to its runner alone."""
        self.totals.unknown_messages += 1

    def _tcp_message(self, stream: TcpStream, kind: int, payload: bytes) -> None:
        core = stream.core
        if kind == PONG:
            stream.pong()
        elif kind == ERROR:
            self._stream_error(stream, ErrorText.parse(payload))
        elif kind == DETACH:
            self.detach_stream(stream, payload)
        elif isinstance(core, KeptCore):
            stream.act(core.take(kind, payload))
            if not core.state.gone:
                stream.update_reading()
        elif kind == WINDOW and (limit := parse_limit(payload)) is not None:
            if core.sending.raise_to(limit):
                stream.update_reading()
        elif kind == CONNECTED:
            self.connected(stream, payload)
        elif kind == EOF:
            stream.act(core.remote_eof())
        elif kind == CLOSE:
            stream.act(core.remote_close())
        else:
            self.totals.unknown_messages += 1

    def _stream_error(self, stream: TcpStream, text: ErrorText) -> None:
        if not self.goes_on(stream, text):
            self.stream_failed(stream, text)
            stream.act(stream.core.remote_error())

    def _udp_message(self, streams: Streams, stream: UdpStream, kind: int, payload: bytes) -> None:
        if kind == DATA:
            if stream.at is not None:
                streams.turns.receives(stream.at.id)
            stream.from_link(payload)
        elif kind == CLOSE:
            stream.over()
        elif kind == ERROR:
            text = ErrorText.parse(payload)
            if not self.goes_on(stream, text):
                self.stream_failed(stream, text)
                stream.refused()
        elif kind == DETACH:
            self.detach_stream(stream, payload)
        elif kind not in KNOWN:
            self.totals.unknown_messages += 1

    def link_drained(self, link: Link) -> None:
        pass  # each stream waits for the link by itself

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        if self.link is link:
            self.detach(reason or why_closed(code), keeps=self.keeps(code))

    def keeps(self, code: int) -> bool:
        """Whether kept streams wait for another link when one was closed with this code."""
        return code not in SESSION_ENDED

    def detach(self, reason: str, *, keeps: bool = True) -> None:
        """The link is gone: every stream on it ends at once, or waits for another if it can and is to (``keeps``)."""
        streams, self.streams = self.streams, None
        self._reporter.stop()
        if streams is not None:
            streams.lost(keeps=keeps)
        self._assembler = Assembler(MAX_CONTROL)

    # -- what the two sides do differently --------------------------------------------------------------------

    def accept(self, client_id: int, proto: int, port: int, payload: bytes) -> None:
        """A CONNECT came."""
        self.totals.unknown_messages += 1

    def kept_message(self, kind: int, client_id: int, proto: int, port: int, payload: bytes) -> None:
        """A message came that is for no stream of this link: RESUME, REVOKE, GOAWAY, NOTICE or STRAIGHT."""
        self.totals.unknown_messages += 1

    def detach_stream(self, stream: AnyStream, payload: bytes) -> None:
        """A DETACH came."""
        self.totals.unknown_messages += 1

    def goes_on(self, stream: AnyStream, text: ErrorText) -> bool:
        """Whether a stream is not over though this ERROR came."""
        return False

    def connected(self, stream: TcpStream, payload: bytes) -> None:
        """A CONNECTED came, of a stream that is not kept."""
        self.totals.unknown_messages += 1

    def socket_ready(self, stream: TcpStream) -> None:
        """A stream's local socket is connected."""

    def socket_gone(self, stream: TcpStream) -> None:
        """A local socket went before its stream had a link."""

    def socket_error(self, stream: TcpStream, exc: BaseException) -> ErrorText:
        """What the other end is told of a local socket that broke."""
        return user_error(exc)

    def window_passed(self, stream: TcpStream) -> None:
        """More came than was granted: the link is one session's, and it ends (§3 rule 5)."""
        number = stream.at.id if stream.at is not None else SESSION_ID
        raise FrameViolation(CloseCode.PROTOCOL_ERROR, f"stream {number} was sent more than its window allows")

    def stream_over(self, stream: AnyStream) -> None:
        """A stream is over on the wire."""

    def stream_detached(self, stream: AnyStream) -> None:
        """A kept stream waits for another link."""

    def stream_answered(self, stream: TcpStream) -> None:
        """A PONG has come for a stream."""

    def stream_failed(self, stream: AnyStream, text: ErrorText) -> None:
        """An ERROR came."""


def why_closed(code: int) -> str:
    """A close without a reason, in words."""
    return (
        "the connection was lost"
        if code in (CloseCode.NO_CODE, CloseCode.ABNORMAL)
        else f"the connection was closed (code {code})"
    )
