"""A TCP stream and its local socket (docs/protocol.md §3)."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import cast

from kohakuriver._frame import HEADROOM, frame_in_place
from kohakuriver.tunnel import stream as rules
from kohakuriver.tunnel.buffers import receive_buffer
from kohakuriver.tunnel.link import soon
from kohakuriver.tunnel.owner import TcpOwner
from kohakuriver.tunnel.protocol import CLOSE, DATA, EOF, ERROR, PING, PROTO_TCP
from kohakuriver.tunnel.sockets import DirectSocket, tune_socket
from kohakuriver.tunnel.stream import Event, State

BLOCKED_READ = 4 * 1024  # a stream that learns only by reading that the link is blocked adds this to what waits
WRITE_PIECE = 256 * 1024


class TcpStream(asyncio.BufferedProtocol):
    """One TCP stream and its local socket."""

    __slots__ = (
        "_blocked", "_direct", "_early", "_ended", "_finishing", "_fresh", "_in_transport", "_linger", "_queue",
        "_reading", "_transport", "_wrote_eof", "endpoint", "held", "id", "last_data", "port", "receiving",
        "sending", "state",
    )  # fmt: skip

    def __init__(self, endpoint: TcpOwner[TcpStream], port: int) -> None:
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

    def source(self) -> tuple[str, int]:
        """The other end of the local connection."""
        peer = None if self._transport is None else self._transport.get_extra_info("peername")
        return peer or ("", 0)

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
            if link is not None and link.out.blocked:
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
        buffer = link.loop_buffer
        start = frame_in_place(buffer.data, HEADROOM, stop, DATA, PROTO_TCP, self.id, 0, link.next_key())
        self._account_sent(nbytes)
        link.send(buffer.view[start:stop])
        if link.out.blocked or self.sending.room <= 0:
            self.update_reading()

    def feed(self, data: bytes) -> None:
        """Take bytes from the local side that came by another way than the transport's reading, in their order."""
        if self.state is not State.OVER and data:
            self._early += data
            self.send_early()
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
            self._begin_linger()

    def _begin_linger(self) -> None:
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
        """v1 has no EOF: CLOSE goes out once neither side has had data for the linger time (§3 rule 4).

        A tunnel client answers it with what the service says to the end of its input, and with its own CLOSE. When
        that does not come either, a second CLOSE tells the relays that nobody waits any more.
        """
        left = self.last_data + self.endpoint.config.v1_linger - time.monotonic()
        if left > 0:
            self._linger = asyncio.get_running_loop().call_later(left, self._linger_over)
            return
        self._linger = None
        if self.state is State.OVER:
            return
        self.endpoint.send_message(CLOSE, self.id)
        following = rules.next_state(self.state, Event.HALF_CLOSE) if self.endpoint.awaits_replies else None
        if following is None:
            self._over()
            self._finish()
        else:
            self.state = following
            self._begin_linger()

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
        elif link.out.blocked:
            may = False
            link.out.wait_drained(self)
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
        if self.receiving is not None and not self._check_window(self.receiving, size):
            return
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

    def _check_window(self, window: rules.ReceiveWindow, size: int) -> bool:
        if not window.receive(size):
            self.endpoint.window_passed(self)
            return False
        if self.state is not State.OPENING:
            now = time.monotonic()
            if window.wants_ping(now):
                self.endpoint.send_message(PING, self.id)
        return True

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
        if self._transport is not None and not self._wrote_eof:
            self._wrote_eof = True
            soon(self._shut_down)  # asyncio would do it twice, were it asked to in resume_writing

    def _shut_down(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
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
        if self.receiving is None and self.state is not State.HALF_CLOSED:
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
            self.endpoint.send_message(ERROR, self.id, self.endpoint.socket_error(self, exc).pack())
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
