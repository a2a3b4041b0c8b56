"""The two ends of a tunnel: streams on one side, sockets on the other (docs/protocol.md §2–§3).

``UserEndpoint`` listens and opens streams (hop 1: the command line); ``ContainerEndpoint`` accepts streams and
dials (hop 4: the Python tunnel client, and a runner for tasks that it reaches by address).
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from kohakuriver._frame import HEADROOM, WS_TEXT, FrameViolation, FrameWalker, Message
from kohakuriver.errors import LocalAddressError
from kohakuriver.resolve import resolving
from kohakuriver.tunnel import stream as rules
from kohakuriver.tunnel.buffers import Assembler
from kohakuriver.tunnel.error_text import service_error, user_error
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
    SESSION_ID,
    WINDOW,
    CloseCode,
    Counts,
    ErrorText,
    pack_limit,
    parse_limit,
)
from kohakuriver.tunnel.stream import Event, State
from kohakuriver.tunnel.tcp import TcpStream
from kohakuriver.tunnel.udp import UdpListener, UdpSocket, UdpStream, connected, connected_datagram_socket, family_of

BULK_READ = (1 << 20) - HEADROOM
SHARED_READ = 256 * 1024  # with several busy streams no one of them takes more than this at a time
SHARED_FOR = 1.0  # seconds in which the streams that receive have to change as often as this
SHARED_TURNS = 8
ALONE = 16  # reads in a row of one stream after which it counts as the only busy one
MAX_CONTROL = 1 << 20
LISTEN_BACKLOG = 4096
REPORT_EVERY = 2.0


@dataclass
class EndpointConfig:
    """What an endpoint may hold and how long it waits. Sizes in bytes, times in seconds."""

    first_window: int = rules.FIRST_WINDOW
    max_window: int = rules.MAX_WINDOW
    budget: int = rules.SESSION_BUDGET
    v1_hold: int = 1 << 20
    v1_linger: float = 2.0
    dial_timeout: float = 10.0
    reattach_wait: float = 5.0
    outage: float = 60.0
    udp_idle: float = 60.0
    udp_peers: int = 1024
    udp_queue: int = 1 << 20


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


@dataclass
class ListeningSocket:
    """A local address that leads to a port of the task."""

    host: str
    port: int
    remote_port: int
    proto: str
    close: Callable[[], None] = field(repr=False)
    sock: socket.socket = field(repr=False)


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
        self._reporter: asyncio.TimerHandle | None = None
        self._reported = (0, 0)

    def stats(self) -> EndpointStats:
        """The totals so far."""
        return EndpointStats(
            len(self.streams), self.opened, self.bytes_sent, self.bytes_received,
            self.udp_dropped, self.stalls, self.unknown_messages,
        )  # fmt: skip

    # -- link handler -----------------------------------------------------------------------------------------

    def link_received(self, link: Link, start: int, stop: int) -> int:
        walker: FrameWalker = link.walker
        data, view = link.buffer.data, link.buffer.view
        count = 0
        while True:
            messages, consumed = walker.walk(data, start, stop)
            if not messages:
                return consumed
            start = consumed
            self._dispatch(link, messages, view)
            count += len(messages)
            if link.turn_over(count):
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
        elif kind == EOF:
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
        elif kind in (CLOSE, ERROR):
            if kind == ERROR:
                self.stream_failed(stream, ErrorText.parse(payload))
            stream.over()
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
        if self._reporter is not None:
            self._reporter.cancel()
            self._reporter = None
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
            link.pause_reading(stream)
        elif stream.held <= self.config.v1_hold // 2:
            link.resume_reading(stream)

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
        if self._reporter is None and self.link is not None and self.link.version >= 2:
            self._reporter = asyncio.get_running_loop().call_later(REPORT_EVERY, self._report)

    def _report(self) -> None:
        """Tell the runner what only endpoints can count (docs/protocol.md §3), for as long as there are streams."""
        link, now = self.link, (self.udp_dropped, self.stalls)
        if link is not None and now != self._reported:
            dropped, stalls = now[0] - self._reported[0], now[1] - self._reported[1]
            self._reported = now
            link.send_message(PING, SESSION_ID, Counts(dropped, stalls).pack(), urgent=True)
        loop = asyncio.get_running_loop()
        self._reporter = loop.call_later(REPORT_EVERY, self._report) if self.streams else None

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


class UserEndpoint(Endpoint):
    """Hop 1: listens on local addresses and opens a stream for each connection.

    It outlives its link: ``attach`` gives it the first one and, after a loss, the next. A connection that is
    accepted in between is held for ``reattach_wait`` seconds, then reset; after ``outage`` seconds it is reset at once.
    """

    awaits_replies = True

    def __init__(
        self,
        *,
        config: EndpointConfig | None = None,
        on_stream_error: Callable[[int, ErrorText], None] = lambda port, text: None,
        on_detach: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(config)
        self.on_stream_error = on_stream_error
        self.on_detach = on_detach
        self._ids = itertools.count(1)
        self._waiting: dict[TcpStream, asyncio.TimerHandle] = {}
        self._detached_at = time.monotonic()
        self._listening: list[ListeningSocket] = []

    def attach(self, link: Link) -> None:
        """Use ``link`` from now on; what waits for one is opened."""
        self.link = link
        link.hand_over(self)
        waiting, self._waiting = self._waiting, {}
        for stream, timer in waiting.items():
            timer.cancel()
            self._open(stream)

    def detach(self, reason: str) -> None:
        super().detach(reason)
        self._detached_at = time.monotonic()
        self.on_detach(reason)

    def socket_ready(self, stream: TcpStream) -> None:
        if self.link is not None:
            self._open(stream)
            return
        outage = time.monotonic() - self._detached_at
        patience = self.config.reattach_wait if outage < self.config.outage else 0.0
        loop = asyncio.get_running_loop()
        self._waiting[stream] = loop.call_later(patience, self._waited_too_long, stream)

    def _waited_too_long(self, stream: TcpStream) -> None:
        self._waiting.pop(stream, None)
        self.on_stream_error(stream.port, ErrorText("ENOTCONN", "the connection to the host is lost"))
        stream.reset()

    def forget_waiting(self, stream: TcpStream) -> None:
        timer = self._waiting.pop(stream, None)
        if timer is not None:
            timer.cancel()

    def _open(self, stream: TcpStream) -> None:
        link = self.link
        assert link is not None
        payload = b""
        if link.version >= 2:
            stream.receiving = rules.ReceiveWindow(self.budget)
            stream.sending.limit = rules.EARLY_DATA
            payload = pack_limit(stream.receiving.granted)
        self._connect(stream, PROTO_TCP, payload)
        stream.update_reading()

    def connected(self, stream: TcpStream, payload: bytes) -> None:
        if rules.next_state(stream.state, Event.ESTABLISHED) is None:
            return
        limit = parse_limit(payload)
        if limit is None:  # the acceptor runs the stream under v1 rules
            if stream.receiving is not None:
                stream.receiving.close()
                stream.receiving = None
            stream.sending.limit = None
        stream.established(limit)

    def _connect(self, stream: AnyStream, proto: int, payload: bytes) -> None:
        assert self.link is not None
        stream.id = self._new_id()
        self.add(stream)
        self.link.send_message(CONNECT, stream.id, payload, proto=proto, port=stream.port, urgent=True)

    def _new_id(self) -> int:
        for client_id in self._ids:
            if client_id > 0xFFFFFFFF:
                self._ids = itertools.count(1)
                return self._new_id()
            if client_id not in self.streams:
                return client_id
        raise AssertionError("unreachable: the counter does not end")

    def has_reached(self, source: tuple[str, int]) -> bool:
        """Whether the stream of the local connection from `source` has been opened in the task."""
        return any(
            isinstance(stream, TcpStream) and stream.state is State.OPEN and stream.source()[:2] == source[:2]
            for stream in self.streams.values()
        )

    def stream_failed(self, stream: AnyStream, text: ErrorText) -> None:
        self.on_stream_error(stream.port, text)

    async def listen_tcp(self, host: str, port: int, remote_port: int) -> ListeningSocket:
        """Listen on ``host:port`` (0: any free port). Raises LocalAddressError if that can't be had."""
        loop = asyncio.get_running_loop()
        sock = _bind(host, port, socket.SOCK_STREAM)
        server = await loop.create_server(lambda: TcpStream(self, remote_port), sock=sock, backlog=LISTEN_BACKLOG)
        listening = ListeningSocket(host, sock.getsockname()[1], remote_port, "tcp", server.close, sock)
        self._listening.append(listening)
        return listening

    async def listen_udp(self, host: str, port: int, remote_port: int) -> ListeningSocket:
        """The same for UDP: one stream per source address (§3 rule 12)."""
        loop = asyncio.get_running_loop()
        sock = _bind(host, port, socket.SOCK_DGRAM)
        address = sock.getsockname()
        transport, _ = await loop.create_datagram_endpoint(lambda: UdpListener(self, remote_port, sock), sock=sock)
        listening = ListeningSocket(host, address[1], remote_port, "udp", transport.close, sock)
        self._listening.append(listening)
        return listening

    def open_udp(self, stream: UdpStream) -> bool:
        """Open a stream for a new source address; False while there is no link."""
        if self.link is None:
            return False
        self._connect(stream, PROTO_UDP, b"")
        return True

    async def close(self) -> None:
        """Stop listening, end every stream, close the link."""
        for listening in self._listening:
            listening.close()
        for stream in list(self._waiting):
            stream.reset()
        link = self.link
        if link is None:
            return
        for open_stream in list(self.streams.values()):
            proto = PROTO_TCP if isinstance(open_stream, TcpStream) else PROTO_UDP
            self.send_message(CLOSE, open_stream.id, proto=proto)
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        link.on_lost = lambda: None if gone.done() else gone.set_result(None)
        link.close(1000, "the forward has ended")
        await gone


