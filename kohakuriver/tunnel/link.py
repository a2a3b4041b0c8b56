"""One WebSocket as an asyncio protocol: a *link*.

A link reads into the loop's shared receive buffer, lets its handler consume what came, sends with a direct
``send(2)`` where that is possible, and looks after keepalive and the closing handshake (RFC 6455 §5.5, §7;
docs/protocol.md §3 rule 11). It knows frames, and nothing of streams or of who it runs for.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from kohakuriver._frame import (
    FIRST,
    HEADROOM,
    LAST,
    WS_CLOSE,
    WS_PING,
    WS_TEXT,
    FrameViolation,
    FrameWalker,
    MaskKeys,
    build_ws,
)
from kohakuriver.tunnel.protocol import OP_CLOSE, Message, parse_ws_close, ws_close, ws_ping, ws_pong

RECEIVE_SIZE = 1 << 20
IDLE_PING = 15.0
PONG_WAIT = 20.0
CLOSE_WAIT = 3.0
# How many bytes the kernel may hold that it has not yet put on the wire; more only adds delay for small messages.
NOTSENT_LOWAT = 256 * 1024

if sys.platform == "win32":  # sockets are no file descriptors there: everything goes through the transport
    _write = None
    _writev = None
else:
    _write = os.write
    _writev = os.writev
_IOV_MAX = 512


class ReceiveBuffer:
    """The one buffer that all sockets of a loop read into; valid until the reading callback returns.

    ``data`` is HEADROOM + 1 MiB bytes: the head room lets a frame's headers be written right before a payload
    that was read at offset HEADROOM, so that payloads never move.
    """

    __slots__ = ("data", "view")

    def __init__(self) -> None:
        self.data = bytearray(HEADROOM + RECEIVE_SIZE)
        self.view = memoryview(self.data)


class _PerThread(threading.local):
    buffer: ReceiveBuffer | None = None


_per_thread = _PerThread()


def receive_buffer() -> ReceiveBuffer:
    """The receive buffer of this thread's loop."""
    if _per_thread.buffer is None:
        _per_thread.buffer = ReceiveBuffer()
    return _per_thread.buffer


class LinkHandler(Protocol):
    """Who owns a link: an endpoint, or one side of a relay."""

    def link_received(self, link: Link, start: int, stop: int) -> int:
        """Consume ``link.buffer.data[start:stop]``; return the offset of the first byte not consumed.

        May raise FrameViolation: the link then closes with its code.
        """

    def link_drained(self, link: Link) -> None:
        """All that was queued on a link that had been blocked is with the kernel."""

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        """The link is gone; called once. ``code`` is 1006 where no close frame came."""


class Pausable(Protocol):
    """A source of bulk that waits for a link to drain."""

    def link_writable(self) -> None: ...


class DirectSocket:
    """``write(2)`` on a transport's socket, beside the transport; (0 bytes) where that can't be done."""

    __slots__ = ("fd",)

    def __init__(self, transport: asyncio.Transport) -> None:
        self.fd = -1
        sock = transport.get_extra_info("socket")
        if sys.platform != "win32" and sock is not None and transport.get_extra_info("sslcontext") is None:
            self.fd = sock.fileno()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes the kernel took at once; an error is left for the transport to find."""
        if self.fd < 0 or _write is None:
            return 0
        try:
            return _write(self.fd, data)
        except OSError:
            return 0

    def writev(self, views: Sequence[memoryview]) -> int:
        """The same for several ranges."""
        if self.fd < 0 or _writev is None:
            return 0
        try:
            return _writev(self.fd, views)
        except OSError:
            return 0


def tune_socket(transport: asyncio.Transport) -> None:
    """TCP_NODELAY, and a small not-yet-sent queue; buffer sizes stay with the kernel's autotuning."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)
    except OSError:
        pass  # the peer may be gone already; the first read says so


