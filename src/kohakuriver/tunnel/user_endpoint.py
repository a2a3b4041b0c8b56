"""Hop 1: the user's end of a tunnel, which listens and opens streams (docs/protocol.md §2–§3)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator

from kohakuriver._frame import FIRST, LAST, Message
from kohakuriver.rates import TokenBucket
from kohakuriver.text import one_line
from kohakuriver.tunnel.buffers import Assembler
from kohakuriver.tunnel.closing import CloseState
from kohakuriver.tunnel.endpoint import MAX_CONTROL, AnyStream, Endpoint, Share, why_closed
from kohakuriver.tunnel.kept import KeptCore, opening_kept
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_listeners import LISTEN_BACKLOG, ListeningSocket, bind
from kohakuriver.tunnel.local_socket import AcceptedStream, TcpStream
from kohakuriver.tunnel.opener import KeptStreams, is_resuming
from kohakuriver.tunnel.protocol import (
    CLOSE,
    CONNECT,
    DATA,
    GOAWAY,
    NOTICE,
    PING,
    PONG,
    SESSION_ID,
    STRAIGHT,
    CloseCode,
    ErrorText,
    parse_limit,
    parse_seconds,
)
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.states import Role, State
from kohakuriver.tunnel.stream import StreamCore
from kohakuriver.tunnel.udp import HeldDatagrams, UdpListener, UdpStream

LOOK, QUIET = 0.02, 1.0
"""Seconds between two looks at what is still under way, and after which it counts as standing still."""
LAST_WORD = 0.5
"""Seconds that a link has to take another byte of what is left to be said, or to answer the last of it."""


NOTICES_AT_ONCE, NOTICE_EVERY = 20, 5.0
"""So many sentences are shown at once, and then one in so many seconds: a hostile node would fill a screen."""

LONGEST_NOTICE = 500
"""Bytes of a sentence that are shown."""


class UserEndpoint(Endpoint):
    """Hop 1: listens on local addresses and opens a stream for each connection.

    It outlives its link: ``attach`` gives it the first one and, after a loss, the next. A connection that is
    accepted in between is held for ``reattach_wait`` seconds, then reset; after ``outage`` seconds it is reset at once.

    Large because streams, listeners and the two links that a session may have each tell it of themselves.

    Args:
        on_stream_error: is told of a stream that could not be opened, or broke: its port, and why.
        on_detach: is told that the link is gone.
        on_going_away: is told, with the reason, that the link will not be there for long.
        on_notice: is told a sentence for the user.
        on_straight: is told what a runner answers to who asks for a straight path.
        on_line_lost: is told, with the reason, that the link of the session is gone while another carries the streams.
        kept: where the streams that outlive links are; without it, none does.
        share: what its streams may hold together with those of other endpoints; None for one of its own.
        on_accept: called with the number of streams after each new local connection.
    """

    role = Role.OPENER

    def __init__(
        self,
        *,
        config: EndpointConfig | None = None,
        on_stream_error: Callable[[int, ErrorText], None] = lambda port, text: None,
        on_detach: Callable[[str], None] = lambda reason: None,
        on_accept: Callable[[int], None] = lambda streams: None,
        on_going_away: Callable[[str], None] = lambda reason: None,
        on_notice: Callable[[str], None] = lambda sentence: None,
        on_straight: Callable[[bytes], None] = lambda payload: None,
        on_line_lost: Callable[[str], None] = lambda reason: None,
        kept: KeptStreams | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__(config, share)
        self.kept = kept
        self.on_going_away = on_going_away
        self.on_notice = on_notice
        self._notices = TokenBucket(1 / NOTICE_EVERY, NOTICES_AT_ONCE, time.monotonic())
        self.on_straight = on_straight
        self.on_line_lost = on_line_lost
        self.line: Link | None = None  # the session's link, while another one carries the streams
        self._said = Assembler(MAX_CONTROL)  # on it
        self._late: dict[int, UdpStream] = {}  # by the ids that they had there
        self.held: HeldDatagrams | None = None
        self.on_accept = on_accept
        self.on_stream_error = on_stream_error
        self.on_detach = on_detach
        self._waiting: dict[TcpStream, asyncio.TimerHandle] = {}
        self._detached_at = time.monotonic()
        self.listening: list[ListeningSocket] = []  # what is closed with this end
        self._closing = False

    @property
    def stream_count(self) -> int:
        return len(self.streams.by_id) if self.streams is not None else self.waiting

    @property
    def waiting(self) -> int:
        """How many streams wait for a link."""
        return 0 if self.kept is None else self.kept.waiting

    def attach(self, link: Link, *, line: Link | None = None) -> None:
        """Use ``link`` from now on: kept streams go on over it, then what waits for one is opened.

        Where it is a straight path, ``line`` is the session's own link, which stays for what is said of that. Links
        that were used before, and are neither, are closed.
        """
        before, self.line = (self.link, self.line), line
        self._said = Assembler(MAX_CONTROL)
        # Nothing of UDP is sent again: what is still on its way over the session's own link counts.
        streams = {} if self.streams is None or self.link is not line else self.streams.by_id
        self._late = {number: each for number, each in streams.items() if isinstance(each, UdpStream)}
        if self.streams is not None:
            super().detach("it goes on over another connection")
        super().attach(link)
        for each in before:
            if each is not None and each not in (link, line):
                each.close(CloseCode.SERVICE_RESTART, "it goes on over another connection")
        self._attach_kept()
        waiting, self._waiting = self._waiting, {}
        for stream, timer in waiting.items():
            timer.cancel()
            self.open_tcp(stream)

    def _attach_kept(self) -> None:
        if self.kept is not None and self.streams is not None:
            self.kept.attach(self.streams)

    def beside(self, link: Link, message: Message, view: memoryview) -> None:
        """Of the session's own link what is said of the session counts while another one carries the streams."""
        kind, proto, client_id, _, start, stop, flags = message
        if link is not self.line:
            return
        if client_id != SESSION_ID:
            late = self._late.get(client_id)
            if late is not None and not late.gone and kind == DATA and flags & FIRST and flags & LAST:
                late.from_link(bytes(view[start:stop]))
            return
        payload = self._said.add(view[start:stop], flags)
        if payload is not None and kind == PING:
            link.send_message(PONG, SESSION_ID, payload, proto=proto, urgent=True)
        elif payload is not None and kind in (NOTICE, GOAWAY, STRAIGHT):
            self.kept_message(kind, SESSION_ID, proto, 0, payload)

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        if link is self.line:
            self.line = None
            self.on_line_lost(reason or why_closed(code))
        super().link_closed(link, code, reason)

    def keeps(self, code: int) -> bool:
        return not self._closing and super().keeps(code)

    def detach(self, reason: str, *, keeps: bool = True) -> None:
        super().detach(reason, keeps=keeps)
        self._detached_at = time.monotonic()
        if self.kept is not None:
            self.kept.detach(self._held_for_too_long)
        self.on_detach(reason)

    def _held_for_too_long(self) -> None:
        self.end_waiting(ErrorText("ETIMEDOUT", "the connection to the host was lost for too long"))

    def end_waiting(self, text: ErrorText) -> None:
        """No link will come for the streams that wait for one."""
        for stream in list(self.kept.streams if self.kept is not None else ()):
            self.stream_failed(stream, text)
            stream.link_lost()

    def stream_over(self, stream: AnyStream) -> None:
        if self.kept is not None:
            self.kept.over(stream)

    def stream_answered(self, stream: TcpStream) -> None:
        if self.kept is not None:
            self.kept.doubt.answered(stream)

    def goes_on(self, stream: AnyStream, text: ErrorText) -> bool:
        """EAGAIN answers a RESUME that is to be tried again; ESTALE may mean that the CONNECT was lost (rule 6)."""
        kept = self.kept
        if kept is None or not is_resuming(stream):
            return False
        if text.code == "EAGAIN":
            kept.later(stream)
            return True
        if text.code != "ESTALE" or not isinstance(stream, TcpStream) or stream.kept is None:
            return False
        if not stream.kept.opens_again(kept.new_key()):
            return False
        self._open_again(stream)
        return True

    def _open_again(self, stream: TcpStream) -> None:
        streams = self.streams
        if streams is None:
            return
        stream.unlink()
        stream.attach(streams.enter(stream, streams.new_id(), again=True), stream.core.link(streams.link.version))

    def kept_message(self, kind: int, client_id: int, proto: int, port: int, payload: bytes) -> None:
        if kind == NOTICE and client_id == SESSION_ID:
            if self._notices.try_take(time.monotonic()):
                self.on_notice(one_line(payload[:LONGEST_NOTICE].decode("utf-8", "replace")))
            return
        if kind == STRAIGHT and client_id == SESSION_ID:
            self.on_straight(payload)
            return
        told = parse_seconds(payload) if kind == GOAWAY and client_id == SESSION_ID else None
        if told is None:
            self.totals.unknown_messages += 1
        else:
            self.on_going_away(told[1])

    def socket_ready(self, stream: TcpStream) -> None:
        if self.open_tcp(stream):
            self.on_accept(self.stream_count)
            return
        outage = time.monotonic() - self._detached_at
        patience = self.config.reattach_wait if outage < self.config.outage else 0.0
        loop = asyncio.get_running_loop()
        self._waiting[stream] = loop.call_later(patience, self._waited_too_long, stream)

    def _waited_too_long(self, stream: TcpStream) -> None:
        self._waiting.pop(stream, None)
        self.stream_failed(stream, ErrorText("ENOTCONN", "the connection to the host is lost"))
        stream.link_lost()

    def socket_gone(self, stream: TcpStream) -> None:
        timer = self._waiting.pop(stream, None)
        if timer is not None:
            timer.cancel()

    def open_tcp(self, stream: TcpStream) -> bool:
        """Open a stream; False while there is no link."""
        streams = self.streams
        if streams is None:
            return False
        if self.kept is not None:
            self._keep(stream, self.kept, streams.link.version)
        at = streams.enter(stream, streams.new_id())
        out = streams.link.out
        gathers = stream.core.waits > 0 and out.gather()  # what came early goes with the CONNECT
        try:
            stream.attach(at, stream.core.link(streams.link.version))
        finally:
            if gathers:
                out.scatter()
        return True

    def new_core(self) -> StreamCore:
        """What a connection that comes now begins with."""
        streams, kept = self.streams, self.kept
        if kept is None or streams is None or streams.link.version < 2:
            return StreamCore(self.rules)
        return KeptCore(self.rules, kept.identity())

    def _keep(self, stream: TcpStream, kept: KeptStreams, version: int) -> None:
        """Have a stream outlive the link that it gets, if that speaks this version; it may have begun without one."""
        core = stream.core
        if version < 2:
            if isinstance(core, KeptCore):  # the link that there was when it began was another
                stream.core = core.unkept()
            return
        if not isinstance(core, KeptCore):
            core = stream.core = opening_kept(self.rules, kept.identity(), core)
        core.identity.start = stream.start
        kept.enter(stream)

    @contextlib.contextmanager
    def holding_datagrams(self) -> Iterator[None]:
        """What local programs send by UDP waits meanwhile, and goes over the link that there is at the end."""
        held = self.held = HeldDatagrams()
        try:
            yield
        finally:
            self.held = None
            held.send()

    def open_udp(self, stream: UdpStream) -> bool:
        """Open a stream for a new source address; False while there is no link."""
        streams = self.streams
        if streams is None:
            return False
        if self.kept is not None and streams.link.version >= 2:
            stream.identity = self.kept.identity()
            self.kept.enter(stream)
        stream.at = streams.enter_udp(stream, streams.new_id())
        stream.send(CONNECT, stream.opening())
        return True

    def connected(self, stream: TcpStream, payload: bytes) -> None:
        stream.act(stream.core.connected(parse_limit(payload)))
        stream.update_reading()

    def has_reached(self, source: tuple[str, int] | str, port: int) -> bool:
        """Whether the stream of the local connection from `source` to this port has been opened in the task.

        By a Unix socket nobody comes from anywhere, and any stream to the port will do.
        """
        return self.streams is not None and any(
            isinstance(stream, TcpStream)
            and stream.core.state is State.OPEN
            and (stream.port == port if isinstance(source, (str, bytes)) else stream.source()[:2] == source[:2])
            for stream in self.streams.by_id.values()
        )

    def stream_failed(self, stream: AnyStream, text: ErrorText) -> None:
        if isinstance(stream, TcpStream):
            stream.refused(text)
            if stream.kept is not None and stream.kept.leaving:
                return  # nobody is there any more who would miss it
        self.on_stream_error(stream.port, text)

    async def listen_tcp(
        self, host: str, port: int, remote_port: int, made: Callable[[], asyncio.BaseProtocol] | None = None
    ) -> ListeningSocket:
        """Listen on ``host:port`` (0: any free port). Raises LocalAddressError if that can't be had.

        Each connection is a stream, or what ``made`` makes of it.
        """
        loop = asyncio.get_running_loop()
        sock = await bind(host, port, socket.SOCK_STREAM)
        server = await loop.create_server(
            made or (lambda: AcceptedStream(self, remote_port, self.new_core())), sock=sock, backlog=LISTEN_BACKLOG
        )
        listening = ListeningSocket(host, sock.getsockname()[1], remote_port, "tcp", server.close, sock)
        self.listening.append(listening)
        return listening

    async def listen_udp(self, host: str, port: int, remote_port: int) -> ListeningSocket:
        """The same for UDP: one stream per source address (§3 rule 12)."""
        loop = asyncio.get_running_loop()
        sock = await bind(host, port, socket.SOCK_DGRAM)
        address = sock.getsockname()
        transport, _ = await loop.create_datagram_endpoint(lambda: UdpListener(self, remote_port, sock), sock=sock)
        listening = ListeningSocket(host, address[1], remote_port, "udp", transport.close, sock)
        self.listening.append(listening)
        return listening

    async def close(self) -> None:
        """Stop listening, end every stream, close the link."""
        self._closing = True
        if self.kept is not None:
            self.kept.doubt.end()
        for listening in self.listening:
            listening.close()
        for stream in list(self._waiting):
            stream.link_lost()
        streams, line = self.streams, self.line
        if streams is None:
            for kept in list(self.kept.streams if self.kept is not None else ()):
                kept.link_lost()
            return
        for open_stream in list(streams.by_id.values()):
            open_stream.send(CLOSE)
        if self.kept is not None:
            self.kept.leave()
        streams.link.close(CloseCode.NORMAL, "the forward has ended")
        await _gone(streams.link)
        if (
            line is not None and line.closing.state is not CloseState.CLOSED
        ):  # after it, so that the host is told in time what went straight
            line.close(CloseCode.NORMAL, "the forward has ended")
            await _gone(line)