# `tcpi_unacked` of Linux' struct tcp_info: how many connections of a listening socket nobody has accepted yet.
_TCPI_UNACKED = slice(24, 28)


def waiting_connections(sock: socket.socket) -> int:
    """How many connections wait to be accepted from a listening socket; 0 where the system does not tell."""
    if sock.type != socket.SOCK_STREAM or not sys.platform.startswith("linux"):
        return 0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_UNACKED.stop)
    except OSError:
        return 0
    return int.from_bytes(info[_TCPI_UNACKED], sys.byteorder)


def _bind(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    try:
        with resolving():
            info = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
    except OSError as exc:
        raise LocalAddressError(f"{host} is not an address of this machine: {exc.strerror or exc}") from exc
    sock = socket.socket(info[0], info[1], info[2])
    try:
        sock.setblocking(False)
        if kind == socket.SOCK_STREAM and os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
        if kind == socket.SOCK_STREAM:
            sock.listen(LISTEN_BACKLOG)
    except OSError as exc:
        sock.close()
        what = "is already in use" if exc.errno == errno.EADDRINUSE else f"can't be bound ({exc.strerror or exc})"
        message = f"{host}:{port} {what}; choose another with --local-port (0 takes any free one)"
        raise LocalAddressError(message) from exc
    return sock


class Network(Protocol):
    """Another network than this process's own, to dial from. Its methods raise OSError."""

    async def addresses(self, port: int, *, udp: bool) -> Sequence[str]:
        """The addresses to try for `port`, in turn."""

    async def open_socket(self, family: int, kind: int) -> socket.socket:
        """A non-blocking socket that is in that network."""


class ContainerEndpoint(Endpoint):
    """Hop 4: accepts streams and dials the service.

    Args:
        hosts: addresses to try in turn, e.g. ``("127.0.0.1", "::1")``.
        where: how error texts name the place, e.g. "in the container".
        refuses: (port, streams that are open) → why a stream may not be opened, or None. What a CONNECT calls port 0 is
            ``default_port``.
        network: where to dial from instead of this process's own network; it says itself which addresses.
    """

    def __init__(
        self,
        hosts: Sequence[str] = ("127.0.0.1", "::1"),
        *,
        config: EndpointConfig | None = None,
        where: str = "in the container",
        refuses: Callable[[int, int], ErrorText | None] = lambda port, streams: None,
        default_port: int = 0,
        network: Network | None = None,
    ) -> None:
        super().__init__(config)
        self.network = network
        self.hosts = hosts
        self.where = where
        self.refuses = refuses
        self.default_port = default_port
        self._dialling: set[asyncio.Task[None]] = set()

    def attach(self, link: Link) -> None:
        """Serve ``link`` from now on."""
        self.link = link
        link.hand_over(self)

    def accept(self, client_id: int, proto: int, port: int, payload: bytes) -> None:
        if client_id == SESSION_ID or client_id in self.streams or self.link is None:
            self.unknown_messages += 1
            return
        port = port or self.default_port
        refusal = self.refuses(port, len(self.streams))
        if refusal is not None:
            self.send_message(ERROR, client_id, refusal.pack(), proto)
            return
        if proto == PROTO_UDP:
            self._dial_soon(self._dial_udp(self._accept_udp(client_id, port)))
        else:
            self._dial_soon(self._dial_tcp(self._accept_tcp(client_id, port, payload)))

    def _accept_tcp(self, client_id: int, port: int, payload: bytes) -> TcpStream:
        stream = TcpStream(self, port)
        stream.id = client_id
        limit = parse_limit(payload)
        if limit is not None:
            stream.receiving = rules.ReceiveWindow(self.budget)
            stream.sending.limit = limit
        self.add(stream)
        return stream

    def _accept_udp(self, client_id: int, port: int) -> UdpStream:
        stream = UdpStream(self, port)
        stream.id = client_id
        stream.hold()  # at once: its first datagrams may have come in the same read
        self.add(stream)
        return stream

    def _dial_soon(self, dial: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(dial)
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    async def _dial_tcp(self, stream: TcpStream) -> None:
        failure: BaseException | None = OSError(errno.EHOSTUNREACH, "no address")
        for host in await self._addresses(stream.port, udp=False):
            failure = await self._try(stream, host)
            if not isinstance(failure, ConnectionRefusedError):
                break
        if failure is None:
            return
        if stream.state is not State.OVER:
            self.send_message(ERROR, stream.id, service_error(failure, stream.port, self.where).pack())
            stream.reset()

    async def _addresses(self, port: int, *, udp: bool) -> Sequence[str]:
        """Where to dial; none in a network that has gone."""
        if self.network is None:
            return self.hosts
        try:
            return await self.network.addresses(port, udp=udp)
        except OSError:
            return ()

    async def _connect_from(self, network: Network, stream: TcpStream, host: str) -> None:
        loop = asyncio.get_running_loop()
        sock = await network.open_socket(family_of(host), socket.SOCK_STREAM)
        try:
            await loop.sock_connect(sock, (host, stream.port))
            await loop.create_connection(lambda: stream, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _try(self, stream: TcpStream, host: str) -> BaseException | None:
        dial: Coroutine[Any, Any, object]
        if self.network is not None:
            dial = self._connect_from(self.network, stream, host)
        else:
            dial = asyncio.get_running_loop().create_connection(lambda: stream, host, stream.port)
        try:
            with resolving():
                await asyncio.wait_for(dial, self.config.dial_timeout)
        except (OSError, asyncio.TimeoutError) as exc:
            return exc
        return None

    def socket_ready(self, stream: TcpStream) -> None:
        if stream.state is State.OVER:  # the user ended it while we dialled: CLOSE delivers, anything else resets
            if stream._finishing:
                stream._pump()
            else:
                stream.reset()
            return
        limit = pack_limit(stream.receiving.granted) if stream.receiving is not None else b""
        self.send_message(CONNECTED, stream.id, limit)
        stream.established(None)
        stream._pump()

    def socket_error(self, stream: TcpStream, exc: Exception) -> ErrorText:
        return service_error(exc, stream.port, self.where)

    async def _datagram_socket(self, port: int) -> socket.socket:
        if self.network is None:
            return connected_datagram_socket(self.hosts[0], port)
        host = (await self.network.addresses(port, udp=True))[0]
        return connected(await self.network.open_socket(family_of(host), socket.SOCK_DGRAM), host, port)

    async def _dial_udp(self, stream: UdpStream) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock = await self._datagram_socket(stream.port)
            transport, _ = await loop.create_datagram_endpoint(lambda: UdpSocket(stream, sock), sock=sock)
        except OSError as exc:
            self.send_message(ERROR, stream.id, service_error(exc, stream.port, self.where).pack(), PROTO_UDP)
            stream.over()
            return
        if self.streams.get(stream.id) is not stream:
            transport.close()
            return
        self.send_message(CONNECTED, stream.id, proto=PROTO_UDP)
        stream.release()

    async def close(self) -> None:
        """End every stream and dial; the link is left to its owner."""
        for task in list(self._dialling):
            task.cancel()
        for stream in list(self.streams.values()):
            stream.reset() if isinstance(stream, TcpStream) else stream.over()


def _why_closed(code: int) -> str:
    """A close without a reason, in words."""
    return "the connection was lost" if code in (1005, 1006) else f"the connection was closed (code {code})"
