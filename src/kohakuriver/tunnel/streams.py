"""The streams of one link: their ids, whose turn it is, and what is done for all of them together."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kohakuriver._frame import HEADROOM, build_frame
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import ACK, CONNECT, CONNECTED, PING, PROTO_TCP, PROTO_UDP, WINDOW
from kohakuriver.tunnel.windows import Budget

__all__ = ["Attachment", "Member", "Streams", "Totals", "Turns"]

BULK_READ = (1 << 20) - HEADROOM
SHARED_READ = 256 * 1024  # with several busy streams no one of them takes more than this at a time
SHARED_FOR = 1.0  # seconds in which the streams that receive have to change as often as this
SHARED_TURNS = 8
ALONE = 16  # reads in a row of one stream after which it counts as the only busy one
ACK_AFTER = 0.9  # seconds after which a kept stream says what came, where nothing else has
LATE = 0.05  # seconds that a message which nobody waits for may wait for others
_URGENT = frozenset({CONNECT, CONNECTED, PING})
_LARGEST_ID = 0xFFFFFFFF


@dataclass
class Totals:
    """What an endpoint has counted since it was made, whatever link it was on.

    `udp_refused` are datagrams that the other end could hand to nobody, and counts itself as dropped.
    """

    opened: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    udp_dropped: int = 0
    udp_refused: int = 0
    stalls: int = 0
    unknown_messages: int = 0


class Member(Protocol):
    """What the table asks of a stream of any kind."""

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Send one message of the stream."""

    def link_lost(self) -> None:
        """The link is gone."""

    def detach(self) -> bool:
        """The link is gone: leave it, and wait for another; False where this stream does not."""


class Acknowledging(Protocol):
    """A stream that may owe an ACK."""

    at: Attachment | None

    def acknowledgement(self) -> bytes:
        """The payload of the ACK; none where the peer was told meanwhile."""


class Expiring(Member, Protocol):
    """One that silence ends: `last` is when it last carried something (`time.monotonic`)."""

    last: float

    def expire(self) -> None:
        """It was silent for too long."""


class Turns:
    """Which streams of a link send and receive: while several take turns, bulk leaves small messages more room.

    ``read_size`` is how many bytes a stream may read from its local socket at a time; ``alone`` is the id of the only
    busy stream, which need not say that it sends.
    """

    __slots__ = ("_budget", "_busy", "_changes", "_in_a_row", "_streams", "_timer", "alone", "read_size", "receiving")

    def __init__(self, streams: dict[int, Member], budget: Budget) -> None:
        self.read_size = BULK_READ
        self.receiving = 0  # the id of the stream that received last
        self.alone = 0
        self._streams = streams
        self._budget = budget
        self._busy = 0  # the id of the stream that sent last
        self._in_a_row = 0
        self._changes = 0
        self._timer: asyncio.TimerHandle | None = None

    def sends(self, stream_id: int) -> None:
        """A stream sends."""
        if self._busy != stream_id:
            self._busy, self._in_a_row, self.alone = stream_id, 0, 0
            self.read_size = SHARED_READ if len(self._streams) > 1 else BULK_READ
        else:
            self._in_a_row += 1
            if self._in_a_row >= ALONE:
                self.alone, self.read_size = stream_id, BULK_READ

    def left(self, stream_id: int) -> None:
        """A stream sends no more."""
        if self._busy == stream_id:
            self._busy = self.alone = 0
            self.read_size = BULK_READ

    def receives(self, stream_id: int) -> None:
        """Another stream receives than the last one: if that goes on, windows in force become smaller."""
        self.receiving = stream_id
        self._changes += 1
        if self._changes == SHARED_TURNS:
            self._budget.shared = True
        elif self._timer is None:
            self._wait()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SHARED_FOR, self._count)

    def _count(self) -> None:
        self._timer = None
        self._budget.shared = self._changes >= SHARED_TURNS
        if self._changes:
            self._changes = 0
            self._wait()

    def stop(self) -> None:
        """The link is gone."""
        self._budget.shared = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Attachment:
    """A stream's place on a link: the id that it has there. A stream that goes on over another link gets another."""

    __slots__ = ("_streams", "id", "link", "proto", "turns")

    def __init__(self, streams: Streams, stream_id: int, proto: int) -> None:
        self._streams = streams
        self.link = streams.link
        self.turns = streams.turns
        self.id = stream_id
        self.proto = proto

    def send(self, kind: int, payload: bytes = b"", *, port: int = 0) -> None:
        """Send one message of the stream, in order with its data."""
        link = self.link
        frame = build_frame(kind, self.proto, self.id, port, payload, link.next_key())
        if kind in _URGENT:
            link.post(frame)
        else:
            link.send(frame)

    def send_soon(self, kind: int, payload: bytes) -> None:
        """Send one message that need not be in order with data, at the end of this turn of the loop."""
        self._streams.send_soon(self.id, kind, payload)

    def send_late(self, kind: int, payload: bytes) -> None:
        """Send one message that nobody waits for, together with others that are sent soon."""
        self._streams.send_late(self.id, kind, payload)

    def open(self, kind: int, payload: bytes, proto: int, port: int) -> None:
        """Send the message that the stream begins with here."""
        self._streams.open(self.id, kind, payload, proto, port)

    def owe(self, stream: Acknowledging) -> None:
        """Something came that `stream` has to acknowledge within a second."""
        self._streams.owe(stream)

    def on(self, streams: Streams) -> bool:
        """Whether it is a place on this link."""
        return self._streams is streams

    def leave(self) -> None:
        """The id is free."""
        self._streams.leave(self.id)


