"""The plain twin of kohakuriver._frame: the same interface, written to be read. The oracle of tests/conformance.

Sources: RFC 6455 section 5 and docs/protocol.md §1 and §3.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import NoReturn

HEADER_SIZE = 8
HEADROOM = 32
MAX_MESSAGE = 16 * 1024 * 1024
MAX_SEND = 1024 * 1024
WHOLE = 128 * 1024
FIRST = 1
LAST = 2
PROTO_TCP = 0
TYPE_CONNECTED = 2
TYPE_DATA = 3
TYPE_WINDOW = 8
TYPE_ACK = 12
WS_TEXT = 0x101
WS_CLOSE = 0x108
WS_PING = 0x109
WS_PONG = 0x10A

PIECE_MAX = MAX_SEND - 10 - HEADER_SIZE
SMALL = 16 * 1024
MAX_RUNS = 1024

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10

Message = tuple[int, int, int, int, int, int, int]
Buffer = bytes | bytearray | memoryview
Writable = bytearray | memoryview


class FrameViolation(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


class NeedMore(Exception):
    """The bytes end before the thing that is read does."""


def check_range(buf: Writable, start: int, stop: int) -> None:
    if memoryview(buf).readonly:
        raise BufferError("the buffer is read-only")
    if not 0 <= start <= stop <= len(buf):
        raise ValueError(f"range {start}:{stop} does not lie in a buffer of {len(buf)} bytes")


def check_field(value: int, bits: int) -> int:
    if not 0 <= value < 1 << bits:
        raise OverflowError(f"{value} is not an unsigned {bits}-bit number")
    return value


def pack_header(kind: int, proto: int, client_id: int, port: int) -> bytes:
    return (
        check_field(kind, 8).to_bytes(1, "big")
        + check_field(proto, 8).to_bytes(1, "big")
        + check_field(client_id, 32).to_bytes(4, "big")
        + check_field(port, 16).to_bytes(2, "big")
    )


def unpack_header(data: Buffer, offset: int = 0) -> tuple[int, int, int, int]:
    if offset < 0 or offset + HEADER_SIZE > len(data):
        raise ValueError(f"no header at offset {offset} of {len(data)} bytes")
    header = bytes(data[offset : offset + HEADER_SIZE])
    return header[0], header[1], int.from_bytes(header[2:6], "big"), int.from_bytes(header[6:8], "big")


def masked_bytes(data: Buffer, key: bytes, phase: int = 0) -> bytes:
    pattern = (key * (len(data) // 4 + 2))[phase % 4 :][: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(pattern, "big")).to_bytes(len(data), "big")


def mask(buf: Writable, start: int, stop: int, key: int, phase: int = 0) -> None:
    check_range(buf, start, stop)
    buf[start:stop] = masked_bytes(buf[start:stop], check_field(key, 32).to_bytes(4, "big"), phase)


def ws_header(opcode: int, length: int, key: int) -> bytes:
    mask_bit = 0x80 if key >= 0 else 0
    if length < 126:
        out = bytes([0x80 | opcode, mask_bit | length])
    elif length < 65536:
        out = bytes([0x80 | opcode, mask_bit | 126]) + length.to_bytes(2, "big")
    else:
        out = bytes([0x80 | opcode, mask_bit | 127]) + length.to_bytes(8, "big")
    return out + key.to_bytes(4, "big") if key >= 0 else out


def whole_frame(opcode: int, payload: bytes, key: int) -> bytes:
    if len(payload) > MAX_SEND:
        raise ValueError(f"a message of {len(payload)} bytes is over the limit")
    if not -1 <= key < 1 << 32:
        raise ValueError("a mask key is -1 or an unsigned 32-bit number")
    body = masked_bytes(payload, key.to_bytes(4, "big")) if key >= 0 else payload
    return ws_header(opcode, len(payload), key) + body


def frame_in_place(
    buf: Writable,
    start: int,
    stop: int,
    kind: int,
    proto: int,
    client_id: int,
    port: int,
    key: int = -1,
) -> int:
    header = pack_header(kind, proto, client_id, port)
    check_range(buf, start, stop)
    if start < HEADROOM:
        raise ValueError("too little room before the payload")
    frame = whole_frame(BINARY, header + bytes(buf[start:stop]), key)
    buf[stop - len(frame) : stop] = frame
    return stop - len(frame)


def build_frame(kind: int, proto: int, client_id: int, port: int, payload: Buffer = b"", key: int = -1) -> bytes:
    return whole_frame(BINARY, pack_header(kind, proto, client_id, port) + bytes(payload), key)


def build_ws(opcode: int, payload: Buffer = b"", key: int = -1) -> bytes:
    if opcode not in (TEXT, BINARY, CLOSE, PING, PONG):
        raise ValueError(f"no frame begins with opcode {opcode}")
    if opcode >= CLOSE and len(payload) > 125:
        raise ValueError("a control frame carries at most 125 bytes")
    return whole_frame(opcode, bytes(payload), key)


class MaskKeys:
    def next(self) -> int:
        return int.from_bytes(os.urandom(4), "big")


@dataclass
class WsHeader:
    opcode: int
    fin: bool
    length: int
    size: int
    key: bytes


@dataclass
class Found:
    head: tuple[int, int, int, int]
    start: int
    stop: int
    flags: int
    key: bytes
    piece: bool

    def message(self) -> Message:
        return (*self.head, self.start, self.stop, self.flags)


@dataclass
class OpenMessage:
    """A data message that has begun, and whose end has not been reached."""

    opcode: int
    claimed: int = 0
    header: bytes = b""
    first: bool = True

    def head(self) -> tuple[int, int, int, int]:
        return (WS_TEXT, 0, 0, 0) if self.opcode == TEXT else unpack_header(self.header)


@dataclass
class OpenFrame:
    """The data frame that the walker stands in."""

    fin: bool
    remaining: int
    key: bytes
    phase: int = 0


class FrameWalker:
    def __init__(self, *, masked: bool, allow_text: bool = False, max_message: int = MAX_MESSAGE) -> None:
        self.masked = masked
        self.allow_text = allow_text
        self.max_message = check_field(max_message, 64)
        self._message: OpenMessage | None = None
        self._frame: OpenFrame | None = None
        self._failed: FrameViolation | None = None

    def _check(self, buf: Writable, start: int, stop: int) -> None:
        if self._failed:
            raise self._failed
        check_range(buf, start, stop)

    def _fail(self, violation: FrameViolation) -> NoReturn:
        self._failed = violation
        raise violation

    def _check_first_bytes(self, first: int, second: int) -> None:
        opcode, fin, length = first & 0x0F, bool(first & 0x80), second & 0x7F
        if first & 0x70:
            raise FrameViolation(1002, "a reserved bit is set and no extension was agreed on")
        if opcode > PONG:
            raise FrameViolation(1002, "unknown control opcode")
        if opcode >= CLOSE and not fin:
            raise FrameViolation(1002, "a control frame is fragmented")
        if opcode >= CLOSE and length > 125:
            raise FrameViolation(1002, "a control frame is longer than 125 bytes")
        if opcode == CLOSE and length == 1:
            raise FrameViolation(1002, "a close frame has half a close code")
        if BINARY < opcode < CLOSE:
            raise FrameViolation(1002, "unknown data opcode")
        if bool(second & 0x80) != self.masked:
            raise FrameViolation(1002, "a frame is not masked" if self.masked else "a frame is masked")
        if opcode == CONTINUATION and self._message is None:
            raise FrameViolation(1002, "a continuation frame continues nothing")
        if opcode in (TEXT, BINARY) and self._message is not None:
            raise FrameViolation(1002, "a message begins inside a fragmented message")
        if opcode == TEXT and not self.allow_text:
            raise FrameViolation(1003, "text where binary is due")

    def _check_message_size(self, header: WsHeader) -> None:
        message = self._message or OpenMessage(header.opcode)
        claimed = message.claimed + header.length
        if claimed > self.max_message:
            raise FrameViolation(1009, f"a message is over the limit of {self.max_message} bytes")
        if header.fin and message.opcode == BINARY and claimed < HEADER_SIZE:
            raise FrameViolation(1002, "a message is shorter than its header")

    def _read_ws_header(self, data: Buffer) -> WsHeader:
        def take(start: int, stop: int) -> bytes:
            if len(data) < stop:
                raise NeedMore
            return bytes(data[start:stop])

        first, second = take(0, 2)
        self._check_first_bytes(first, second)
        length, size = second & 0x7F, 2
        if length >= 126:
            size = 4 if length == 126 else 10
            length = int.from_bytes(take(2, size), "big")
            if length >= 1 << 63:
                raise FrameViolation(1002, "a frame claims 2^63 bytes or more")
            if length < 126 or (size == 10 and length < 65536):
                raise FrameViolation(1002, "a frame's length is not in its shortest form")
        header = WsHeader(first & 0x0F, bool(first & 0x80), length, size, b"\0\0\0\0")
        if header.opcode < CLOSE:
            self._check_message_size(header)
        if self.masked:
            header.key = take(size, size + 4)
            header.size += 4
        return header

    def _enter(self, header: WsHeader) -> None:
        if self._message is None:
            self._message = OpenMessage(header.opcode)
        self._message.claimed += header.length
        self._frame = OpenFrame(header.fin, header.length, header.key)

    def _advance(self, size: int) -> None:
        assert self._frame is not None
        self._frame.phase += size
        self._frame.remaining -= size
        if self._frame.remaining == 0:
            if self._frame.fin:
                self._message = None
            self._frame = None

    def _whole(self, buf: Writable, pos: int, stop: int, header: WsHeader) -> Found | None:
        """Return the frame at pos if it is one to deliver whole; NeedMore if the end of such a one is missing."""
        start, end = pos + header.size, pos + header.size + header.length
        head = (0x100 + header.opcode, 0, 0, 0)
        if header.opcode < CLOSE and not header.fin:
            return None
        if header.opcode == CONTINUATION:
            return None
        if header.opcode == BINARY:
            if stop - start < HEADER_SIZE:
                raise NeedMore
            head = unpack_header(masked_bytes(buf[start : start + HEADER_SIZE], header.key))
            start += HEADER_SIZE
        if header.length > WHOLE or head[:2] == (TYPE_DATA, PROTO_TCP):
            return None
        if end > stop:
            raise NeedMore
        return Found(head, start, end, FIRST | LAST, header.key, piece=False)

    def _piece(self, pos: int, stop: int) -> Found | None:
        """Return what there is of the open frame's payload, if that makes a piece."""
        message, frame = self._message, self._frame
        assert message is not None
        assert frame is not None
        size = min(frame.remaining, stop - pos)
        last = frame.fin and size == frame.remaining
        if size == 0 and not last:
            return None
        flags = (FIRST if message.first else 0) | (LAST if last else 0)
        key = masked_key(frame.key, frame.phase)
        return Found(message.head(), pos, pos + size, flags, key, piece=True)

    def _find(self, buf: Writable, pos: int, stop: int) -> tuple[int, Found | None]:
        """Return how far headers were consumed, and the next message or piece; FrameViolation has that offset too."""
        while True:
            if self._frame is None:
                try:
                    header = self._read_ws_header(memoryview(buf)[pos:stop])
                    found = self._whole(buf, pos, stop, header)
                except NeedMore:
                    return pos, None
                except FrameViolation as violation:
                    violation.args = (*violation.args[:2], pos)
                    raise
                if found:
                    return pos, found
                self._enter(header)
                pos += header.size
            assert self._frame is not None
            assert self._message is not None
            if self._message.opcode == BINARY:
                size = min(HEADER_SIZE - len(self._message.header), self._frame.remaining, stop - pos)
                self._message.header += masked_bytes(buf[pos : pos + size], self._frame.key, self._frame.phase)
                self._frame.phase += size
                self._frame.remaining -= size
                pos += size
            if self._message.opcode == TEXT or len(self._message.header) == HEADER_SIZE:
                found = self._piece(pos, stop)
                if found:
                    return pos, found
            if self._frame.remaining:
                return pos, None
            self._advance(0)

    def _take(self, buf: Writable, found: Found) -> None:
        buf[found.start : found.stop] = masked_bytes(buf[found.start : found.stop], found.key)
        self._skip(found)

    def _skip(self, found: Found) -> None:
        if found.piece:
            assert self._message is not None
            self._message.first = False
            self._advance(found.stop - found.start)

    def _each(self, buf: Writable, start: int, stop: int) -> Iterator[tuple[int, Found | None]]:
        """Find one thing after another, each after the one before was taken; the last is (offset, None)."""
        pos = start
        while True:
            try:
                pos, found = self._find(buf, pos, stop)
            except FrameViolation as violation:
                pos = violation.args[2]
                if pos == start:
                    self._fail(FrameViolation(*violation.args[:2]))
                found = None
            yield pos, found
            if found is None:
                return
            pos = found.stop

    def walk(self, buf: Writable, start: int, stop: int, limit: int = 256) -> tuple[list[Message], int]:
        if limit < 1:
            raise ValueError("limit must be at least 1")
        self._check(buf, start, stop)
        out: list[Message] = []
        for pos, found in self._each(buf, start, stop):
            if found is None:
                return out, pos
            self._take(buf, found)
            out.append(found.message())
            if len(out) == limit:
                return out, found.stop
        raise AssertionError("unreachable")


