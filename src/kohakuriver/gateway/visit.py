"""One connection of a browser: its requests are judged, changed and passed to a service, one after another.

Bodies whose length is known, and what follows an upgrade, are read right into the stream's buffer and sent as they lie,
as a forward does; nothing is held here but heads and what the kernel has not taken yet.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable
from typing import Protocol, cast

from kohakuriver._frame import HEADROOM
from kohakuriver.gateway import rewrite
from kohakuriver.gateway.chunks import Chunks
from kohakuriver.gateway.destination import Destination, Places
from kohakuriver.gateway.heads import (
    CHUNKED,
    MAX_HEAD,
    UNTIL_CLOSE,
    Malformed,
    RequestHead,
    head_end,
    read_request,
    request_body,
    wants_websocket,
)
from kohakuriver.gateway.pages import page
from kohakuriver.gateway.upstream import Phase, Upstream
from kohakuriver.text import one_line
from kohakuriver.tunnel.buffers import receive_buffer
from kohakuriver.tunnel.link import soon
from kohakuriver.tunnel.local_writer import LocalWriter
from kohakuriver.tunnel.stream import Reading

__all__ = ["Owner", "Visit"]

READ = 64 << 10
HEAD_SECONDS, IDLE_SECONDS, REST_SECONDS, UNREAD_SECONDS, LEFT_SECONDS = 15.0, 90.0, 2.0, 30.0, 60.0
"""How long a head may take, a connection be without one, what is left of a refused request be thrown away, a page of
ours not be read, and a service that was told that its browser sends no more say nothing."""
LONGEST_FORM = 4096
"""Bytes of a body that is the gateway's own."""
_FULL = "Too many connections lead to apps now; close some pages and try again."
_END = b"\r\n\r\n"


class _Mode(enum.Enum):
    """What is read from the browser."""

    HEAD = enum.auto()
    FORM = enum.auto()  # a body that is the gateway's own
    ASKED = enum.auto()  # it is being found out where the request goes; what comes waits
    BODY = enum.auto()
    CHUNKS = enum.auto()
    SENT = enum.auto()  # the request is passed on; what comes before its answer is over waits
    RAW = enum.auto()
    REST = enum.auto()  # thrown away: the last answer is given


_WITH_STREAM = frozenset({_Mode.BODY, _Mode.RAW})


class _Socket(asyncio.Transport):
    """What a stream sees of the browser's connection: it can be told to wait."""

    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self._visit = visit

    def is_closing(self) -> bool:
        return self._visit.gone

    def pause_reading(self) -> None:
        self._visit.hold(stream=True)

    def resume_reading(self) -> None:
        self._visit.hold(stream=False)


class Owner(Protocol):
    """What a connection asks of its gateway."""

    visits: set[Visit]

    def now(self) -> float:
        """The loop's time, in seconds."""

    def judge(
        self, visit: Visit, head: RequestHead, form: bytes, *, close: bool
    ) -> Destination | bytes | Awaitable[Destination | bytes]:
        """Where a request may go, else what is answered, by a connection that ends then if `close`; or what tells.

        `form` is its body where that is the gateway's own. Raises Malformed, at once.
        """

    def takes_form(self, head: RequestHead) -> bool:
        """Whether the body of a request is for the gateway itself."""

    def waits(self, visit: Visit, *, waits: bool) -> None:
        """Whether a browser has no request under way."""