class Link(asyncio.BufferedProtocol):
    """One WebSocket after its opening handshake.

    Args:
        handler: who consumes what comes.
        walker: the receiving side's frame walker (it knows whether frames must be masked).
        masks: True on the side that dialled: our frames are masked (RFC 6455 §5.3).
    """

    def __init__(self, handler: LinkHandler, walker: FrameWalker, *, masks: bool, version: int = 2) -> None:
        self.handler = handler
        self.walker = walker
        self.version = version
        self.keys = MaskKeys() if masks else None
        self.buffer = receive_buffer()
        self.blocked = False
        self.closing = False
        self.closed = False
        self.close_code = 1006
        self.close_reason = ""
        # Where the last byte sent lies in a frame: only a relay that passes partial frames on ever sets it.
        self.mid_frame = False
        self.queued = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        self.on_lost: Callable[[], None] | None = None
        self.label = ""
        self._loop = asyncio.get_running_loop()
        self._stash = b""
        self._queue: deque[bytes] = deque()
        self._urgent: deque[bytes] = deque()
        self._waiters: dict[Pausable, None] = {}
        self._pauses: set[object] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._last_received = self._loop.time()
        self._ping_sent: float | None = None
        self._finishing = False
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._direct: DirectSocket = cast(DirectSocket, None)

    # -- life --------------------------------------------------------------------------------------------------

    def start(self, transport: asyncio.Transport, early: bytes = b"") -> None:
        """Take a transport over from the opening handshake; ``early`` is what followed the handshake's head."""
        self._transport = transport
        transport.set_write_buffer_limits(high=0)
        tune_socket(transport)
        self._direct = DirectSocket(transport)
        transport.set_protocol(self)
        self._last_received = self._loop.time()
        self._timer = self._loop.call_later(IDLE_PING, self._keepalive)
        if early:
            self._stash = early
            self._loop.call_soon(self._consume_stash)

    def hand_over(self, handler: LinkHandler) -> None:
        """Give a link that was held back since its greeting to the handler that it is meant for."""
        self.handler = handler
        if self._stash:
            self._loop.call_soon(self._consume_stash)
        for why in list(self._pauses):
            self.resume_reading(why)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.closed:
            return
        self.closed = self.closing = True
        self._direct.fd = -1
        if self._timer is not None:
            self._timer.cancel()
        self._queue.clear()
        self._urgent.clear()
        self.queued = 0
        if exc is not None and not self.close_reason:
            self.close_reason = str(exc)
        waiters, self._waiters = self._waiters, {}
        self.handler.link_closed(self, self.close_code, self.close_reason)
        for waiter in waiters:
            waiter.link_writable()
        if self.on_lost is not None:
            self.on_lost()

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Send what is queued, then a close frame; the transport goes after the peer's answer or CLOSE_WAIT."""
        if self.closing:
            return
        self.closing = True
        self.close_code, self.close_reason = code, self.close_reason or reason
        if self.mid_frame:  # a close frame can't stand inside another frame
            self._finish()
        else:
            self._enqueue(ws_close(code, reason, self._key()))
        self._reset_timer(CLOSE_WAIT, self.abort)

    def _finish(self) -> None:
        """Close the TCP connection as soon as all that is queued has been written."""
        self._finishing = True
        if not self.blocked:
            self._transport.close()

    def abort(self) -> None:
        """End the TCP connection at once."""
        self.closing = True
        self._transport.abort()

    def shutdown(self) -> None:
        """The server that accepted this link is going down (uvicorn calls it)."""
        self.close(1001, "the server is shutting down")

    @property
    def peer(self) -> str:
        """The other side's address, for messages."""
        name = self._transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "?")

    # -- receiving ---------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        stash = self._stash
        if not stash:
            return self.buffer.view[HEADROOM:]
        end = HEADROOM + len(stash)
        self.buffer.data[HEADROOM:end] = stash
        return self.buffer.view[end:]

    def buffer_updated(self, nbytes: int) -> None:
        self.bytes_received += nbytes
        self._last_received = self._loop.time()
        self._consume(HEADROOM + len(self._stash) + nbytes)

    def eof_received(self) -> bool:
        return False

    def _consume_stash(self) -> None:
        if self._stash and not self.closed:
            self.get_buffer(-1)
            self._consume(HEADROOM + len(self._stash))

    def _consume(self, stop: int) -> None:
        try:
            consumed = self.handler.link_received(self, HEADROOM, stop)
        except FrameViolation as violation:
            self._stash = b""
            self.fail(violation.code, str(violation))
            return
        self._stash = bytes(self.buffer.view[consumed:stop]) if consumed < stop else b""

    def fail(self, code: int, reason: str) -> None:
        """The peer broke the protocol: say so, and read no more (RFC 6455 §7.1.7)."""
        if self.closing:
            self.abort()
            return
        self.close(code, reason)
        self.pause_reading(self)
        self._finish()

    def control(self, message: Message) -> None:
        """Answer a WebSocket control frame that the walker handed out as a message."""
        kind, start, stop = message[0], message[4], message[5]
        if kind == WS_PING:
            self.post(ws_pong(bytes(self.buffer.view[start:stop]), self._key()))
        elif kind == WS_CLOSE:
            self._peer_closes(bytes(self.buffer.view[start:stop]))
        elif kind == WS_TEXT:
            raise FrameViolation(1003, "text where a binary message is due")

    def _peer_closes(self, payload: bytes) -> None:
        code, reason = parse_ws_close(payload)
        if not self.closing:
            self.close_code, self.close_reason = code, reason
            self.closing = True
            if not self.mid_frame:
                # NO_CODE may not be on the wire: the answer to an empty close frame is an empty one.
                answer = build_ws(OP_CLOSE, b"", self._key()) if not payload else ws_close(code, "", self._key())
                self._enqueue(answer)
        self._reset_timer(CLOSE_WAIT, self.abort)
        self._finish()

    def pause_reading(self, why: object) -> None:
        """Stop reading until every ``why`` that paused has called resume_reading."""
        if not self._pauses and not self.closed:
            self._transport.pause_reading()
        self._pauses.add(why)

    def resume_reading(self, why: object) -> None:
        if why in self._pauses:
            self._pauses.discard(why)
            if not self._pauses and not self.closed:
                self._last_received = self._loop.time()
                self._transport.resume_reading()

    # -- sending -----------------------------------------------------------------------------------------------

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send whole frames in order. The caller may reuse ``data`` at once: what the kernel does not take is copied.

        Afterwards ``blocked`` says whether the caller ought to stop until the link has drained (``wait_drained``).
        """
        if self.closing:
            return
        self._send(data)

    def send_many(self, views: Sequence[memoryview]) -> None:
        """The same for several ranges, with one system call where the kernel has room."""
        if self.closing:
            return
        if self.blocked or len(views) > _IOV_MAX:
            for view in views:
                self._send(view)
            return
        sent = self._direct.writev(views)
        self.bytes_sent += sent
        for view in views:
            if sent >= len(view):
                sent -= len(view)
            else:
                self._send(view[sent:] if sent else view)
                sent = 0

    def post(self, frame: bytes) -> None:
        """Send a small frame ahead of all queued bulk, at the next frame border."""
        if self.closing:
            return
        if self.blocked or self.mid_frame:
            self._urgent.append(frame)
        else:
            self._send(frame)

    def wait_drained(self, source: Pausable) -> None:
        """``source.link_writable()`` will be called once, when the link has drained (or is gone)."""
        self._waiters[source] = None

    def flush_urgent(self) -> None:
        """A relay that passes partial frames has just passed a frame border."""
        while self._urgent and not self.blocked:
            self._send(self._urgent.popleft())

    @property
    def urgent(self) -> bool:
        """Whether a small frame waits for a frame border."""
        return bool(self._urgent)

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        if self.blocked:
            self._queue.append(bytes(data))
            self.queued += len(data)
            return
        size = len(data)
        sent = self._direct.write(data)
        self.bytes_sent += size
        if sent < size:
            # With a high-water mark of 0 the transport calls pause_writing() here if it can't finish at once.
            self._transport.write(bytes(data if sent == 0 else memoryview(data)[sent:]))

    def _enqueue(self, frame: bytes) -> None:
        if self.blocked:
            self._queue.append(frame)
            self.queued += len(frame)
        else:
            self._send(frame)

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        if not self.mid_frame:
            self.flush_urgent()
        while self._queue and not self.blocked:
            data = self._queue.popleft()
            self.queued -= len(data)
            self._send(data)
        if self.blocked:
            return
        if self._finishing:
            self._transport.close()
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            waiter.link_writable()
        self.handler.link_drained(self)

    def _key(self) -> int:
        return self.keys.next() if self.keys is not None else -1

    # -- keepalive ---------------------------------------------------------------------------------------------

    def _reset_timer(self, delay: float, call: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay, call)

    def _keepalive(self) -> None:
        now = self._loop.time()
        idle = now - self._last_received
        if self._pauses:  # we don't read just now, so silence says nothing about the peer
            self._ping_sent = None
            idle = 0.0
        if self._ping_sent is not None and self._last_received <= self._ping_sent:
            if now - self._ping_sent >= PONG_WAIT:
                self.close_reason = f"no answer to a ping for {PONG_WAIT:.0f} s"
                self.abort()
                return
            self._reset_timer(self._ping_sent + PONG_WAIT - now, self._keepalive)
            return
        self._ping_sent = None
        if idle >= IDLE_PING:
            self._ping_sent = now
            self.post(ws_ping(key=self._key()))
            self._reset_timer(PONG_WAIT, self._keepalive)
        else:
            self._reset_timer(IDLE_PING - idle, self._keepalive)


class Assembler:
    """Puts the pieces of a message together that was too large, or fragmented, to come whole."""

    __slots__ = ("_parts", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._parts = bytearray()

    def add(self, view: memoryview, flags: int) -> bytes | None:
        """The whole payload at its last piece, otherwise None. Raises FrameViolation (1009) over the limit."""
        if flags == FIRST | LAST:
            return bytes(view)
        if flags & FIRST:
            self._parts.clear()
        self._parts += view
        if len(self._parts) > self.limit:
            raise FrameViolation(1009, f"a message of this type may have at most {self.limit} bytes")
        if not flags & LAST:
            return None
        whole = bytes(self._parts)
        self._parts.clear()
        return whole