def masked_key(key: bytes, phase: int) -> bytes:
    """Return the key as it looks from payload byte `phase` on."""
    return bytes(key[(i + phase) % 4] for i in range(4))


_serials = count(1)


@dataclass
class Route:
    target: object
    new_id: int
    serial: int = field(default_factory=lambda: next(_serials))


class RoutingTable:
    def __init__(self) -> None:
        self.routes: dict[int, Route] = {}

    def add(self, client_id: int, target: object, new_id: int) -> None:
        if check_field(client_id, 32) in self.routes:
            raise KeyError(client_id)
        self.routes[client_id] = Route(target, check_field(new_id, 32))

    def get(self, client_id: int) -> tuple[object, int] | None:
        route = self.routes.get(check_field(client_id, 32))
        return (route.target, route.new_id) if route else None

    def remove(self, client_id: int) -> tuple[object, int] | None:
        route = self.routes.pop(check_field(client_id, 32), None)
        return (route.target, route.new_id) if route else None

    def items(self) -> list[tuple[int, tuple[object, int]]]:
        return [(client_id, (route.target, route.new_id)) for client_id, route in self.routes.items()]

    def __len__(self) -> int:
        return len(self.routes)

    def __contains__(self, client_id: int) -> bool:
        return check_field(client_id, 32) in self.routes


