"""The tunnel protocol's vocabulary: its numbers, and the payloads of its messages (docs/protocol.md §1–§4).

A payload that has a form is packed and parsed here and nowhere else: a limit, an ERROR's text, an endpoint's counts, a
WebSocket's close. `Link.send_message` puts the header, and the mask where one is due, around it.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from enum import IntEnum
from typing import Final, NamedTuple

import kohakuriver._frame as _frame

# First header byte (docs/protocol.md §3); 0x0E is reserved.
CONNECT: Final = 0x01
CONNECTED: Final = _frame.TYPE_CONNECTED
DATA: Final = _frame.TYPE_DATA
CLOSE: Final = 0x04
ERROR: Final = 0x05
PING: Final = 0x06
PONG: Final = 0x07
WINDOW: Final = _frame.TYPE_WINDOW
EOF: Final = 0x09
RESUME: Final = 0x0A
RESUMED: Final = 0x0B
ACK: Final = 0x0C
DETACH: Final = 0x0D
GOAWAY: Final = 0x0F
REVOKE: Final = 0x10
PORTS: Final = 0x11
NOTICE: Final = 0x12
STRAIGHT: Final = 0x13

KNOWN: Final = frozenset(
    {CONNECT, CONNECTED, DATA, CLOSE, ERROR, PING, PONG, WINDOW, EOF, RESUME, RESUMED, ACK, DETACH, GOAWAY, REVOKE}
    | {PORTS, NOTICE, STRAIGHT}
)

# Second header byte (docs/protocol.md §1).
PROTO_TCP: Final = _frame.PROTO_TCP
PROTO_UDP: Final = 0x01
PROTO_TERMINAL: Final = 0x02  # in CONNECT and RESUME; its other messages are those of a TCP stream

# The ClientID that means the session itself.
SESSION_ID: Final = 0

# Opcodes of frames that carry no tunnel message (RFC 6455 section 5.2).
OP_TEXT: Final = 0x1
OP_CLOSE: Final = 0x8
OP_PING: Final = 0x9
OP_PONG: Final = 0xA

TUNNEL_V2: Final = "kohakuriver.tunnel.v2"
TERMINAL_V2: Final = "kohakuriver.terminal.v2"

# What a refused v1 session is, in the answer to its handshake: HTTP status and code.
REFUSAL_HEADER: Final = "KohakuRiver-Error"

# Which tunnel client it is that dials, whatever token it shows: an id that it made at random when it started.
CLIENT_HEADER: Final = "KohakuRiver-Client"
# The payload of a runner's PING of the session: a new token lies where the tunnel client's was.
NEW_TOKEN: Final = b"tok1"
# The payload of a host's PING of the session: the agent's task is to end (docs/protocol.md §4).
END_TASK: Final = b"end1"
# In the answer to an agent, and to who opens a session: the task's id.
TASK_HEADER: Final = "KohakuRiver-Task"
_EXITED: Final = re.compile(r"exit (\d{1,3})")

Bytes = bytes | bytearray | memoryview

# Of kept streams: the length of a key, of the part that all keys of one opener begin with, of a mark (bytes).
KEY: Final = 16
OPENER: Final = 12
MARK: Final = 16
UNKNOWN_TOTAL: Final = (1 << 64) - 1  # no EOF was sent yet
FULL_HOLD: Final = (1 << 32) - 1  # in DETACH: as long as the stream's own hold
LONGEST_HOLD: Final = 86_400  # seconds
# How long the streams of a process are held whose connection ended without a word: most likely it was killed (seconds).
USER_LOST_HOLD: Final = 120

# Of a ticket for the straight path: what is shown to the runner, and what it proves itself by (bytes each).
STRAIGHT_SECRET: Final = 16

_LIMIT: Final = struct.Struct(">Q")
_PAIR: Final = struct.Struct(">QQ")
_OPENING: Final = struct.Struct(">Q16sIB")
_RESUMING: Final = struct.Struct(">16sIQQQ")
_ROLL: Final = struct.Struct(">12sI")
_ATTACHED: Final = struct.Struct(">QQQ")
_SECONDS: Final = struct.Struct(">I")
_CLOSE_CODE: Final = struct.Struct(">H")
_CONTROL_PAYLOAD: Final = 125  # what a WebSocket control frame may carry (RFC 6455 section 5.5)
_ERROR_CODE: Final = re.compile(r"(E[A-Z0-9]+): ")
# What an endpoint tells of its counts: a mark, then two numbers; no more of either than can be true is believed.
_COUNTS: Final = struct.Struct(">4sQQ")
_COUNTS_MARK: Final = b"cnt1"
_MOST_AT_ONCE: Final = 1 << 32
# What a runner tells its host of a straight path, in a WebSocket ping: a mark, then two numbers.
_WENT: Final = struct.Struct(">4sQQ")
_WENT_MARK: Final = b"str1"
_OFFER: Final = struct.Struct(f">B{STRAIGHT_SECRET}s{STRAIGHT_SECRET}s")
MOST_PORTS: Final = 1000  # an answer to PORTS tells no more
LONGEST_PROGRAM: Final = 64  # bytes of a program's name in it
_QUESTION: Final = struct.Struct(">IB")
_ANSWER: Final = struct.Struct(">IB")
_BOUND: Final = struct.Struct(">BHB")
_MORE: Final = 1
_LONGEST_ANSWER: Final = _ANSWER.size + MOST_PORTS * (_BOUND.size + 16 + 1 + LONGEST_PROGRAM)


class CloseCode(IntEnum):
    """WebSocket close codes in use (RFC 6455 section 7.4.1; docs/protocol.md §3 rules 5 and 8, §4)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED = 1003
    NO_CODE = 1005  # never on the wire: the close frame had none
    ABNORMAL = 1006  # never on the wire: no close frame came
    BAD_DATA = 1007
    POLICY = 1008
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012
    REPLACED = 4000  # a second tunnel client took the place of this one
    IDLE = 4001  # nothing passed for longer than the host allows
    USER_LOST = 4002  # host to runner: the user's connection ended without a close frame


