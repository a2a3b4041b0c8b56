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
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from kohakuriver._frame import HEADROOM, WS_TEXT, FrameViolation, FrameWalker, build_frame, frame_in_place
from kohakuriver.errors import LocalAddressError
from kohakuriver.tunnel import stream as rules
from kohakuriver.tunnel.link import Assembler, DirectSocket, Link, receive_buffer, soon, tune_socket
from kohakuriver.tunnel.protocol import (
    CLOSE,
    CONNECT,
    CONNECTED,
    DATA,
    EOF,
    ERROR,
    PING,
    PONG,
    PROTO_TCP,
    PROTO_UDP,
    WINDOW,
    Message,
)
from kohakuriver.tunnel.stream import Event, State

BULK_READ = (1 << 20) - HEADROOM
SHARED_READ = 256 * 1024  # with several busy streams no one of them takes more than this at a time
BLOCKED_READ = 4 * 1024  # a stream that learns only by reading that the link is blocked adds this to what waits
WRITE_PIECE = 256 * 1024
MAX_CONTROL = 1 << 20
LISTEN_BACKLOG = 4096


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


def error_text(exc: BaseException, doing: str) -> str:
    """A wire error text: symbolic code, then what failed (docs/protocol.md §3, ERROR)."""
    number = exc.errno if isinstance(exc, OSError) else None
    if number is None and isinstance(exc, (asyncio.TimeoutError, TimeoutError)):
        number = errno.ETIMEDOUT
    code = errno.errorcode.get(number, "EIO") if number is not None else "EIO"
    reason = os.strerror(number) if number is not None else str(exc) or type(exc).__name__
    return f"{code}: {doing}: {reason}"