class RelayWalker(FrameWalker):
    def __init__(self, *, masked: bool, allow_text: bool = False, max_message: int = MAX_MESSAGE) -> None:
        super().__init__(masked=masked, allow_text=allow_text, max_message=max_message)
        self.bytes_routed = 0
        self.unrouted = 0
        self._route: Route | None = None

    def _choose_route(self, found: Found, route: Route | None) -> Route | None:
        """Later pieces of a message follow its first while the same route stands, and never another."""
        if found.flags & FIRST:
            self._route = route
            self.unrouted += route is None
        elif self._route is not None and (route is None or route.serial != self._route.serial):
            self._route = None
            self.unrouted += 1
        return self._route

    def relay(
        self, buf: Writable, start: int, stop: int, table: RoutingTable
    ) -> tuple[list[tuple[object, int, int]], Message | None, int]:
        self._check(buf, start, stop)
        if start < HEADROOM:
            raise ValueError("too little room before what was read")
        runs: list[tuple[object, int, int]] = []
        for pos, found in self._each(buf, start, stop):
            if found is None:
                return runs, None, pos
            if not is_routed(found):
                self._take(buf, found)
                return runs, found.message(), found.stop
            if found.stop - found.start > PIECE_MAX:
                found.stop, found.flags = found.start + PIECE_MAX, found.flags & ~LAST
            route = self._choose_route(found, table.routes.get(found.head[2]))
            if route is None or (found.start == found.stop and not found.flags & FIRST):
                self._skip(found)
                continue
            frame_size = len(ws_header(BINARY, HEADER_SIZE + found.stop - found.start, -1)) + HEADER_SIZE
            natural = found.start - frame_size
            written = runs[-1][2] if runs else start - HEADROOM
            if natural < written:
                return runs, None, pos
            self._take(buf, found)
            self._emit(buf, found, route, runs)
            if len(runs) == MAX_RUNS:
                return runs, None, found.stop
        raise AssertionError("unreachable")

    def _emit(self, buf: Writable, found: Found, route: Route, runs: list[tuple[object, int, int]]) -> None:
        kind, proto, _, port = found.head
        payload = bytes(buf[found.start : found.stop])
        frame = build_frame(kind, proto, route.new_id, port, payload)
        at = found.start + len(payload) - len(frame)
        if runs and runs[-1][0] is route.target:
            if len(frame) <= SMALL:
                at = runs[-1][2]
            if at == runs[-1][2]:
                runs[-1] = (route.target, runs[-1][1], at + len(frame))
            else:
                runs.append((route.target, at, at + len(frame)))
        else:
            runs.append((route.target, at, at + len(frame)))
        buf[at : at + len(frame)] = frame
        self.bytes_routed += len(payload)


