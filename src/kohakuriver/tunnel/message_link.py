"""A WebSocket that carries whole messages, received one by one: what terminals run on (docs/protocol.md §6).

Unlike a link, which passes frames of many streams on in place, it has one stream and one reader: `receive` and `send`
are awaited, and whoever does not receive holds the peer up. Frames are the `websockets` library's business (its
sans-I/O core); keepalive is that of docs/protocol.md §3 rule 11.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, cast

from kohakuriver._frame import MAX_MESSAGE
from kohakuriver.tunnel.buffers import receive_buffer
from kohakuriver.tunnel.closing import CLOSE_WAIT, CloseState, Closing
from kohakuriver.tunnel.keepalive import IDLE_PING, PONG_WAIT
from kohakuriver.tunnel.peer_watch import PeerWatch
from kohakuriver.tunnel.protocol import CloseCode
from kohakuriver.tunnel.sockets import tune_socket

__all__ = ["MAX_MESSAGE", "Frames", "MessageLink", "may_close_with", "size_of"]

# Received bytes that may wait for `receive` before reading stops, and sent ones that may wait for the kernel.
MAX_WAITING = 64 * 1024
# What is read, and how many messages are taken, before everybody else gets a turn: a frame may have one byte, and costs
# as much as a large one.
READ = 16 * 1024
TAKEN_AT_ONCE = 32
# With a person at the other end, what is under way is what Ctrl-C does not stop any more.
INTERACTIVE_WINDOW = 128 * 1024

_CONT, _TEXT, _BINARY, _CLOSE, _PING = 0x0, 0x1, 0x2, 0x8, 0x9


class Frames(Protocol):
    """The part of the `websockets` library's sans-I/O protocol that is used here."""

    def receive_data(self, data: bytes) -> None: ...

    def receive_eof(self) -> None: ...

    def events_received(self) -> list[Any]: ...

    def data_to_send(self) -> list[bytes]: ...

    def close_expected(self) -> bool: ...

    def send_text(self, data: bytes) -> None: ...

    def send_binary(self, data: bytes) -> None: ...

    def send_ping(self, data: bytes) -> None: ...

    def send_close(self, code: int, reason: str) -> None: ...

    @property
    def close_rcvd(self) -> Any: ...

    @property
    def close_sent(self) -> Any: ...


