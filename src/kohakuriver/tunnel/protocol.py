"""The tunnel protocol's numbers and small messages: constants, builders and parsers (docs/protocol.md).

Builders return whole WebSocket frames, ready to send; `key` is the mask key, or -1 on the side that must not mask
(RFC 6455 section 5.1). Parsers take the payload of one message and raise FrameViolation, with the close code that the
sender is owed, when it is not what the protocol says.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum
from typing import Final, NamedTuple

from kohakuriver import _frame
from kohakuriver._frame import (
    FIRST,
    HEADER_SIZE,
    HEADROOM,
    LAST,
    MAX_MESSAGE,
    MAX_SEND,
    WHOLE,
    WS_CLOSE,
    WS_PING,
    WS_PONG,
    WS_TEXT,
    FrameViolation,
    Message,
    build_frame,
    build_ws,
    pack_header,
    unpack_header,
)

__all__ = [
    "CLOSE",
    "CONNECT",
    "CONNECTED",
    "DATA",
    "EOF",
    "ERROR",
    "FIRST",
    "HEADER_SIZE",
    "HEADROOM",
    "LAST",
    "MAX_MESSAGE",
    "MAX_SEND",
    "MAX_SEND_PAYLOAD",
    "OP_CLOSE",
    "OP_PING",
    "OP_PONG",
    "OP_TEXT",
    "PING",
    "PONG",
    "PROTO_TCP",
    "PROTO_UDP",
    "SESSION_ID",
    "TERMINAL_V2",
    "TUNNEL_V2",
    "WHOLE",
    "WINDOW",
    "WS_CLOSE",
    "WS_PING",
    "WS_PONG",
    "WS_TEXT",
    "CloseCode",
    "FrameViolation",
    "Message",
    "StreamError",
    "WsClose",
    "build_frame",
    "build_ws",
    "close",
    "connect",
    "connected",
    "counts",
    "data",
    "eof",
    "error",
    "pack_header",
    "parse_counts",
    "parse_error",
    "parse_limit",
    "parse_reason",
    "parse_ws_close",
    "ping",
    "pong",
    "unpack_header",
    "window",
    "ws_close",
    "ws_ping",
    "ws_pong",
    "ws_text",
]


# First header byte (docs/protocol.md §3); 0x0A to 0x0F are reserved.
CONNECT: Final = 0x01
CONNECTED: Final = _frame.TYPE_CONNECTED
DATA: Final = _frame.TYPE_DATA
CLOSE: Final = 0x04
ERROR: Final = 0x05
PING: Final = 0x06
PONG: Final = 0x07
WINDOW: Final = _frame.TYPE_WINDOW
EOF: Final = 0x09

# Second header byte (docs/protocol.md §1).
PROTO_TCP: Final = _frame.PROTO_TCP
PROTO_UDP: Final = 0x01

# Opcodes of frames that carry no tunnel message (RFC 6455 section 5.2).
OP_TEXT: Final = 0x1
OP_CLOSE: Final = 0x8
OP_PING: Final = 0x9
OP_PONG: Final = 0xA


# What an endpoint tells of its counts: a mark, then two numbers; no more of either than can be true is believed.
_COUNTS: Final = struct.Struct(">4sQQ")
_COUNTS_MARK: Final = b"cnt1"
_MOST_AT_ONCE: Final = 1 << 32


class CloseCode(IntEnum):
    """WebSocket close codes in use (RFC 6455 section 7.4.1; docs/protocol.md §3 rules 5 and 8, §4)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED = 1003
    NO_CODE = 1005  # never on the wire: the close frame had none
    BAD_DATA = 1007
    POLICY = 1008
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    REPLACED = 4000  # a second tunnel client took the place of this one
    IDLE = 4001  # nothing passed for longer than the host allows


TUNNEL_V2: Final = "kohakuriver.tunnel.v2"
TERMINAL_V2: Final = "kohakuriver.terminal.v2"

SESSION_ID: Final = 0
"""The ClientID that means the session itself."""

MAX_SEND_PAYLOAD: Final = MAX_SEND - HEADER_SIZE
_CONTROL_PAYLOAD: Final = 125  # what a WebSocket control frame may carry (RFC 6455 section 5.5)
_LIMIT_SIZE: Final = 8
_ERROR_CODE: Final = re.compile(r"(E[A-Z0-9]+): ")


class StreamError(NamedTuple):
    """An ERROR's text: `code` is symbolic, such as "ECONNREFUSED", or "" where the peer gave none (v1)."""

    code: str
    message: str


class WsClose(NamedTuple):
    """A close frame's payload; code is NO_CODE where it was empty."""

    code: int
    reason: str


def connect(client_id: int, proto: int, port: int = 0, limit: int | None = None, key: int = -1) -> bytes:
    """CONNECT to `port` (0: the session's). `limit` is the opener's first receive limit in bytes; None on v1."""
    return build_frame(CONNECT, proto, client_id, port, _limit_bytes(limit), key)


def connected(client_id: int, proto: int, limit: int | None = None, key: int = -1) -> bytes:
    """CONNECTED. `limit` is the acceptor's first receive limit in bytes; None on v1."""
    return build_frame(CONNECTED, proto, client_id, 0, _limit_bytes(limit), key)


def data(client_id: int, proto: int, payload: bytes | bytearray | memoryview, key: int = -1) -> bytes:
    """DATA, for payloads small enough to copy; at most MAX_SEND_PAYLOAD bytes, else ValueError."""
    return build_frame(DATA, proto, client_id, 0, payload, key)