class Streams:
    """The table of a link's streams, by id.

    Args:
        link: what carries them.
        totals: where they are counted.
        budget: where their windows come from.
        udp_idle: seconds after which a UDP stream on which nothing came is ended.
        ids: where new ids come from; by default they begin with 1.
        on_enter: called when a stream has entered.
    """

    def __init__(
        self,
        link: Link,
        *,
        totals: Totals,
        budget: Budget,
        udp_idle: float,
        on_enter: Callable[[Link], None],
        ids: Iterator[int] | None = None,
    ) -> None:
        self.link = link
        self.by_id: dict[int, Member] = {}
        self.turns = Turns(self.by_id, budget)
        self._expiring: dict[int, Expiring] = {}
        self._totals = totals
        self._udp_idle = udp_idle
        self._on_enter = on_enter
        self._ids = itertools.count(1) if ids is None else ids
        self._soon: dict[tuple[int, int], bytes] = {}  # payloads to be sent at the end of this turn of the loop
        self._late: list[bytes] = []  # frames that go with the next ones
        self._late_timer: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._owing: list[Acknowledging] = []
        self._acknowledger: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self.by_id)

    def new_id(self) -> int:
        """An id that no stream has."""
        for stream_id in self._ids:
            if stream_id > _LARGEST_ID:
                self._ids = itertools.count(1)
                return self.new_id()
            if stream_id not in self.by_id:
                return stream_id
        raise AssertionError("unreachable: the counter does not end")

    def enter(self, stream: Member, stream_id: int, proto: int = PROTO_TCP, *, again: bool = False) -> Attachment:
        """Enter a stream under its id; `again`: it was on another link before."""
        self.by_id[stream_id] = stream
        self._totals.opened += not again
        self._on_enter(self.link)
        return Attachment(self, stream_id, proto)

    def enter_udp(self, stream: Expiring, stream_id: int, *, again: bool = False) -> Attachment:
        """Enter a UDP stream, which ends when nothing has come for a while."""
        self._expiring[stream_id] = stream
        if self._sweeper is None:
            self._sweep()
        return self.enter(stream, stream_id, PROTO_UDP, again=again)

    def leave(self, stream_id: int) -> None:
        """The id is free again."""
        del self.by_id[stream_id]
        if self._expiring:
            self._expiring.pop(stream_id, None)
        if self._soon:
            self._soon.pop((stream_id, WINDOW), None)
        self.turns.left(stream_id)

    def send_soon(self, stream_id: int, kind: int, payload: bytes) -> None:
        """Send WINDOW or ACK: ahead of bulk, the peer may be waiting for it.

        Those of all streams that have read something in one turn of the loop go out together, as with a thousand
        streams they would otherwise be most of what is sent and read at every hop.
        """
        if not self._soon:
            asyncio.get_running_loop().call_soon(self._send_soon)
        self._soon[stream_id, kind] = payload

    def _send_soon(self) -> None:
        soon, self._soon = self._soon, {}
        build = self.link.build_message
        if soon:
            self._post([build(kind, each, payload) for (each, kind), payload in soon.items()])

    def send_late(self, stream_id: int, kind: int, payload: bytes) -> None:
        """Send what a kept stream ends with, its last ACK or its CLOSE: with a CONNECT, WINDOWs or others of its kind.

        Where connections follow each other it would be one more message by itself for each of them, at every hop.
        """
        self._late.append(self.link.build_message(kind, stream_id, payload))
        if self._late_timer is None:  # one for all that come until then, whether they are still there or not
            self._late_timer = asyncio.get_running_loop().call_later(LATE, self._send_late)

    def _send_late(self) -> None:
        self._late_timer = None
        if self._late:
            self._post([])

    def open(self, stream_id: int, kind: int, payload: bytes, proto: int, port: int) -> None:
        """Send CONNECT or RESUME, ahead of bulk, and what goes with it."""
        self._post([self.link.build_message(kind, stream_id, payload, proto=proto, port=port)])

    def _post(self, frames: list[bytes]) -> None:
        if self._late:
            frames += self._late
            self._late = []
        self.link.post(frames[0] if len(frames) == 1 else b"".join(frames))

    def owe(self, stream: Acknowledging) -> None:
        """Have it acknowledge what came, together with all others that have something to acknowledge by then."""
        self._owing.append(stream)
        if self._acknowledger is None:
            self._acknowledger = asyncio.get_running_loop().call_later(ACK_AFTER, self._acknowledge)

    def _acknowledge(self) -> None:
        owing, self._owing, self._acknowledger = self._owing, [], None
        for stream in owing:
            at = stream.at
            if at is not None and at.on(self) and (payload := stream.acknowledgement()):
                self.send_soon(at.id, ACK, payload)

    def lost(self, *, keeps: bool = False) -> None:
        """The link is gone: every stream on it is told. `keeps`: those wait that can."""
        self._soon.clear()
        self._late.clear()
        self._owing.clear()
        self.turns.stop()
        for timer in (self._sweeper, self._acknowledger, self._late_timer):
            if timer is not None:
                timer.cancel()
        self._sweeper = self._acknowledger = self._late_timer = None
        for stream in list(self.by_id.values()):
            if not (keeps and stream.detach()):
                stream.link_lost()

    def _sweep(self) -> None:
        """End the UDP streams on which nothing came for a while."""
        oldest = time.monotonic() - self._udp_idle
        for stream in [each for each in self._expiring.values() if each.last <= oldest]:
            stream.expire()
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(self._udp_idle / 4, self._sweep) if self._expiring else None