# A session that was closed by these has ended, and so have its streams; else it was lost, and kept ones are held (§3).
SESSION_ENDED: Final = frozenset(
    {
        CloseCode.NORMAL,
        CloseCode.PROTOCOL_ERROR,
        CloseCode.UNSUPPORTED,
        CloseCode.POLICY,
        CloseCode.TOO_BIG,
        CloseCode.IDLE,
    }
)


def pack_limit(limit: int) -> bytes:
    """The payload of WINDOW, CONNECT and CONNECTED of v2, and of ACK: a limit or an offset in bytes, less than 2^64."""
    return _LIMIT.pack(limit)


def parse_limit(payload: Bytes) -> int | None:
    """The limit that such a payload holds; None where it holds none, as v1's is empty."""
    return int(_LIMIT.unpack(payload)[0]) if len(payload) == _LIMIT.size else None


def exit_code_in(code: int, reason: str) -> int | None:
    """With what an agent's command has ended, as its close frame says; None where its task goes on without the link."""
    found = _EXITED.fullmatch(reason) if code == CloseCode.NORMAL else None
    return int(found[1]) if found else None


def pack_pair(offset: int, received: int) -> bytes:
    """The payload of a kept stream's CONNECTED, WINDOW and EOF (docs/protocol.md §3).

    `offset` is the limit, and of an EOF the bytes of that direction; `received` is what its sender has received.
    """
    return _PAIR.pack(offset, received)


def parse_pair(payload: Bytes) -> tuple[int, int] | None:
    """The two numbers of such a payload; None where it is of another length."""
    return _PAIR.unpack(payload) if len(payload) == _PAIR.size else None


def _is_opening(payload: Bytes, proto: int) -> bool:
    least = _OPENING.size + MARK
    return len(payload) >= least if proto == PROTO_TERMINAL else len(payload) in (_OPENING.size, least)


def mark_opening(payload: bytes, mark: bytes, proto: int = PROTO_TCP) -> tuple[bytes, bytes] | None:
    """An `Opening` with this mark, whether it had one or not, and its `start`; None where it is of another length."""
    if not _is_opening(payload, proto):
        return None
    start = payload[_OPENING.size + MARK :]
    return payload[: _OPENING.size] + mark + start, start


def pack_opening(limit: int, key: bytes, hold: int, flags: int = 0) -> bytes:
    """The payload of a kept stream's CONNECT, as an opener sends it (`Opening`), but for what a terminal adds."""
    return _OPENING.pack(limit, key, hold, flags)