def stop_listening(endpoint: UserEndpoint, listening: ListeningSocket) -> None:
    """Take no new connections there; those that are open go on."""
    listening.close()
    endpoint.listening.remove(listening)


async def delivered(endpoint: UserEndpoint) -> None:
    """Wait until local TCP connections have ended on both sides, or have sent nothing more for `QUIET` seconds.

    A program that ends leaves behind what the kernel and this end have not passed on yet.
    """
    sent, until = -1, 0.0
    while True:
        await asyncio.sleep(LOOK)  # first: a connection may not have been accepted yet
        kept = endpoint.kept.streams if endpoint.kept is not None else ()
        open_now = kept if endpoint.streams is None else endpoint.streams.by_id.values()
        # One whose both sides have ended waits for the last word of its peer alone.
        if not any(isinstance(each, TcpStream) and each.core.state is not State.ENDED for each in open_now):
            return
        if endpoint.totals.bytes_sent != sent:
            sent, until = endpoint.totals.bytes_sent, time.monotonic() + QUIET
        elif time.monotonic() >= until:
            return


async def _gone(link: Link) -> None:
    """Wait until a link that was closed has ended. One that is dead tells nobody, and nobody waits for it."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    link.on_lost = lambda: None if gone.done() else gone.set_result(None)
    while not gone.done():
        taken = link.out.taken()
        await asyncio.wait({gone}, timeout=LAST_WORD)
        if not gone.done() and link.out.taken() == taken:
            link.abort()