def window(client_id: int, limit: int, key: int = -1) -> bytes:
    """WINDOW: the peer may send this stream's bytes up to offset `limit`. ValueError for client id 0."""
    if client_id == SESSION_ID:
        raise ValueError("a session has no window")
    return build_frame(WINDOW, PROTO_TCP, client_id, 0, _limit_bytes(limit), key)


def eof(client_id: int, key: int = -1) -> bytes:
    """EOF: no more DATA from this side of a TCP stream."""
    return build_frame(EOF, PROTO_TCP, client_id, 0, b"", key)


def close(client_id: int, proto: int, reason: str = "", key: int = -1) -> bytes:
    """CLOSE of a stream. `reason` must be "" on v1."""
    return build_frame(CLOSE, proto, client_id, 0, reason.encode("utf-8", "replace"), key)


def error(client_id: int, proto: int, message: str, code: str = "", key: int = -1) -> bytes:
    """ERROR, as the text "CODE: message"; `code` must be given on v2."""
    text = f"{code}: {message}" if code else message
    return build_frame(ERROR, proto, client_id, 0, text.encode("utf-8", "replace"), key)


def ping(payload: bytes = b"", key: int = -1, client_id: int = SESSION_ID) -> bytes:
    """PING of the session."""
    return build_frame(PING, PROTO_TCP, client_id, 0, payload, key)


def pong(payload: bytes = b"", key: int = -1, client_id: int = SESSION_ID) -> bytes:
    """PONG, with the PING's payload and client id."""
    return build_frame(PONG, PROTO_TCP, client_id, 0, payload, key)


def counts(udp_dropped: int, stalls: int, key: int = -1) -> bytes:
    """PING of the session that tells what an endpoint counted since it last did (docs/protocol.md §3)."""
    return ping(_COUNTS.pack(_COUNTS_MARK, udp_dropped, stalls), key)


def ws_text(text: str, key: int = -1) -> bytes:
    """Return a text frame, such as "CONNECTED"."""
    return build_ws(OP_TEXT, text.encode("utf-8", "replace"), key)


def ws_ping(payload: bytes = b"", key: int = -1) -> bytes:
    """Return a WebSocket ping of at most 125 bytes, else ValueError."""
    return build_ws(OP_PING, payload, key)


def ws_pong(payload: bytes = b"", key: int = -1) -> bytes:
    """Return a WebSocket pong of at most 125 bytes, else ValueError."""
    return build_ws(OP_PONG, payload, key)


def ws_close(code: int, reason: str = "", key: int = -1) -> bytes:
    """Return a close frame; the reason is cut, between characters, to what fits. NO_CODE sends an empty one."""
    if code == CloseCode.NO_CODE:
        return build_ws(OP_CLOSE, b"", key)
    text = reason.encode("utf-8", "replace")[: _CONTROL_PAYLOAD - 2].decode("utf-8", "ignore")
    return build_ws(OP_CLOSE, code.to_bytes(2, "big") + text.encode(), key)


def parse_limit(payload: bytes | bytearray | memoryview) -> int:
    """Return the receive limit, in bytes, of a v2 CONNECT, CONNECTED or WINDOW."""
    if len(payload) != _LIMIT_SIZE:
        raise FrameViolation(CloseCode.PROTOCOL_ERROR, f"a limit has {_LIMIT_SIZE} bytes, not {len(payload)}")
    return int.from_bytes(payload, "big")


def parse_error(payload: bytes | bytearray | memoryview) -> StreamError:
    """Return an ERROR's code and message. Peers of v1 send what they like, so bad UTF-8 is replaced, not refused."""
    text = bytes(payload).decode("utf-8", "replace")
    match = _ERROR_CODE.match(text)
    return StreamError(match[1], text[match.end() :]) if match else StreamError("", text)


def parse_counts(payload: bytes | bytearray | memoryview) -> dict[str, int]:
    """What a PING of the session tells of its sender's counts; nothing where it is any other PING."""
    if len(payload) != _COUNTS.size or bytes(payload[:4]) != _COUNTS_MARK:
        return {}
    _, udp_dropped, stalls = _COUNTS.unpack(payload)
    return {"udp_dropped": min(udp_dropped, _MOST_AT_ONCE), "stalls": min(stalls, _MOST_AT_ONCE)}


def parse_reason(payload: bytes | bytearray | memoryview) -> str:
    """Return a CLOSE's reason, "" if none; bad UTF-8 is replaced."""
    return bytes(payload).decode("utf-8", "replace")


def parse_ws_close(payload: bytes | bytearray | memoryview) -> WsClose:
    """Return the code and reason of a WebSocket close frame (RFC 6455 section 5.5.1).

    FrameViolation 1002 for a code that may not be sent, 1007 for a reason that is not UTF-8.
    """
    if not payload:
        return WsClose(CloseCode.NO_CODE, "")
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not _may_be_sent(code):
        raise FrameViolation(CloseCode.PROTOCOL_ERROR, f"a close frame has the code {code}")
    try:
        return WsClose(code, bytes(payload[2:]).decode())
    except UnicodeDecodeError:
        raise FrameViolation(CloseCode.BAD_DATA, "a close reason is not UTF-8") from None


def _may_be_sent(code: int) -> bool:
    """RFC 6455 section 7.4.2, with the codes registered since (1012 to 1014)."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def _limit_bytes(limit: int | None) -> bytes:
    return b"" if limit is None else limit.to_bytes(_LIMIT_SIZE, "big")