class Opening(NamedTuple):
    """CONNECT of a kept stream.

    `key` has KEY bytes, `hold` is in seconds, `mark` has MARK bytes or none: the runner appends it. `start` is a
    terminal's alone, whose `mark` is never missing.
    """

    limit: int
    key: bytes
    hold: int
    flags: int = 0
    mark: bytes = b""
    start: bytes = b""

    def pack(self) -> bytes:
        """The payload."""
        return pack_opening(self.limit, self.key, self.hold, self.flags) + self.mark + self.start

    @classmethod
    def parse(cls, payload: Bytes, proto: int = PROTO_TCP) -> Opening | None:
        """What such a payload holds, with a mark or without; None where it is of another length."""
        size = _OPENING.size + MARK
        if not _is_opening(payload, proto):
            return None
        limit, key, hold, flags = _OPENING.unpack_from(payload)
        return cls(limit, key, hold, flags, bytes(payload[_OPENING.size : size]), bytes(payload[size:]))


class Resuming(NamedTuple):
    """RESUME of one stream. `total` is UNKNOWN_TOTAL before the opener's EOF; `mark` as in CONNECT."""

    key: bytes
    epoch: int
    received: int
    limit: int
    total: int
    mark: bytes = b""

    def pack(self) -> bytes:
        """The payload."""
        return _RESUMING.pack(self.key, self.epoch, self.received, self.limit, self.total) + self.mark

    @classmethod
    def parse(cls, payload: Bytes) -> Resuming | None:
        """What such a payload holds, with a mark or without; None where it is of another length."""
        if len(payload) not in (_RESUMING.size, _RESUMING.size + MARK):
            return None
        key, epoch, received, limit, total = _RESUMING.unpack_from(payload)
        return cls(key, epoch, received, limit, total, bytes(payload[_RESUMING.size :]))


class Roll(NamedTuple):
    """RESUME of ClientID 0: what all keys of this opener begin with, and the epoch that all of its streams have now."""

    opener: bytes
    epoch: int
    mark: bytes = b""

    def pack(self) -> bytes:
        """The payload."""
        return _ROLL.pack(self.opener, self.epoch) + self.mark

    @classmethod
    def parse(cls, payload: Bytes) -> Roll | None:
        """What such a payload holds, with a mark or without; None where it is of another length."""
        if len(payload) not in (_ROLL.size, _ROLL.size + MARK):
            return None
        opener, epoch = _ROLL.unpack_from(payload)
        return cls(opener, epoch, bytes(payload[_ROLL.size :]))


class Attached(NamedTuple):
    """RESUMED: what the acceptor has received, its limit, and its total or UNKNOWN_TOTAL."""

    received: int
    limit: int
    total: int

    def pack(self) -> bytes:
        """The payload."""
        return _ATTACHED.pack(self.received, self.limit, self.total)

    @classmethod
    def parse(cls, payload: Bytes) -> Attached | None:
        """What such a payload holds; None where it is of another length."""
        return cls(*_ATTACHED.unpack(payload)) if len(payload) == _ATTACHED.size else None


def hold_after(code: int) -> int:
    """For how many seconds at most the streams of a session are held that was lost with this close code (§3)."""
    return USER_LOST_HOLD if code == CloseCode.USER_LOST else FULL_HOLD


def pack_seconds(seconds: int, reason: str = "") -> bytes:
    """The payload of DETACH, and of GOAWAY with its reason."""
    return _SECONDS.pack(seconds) + reason.encode("utf-8", "replace")


def parse_seconds(payload: Bytes) -> tuple[int, str] | None:
    """The seconds and the reason of such a payload; None where it is too short."""
    if len(payload) < _SECONDS.size:
        return None
    return _SECONDS.unpack_from(payload)[0], bytes(payload[_SECONDS.size :]).decode("utf-8", "replace")


