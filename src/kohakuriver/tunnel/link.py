"""One WebSocket as an asyncio protocol: a *link*.

A link lets its handler consume what comes (`intake`), sends with a direct ``send(2)`` where that is possible (`out`),
watches for signs of life (`PeerWatch`), and goes through the closing handshake (`closing`; RFC 6455 §5.5, §7,
docs/protocol.md §3 rule 11). It knows frames, and nothing of streams or of who it runs for.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast

from kohakuriver._frame import WS_CLOSE, WS_PING, WS_TEXT, FrameViolation, FrameWalker, MaskKeys, Message, build_frame
from kohakuriver.tunnel.buffers import receive_buffer
from kohakuriver.tunnel.closing import CLOSE_WAIT, CloseState, Closing
from kohakuriver.tunnel.intake import Intake
from kohakuriver.tunnel.keepalive import IDLE_PING, PONG_WAIT
from kohakuriver.tunnel.peer_watch import PeerWatch
from kohakuriver.tunnel.protocol import PROTO_TCP, Bytes, CloseCode, parse_ws_close, ws_close, ws_ping, ws_pong
from kohakuriver.tunnel.send_queue import SendQueue
from kohakuriver.tunnel.sockets import TransportSink, tune_socket


class LinkHandler(Protocol):
    """Who owns a link: an endpoint, or one side of a relay."""

    def link_received(self, link: Link, start: int, stop: int) -> int:
        """Consume ``link.intake.buffer.data[start:stop]``; return the offset of the first byte not consumed.

        May raise FrameViolation: the link then closes with its code. A handler that looks at every message asks
        ``link.intake.turn_over`` whether to leave the rest for later.
        """

    def link_drained(self, link: Link) -> None:
        """All that was queued on a link that had been blocked is with the kernel."""

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        """The link is gone; called once. ``code`` is 1006 where no close frame came."""


def soon(call: Callable[[], None]) -> None:
    """Call it once the callback that runs now has returned.

    A transport may be closed from its own ``resume_writing`` only like this: asyncio's closes once more after it.
    """
    asyncio.get_running_loop().call_soon(call)


_no_key: Callable[[], int] = itertools.repeat(-1).__next__  # for every frame that is sent: no call of Python's


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
        self.loop_buffer = receive_buffer()
        self.closing = Closing()
        self.posted = 0  # bytes of what goes ahead of all else, which keeps the link alive and carries nothing
        self.out = SendQueue(partial(self.abort, "the peer does not read what it asked for"))
        self.watch = PeerWatch(self.idle_ping, self.pong_wait, ping=self._ping, written=self.out.taken, drop=self.abort)
        self.intake = Intake(self._deliver, self.watch)
        self.on_lost: Callable[[], None] | None = None
        self.on_peer_closes: Callable[[], None] | None = None  # what is to be said before that is answered
        self.label = ""
        self.task = ""  # the id of the one that a session leads to, where the host tells
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._sink: TransportSink = cast(TransportSink, None)

    # -- life --------------------------------------------------------------------------------------------------

    def start(self, transport: asyncio.Transport, early: bytes = b"") -> None:
        """Take a transport over from the opening handshake; ``early`` is what followed the handshake's head."""
        self._transport = transport
        # TLS transports pause at the mark itself, plain ones above it: a mark of 0 would pause those for ever.
        transport.set_write_buffer_limits(high=0 if transport.get_extra_info("sslcontext") is None else 1)
        tune_socket(transport)
        self._sink = TransportSink(transport)
        self.out.begin(self._sink)
        transport.set_protocol(self)
        self.watch.begin()
        if transport.is_closing():  # it went during the handshake, and told the protocol that it had then
            asyncio.get_running_loop().call_soon(self.connection_lost, None)
        self.intake.begin(transport, early)

    def hand_over(self, handler: LinkHandler) -> None:
        """Give a link that was held back since its greeting to the handler that it is meant for."""
        self.handler = handler
        if self.closing.state is CloseState.CLOSED:  # the handler before this one was told
            soon(lambda: handler.link_closed(self, self.closing.code, self.closing.reason))
        self.intake.hand_over()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closing.lost(exc):
            return
        self._sink.close()
        self.watch.stop()
        self.out.end()
        self.intake.end()
        self.handler.link_closed(self, self.closing.code, self.closing.reason)
        self.out.wake()
        if self.on_lost is not None:
            self.on_lost()

    @property
    def peer(self) -> str:
        """The other side's address, for messages."""
        name = self._transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "?")

    # -- the end -----------------------------------------------------------------------------------------------

    def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send what is queued, then a close frame; the transport goes after the peer's answer or CLOSE_WAIT."""
        if self.closing.begin(code, reason):
            self._send_close(code, reason)
            self.watch.end_within(CLOSE_WAIT)
            self.intake.release()  # the peer's close frame is to be read

    def fail(self, code: int, reason: str) -> None:
        """The peer broke the protocol: say so, and heed nothing more of it (RFC 6455 §7.1.7).

        What still comes is read and thrown away: closing over unread bytes would reset the connection, and the reason
        might not arrive.
        """
        if not self.closing.begin(code, reason, failed=True):
            self.abort()
            return
        self.intake.discard()
        self.intake.release()
        self._send_close(code, reason)
        self.watch.end_within(CLOSE_WAIT)
        self._end_output()

    def abort(self, reason: str = "") -> None:
        """End the TCP connection at once."""
        self.closing.cut(reason)
        self._transport.abort()

    def shutdown(self) -> None:
        """The server that accepted this link is going down (uvicorn calls it)."""
        self.close(CloseCode.GOING_AWAY, "the server is shutting down")

    def _peer_closes(self, payload: bytes) -> None:
        code, reason = parse_ws_close(payload)
        if self.on_peer_closes is not None:
            self.on_peer_closes()
        if self.closing.peer_closes(code, reason):
            self._send_close(code, "")
        self.watch.end_within(CLOSE_WAIT)
        self._end_output()

    def _send_close(self, code: int, reason: str) -> None:
        if self.out.inside:  # a close frame can't stand inside another frame
            self.closing.finish()
            self._end_output()
        else:
            self.out.send(ws_close(code, reason, self.next_key()))

    def _end_output(self) -> None:
        """End what can be ended of the TCP connection, once all is written."""
        if self.out.blocked:
            return
        if self.closing.state is CloseState.FINISHING:
            soon(self._transport.close)
        elif self.closing.state is CloseState.FAILED:  # the peer need not wait for more before it closes
            soon(self._sink.write_eof)

    # -- receiving ---------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.intake.space()

    def buffer_updated(self, nbytes: int) -> None:
        self.intake.took(nbytes)

    def _deliver(self, start: int, stop: int) -> int:
        try:
            return self.handler.link_received(self, start, stop)
        except FrameViolation as violation:
            self.fail(violation.code, str(violation))
            return stop

    def control(self, message: Message) -> None:
        """Answer a WebSocket control frame that the walker handed out as a message."""
        kind, payload = message[0], bytes(self.intake.buffer.view[message[4] : message[5]])
        if kind == WS_PING:
            self.post(ws_pong(payload, self.next_key()))
        elif kind == WS_CLOSE:
            self._peer_closes(payload)
        elif kind == WS_TEXT:
            raise FrameViolation(CloseCode.UNSUPPORTED, "text where a binary message is due")

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

    def send(self, data: Bytes, inside: bool = False) -> None:
        """Send frames in order, ``inside`` where the last one is not yet whole. The caller may reuse ``data`` at once.

        Afterwards ``out.blocked`` says whether to stop until the link has drained (``out.wait_drained``).
        """
        if not self.closing.state:
            self.out.send(data, inside)

    def send_many(self, views: Sequence[memoryview]) -> None:
        """Send whole frames that lie in several ranges, with one system call where the kernel has room."""
        if not self.closing.state:
            self.out.send_many(views)

    def post(self, frame: bytes) -> None:
        """Send a small frame ahead of all queued bulk, at the next frame border."""
        if not self.closing.state:
            self.posted += len(frame)
            self.out.post(frame)

    def pause_writing(self) -> None:
        self.out.block()

    def resume_writing(self) -> None:
        if self.out.resume():
            self._end_output()
            self.out.wake()
            self.handler.link_drained(self)

    def _ping(self) -> None:
        if not self.out.urgent:  # what waits there says as much
            self.post(ws_ping(key=self.next_key()))