class Visit(LocalWriter):
    """A browser's connection. `gateway` says where its requests go.

    Large because a transport calls a third of its methods, and its stream another.
    """

    def __init__(self, gateway: Owner) -> None:
        super().__init__()
        self.neighbour: tuple[str, int] = ("", 0)
        """Where the connection comes from."""
        self.peer: tuple[str, int] = ("", 0)
        """Who sends the present request: with a proxy in between, somebody else."""
        self.uncounted = 0  # bytes to be written that no window knows of
        self._gateway = gateway
        self._mode = _Mode.HEAD
        self._since = 0.0
        self._head = bytearray()
        self._known = 0  # bytes of it that have no end in them
        self._left = 0
        self._chunks = Chunks()
        self._stream: Upstream | None = None
        self._places: Places | None = None
        self._answering = False
        self._closes = False  # with the present answer
        self._half_closed = False
        self._minor = 1
        self._head_only = False  # the present request asks for no body
        self._own = False  # the last answer is the gateway's
        self._held_by_stream = False
        self._held_by_queue = False
        self._held_by_pace = False
        self._paused = False
        self._form: tuple[RequestHead, int] | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def destination(self) -> Destination | None:
        """Where its stream leads."""
        return None if self._stream is None else self._stream.destination

    # -- the browser's connection ------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Whether the connection has ended, or is about to."""
        return self._transport is None or self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.use(cast(asyncio.Transport, transport))
        self.peer = self.neighbour = (transport.get_extra_info("peername") or ("", 0))[:2]
        self._since = self._gateway.now()
        self._gateway.visits.add(self)
        self._gateway.waits(self, waits=True)

    def begin(self, data: bytes) -> None:
        """Take what came before the connection was this one's."""
        rest = memoryview(data)
        while rest and not self.gone:
            view = self.get_buffer(-1)
            size = min(len(view), len(rest))
            view[:size] = rest[:size]
            self.buffer_updated(size)
            rest = rest[size:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._gateway.visits.discard(self)
        self._gateway.waits(self, waits=False)
        if self._asking is not None:
            self._asking.cancel()
        self._release()
        self.drop()

    def failed(self, exc: BaseException) -> None:
        self.abort()

    def abort(self) -> None:
        """Whoever waits for the rest of an answer is to see that it was cut off."""
        self._release()
        self.reset()

    def get_buffer(self, sizehint: int) -> memoryview:
        stream = self._stream
        if stream is not None and self._mode in _WITH_STREAM:
            view = stream.get_buffer(sizehint)
            return view if self._mode is _Mode.RAW else view[: self._left]
        return receive_buffer().view[HEADROOM : HEADROOM + READ]

    def buffer_updated(self, nbytes: int) -> None:
        mode, stream = self._mode, self._stream
        if stream is not None and mode in _WITH_STREAM:
            if mode is _Mode.BODY:
                self._left -= nbytes
            stream.buffer_updated(nbytes)
            if stream.destination.pace is not None:
                self._slow_down(stream.destination.pace.took(nbytes))
            if mode is _Mode.BODY and not self._left and self._mode is _Mode.BODY:
                self._sent()
            return
        data = receive_buffer().view[HEADROOM : HEADROOM + nbytes]
        if mode is _Mode.CHUNKS:
            self._pass_chunks(data)
        elif mode is not _Mode.REST:
            self._collect(data)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._mode is _Mode.HEAD and self._head:  # TLS has words of its own to send, before the first answer too
            soon(self._settled)

    def eof_received(self) -> bool:
        stream = self._stream
        if self._mode is _Mode.RAW and stream is not None:
            return stream.eof_received()
        self._half_closed = True
        if self._mode in (_Mode.BODY, _Mode.CHUNKS):
            self.abort()
        elif self._mode is _Mode.SENT:
            self._leave()
        elif self._mode is not _Mode.ASKED and (self._mode is not _Mode.HEAD or _END not in self._head):
            self.close()
        return True

    def _leave(self) -> None:
        """The browser sends no more. One that has left looks like this, too: the service hears of it, and may not keep
        the connection for ever."""
        self._since = self._gateway.now()
        if self._stream is not None:
            self._stream.ended = True
            self._stream.eof_received()

    def overdue(self, now: float) -> None:
        """Called now and then: end what takes too long."""
        waited = now - self._since
        if self._half_closed and self._mode is _Mode.SENT and waited > LEFT_SECONDS:
            self.abort()
        if self._mode not in (_Mode.HEAD, _Mode.FORM, _Mode.REST):
            return
        if self._queue or self._blocked:
            if not self._own:
                self._since = now
            elif waited > UNREAD_SECONDS:
                self.abort()
        elif self._mode is _Mode.REST:
            if waited > REST_SECONDS and self._transport is not None:
                self._transport.abort()
        elif waited > (HEAD_SECONDS if self._head or self._form else IDLE_SECONDS):
            if self._head or self._form:
                self._refuse(Malformed("The request did not come in time.", 408))
            else:
                self.close()

    def hold(self, *, stream: bool | None = None, queue: bool | None = None, pace: bool | None = None) -> None:
        """Whether the browser is to wait for its stream, with its next request, or for its rate: it is read while none
        says so."""
        self._held_by_stream = self._held_by_stream if stream is None else stream
        self._held_by_queue = self._held_by_queue if queue is None else queue
        self._held_by_pace = self._held_by_pace if pace is None else pace
        held = self._held_by_stream or self._held_by_queue or self._held_by_pace
        if self._transport is None or self._transport.is_closing() or held == self._paused:
            return
        self._paused = held
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _slow_down(self, seconds: float) -> None:
        if seconds > 0 and not self._held_by_pace:
            self.hold(pace=True)
            asyncio.get_running_loop().call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self.hold(pace=False)

    # -- requests ----------------------------------------------------------------------------------------------

    def _collect(self, data: memoryview) -> None:
        if not self._head and self._mode is _Mode.HEAD:
            self._since = self._gateway.now()
        self._head += data
        if self._mode is _Mode.HEAD:
            self._look()
        elif self._mode is _Mode.FORM:
            try:
                self._take_form()
            except Malformed as why:
                self._refuse(why)
        self._throttle()

    def _throttle(self) -> None:
        """Read no more than this while requests wait for their turn."""
        self.hold(queue=len(self._head) >= MAX_HEAD)

    def _look(self) -> None:
        """Begin with the next request, if its head is there and the last answer is written."""
        if self._mode is not _Mode.HEAD or self._queue or self._blocked or self.gone:
            return
        try:
            end = head_end(self._head, self._known)
            self._known = len(self._head)
            if end < 0:
                return
            whole = bytes(self._head[:end])
            del self._head[:end]
            self._known = 0
            self._head_only = False
            self._begin(read_request(whole))
        except Malformed as why:
            self._refuse(why)
        self._throttle()

    def _begin(self, head: RequestHead) -> None:
        """Raises Malformed."""
        body, upgrade = request_body(head), wants_websocket(head)
        if upgrade and body:
            raise Malformed("A request that asks for a WebSocket has no body.")
        self._minor = head.minor
        self._head_only = head.method == b"HEAD"
        self._closes = head.minor == 0 or _asks_to_close(head)
        self._gateway.waits(self, waits=False)
        if body and self._gateway.takes_form(head):
            if not 0 < body <= LONGEST_FORM:
                raise Malformed(f"A form is sent with its length, which is {LONGEST_FORM} bytes at most.", 413)
            self._mode, self._form = _Mode.FORM, (head, body)
            self._take_form()
            return
        self._judge(head, b"", body, upgrade)

    def _take_form(self) -> None:
        """Go on with a request whose body is the gateway's own, once that is there."""
        assert self._form is not None
        head, size = self._form
        if len(self._head) < size:
            return
        form = bytes(self._head[:size])
        del self._head[:size]
        self._form = None
        self._judge(head, form, 0, upgrade=False)

    def _judge(self, head: RequestHead, form: bytes, body: int, upgrade: bool) -> None:
        """Find out where a request goes. Raises Malformed."""
        answer = self._gateway.judge(self, head, form, close=self._closes or body != 0)
        if isinstance(answer, (Destination, bytes)):
            self._go(head, answer, body, upgrade)
            return
        self._mode = _Mode.ASKED
        self._asking = asyncio.ensure_future(self._ask(answer, head, body, upgrade))

    async def _ask(self, answer: Awaitable[Destination | bytes], head: RequestHead, body: int, upgrade: bool) -> None:
        told = await answer
        self._asking = None
        if not self.gone:
            self._go(head, told, body, upgrade)

    def _go(self, head: RequestHead, answer: Destination | bytes, body: int, upgrade: bool) -> None:
        if isinstance(answer, Destination):
            self._pass(head, answer, body, upgrade)
        else:
            self._answer(answer, close=self._closes or body != 0)

    def _pass(self, head: RequestHead, destination: Destination, body: int, upgrade: bool) -> None:
        trouble = destination.trouble()
        if trouble is not None:
            self._closes = self._closes or body != 0
            self._answer(page(503, trouble, close=self._closes, head_only=self._head_only), close=self._closes)
            return
        stream = self._stream_to(destination)
        if stream is None:
            self._answer(page(503, _FULL, close=True, head_only=self._head_only), close=True)
            return
        self._answering, self._own = True, False
        stream.expect(head.method, head.minor, upgrade=upgrade, more=destination.more)
        self._mode = _Mode.SENT if body == 0 else _Mode.CHUNKS if body == CHUNKED else _Mode.BODY
        self._left, self._chunks = body, Chunks()
        stream.feed(rewrite.request(head, destination.place, self.peer[0], body=body, upgrade=upgrade))
        if self._mode in (_Mode.BODY, _Mode.CHUNKS):  # one that was used before may be waiting, and says so but once
            self.hold(stream=self._waits())
        self._pass_begun()
        if self._half_closed and self._mode in (_Mode.BODY, _Mode.CHUNKS):
            self.abort()
        elif self._half_closed and self._mode is _Mode.SENT:
            self._leave()

    def _waits(self) -> bool:
        """Whether its stream takes nothing now."""
        return self._stream is not None and self._stream.core.reading is Reading.PAUSED

    def _stream_to(self, destination: Destination) -> Upstream | None:
        """The stream for a request; None where there are as many connections as may be."""
        stream = self._stream
        if stream is not None and (
            stream.ended or stream.phase is not Phase.IDLE or not _same(stream.destination, destination)
        ):
            self._release()
            stream = None
        if stream is None:
            if destination.places is not None and not destination.places.enter():
                return None
            self._places = destination.places
            stream = self._stream = Upstream(destination, self)
            stream.connection_made(_Socket(self))
        return stream

    def _pass_begun(self) -> None:
        """Pass on what came of the body together with the head."""
        if not self._head or self._mode is _Mode.SENT:
            return
        if self._mode is _Mode.CHUNKS:
            came, self._head = memoryview(bytes(self._head)), bytearray()
            self._pass_chunks(came)
        elif self._mode is _Mode.BODY and self._stream is not None:
            came = memoryview(bytes(self._head[: self._left]))
            del self._head[: self._left]
            self._left -= len(came)
            self._stream.feed(came)
            if not self._left and self._mode is _Mode.BODY:
                self._sent()

    def _pass_chunks(self, data: memoryview) -> None:
        try:
            consumed, pieces = self._chunks.walk(data)
        except Malformed as why:
            if self._stream is not None and self._stream.begun:
                self.abort()
            else:
                self._refuse(why)
            return
        for piece in pieces:
            if self._stream is not None and self._mode is _Mode.CHUNKS:
                self._stream.feed(piece)
        if self._chunks.over and self._mode is _Mode.CHUNKS:
            self._sent()
            if consumed < len(data):
                self._collect(data[consumed:])

    def _sent(self) -> None:
        """All of the request is passed on."""
        self._mode = _Mode.SENT
        if not self._answering:
            self._next()

    def _next(self) -> None:
        """The answer is given, the request was taken: the next one may come."""
        if self._half_closed and _END not in self._head:
            self.close()
            return
        self._mode = _Mode.HEAD
        self._head_only = False
        self._since = self._gateway.now()
        self._gateway.waits(self, waits=True)
        self.hold(stream=False)
        self._throttle()
        if self._head or (self._stream is not None and self._stream.ended):
            soon(self._settled)

    def _settled(self) -> None:
        """All that was answered is written."""
        if self._mode is not _Mode.HEAD or self._queue or self._blocked:
            return
        if self._stream is not None and self._stream.ended:
            self._release()
        if self._head:
            self._look()

    def _refuse(self, why: Malformed) -> None:
        self._answer(page(why.status, why.sentence, close=True, head_only=self._head_only), close=True)

    def _answer(self, response: bytes, *, close: bool) -> None:
        """Answer a request without its service."""
        self.uncounted += len(response)
        self._own = True
        self.write([memoryview(response)], len(response))
        self._answering = False
        if close:
            self._finish()
        else:
            self._next()

    def _finish(self) -> None:
        """The last answer is given. What is still sent is thrown away: else the browser might not get to read it."""
        self._release()
        self._mode = _Mode.REST
        self._form = None
        self._since = self._gateway.now()
        self._head.clear()
        self.hold(stream=False, queue=False)
        if self._half_closed:
            self.close()
        else:
            self.shut()

    def _release(self) -> None:
        """Let go of the stream."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.connection_lost(None)
            self.hold(stream=False)
        places, self._places = self._places, None
        if places is not None:
            places.leave()

    # -- what the stream tells ---------------------------------------------------------------------------------

    def serves(self, stream: Upstream) -> bool:
        """Whether the stream is still this connection's."""
        return self._stream is stream

    def closes(self, body: int) -> bool:
        """Whether the connection ends with an answer that has such a body."""
        self._closes = self._closes or body == UNTIL_CLOSE
        return self._closes

    def switched(self) -> None:
        """The service speaks another protocol from now on, and so does the browser."""
        self._mode = _Mode.RAW
        self._answering = False
        self.hold(stream=self._waits(), queue=False)
        came, self._head = bytes(self._head), bytearray()
        if came and self._stream is not None:
            self._stream.feed(came)

    def answered(self) -> None:
        """The answer is complete."""
        self._answering = False
        if self._closes:
            self._finish()
        elif self._mode is _Mode.SENT:
            self._next()

    def service_left(self, stream: Upstream) -> None:
        """A service that owed nothing has ended its connection."""
        if self._stream is not stream:
            return
        if self._mode in (_Mode.BODY, _Mode.CHUNKS):  # it has answered, and takes no more of the request
            self._finish()
        else:
            soon(self._settled)

    def failure(self, stream: Upstream) -> tuple[int, str]:
        """What the browser is told of a stream that broke: a status, and a sentence."""
        place, why = stream.place, stream.why
        trouble = stream.destination.trouble()
        if trouble is not None:
            return 503, trouble
        if why.code == "ECONNREFUSED":
            return 502, f"Nothing listens on port {place.port} of task {place.label}."
        words = one_line(why.message) or "the connection to the host is lost"
        status = 503 if why.code in ("", "ENOTCONN", "ETIMEDOUT") else 502
        end = "" if words.endswith(("?", ".", "…")) else "."
        return status, f"Port {place.port} of task {place.label} can't be reached: {words}{end}"

    def service_failed(self, status: int, sentence: str) -> None:
        """The answer will not come, or not all of it."""
        stream = self._stream
        if stream is None:
            return
        if stream.phase is Phase.RAW or stream.begun:
            self.abort()
        elif stream.again and stream.silent and stream.why.code != "ECONNREFUSED" and not stream.destination.trouble():
            # The service has ended a connection that stood idle, as the request was on its way: to the browser it is
            # the same, and it knows which requests may be sent again.
            self._release()
            self.close()
        else:
            close = self._closes or self._mode is not _Mode.SENT
            self._release()
            self._answer(page(status, sentence, close=close, head_only=self._head_only), close=close)

    def taken(self, size: int) -> None:
        if self._half_closed:
            self._since = self._gateway.now()
        own = min(self.uncounted, size)
        self.uncounted -= own
        if self._stream is not None and size > own:
            self._stream.taken(size - own)
        if not self._queue and self._mode is _Mode.HEAD and (self._head or self._stream is not None):
            soon(self._settled)


def _same(before: Destination, now: Destination) -> bool:
    return before.endpoint is now.endpoint and before.place == now.place


def _asks_to_close(head: RequestHead) -> bool:
    values = head.fields.named.get(b"connection")
    return values is not None and any(b"close" in value.lower() for value in values)
