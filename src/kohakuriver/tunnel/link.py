"""One WebSocket as an asyncio protocol: a *link*.

A link reads into the loop's shared receive buffer, lets its handler consume what came, sends with a direct
``send(2)`` where that is possible, and looks after keepalive and the closing handshake (RFC 6455 §5.5, §7;
docs/protocol.md §3 rule 11). It knows frames, and nothing of streams or of who it runs for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from kohakuriver._frame import (
    HEADROOM,
    WS_CLOSE,
    WS_PING,
    WS_TEXT,
    FrameViolation,
    FrameWalker,
    MaskKeys,
    Message,
    build_frame,
)
from kohakuriver.tunnel.buffers import ReceiveBuffer, receive_buffer
from kohakuriver.tunnel.keepalive import IDLE_PING, PONG_WAIT, Act, Keepalive
from kohakuriver.tunnel.protocol import PROTO_TCP, Bytes, CloseCode, parse_ws_close, ws_close, ws_ping, ws_pong
from kohakuriver.tunnel.sockets import DirectSocket, tune_socket

CLOSE_WAIT = 3.0
# A peer that makes us answer and never reads is dropped when this much waits for it: more than any window gives out.
MAX_QUEUED = 128 << 20
MAX_URGENT = 8 << 20

_IOV_MAX = 512
# How many messages that are not just relayed may be worked off before other links get their turn: a few milliseconds'
# worth. A read of 1 MiB can hold 170,000 pings.
TURN = 256
_TURN = object()


class LinkHandler(Protocol):
    """Who owns a link: an endpoint, or one side of a relay."""

    def link_received(self, link: Link, start: int, stop: int) -> int:
        """Consume ``link.buffer.data[start:stop]``; return the offset of the first byte not consumed.

        May raise FrameViolation: the link then closes with its code. A handler that looks at every message asks
        ``link.turn_over`` whether to leave the rest for later.
        """

    def link_drained(self, link: Link) -> None:
        """All that was queued on a link that had been blocked is with the kernel."""

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        """The link is gone; called once. ``code`` is 1006 where no close frame came."""


class Pausable(Protocol):
    """A source of bulk that waits for a link to drain."""

    def link_writable(self) -> None: ...


def soon(call: Callable[[], None]) -> None:
    """Call it once the callback that runs now has returned.

    A transport may be closed from its own ``resume_writing`` only like this: asyncio's closes once more after it.
    """
    asyncio.get_running_loop().call_soon(call)


def _no_key() -> int:
    return -1


class Link(asyncio.BufferedProtocol):
    """One WebSocket after its opening handshake.

    ``idle_ping`` and ``pong_wait`` are seconds: after so long without a byte from the peer it is pinged, and so long
    after that, without a byte from it and without a byte that it took, it is dropped.

    Args:
        handler: who consumes what comes.
        walker: the receiving side's frame walker (it knows whether frames must be masked).
        masks: True on the side that dialled: our frames are masked (RFC 6455 §5.3).
    """

    idle_ping = IDLE_PING
    pong_wait = PONG_WAIT

    def __init__(self, handler: LinkHandler, walker: FrameWalker, *, masks: bool, version: int = 2) -> None:
        self.handler = handler
        self.walker = walker
        self.version = version
        # The mask key of the next frame, -1 where this side must not mask.
        self.next_key: Callable[[], int] = MaskKeys().next if masks else _no_key
        # What is read from the local sockets of streams lies in the loop's buffer, and is framed there; what this link
        # reads may one day need a buffer of its own.
        self.loop_buffer = self.buffer = receive_buffer()
        self.blocked = False
        self.closing = False
        self.closed = False
        self.close_code = int(CloseCode.ABNORMAL)  # logs show an enum's member by its name
        self.close_reason = ""
        # Where the last byte sent lies in a frame: only a relay that passes partial frames on ever sets it.
        self.mid_frame = False
        self._queue_mid_frame = False
        self.queued = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        self.on_lost: Callable[[], None] | None = None
        self.label = ""
        self._loop = asyncio.get_running_loop()
        self._stash = b""
        self._queue: deque[bytes] = deque()
        self._urgent: deque[bytes] = deque()
        self._urgent_size = 0
        self._waiters: dict[Pausable, None] = {}
        self._pauses: set[object] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._last_received = self._loop.time()
        self._keepalive = Keepalive(self.idle_ping, self.pong_wait)
        self._finishing = False
        self._failed = False
        self._more = False
        self._turn_due = False
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._direct: DirectSocket = cast(DirectSocket, None)

    # -- life --------------------------------------------------------------------------------------------------

    def start(self, transport: asyncio.Transport, early: bytes = b"") -> None:
        """Take a transport over from the opening handshake; ``early`` is what followed the handshake's head."""
        self._transport = transport
        # TLS transports pause at the mark itself, plain ones above it: a mark of 0 would pause those for ever.
        transport.set_write_buffer_limits(high=0 if transport.get_extra_info("sslcontext") is None else 1)
        tune_socket(transport)
        self._direct = DirectSocket(transport)
        transport.set_protocol(self)
        self._last_received = self._loop.time()
        self._timer = self._loop.call_later(self.idle_ping, self._tick)
        if transport.is_closing():  # it went during the handshake, and told the protocol that it had then
            self._loop.call_soon(self.connection_lost, None)
        if early:
            self._stash = early
            self._loop.call_soon(self._consume_stash)

    def hand_over(self, handler: LinkHandler) -> None:
        """Give a link that was held back since its greeting to the handler that it is meant for."""
        self.handler = handler
        if self.closed:  # the handler before this one was told
            self._loop.call_soon(handler.link_closed, self, self.close_code, self.close_reason)
        if self._stash:
            self._loop.call_soon(self._consume_stash)
        for why in self._pauses - {_TURN}:
            self.resume_reading(why)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.closed:
            return
        self.closed = self.closing = True
        self.blocked = False
        self._direct.fd = -1
        if self._timer is not None:
            self._timer.cancel()
        self._queue.clear()
        self._urgent.clear()
        self.queued = self._urgent_size = 0
        if exc is not None and not self.close_reason:
            self.close_reason = (
                f"the connection was lost ({exc.strerror})" if isinstance(exc, OSError) and exc.strerror else str(exc)
            )
        self.handler.link_closed(self, self.close_code, self.close_reason)
        self._wake()
        if self.on_lost is not None:
            self.on_lost()

    def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send what is queued, then a close frame; the transport goes after the peer's answer or CLOSE_WAIT."""
        if self.closing:
            return
        self.closing = True
        self.close_code, self.close_reason = int(code), self.close_reason or reason
        if self.mid_frame:  # a close frame can't stand inside another frame
            self._finish()
        else:
            self._send(ws_close(code, reason, self.next_key()))
        self._reset_timer(CLOSE_WAIT, self.abort)

    def _finish(self) -> None:
        """Close the TCP connection as soon as all that is queued has been written."""
        self._finishing = True
        if not self.blocked:
            soon(self._transport.close)

    def abort(self) -> None:
        """End the TCP connection at once."""
        self.closing = True
        self._transport.abort()

    def shutdown(self) -> None:
        """The server that accepted this link is going down (uvicorn calls it)."""
        self.close(CloseCode.GOING_AWAY, "the server is shutting down")

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
        if end >= len(self.buffer.data):  # it is read on though we have paused, as TLS of Python 3.10 does
            self.buffer = ReceiveBuffer(2 * len(stash))
        self.buffer.data[HEADROOM:end] = stash
        return self.buffer.view[end:]

    def buffer_updated(self, nbytes: int) -> None:
        self.bytes_received += nbytes
        self._last_received = self._loop.time()
        if self._failed:
            return
        self._consume(HEADROOM + len(self._stash) + nbytes)

    def eof_received(self) -> bool:
        return False

    def _consume_stash(self) -> None:
        if self._stash and not self.closed and not self._failed:
            self.get_buffer(-1)
            self._consume(HEADROOM + len(self._stash))

    def _consume(self, stop: int) -> None:
        try:
            consumed = self.handler.link_received(self, HEADROOM, stop)
        except FrameViolation as violation:
            self.fail(violation.code, str(violation))
            return
        self._stash = bytes(self.buffer.view[consumed:stop]) if consumed < stop else b""
        if self._more and not self._turn_due:
            self._turn_due = True
            self.pause_reading(_TURN)  # what is left may fill the buffer
            self._loop.call_soon(self._next_turn)

    def turn_over(self, messages: int) -> bool:
        """Whether a handler that has worked off so many messages in this call is to return; it is soon called again."""
        self._more = messages >= TURN
        return self._more

    def _next_turn(self) -> None:
        self._turn_due = self._more = False
        self._consume_stash()
        if not self._turn_due:
            self.resume_reading(_TURN)

    def fail(self, code: int, reason: str) -> None:
        """The peer broke the protocol: say so, and heed nothing more of it (RFC 6455 §7.1.7).

        What still comes is read and thrown away: closing over unread bytes would reset the connection, and the reason
        might not arrive.
        """
        if self.closing:
            self.abort()
            return
        self._failed = True
        self._stash = b""
        self.close(code, reason)
        if not self._finishing:
            self._write_eof()

    def _write_eof(self) -> None:
        """Nothing comes after the close frame: the peer need not wait for more before it closes."""
        if self.blocked or not self._transport.can_write_eof():
            return
        try:
            self._transport.write_eof()
        except OSError:
            pass  # it is gone already

    def control(self, message: Message) -> None:
        """Answer a WebSocket control frame that the walker handed out as a message."""
        kind, start, stop = message[0], message[4], message[5]
        if kind == WS_PING:
            self.post(ws_pong(bytes(self.buffer.view[start:stop]), self.next_key()))
        elif kind == WS_CLOSE:
            self._peer_closes(bytes(self.buffer.view[start:stop]))
        elif kind == WS_TEXT:
            raise FrameViolation(CloseCode.UNSUPPORTED, "text where a binary message is due")

    def _peer_closes(self, payload: bytes) -> None:
        code, reason = parse_ws_close(payload)
        if not self.closing:
            self.close_code, self.close_reason = code, reason
            self.closing = True
            if not self.mid_frame:
                self._send(ws_close(code, "", self.next_key()))
        self._reset_timer(CLOSE_WAIT, self.abort)
        self._finish()

    def pause_reading(self, why: object) -> None:
        """Stop reading until every ``why`` that paused has called resume_reading."""
        if not self._pauses and not self.closed:
            self._transport.pause_reading()
        self._pauses.add(why)

    def limit_reads(self, size: int) -> None:
        """Read at most ``size`` bytes at a time from now on, into a buffer of this link's own."""
        if len(self._stash) < size // 2:  # else what is there already would leave no room
            self.buffer = ReceiveBuffer(size)

    def resume_reading(self, why: object) -> None:
        if why in self._pauses:
            self._pauses.discard(why)
            if not self._pauses and not self.closed:
                self._last_received = self._loop.time()
                self._transport.resume_reading()

    # -- sending -----------------------------------------------------------------------------------------------

    def build_message(
        self, kind: int, stream_id: int, payload: Bytes = b"", *, proto: int = PROTO_TCP, port: int = 0
    ) -> bytes:
        """One message as a whole frame, masked where this side masks: for callers that send several together."""
        return build_frame(kind, proto, stream_id, port, payload, self.next_key())

    def send_message(
        self,
        kind: int,
        stream_id: int,
        payload: Bytes = b"",
        *,
        proto: int = PROTO_TCP,
        port: int = 0,
        urgent: bool = False,
    ) -> None:
        """Send one message in order with what was sent before, or, where it is ``urgent``, ahead of queued bulk."""
        frame = build_frame(kind, proto, stream_id, port, payload, self.next_key())
        if urgent:
            self.post(frame)
        else:
            self.send(frame)

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
        if not self.blocked and not self.mid_frame:
            self._send(frame)
            return
        self._urgent.append(frame)
        self._urgent_size += len(frame)
        if self._urgent_size > MAX_URGENT:
            self._overrun()

    def wait_drained(self, source: Pausable) -> None:
        """``source.link_writable()`` will be called once, when the link has drained (or is gone)."""
        self._waiters[source] = None
        if self.closed:
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            waiter.link_writable()

    def frame_border(self) -> None:
        """A relay that passes partial frames has just passed a border: what is urgent goes right behind it.

        Also into the queue, where that is where the border lies: a link that is always busy has no better moment.
        """
        self.mid_frame = False
        while self._urgent:
            self._send(self._next_urgent())

    def _next_urgent(self) -> bytes:
        frame = self._urgent.popleft()
        self._urgent_size -= len(frame)
        return frame

    @property
    def urgent(self) -> bool:
        """Whether a small frame waits for a frame border."""
        return bool(self._urgent)

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        if self.blocked:
            if not self._queue:
                self._queue_mid_frame = self.mid_frame
            self._queue.append(bytes(data))
            self.queued += len(data)
            if self.queued > MAX_QUEUED:
                self._overrun()
            return
        size = len(data)
        sent = self._direct.write(data)
        self.bytes_sent += size
        if sent < size:
            # With a high-water mark of 0 the transport calls pause_writing() here if it can't finish at once.
            self._transport.write(bytes(data if sent == 0 else memoryview(data)[sent:]))

    def _overrun(self) -> None:
        self._drop("the peer does not read what it asked for")

    def _drop(self, reason: str) -> None:
        self.close_reason = self.close_reason or reason
        self.abort()

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        # mid_frame says how the queue ends; what counts first is whether a frame may stand where it begins.
        self._send_urgent(self._queue_mid_frame if self._queue else self.mid_frame)
        while self._queue and not self.blocked:
            data = self._queue.popleft()
            self.queued -= len(data)
            self._send(data)
        self._send_urgent(self.mid_frame)
        if self.blocked:
            return
        if self._finishing:
            soon(self._transport.close)
        elif self._failed:
            soon(self._write_eof)
        self._wake()
        self.handler.link_drained(self)

    def _send_urgent(self, mid_frame: bool) -> None:
        while self._urgent and not self.blocked and not mid_frame:
            self._send(self._next_urgent())

    # -- keepalive ---------------------------------------------------------------------------------------------

    def _reset_timer(self, delay: float, call: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay, call)

    def _tick(self) -> None:
        """Ping an idle peer; drop one that neither answered since nor took a byte of what waits for it."""
        act, delay = self._keepalive.tick(
            self._loop.time(),
            heard_at=self._last_received,
            received=self.bytes_received,
            written=self._written(),
            reading=not self._pauses,
        )
        if act is Act.DROP:
            self._drop(self._keepalive.reason)
            return
        if act is Act.PING:
            self._ping()
            self._keepalive.pinged(self.bytes_received, self._written())
        self._reset_timer(delay, self._tick)

    def _ping(self) -> None:
        if not self._urgent:  # what waits there says as much
            self.post(ws_ping(key=self.next_key()))

    def _written(self) -> int:
        """Bytes that the kernel has taken so far."""
        return self.bytes_sent - self._transport.get_write_buffer_size()