def is_routed(found: Found) -> bool:
    if found.head[:2] == (TYPE_DATA, PROTO_TCP):
        return True
    return not found.piece and found.head[0] in (TYPE_DATA, TYPE_WINDOW, TYPE_CONNECTED, TYPE_ACK)


class SpliceWalker(FrameWalker):
    def __init__(self, *, masked: bool, allow_text: bool = False, max_message: int = MAX_MESSAGE) -> None:
        super().__init__(masked=masked, allow_text=allow_text, max_message=max_message)
        self.bytes_passed = 0
        self.messages = 0

    @property
    def at_boundary(self) -> bool:
        return self._frame is None

    def splice(self, buf: Writable, start: int, stop: int) -> tuple[int, Message | None, int]:
        self._check(buf, start, stop)
        pos = start
        while True:
            if self._frame is not None:
                size = min(self._frame.remaining, stop - pos)
                self._advance(size)
                pos += size
                self.bytes_passed += size
                if not self.at_boundary:
                    return pos, None, pos
                self.messages += self._message is None
            try:
                header = self._read_ws_header(memoryview(buf)[pos:stop])
                if header.opcode == TEXT and (not header.fin or header.length > WHOLE):
                    raise FrameViolation(1009, f"a text message is not in one frame of at most {WHOLE} bytes")
                if header.opcode == TEXT or header.opcode >= CLOSE:
                    found = self._whole(buf, pos, stop, header)
                    assert found is not None
                    self._take(buf, found)
                    return pos, found.message(), found.stop
            except NeedMore:
                return pos, None, pos
            except FrameViolation as violation:
                if pos == start:
                    self._fail(violation)
                return pos, None, pos
            self._enter(header)
            pos += header.size