class ErrorText(NamedTuple):
    """An ERROR's text: `code` is symbolic, such as "ECONNREFUSED", or "" where the peer gave none (v1)."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.code else self.message

    def pack(self) -> bytes:
        """The payload of an ERROR; on v2 `code` must not be empty."""
        return str(self).encode("utf-8", "replace")

    @classmethod
    def parse(cls, payload: Bytes) -> ErrorText:
        """What an ERROR says. Peers of v1 send what they like, so bad UTF-8 is replaced, not refused."""
        text = bytes(payload).decode("utf-8", "replace")
        match = _ERROR_CODE.match(text)
        return cls(match[1], text[match.end() :]) if match else cls("", text)


class Counts(NamedTuple):
    """What an endpoint counted since it last told: the payload of a PING of the session (docs/protocol.md §3)."""

    udp_dropped: int
    stalls: int

    def pack(self) -> bytes:
        """The PING's payload."""
        return _COUNTS.pack(_COUNTS_MARK, self.udp_dropped, self.stalls)

    @classmethod
    def parse(cls, payload: Bytes) -> Counts | None:
        """The counts that a PING tells; None where it is any other PING."""
        if len(payload) != _COUNTS.size or bytes(payload[:4]) != _COUNTS_MARK:
            return None
        _, udp_dropped, stalls = _COUNTS.unpack(payload)
        return cls(min(udp_dropped, _MOST_AT_ONCE), min(stalls, _MOST_AT_ONCE))


class WentStraight(NamedTuple):
    """Bytes of a session that went past the host: the payload of a runner's WebSocket ping (docs/protocol.md §4)."""

    to_container: int
    to_user: int

    def pack(self) -> bytes:
        """The ping's payload."""
        return _WENT.pack(_WENT_MARK, self.to_container, self.to_user)

    @classmethod
    def parse(cls, payload: Bytes) -> WentStraight | None:
        """What a ping tells; None where it is any other ping."""
        if len(payload) != _WENT.size or bytes(payload[:4]) != _WENT_MARK:
            return None
        return cls(*_WENT.unpack(payload)[1:])


class StraightOffer(NamedTuple):
    """STRAIGHT to the user: where the session's runner is, and a ticket for there; or why it can't be had, a clause.

    `shown` is shown to the runner, which proves by `proof` that it is the one that gave the ticket.
    """

    url: str = ""
    shown: bytes = b""
    proof: bytes = b""
    refusal: str = ""

    def pack(self) -> bytes:
        """The payload."""
        if not self.url:
            return b"\0" + self.refusal.encode("utf-8", "replace")
        return _OFFER.pack(1, self.shown, self.proof) + self.url.encode()

    @classmethod
    def parse(cls, payload: Bytes) -> StraightOffer | None:
        """What such a payload says; None where it makes no sense."""
        data = bytes(payload)
        if data[:1] == b"\0":
            return cls(refusal=data[1:].decode("utf-8", "replace"))
        if data[:1] != b"\1" or len(data) <= _OFFER.size:
            return None
        _, shown, proof = _OFFER.unpack_from(data)
        try:
            return cls(data[_OFFER.size :].decode(), shown, proof)
        except UnicodeDecodeError:
            return None


def straight_greeting(proof: bytes) -> str:
    """The first message on a straight path, by which the runner shows that it is the one that gave the ticket."""
    return f"CONNECTED {proof.hex()}"


class PortScope(IntEnum):
    """Whose sockets a PORTS asks for (docs/protocol.md §3)."""

    NETWORK = 0  # all of the tunnel client's network
    SEEN = 1  # those of processes that it can see
    OWN = 2  # those of its session's processes, and of those that have the mark in their environment


class PortsQuestion(NamedTuple):
    """PORTS to the container. `mark` is `NAME=VALUE`, of scope OWN alone, which needs one."""

    number: int
    scope: PortScope = PortScope.NETWORK
    mark: bytes = b""

    def pack(self) -> bytes:
        """The payload."""
        return _QUESTION.pack(self.number, self.scope) + self.mark

    @classmethod
    def parse(cls, payload: Bytes) -> PortsQuestion | None:
        """What such a payload asks; None where it makes no sense."""
        if len(payload) < _QUESTION.size:
            return None
        number, scope = _QUESTION.unpack_from(payload)
        mark = bytes(payload[_QUESTION.size :])
        if scope > PortScope.OWN or bool(mark) != (scope == PortScope.OWN) or 0 in mark:
            return None
        return cls(number, PortScope(scope), mark)


class BoundPort(NamedTuple):
    """A port that listens, or takes datagrams: on which address, and the name of the program, b"" where unknown."""

    proto: int
    port: int
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    program: bytes = b""

    def pack(self) -> bytes:
        """Its part of an answer."""
        address, program = self.address.packed, self.program[:LONGEST_PROGRAM]
        return _BOUND.pack(self.proto, self.port, len(address)) + address + bytes([len(program)]) + program


