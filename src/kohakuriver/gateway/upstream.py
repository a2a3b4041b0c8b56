"""A stream to a service that speaks HTTP: what it answers is followed just as far as it must be (docs/protocol.md §3).

To the stream the browser's connection is its local socket: what the stream sends there is a response, of which heads
are read and changed, and bodies passed on as they lie.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from typing import Protocol

from kohakuriver.gateway import rewrite
from kohakuriver.gateway.chunks import Chunks
from kohakuriver.gateway.destination import Destination
from kohakuriver.gateway.heads import CHUNKED, UNTIL_CLOSE, Malformed, head_end, read_response, response_body, words
from kohakuriver.gateway.names import Place
from kohakuriver.tunnel.link import soon
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import ErrorText

__all__ = ["Browser", "Phase", "Upstream"]

ENDLESS = 1 << 62
MOST_INTERIM = 16
"""How many heads of the 1xx kind may come before one answer."""


class Phase(enum.Enum):
    """Where the service is."""

    IDLE = enum.auto()  # it owes nothing
    HEAD = enum.auto()
    BODY = enum.auto()
    CHUNKS = enum.auto()
    RAW = enum.auto()  # no longer HTTP


class Browser(Protocol):
    """What a stream asks of the browser's connection that it serves."""

    peer: tuple[str, int]
    uncounted: int

    def write(self, views: Sequence[memoryview], size: int) -> None:
        """Take bytes of the answer, which are only valid during the call."""

    def shut(self) -> None:
        """Nothing more comes."""

    def close(self) -> None:
        """All is over."""

    def serves(self, stream: Upstream) -> bool:
        """Whether the stream is still this connection's."""

    def closes(self, body: int) -> bool:
        """Whether the connection ends with an answer that has such a body."""

    def switched(self) -> None:
        """The service speaks another protocol from now on, and so does the browser."""

    def answered(self) -> None:
        """The answer is complete."""

    def service_left(self, stream: Upstream) -> None:
        """A service that owed nothing has ended its connection."""

    def service_failed(self, status: int, sentence: str) -> None:
        """The answer will not come, or not all of it."""

    def failure(self, stream: Upstream) -> tuple[int, str]:
        """What the browser is told of a stream that broke: a status, and a sentence."""