class MessageLink(asyncio.BufferedProtocol):
    """One WebSocket after its opening handshake.

    `idle_ping` and `pong_wait` are seconds: after so long without a byte from the peer it is pinged, and so long after
    that, without a byte from it and without one that it took, it is dropped.
    """

    idle_ping = IDLE_PING
    pong_wait = PONG_WAIT

    def __init__(self, frames: Frames, *, subprotocol: str | None = None) -> None:
        self.subprotocol = subprotocol
        self.on_lost: Callable[[], None] | None = None
        self.closing = Closing()
        self.watch = PeerWatch(self.idle_ping, self.pong_wait, ping=self._ping, written=self._taken, drop=self.abort)
        self._frames = frames
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._messages: deque[str | bytes] = deque()
        self._waiting = 0
        self._taken_at_once = 0
        self._parts: list[bytes] = []
        self._text = False
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost = asyncio.Event()
        self._paused = False
        self._given = 0

    # -- life --------------------------------------------------------------------------------------------------

    def start(self, transport: asyncio.Transport, early: bytes = b"") -> None:
        """Take a transport over from the opening handshake; `early` is what followed the handshake's head."""
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_WAITING)
        tune_socket(transport)
        transport.set_protocol(self)
        self.watch.begin()
        if transport.is_closing():  # it went during the handshake, and told the protocol that it had then
            asyncio.get_running_loop().call_soon(self.connection_lost, None)
        elif early:
            self._frames.receive_data(early)
            self._handle()

    @property
    def close_code(self) -> int:
        """How it ended: by whichever side said so first, 1006 where none did."""
        return self.closing.code

    @property
    def close_reason(self) -> str:
        """Why it ended, as a clause, or ""."""
        return self.closing.reason

    def limit_window(self) -> None:
        """Keep little under way towards us: a person waits for the end of what is shown."""
        sock: socket.socket | None = self._transport.get_extra_info("socket")
        if sock is not None:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, INTERACTIVE_WINDOW)
            except OSError:
                pass  # it is gone; the next read says so

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send a close frame behind what was sent, and wait until the TCP connection has ended, CLOSE_WAIT at most."""
        self.begin_close(code, reason)
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until the TCP connection has ended."""
        await self._lost.wait()

    def begin_close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """`close`, without waiting."""
        if not self.closing.begin(code, reason):
            return
        self._arrived.set()
        self._frames.send_close(code, reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore"))
        self._flush()
        self.watch.end_within(CLOSE_WAIT)
        self._resume()  # for the peer's answer

    def abort(self, reason: str = "") -> None:
        """End the TCP connection at once."""
        self.closing.cut(reason)
        self._transport.abort()

    def shutdown(self) -> None:
        """The server that accepted this WebSocket is going down (uvicorn calls it)."""
        self.begin_close(CloseCode.GOING_AWAY, "the server is shutting down")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.closing.state < CloseState.FINISHING:
            self._frames.receive_eof()
            self._take_end()
        if not self.closing.lost(exc):
            return
        self.watch.stop()
        self._lost.set()
        self._arrived.set()
        self._writable.set()
        if self.on_lost is not None:
            self.on_lost()

    # -- receiving ---------------------------------------------------------------------------------------------

    async def receive(self) -> str | bytes | None:
        """The next message, None after the last; `close_code` and `close_reason` then say how it ended."""
        while not self._messages:
            if self.closing.state:
                return None
            self._arrived.clear()
            self._taken_at_once = 0
            await self._arrived.wait()
        self._taken_at_once += 1
        if self._taken_at_once >= TAKEN_AT_ONCE:
            self._taken_at_once = 0
            await asyncio.sleep(0)
        message = self._messages.popleft()
        self._waiting -= len(message)
        if self._waiting < MAX_WAITING:
            self._resume()
        return message

    def get_buffer(self, sizehint: int) -> memoryview:
        return receive_buffer().view[:READ]

    def buffer_updated(self, nbytes: int) -> None:
        self.watch.heard(nbytes)
        self._frames.receive_data(bytes(receive_buffer().view[:nbytes]))
        self._handle()

    def eof_received(self) -> bool:
        self._frames.receive_eof()
        self._handle()
        return False

    def _handle(self) -> None:
        for frame in self._frames.events_received():
            if frame.opcode == _CLOSE:
                break
            if frame.opcode in (_CONT, _TEXT, _BINARY):
                self._add(frame)
        self._flush()  # answers to pings and closes
        if self._frames.close_expected():
            self._take_end()
            self.watch.end_within(CLOSE_WAIT)
        if self._waiting >= MAX_WAITING and not self.closing.state and not self._paused:
            self._paused = True
            self.watch.paused()
            self._transport.pause_reading()

    def _add(self, frame: Any) -> None:
        if frame.opcode != _CONT:
            self._text = frame.opcode == _TEXT
        self._parts.append(bytes(frame.data))
        if not frame.fin:
            return
        whole = b"".join(self._parts)
        self._parts.clear()
        if not self.closing.state:
            self._messages.append(whole.decode("utf-8", "replace") if self._text else whole)
            self._waiting += len(self._messages[-1])
            self._arrived.set()

    def _take_end(self) -> None:
        """No message comes any more, by the peer's close or because it broke the protocol."""
        close = self._frames.close_rcvd or self._frames.close_sent
        if close is not None:
            self.closing.peer_closes(close.code, close.reason)
        self.closing.finish()
        self._arrived.set()

    def _resume(self) -> None:
        if self._paused and not self._lost.is_set():
            self._paused = False
            self.watch.resumed()
            self._transport.resume_reading()

    # -- sending -----------------------------------------------------------------------------------------------

    async def send(self, message: str | bytes) -> None:
        """Send one message; returns once there is room for more. Raises ConnectionError after the end."""
        if self.closing.state:
            raise ConnectionResetError("the WebSocket is closed")
        if isinstance(message, str):
            self._frames.send_text(message.encode("utf-8", "replace"))
        else:
            self._frames.send_binary(message)
        self._flush()
        await self._writable.wait()

    def _flush(self) -> None:
        for data in self._frames.data_to_send():
            if data:
                self._given += len(data)
                self._transport.write(data)
            elif self._transport.can_write_eof():  # the library's sign for a half-close
                self._transport.write_eof()
            else:
                self._transport.close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- keepalive ---------------------------------------------------------------------------------------------

    def _ping(self) -> None:
        self._frames.send_ping(b"")
        self._flush()

    def _taken(self) -> int:
        """Bytes that the kernel has taken so far."""
        return self._given - self._transport.get_write_buffer_size()


def size_of(message: str | bytes) -> int:
    """Bytes of a message's payload on the wire."""
    return len(message) if isinstance(message, bytes) else len(message.encode("utf-8", "replace"))


def may_close_with(code: int) -> int:
    """`code` as a close code that may be sent: 1005 and 1006 only say what was seen (RFC 6455 §7.4.1)."""
    return CloseCode.INTERNAL_ERROR if code in (CloseCode.NO_CODE, CloseCode.ABNORMAL) else code