class PortsAnswer(NamedTuple):
    """PORTS to the runner; `more`: there are ports that it does not tell."""

    number: int
    more: bool
    ports: list[BoundPort]

    def pack(self) -> bytes:
        """The payload."""
        told = b"".join(port.pack() for port in self.ports[:MOST_PORTS])
        return _ANSWER.pack(self.number, _MORE if self.more else 0) + told

    @classmethod
    def parse(cls, payload: Bytes) -> PortsAnswer | None:
        """What such a payload tells; None where anything in it is not as it must be: a container may send what it
        likes.
        """
        if not _ANSWER.size <= len(payload) <= _LONGEST_ANSWER:
            return None
        number, flags = _ANSWER.unpack_from(payload)
        data, at = bytes(payload), _ANSWER.size
        ports: list[BoundPort] = []
        while at < len(data) and len(ports) < MOST_PORTS:
            found = _bound_port(data, at)
            if found is None:
                return None
            port, at = found
            ports.append(port)
        return None if at < len(data) or flags & ~_MORE else cls(number, bool(flags & _MORE), ports)

    @staticmethod
    def number_of(payload: Bytes) -> int | None:
        """Which question such a payload answers; None where it is too short to say."""
        return int.from_bytes(payload[:4], "big") if len(payload) >= 4 else None


def _bound_port(data: bytes, at: int) -> tuple[BoundPort, int] | None:
    """The port that stands at this offset of an answer, and the offset behind it; None where that is none."""
    if len(data) < at + _BOUND.size:
        return None
    proto, port, length = _BOUND.unpack_from(data, at)
    if proto > PROTO_UDP or port == 0 or length not in (4, 16):
        return None
    address_at = at + _BOUND.size
    name_at = address_at + length
    size = data[name_at] if len(data) > name_at else LONGEST_PROGRAM + 1
    end = name_at + 1 + size
    if size > LONGEST_PROGRAM or len(data) < end:
        return None
    return BoundPort(proto, port, ipaddress.ip_address(data[address_at:name_at]), data[name_at + 1 : end]), end


class WsClose(NamedTuple):
    """A close frame's payload; code is NO_CODE where it was empty."""

    code: int
    reason: str


def ws_text(text: str, key: int = -1) -> bytes:
    """A text frame, such as "CONNECTED". `key` is the mask key, or -1 on the side that must not mask."""
    return _frame.build_ws(OP_TEXT, text.encode("utf-8", "replace"), key)


def ws_ping(payload: bytes = b"", key: int = -1) -> bytes:
    """A WebSocket ping of at most 125 bytes, else ValueError."""
    return _frame.build_ws(OP_PING, payload, key)


def ws_pong(payload: bytes = b"", key: int = -1) -> bytes:
    """A WebSocket pong of at most 125 bytes, else ValueError."""
    return _frame.build_ws(OP_PONG, payload, key)


def ws_close(code: int, reason: str = "", key: int = -1) -> bytes:
    """A close frame; the reason is cut, between characters, to what fits. NO_CODE sends an empty one."""
    if code == CloseCode.NO_CODE:
        return _frame.build_ws(OP_CLOSE, b"", key)
    text = reason.encode("utf-8", "replace")[: _CONTROL_PAYLOAD - 2].decode("utf-8", "ignore")
    return _frame.build_ws(OP_CLOSE, _CLOSE_CODE.pack(code) + text.encode(), key)


def parse_ws_close(payload: Bytes) -> WsClose:
    """Return the code and reason of a WebSocket close frame (RFC 6455 section 5.5.1).

    FrameViolation 1002 for a code that may not be sent, 1007 for a reason that is not UTF-8.
    """
    if not payload:
        return WsClose(CloseCode.NO_CODE, "")
    if len(payload) < _CLOSE_CODE.size:
        raise _frame.FrameViolation(CloseCode.PROTOCOL_ERROR, "a close frame has half a code")
    code: int = _CLOSE_CODE.unpack_from(payload)[0]
    if not _may_be_sent(code):
        raise _frame.FrameViolation(CloseCode.PROTOCOL_ERROR, f"a close frame has the code {code}")
    try:
        return WsClose(code, bytes(payload[_CLOSE_CODE.size :]).decode())
    except UnicodeDecodeError:
        raise _frame.FrameViolation(CloseCode.BAD_DATA, "a close reason is not UTF-8") from None


def _may_be_sent(code: int) -> bool:
    """RFC 6455 section 7.4.2, with the codes registered since (1012 to 1014)."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