class TcpStream(asyncio.BufferedProtocol):
    """One TCP stream and its local socket."""

    __slots__ = (
        "_blocked", "_direct", "_early", "_ended", "_finishing", "_fresh", "_in_transport", "_linger", "_queue",
        "_reading", "_transport", "_wrote_eof", "endpoint", "held", "id", "last_data", "port", "receiving",
        "sending", "state",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, port: int) -> None:
        self.endpoint = endpoint
        self.port = port
        self.id = 0
        self.state = State.OPENING
        self.sending = rules.SendWindow(None)
        self.receiving: rules.ReceiveWindow | None = None
        self.held = 0  # bytes received that the local socket has not taken
        self.last_data = 0.0
        self._transport: asyncio.Transport | None = None
        self._direct: DirectSocket = cast(DirectSocket, None)
        self._queue: deque[bytes | memoryview] | None = None
        self._in_transport = 0
        self._blocked = False
        self._reading = True
        self._fresh = True  # connection_made has only just been called
        self._ended = False  # the local socket has read end-of-file
        self._finishing = False
        self._wrote_eof = False
        self._early = b""
        self._linger: asyncio.TimerHandle | None = None

    # -- local socket → link ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)
        tune_socket(self._transport)
        self._direct = DirectSocket(self._transport)
        self.endpoint.socket_ready(self)
        soon(self._settle)

    def _settle(self) -> None:
        """uvloop undoes a pause in connection_made, so the first one is made here."""
        self._fresh = False
        self.update_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        link = self.endpoint.link
        if self.id == 0:
            size = max(1, rules.EARLY_DATA - len(self._early))
        else:
            size = min(self.endpoint.read_size, max(1, self.sending.room))
            if link is not None and link.blocked:
                size = min(size, BLOCKED_READ)
        return receive_buffer().view[HEADROOM : HEADROOM + size]

    def buffer_updated(self, nbytes: int) -> None:
        link = self.endpoint.link
        if self.state is State.OVER:  # its id may be another stream's by now; what is queued is still delivered
            return
        if self.id == 0 or link is None or self._early or self.sending.room < nbytes:  # it can't be sent yet
            self._early += bytes(receive_buffer().view[HEADROOM : HEADROOM + nbytes])
            self.update_reading()
            return
        stop = HEADROOM + nbytes
        buffer = link.buffer
        key = link.keys.next() if link.keys is not None else -1
        start = frame_in_place(buffer.data, HEADROOM, stop, DATA, PROTO_TCP, self.id, 0, key)
        self._account_sent(nbytes)
        link.send(buffer.view[start:stop])
        if link.blocked or self.sending.room <= 0:
            self.update_reading()

    def _account_sent(self, size: int) -> None:
        self.sending.sent += size
        self.endpoint.bytes_sent += size
        self.endpoint.mark_busy(self)
        if self._linger is not None:
            self.last_data = time.monotonic()

    def eof_received(self) -> bool:
        self._ended = True
        if self.id != 0 and not self._early:
            self._end_sending()
        return True

    def _end_sending(self) -> None:
        """The local socket has read end-of-file, and all that it had sent is on its way."""
        if self.receiving is not None:
            self._local_eof()
        elif self.state is not State.OVER and self._linger is None:
            self.last_data = time.monotonic()
            self._linger = asyncio.get_running_loop().call_later(self.endpoint.config.v1_linger, self._linger_over)

    def _local_eof(self) -> None:
        following = rules.next_state(self.state, Event.LOCAL_EOF)
        if following is None:
            return
        self.endpoint.send_message(EOF, self.id)
        self.state = following
        if following is State.OVER:
            self.endpoint.stream_over(self)
            self._finish()

    def _linger_over(self) -> None:
        """v1 has no EOF: CLOSE goes out once neither side has had data for the linger time (§3 rule 4)."""
        left = self.last_data + self.endpoint.config.v1_linger - time.monotonic()
        if left > 0:
            self._linger = asyncio.get_running_loop().call_later(left, self._linger_over)
            return
        self._linger = None
        if self.state is not State.OVER:
            self.endpoint.send_message(CLOSE, self.id)
            self._over()
            self._finish()

    def link_writable(self) -> None:
        self.update_reading()

    def update_reading(self) -> None:
        """Read the local socket only while what is read can be sent."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._fresh or self.state in rules.LOCAL_DONE:
            return
        self.send_early()
        if self._ended:
            return
        link = self.endpoint.link
        if self.id == 0 or link is None:
            may = False
        elif link.blocked:
            may = False
            link.wait_drained(self)
        else:
            may = self.sending.room > 0
            if not may and self._reading:
                self.endpoint.stalls += 1
        if may != self._reading:
            self._reading = may
            if may:
                transport.resume_reading()
            else:
                transport.pause_reading()

    # -- stream → local socket --------------------------------------------------------------------------------

    def receive(self, views: Sequence[memoryview]) -> None:
        """Take the stream's next bytes; views are only valid during the call."""
        size = sum(map(len, views))
        if self.receiving is not None:
            self._check_window(self.receiving, size)
        self.held += size
        if self._linger is not None:
            self.last_data = time.monotonic()
        if self._transport is None or self._queue or self._blocked:
            self._hold(views)
            return
        direct = self._direct
        sent = direct.write(views[0]) if len(views) == 1 else direct.writev(views)
        if sent < size:
            self._hold(views, skip=sent)
            self._pump()
        if sent:
            self._consumed(sent)

    def _check_window(self, window: rules.ReceiveWindow, size: int) -> None:
        if not window.receive(size):
            raise FrameViolation(1002, f"stream {self.id} was sent more than its window allows")
        if self.state is not State.OPENING:
            now = time.monotonic()
            if window.wants_ping(now):
                self.endpoint.send_message(PING, self.id)

    def _hold(self, views: Sequence[memoryview], skip: int = 0) -> None:
        if self._queue is None:
            self._queue = deque()
        for view in views:
            if skip >= len(view):
                skip -= len(view)
                continue
            rest = bytes(view[skip:])
            skip = 0
            if len(rest) <= WRITE_PIECE:
                self._queue.append(rest)
            else:  # credit goes back a piece at a time, so pieces are not too large
                whole = memoryview(rest)
                self._queue.extend(whole[i : i + WRITE_PIECE] for i in range(0, len(rest), WRITE_PIECE))
        if self.receiving is None:
            self.endpoint.check_hold(self)

    def _pump(self) -> None:
        transport = self._transport
        while self._queue and not self._blocked and transport is not None:
            piece = self._queue.popleft()
            self._in_transport = len(piece)
            transport.write(piece)
            if not self._blocked:
                self._transport_drained()
        if not self._queue and not self._blocked:
            self._queue = None
            if self._finishing:
                self._finish()
            elif self.state in rules.REMOTE_DONE:
                self._write_eof()

    def _transport_drained(self) -> None:
        size, self._in_transport = self._in_transport, 0
        if size:
            self._consumed(size)

    def _consumed(self, size: int) -> None:
        self.held -= size
        self.endpoint.bytes_received += size
        if self.receiving is None:
            self.endpoint.check_hold(self)
            return
        limit = self.receiving.consume(size)
        if limit is not None and self.state is not State.OVER and self.state not in rules.REMOTE_DONE:
            self.endpoint.send_limit(self.id, limit)

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._transport_drained()
        self._pump()

    def _write_eof(self) -> None:
        if self._transport is not None and not self._wrote_eof and not self._transport.is_closing():
            self._wrote_eof = True
            try:
                self._transport.write_eof()
            except OSError as exc:  # ENOTCONN: it was reset, and nobody has read that yet
                self._local_error(exc)

    # -- messages about this stream ---------------------------------------------------------------------------

    def established(self, limit: int | None) -> None:
        """CONNECTED came (``limit``: what we may send; None on v1), or our dial succeeded."""
        following = rules.next_state(self.state, Event.ESTABLISHED)
        if following is None:
            return
        self.state = following
        if limit is not None:
            self.sending.raise_to(limit)
        self.update_reading()

    def window(self, limit: int) -> None:
        """The peer raised its limit."""
        if self.sending.raise_to(limit):
            self.update_reading()

    def pong(self) -> None:
        """The answer to this stream's PING."""
        if self.receiving is not None and self.state is not State.OVER:
            limit = self.receiving.pong(time.monotonic())
            if limit is not None:
                self.endpoint.send_limit(self.id, limit)

    def remote_eof(self) -> None:
        """The peer sends no more; our socket is half-closed once it has everything."""
        following = rules.next_state(self.state, Event.REMOTE_EOF)
        if following is None:
            return
        self.state = following
        if following is State.OVER:
            self.endpoint.stream_over(self)
            self._finish()
        elif not self._queue and not self._blocked:
            self._write_eof()

    def remote_close(self) -> None:
        """CLOSE came: what is queued is still delivered."""
        if self.receiving is None:
            self.endpoint.send_message(CLOSE, self.id)  # v1 peers keep their entry until they get one
        self._over()
        self._finish()

    def reset(self) -> None:
        """The stream is over and its local socket is reset, so that the application sees a failure."""
        self._over()
        transport = self._transport
        if transport is None:
            self._drop_queue()
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and not transport.is_closing():
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # gone already, which is what we want
        transport.abort()

    def _over(self) -> None:
        if self.state is not State.OVER:
            self.state = State.OVER
            self.endpoint.stream_over(self)

    def _finish(self) -> None:
        """Close the local socket as soon as it has everything."""
        self._finishing = True
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._transport is not None and not self._queue and not self._blocked:
            soon(self._transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._direct.fd = -1
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self.id == 0:
            self.endpoint.forget_waiting(self)
        elif self.state is not State.OVER:
            if exc is not None:
                self._local_error(exc)
            else:
                self.endpoint.send_message(CLOSE, self.id)
                self._over()
        self._transport = None
        self._drop_queue()

    def _local_error(self, exc: Exception) -> None:
        if self.state is not State.OVER:
            text = error_text(exc, "the socket at the other end failed")
            self.endpoint.send_message(ERROR, self.id, text.encode())
            self.reset()

    def _drop_queue(self) -> None:
        """Nothing more is delivered: what was held no longer holds anybody up."""
        self._queue = None
        self.held = 0
        if self.receiving is None:
            self.endpoint.check_hold(self)
        else:
            self.receiving.close()

    def send_early(self) -> None:
        """Send what was read before the stream was open, as far as its window goes, and the end-of-file behind it."""
        if self.id == 0 or self.endpoint.link is None:
            return
        size = min(len(self._early), max(0, self.sending.room))
        if size:
            early, self._early = self._early[:size], self._early[size:]
            self._account_sent(size)
            self.endpoint.send_message(DATA, self.id, early)
        if self._ended and not self._early:
            self._end_sending()


def send_datagram(send: Callable[[], int]) -> bool:
    """Send one datagram now; False if it does not fit or the socket takes none.

    asyncio's own sendto leaves empty datagrams out, and queues others without a limit.
    """
    for _ in range(2):  # the first try may only report what an ICMP message said of an earlier datagram
        try:
            send()
        except ConnectionRefusedError:
            continue
        except OSError:
            return False
        return True
    return False


class UdpStream:
    """One UDP stream: on the user side a source address, on the container side a connected socket."""

    __slots__ = ("endpoint", "id", "last", "port", "send_local", "shut")

    def __init__(self, endpoint: Endpoint, port: int) -> None:
        self.endpoint = endpoint
        self.port = port
        self.id = 0
        self.last = time.monotonic()
        self.send_local: Callable[[bytes], bool] = lambda data: False
        self.shut: Callable[[], None] = lambda: None

    def from_local(self, data: bytes) -> None:
        """A datagram for the other end."""
        self.last = time.monotonic()
        link = self.endpoint.link
        if link is None or link.queued > self.endpoint.config.udp_queue:
            self.endpoint.udp_dropped += 1
            return
        self.endpoint.bytes_sent += len(data)
        self.endpoint.send_message(DATA, self.id, data, PROTO_UDP)

    def from_link(self, data: bytes) -> None:
        """A datagram from the other end."""
        self.last = time.monotonic()
        if not self.send_local(data):
            self.endpoint.udp_dropped += 1
        else:
            self.endpoint.bytes_received += len(data)

    def over(self) -> None:
        """CLOSE or ERROR came, or the link went."""
        self.endpoint.stream_over(self)
        self.shut()


AnyStream: TypeAlias = TcpStream | UdpStream


class Endpoint:
    """The streams of one link, whichever side opened them."""

    def __init__(self, config: EndpointConfig | None = None) -> None:
        self.config = config or EndpointConfig()
        self.link: Link | None = None
        self.streams: dict[int, AnyStream] = {}
        self.budget = rules.Budget(self.config.budget, self.config.first_window, self.config.max_window)
        self.read_size = BULK_READ
        self.opened = self.bytes_sent = self.bytes_received = 0
        self.udp_dropped = self.stalls = self.unknown_messages = 0
        self._busy: TcpStream | None = None
        self._assembler = Assembler(MAX_CONTROL)
        self._sweeper: asyncio.TimerHandle | None = None

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
        while True:
            messages, consumed = walker.walk(data, start, stop)
            if not messages:
                return consumed
            start = consumed
            self._dispatch(link, messages, view)

    def _dispatch(self, link: Link, messages: list[Message], view: memoryview) -> None:
        count, i = len(messages), 0
        while i < count:
            kind, proto, client_id, _, start, stop, _ = message = messages[i]
            i += 1
            if kind != DATA or proto != PROTO_TCP:
                self._message(link, message, view)
                continue
            stream = self.streams.get(client_id)
            views = [view[start:stop]]
            while i < count and messages[i][:3] == (DATA, PROTO_TCP, client_id):
                views.append(view[messages[i][4] : messages[i][5]])
                i += 1
            if isinstance(stream, TcpStream) and stream.state not in rules.REMOTE_DONE:
                stream.receive(views)

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
            link.post(build_frame(PONG, proto, client_id, 0, payload, link.keys.next() if link.keys else -1))
        elif kind == CONNECT:
            self.accept(client_id, proto, port, payload)
        elif isinstance(stream, TcpStream):
            self._tcp_message(stream, kind, payload)
        elif isinstance(stream, UdpStream):
            self._udp_message(stream, kind, payload)
        elif kind not in _KNOWN:
            self.unknown_messages += 1

    def _tcp_message(self, stream: TcpStream, kind: int, payload: bytes) -> None:
        if kind == WINDOW and len(payload) == 8:
            stream.window(int.from_bytes(payload, "big"))
        elif kind == PONG:
            stream.pong()
        elif kind == CONNECTED:
            self.connected(stream, payload)
        elif kind == EOF:
            stream.remote_eof()
        elif kind == CLOSE:
            stream.remote_close()
        elif kind == ERROR:
            self.stream_failed(stream, payload.decode("utf-8", "replace"))
            if stream.receiving is None:
                self.send_message(CLOSE, stream.id)
            stream.reset()
        else:
            self.unknown_messages += 1

    def _udp_message(self, stream: UdpStream, kind: int, payload: bytes) -> None:
        if kind == DATA:
            stream.from_link(payload)
        elif kind in (CLOSE, ERROR):
            if kind == ERROR:
                self.stream_failed(stream, payload.decode("utf-8", "replace"))
            stream.over()
        elif kind not in _KNOWN:
            self.unknown_messages += 1

    def link_drained(self, link: Link) -> None:
        pass  # each stream waits for the link by itself

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        if self.link is link:
            self.detach(reason or f"the link closed with code {code}")

    def detach(self, reason: str) -> None:
        """The link is gone: every stream on it ends at once."""
        self.link = None
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for stream in list(self.streams.values()):
            if isinstance(stream, TcpStream):
                stream.reset()
            else:
                stream.over()
        self._assembler = Assembler(MAX_CONTROL)

    # -- what streams ask for ---------------------------------------------------------------------------------

    def send_message(self, kind: int, client_id: int, payload: bytes = b"", proto: int = PROTO_TCP) -> None:
        """Send one message of a stream, in order with its data."""
        link = self.link
        if link is None:
            return
        frame = build_frame(kind, proto, client_id, 0, payload, link.keys.next() if link.keys is not None else -1)
        if kind in (PING, CONNECTED):
            link.post(frame)
        else:
            link.send(frame)

    def send_limit(self, client_id: int, limit: int) -> None:
        """Send WINDOW: ahead of bulk, since the peer may be waiting for it."""
        link = self.link
        if link is not None:
            key = link.keys.next() if link.keys is not None else -1
            link.post(build_frame(WINDOW, PROTO_TCP, client_id, 0, limit.to_bytes(8, "big"), key))

    def mark_busy(self, stream: TcpStream) -> None:
        """Note which stream sends; as soon as two take turns, each gets less at a time."""
        if self._busy is not stream:
            self.read_size = SHARED_READ if self._busy is not None and len(self.streams) > 1 else BULK_READ
            self._busy = stream

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

    def forget_waiting(self, stream: TcpStream) -> None:
        """A local socket went before its stream was opened."""

    def stream_failed(self, stream: AnyStream, text: str) -> None:
        """An ERROR came."""


_KNOWN = frozenset({CONNECT, CONNECTED, DATA, CLOSE, ERROR, PING, PONG, WINDOW, EOF})


class UserEndpoint(Endpoint):
    """Hop 1: listens on local addresses and opens a stream for each connection.

    It outlives its link: ``attach`` gives it the first one and, after a loss, the next. A connection that is
    accepted in between is held for ``reattach_wait`` seconds, then reset.
    """

    def __init__(
        self,
        *,
        config: EndpointConfig | None = None,
        on_stream_error: Callable[[int, str], None] = lambda port, text: None,
        on_detach: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(config)
        self.on_stream_error = on_stream_error
        self.on_detach = on_detach
        self._ids = itertools.count(1)
        self._waiting: dict[TcpStream, asyncio.TimerHandle] = {}
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
        self.on_detach(reason)

    def socket_ready(self, stream: TcpStream) -> None:
        if self.link is not None:
            self._open(stream)
            return
        loop = asyncio.get_running_loop()
        self._waiting[stream] = loop.call_later(self.config.reattach_wait, self._waited_too_long, stream)

    def _waited_too_long(self, stream: TcpStream) -> None:
        self._waiting.pop(stream, None)
        self.on_stream_error(stream.port, "ENOTCONN: the connection to the host is lost")
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
            payload = stream.receiving.granted.to_bytes(8, "big")
        self._connect(stream, PROTO_TCP, payload)
        stream.update_reading()

    def connected(self, stream: TcpStream, payload: bytes) -> None:
        if rules.next_state(stream.state, Event.ESTABLISHED) is None:
            return
        limit = int.from_bytes(payload, "big") if len(payload) == 8 else None
        if limit is None:  # the acceptor runs the stream under v1 rules
            if stream.receiving is not None:
                stream.receiving.close()
                stream.receiving = None
            stream.sending.limit = None
        stream.established(limit)

    def _connect(self, stream: AnyStream, proto: int, payload: bytes) -> None:
        link = self.link
        assert link is not None
        stream.id = self._new_id()
        self.add(stream)
        key = link.keys.next() if link.keys is not None else -1
        link.post(build_frame(CONNECT, proto, stream.id, stream.port, payload, key))

    def _new_id(self) -> int:
        for client_id in self._ids:
            if client_id > 0xFFFFFFFF:
                self._ids = itertools.count(1)
                return self._new_id()
            if client_id not in self.streams:
                return client_id
        raise AssertionError("unreachable: the counter does not end")

    def stream_failed(self, stream: AnyStream, text: str) -> None:
        self.on_stream_error(stream.port, text)

    async def listen_tcp(self, host: str, port: int, remote_port: int) -> ListeningSocket:
        """Listen on ``host:port`` (0: any free port). Raises LocalAddressError if that can't be had."""
        loop = asyncio.get_running_loop()
        sock = _bind(host, port, socket.SOCK_STREAM)
        server = await loop.create_server(lambda: TcpStream(self, remote_port), sock=sock, backlog=LISTEN_BACKLOG)
        listening = ListeningSocket(host, sock.getsockname()[1], remote_port, "tcp", server.close)
        self._listening.append(listening)
        return listening

    async def listen_udp(self, host: str, port: int, remote_port: int) -> ListeningSocket:
        """The same for UDP: one stream per source address (§3 rule 12)."""
        loop = asyncio.get_running_loop()
        sock = _bind(host, port, socket.SOCK_DGRAM)
        address = sock.getsockname()
        transport, _ = await loop.create_datagram_endpoint(lambda: UdpListener(self, remote_port, sock), sock=sock)
        listening = ListeningSocket(host, address[1], remote_port, "udp", transport.close)
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


def _bind(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    try:
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


class UdpListener(asyncio.DatagramProtocol):
    """A local UDP port: every source address is a stream; the one idle longest goes when there are too many."""

    def __init__(self, endpoint: UserEndpoint, remote_port: int, sock: socket.socket) -> None:
        self.endpoint = endpoint
        self.remote_port = remote_port
        self._sock = sock
        self._peers: OrderedDict[object, UdpStream] = OrderedDict()
        self._transport: asyncio.DatagramTransport = cast(asyncio.DatagramTransport, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        stream = self._peers.get(addr)
        if stream is None:
            stream = self._new_peer(addr)
            if stream is None:
                self.endpoint.udp_dropped += 1
                return
        self._peers.move_to_end(addr)
        stream.from_local(data)

    def _new_peer(self, addr: tuple[str | int, ...]) -> UdpStream | None:
        if len(self._peers) >= self.endpoint.config.udp_peers:
            oldest = next(iter(self._peers.values()))
            self.endpoint.send_message(CLOSE, oldest.id, proto=PROTO_UDP)
            oldest.over()
        stream = UdpStream(self.endpoint, self.remote_port)
        stream.send_local = lambda data: self._reply(data, addr)
        stream.shut = lambda: self._forget(addr)
        if not self.endpoint.open_udp(stream):
            return None
        self._peers[addr] = stream
        return stream

    def _forget(self, addr: object) -> None:
        self._peers.pop(addr, None)

    def _reply(self, data: bytes, addr: tuple[str | int, ...]) -> bool:
        return not self._transport.is_closing() and send_datagram(lambda: self._sock.sendto(data, addr))

    def error_received(self, exc: Exception) -> None:
        pass  # an ICMP answer to one source address says nothing about the others


class ContainerEndpoint(Endpoint):
    """Hop 4: accepts streams and dials the service.

    Args:
        hosts: addresses to try in turn, e.g. ``("127.0.0.1", "::1")``.
        where: how error texts name the place, e.g. "in the container".
        allowed_port: which ports a CONNECT may name; ``default_port`` stands for 0.
    """

    def __init__(
        self,
        hosts: Sequence[str] = ("127.0.0.1", "::1"),
        *,
        config: EndpointConfig | None = None,
        where: str = "in the container",
        allowed_port: Callable[[int], bool] = lambda port: True,
        default_port: int = 0,
    ) -> None:
        super().__init__(config)
        self.hosts = hosts
        self.where = where
        self.allowed_port = allowed_port
        self.default_port = default_port
        self._dialling: set[asyncio.Task[None]] = set()

    def attach(self, link: Link) -> None:
        """Serve ``link`` from now on."""
        self.link = link
        link.hand_over(self)

    def accept(self, client_id: int, proto: int, port: int, payload: bytes) -> None:
        if client_id == 0 or client_id in self.streams or self.link is None:
            self.unknown_messages += 1
            return
        port = port or self.default_port
        if not self.allowed_port(port):
            self.send_message(ERROR, client_id, f"EACCES: port {port} is not part of this forward".encode(), proto)
            return
        if proto == PROTO_UDP:
            self._dial_soon(self._dial_udp(self._accept_udp(client_id, port)))
        else:
            self._dial_soon(self._dial_tcp(self._accept_tcp(client_id, port, payload)))

    def _accept_tcp(self, client_id: int, port: int, payload: bytes) -> TcpStream:
        stream = TcpStream(self, port)
        stream.id = client_id
        if len(payload) == 8:
            stream.receiving = rules.ReceiveWindow(self.budget)
            stream.sending.limit = int.from_bytes(payload, "big")
        self.add(stream)
        return stream

    def _accept_udp(self, client_id: int, port: int) -> UdpStream:
        stream = UdpStream(self, port)
        stream.id = client_id
        self.add(stream)
        return stream

    def _dial_soon(self, dial: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(dial)
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    async def _dial_tcp(self, stream: TcpStream) -> None:
        failure: BaseException | None = OSError(errno.EHOSTUNREACH, "no address")
        for host in self.hosts:
            failure = await self._try(stream, host)
            if not isinstance(failure, ConnectionRefusedError):
                break
        if failure is None:
            return
        if stream.state is not State.OVER:
            text = error_text(failure, f"port {stream.port} {self.where} can't be reached")
            if isinstance(failure, ConnectionRefusedError):
                text = f"ECONNREFUSED: nothing listens on port {stream.port} {self.where}"
            self.send_message(ERROR, stream.id, text.encode())
            stream.reset()

    async def _try(self, stream: TcpStream, host: str) -> BaseException | None:
        dial = asyncio.get_running_loop().create_connection(lambda: stream, host, stream.port)
        try:
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
        limit = stream.receiving.granted.to_bytes(8, "big") if stream.receiving is not None else b""
        self.send_message(CONNECTED, stream.id, limit)
        stream.established(None)
        stream._pump()

    async def _dial_udp(self, stream: UdpStream) -> None:
        early: deque[bytes] = deque(maxlen=64)

        def hold(data: bytes) -> bool:
            early.append(data)
            return True

        stream.send_local = hold
        loop = asyncio.get_running_loop()
        try:
            sock = _connected_datagram_socket(self.hosts[0], stream.port)
            transport, _ = await loop.create_datagram_endpoint(lambda: UdpSocket(stream, sock), sock=sock)
        except OSError as exc:
            text = error_text(exc, f"port {stream.port} {self.where} can't be reached")
            self.send_message(ERROR, stream.id, text.encode(), PROTO_UDP)
            stream.over()
            return
        if self.streams.get(stream.id) is not stream:
            transport.close()
            return
        self.send_message(CONNECTED, stream.id, proto=PROTO_UDP)
        for data in early:
            stream.from_link(data)

    async def close(self) -> None:
        """End every stream and dial; the link is left to its owner."""
        for task in list(self._dialling):
            task.cancel()
        for stream in list(self.streams.values()):
            stream.reset() if isinstance(stream, TcpStream) else stream.over()


def _connected_datagram_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.connect((host, port))
    except OSError:
        sock.close()
        raise
    return sock


class UdpSocket(asyncio.DatagramProtocol):
    """The connected socket of a UDP stream on the container side."""

    def __init__(self, stream: UdpStream, sock: socket.socket) -> None:
        self.stream = stream
        self._sock = sock
        self._transport: asyncio.DatagramTransport = cast(asyncio.DatagramTransport, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self.stream.send_local = self._send
        self.stream.shut = transport.close

    def _send(self, data: bytes) -> bool:
        return not self._transport.is_closing() and send_datagram(lambda: self._sock.send(data))

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.stream.from_local(data)

    def error_received(self, exc: Exception) -> None:
        self.stream.endpoint.udp_dropped += 1  # nothing listens just now: the service may come back