class Upstream(TcpStream):
    """One connection to a service, which serves one browser's connection, request after request."""

    __slots__ = (
        "_chunks",
        "_head",
        "_interim",
        "_kept",
        "_method",
        "_minor",
        "_more",
        "_pieces",
        "_rest",
        "_upgrade",
        "_visit",
        "again",
        "destination",
        "ended",
        "phase",
        "why",
    )

    def __init__(self, destination: Destination, visit: Browser) -> None:
        super().__init__(destination.endpoint, destination.place.port)
        self.destination = destination
        self.phase = Phase.IDLE
        self.again = False  # it has answered before
        self.ended = False  # it takes no other request
        self.why = ErrorText("", "")
        self._visit = visit
        self._head = bytearray()
        self._interim = 0  # heads before the present answer
        self._rest = 0  # bytes that go on as they lie
        self._chunks = Chunks()
        self._pieces: list[memoryview] = []
        self._kept = b""  # a head that goes out with what comes of its body
        self._method = b""
        self._minor = 1
        self._more = b""
        self._upgrade = False

    def use(self, transport: asyncio.Transport) -> None:
        """It is written to, and read from, by the visit."""
        self._transport = transport

    def source(self) -> tuple[str, int]:
        return self._visit.peer

    @property
    def place(self) -> Place:
        """Where it leads."""
        return self.destination.place

    def expect(self, method: bytes, minor: int, *, upgrade: bool, more: bytes = b"") -> None:
        """A request is sent: an answer will come, whose head gets `more`."""
        self._method, self._minor, self._upgrade, self._more = method, minor, upgrade, more
        self.phase = Phase.HEAD
        self._interim = 0

    @property
    def begun(self) -> bool:
        """Whether something of the present answer was passed on."""
        return self.phase is not Phase.HEAD

    @property
    def silent(self) -> bool:
        """Whether nothing of it has come."""
        return self.phase is Phase.HEAD and not self._head

    # -- what comes --------------------------------------------------------------------------------------------

    def write(self, views: Sequence[memoryview], size: int) -> None:
        if not size:
            return
        if self._rest >= size and not self._kept:
            self._rest -= size
            self._visit.write(views, size)
            if not self._rest:
                self._over()
            return
        try:
            for view in views:
                self._take(view, size=len(view))
        except Malformed as why:
            self.ended = True
            if self.phase is Phase.IDLE:
                self._visit.service_left(self)
                return
            self.again = False  # it did take the request: a browser is not to send that once more
            self._visit.service_failed(502, f"Port {self.port} did not answer as HTTP asks for: {why.sentence}")

    def _take(self, view: memoryview, *, size: int = 0) -> None:
        """Take what came. Of it `size` bytes have to be accounted for; the rest are a copy of such."""
        while len(view) and self._visit.serves(self):
            if self.phase is Phase.HEAD:
                # What is kept here is bounded and short-lived, so that the window need not wait for it.
                if size:
                    self.taken(len(view))
                    size = 0
                view = self._take_head(view)
            elif self.phase is Phase.CHUNKS:
                view = self._take_chunks(view, counted=size > 0)
            elif self._rest:
                piece = view[: self._rest]
                self._rest -= len(piece)
                self._emit([piece], copied=0 if size else len(piece))
                view = view[len(piece) :]
                if not self._rest:
                    self._flush()
                    self._over()
            else:
                raise Malformed("It sent more than it was asked for.")
        if self._kept and not self._pieces:
            soon(self._flush_head)  # what has come after it over the link is taken before that
        else:
            self._flush()

    def _take_head(self, view: memoryview) -> memoryview:
        known = len(self._head)
        self._head += view
        end = head_end(self._head, known)
        if end < 0:
            return memoryview(b"")
        whole, rest = bytes(self._head[:end]), bytes(self._head[end:])
        self._head.clear()
        self._read_head(whole)
        return memoryview(rest)

    def _read_head(self, whole: bytes) -> None:
        head = read_response(whole)
        if head.status == 101:
            self._switched(rewrite.response(head, self.place, body=0, close=False, upgrade=True, more=self._more))
            return
        if head.status < 200:
            self.again = False  # it did take the request
            self._interim += 1
            if self._interim > MOST_INTERIM:
                raise Malformed(f"More than {MOST_INTERIM} heads came before its answer.")
            if self._minor:
                self._emit_own(rewrite.response(head, self.place, body=0, close=False))
            return
        body = response_body(head, self._method)
        if body == UNTIL_CLOSE or head.minor == 0 or b"close" in words(head.fields.named.get(b"connection")):
            self.ended = True
        closes = self._visit.closes(body)
        bare = body == CHUNKED and not self._minor  # it knows no chunks: the connection's end is the body's
        told = UNTIL_CLOSE if bare else body
        self._kept = rewrite.response(head, self.place, body=told, close=closes, more=self._more)
        if body == CHUNKED:
            self.phase, self._chunks = Phase.CHUNKS, Chunks(bare=bare)
        else:
            self.phase, self._rest = Phase.BODY, ENDLESS if body == UNTIL_CLOSE else body
        if not body:
            self._flush()
            self._over()

    def _switched(self, head: bytes) -> None:
        if not self._upgrade:
            raise Malformed("It changed the protocol, which it was not asked for.")
        self._emit_own(head)
        self.phase, self._rest = Phase.RAW, ENDLESS
        self.ended = True
        self._visit.switched()

    def _take_chunks(self, view: memoryview, *, counted: bool) -> memoryview:
        consumed, pieces = self._chunks.walk(view)
        more = sum(map(len, pieces)) - (consumed if counted else 0)
        if more < 0:
            self.taken(-more)
        self._emit(pieces, copied=max(more, 0))
        if self._chunks.over:
            self._flush()
            self._over()
        return view[consumed:]

    def _emit_own(self, data: bytes) -> None:
        self._emit([memoryview(data)], copied=len(data))

    def _emit(self, pieces: Sequence[memoryview], *, copied: int) -> None:
        self._visit.uncounted += copied
        self._pieces += pieces

    def _flush_head(self) -> None:
        if self._kept and self._visit.serves(self):
            self._flush()

    def _flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        if self._kept:
            head, self._kept = memoryview(self._kept), b""
            self._visit.uncounted += len(head)
            pieces.insert(0, head)
        if pieces:
            self._visit.write(pieces, sum(map(len, pieces)))

    def _over(self) -> None:
        """The answer is complete."""
        self.phase = Phase.IDLE
        self.again = True
        self._visit.answered()

    # -- how it ends -------------------------------------------------------------------------------------------

    def refused(self, text: ErrorText) -> None:
        self.why = text

    def shut(self) -> None:
        """The service sends no more."""
        self.ended = True
        self._flush_head()
        if self.phase is Phase.RAW:
            self._visit.shut()
        elif self.phase is Phase.BODY and self._rest > ENDLESS >> 1:
            self._rest = 0
            self._over()
        elif self.phase is Phase.IDLE:
            self._visit.service_left(self)
        else:
            self._visit.service_failed(502, f"Port {self.port} ended the connection before it had answered.")

    def close(self) -> None:
        """The service has gone."""
        if self.phase is Phase.RAW:
            self._visit.close()
        else:
            self.shut()

    def reset(self) -> bool:
        """The connection to the service broke, or there never was one."""
        self.ended = True
        self._flush_head()
        if self.phase is Phase.IDLE:
            self._visit.service_left(self)
        else:
            self._visit.service_failed(*self._visit.failure(self))
        return False
