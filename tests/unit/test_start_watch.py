"""`StartWatch` of the host's tunnel proxy: a start is seen however it is sent, and a data set is stepped over."""

from __future__ import annotations

import random
import struct

from kohakuriver.host.services.tunnel_proxy import StartWatch
from kohakuriver.tunnel.protocol import CONNECT, DATA, PROTO_TERMINAL

BINARY, CONTINUATION, PING = 0x2, 0x0, 0x9
LIMIT = 16 << 20


def frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """One masked frame."""
    length, key = len(payload), random.randbytes(4)
    head = bytes([opcode | 0x80 * fin])
    if length < 126:
        head += bytes([0x80 | length])
    elif length < 1 << 16:
        head += struct.pack(">BH", 0x80 | 126, length)
    else:
        head += struct.pack(">BQ", 0x80 | 127, length)
    return head + key + bytes(each ^ key[at & 3] for at, each in enumerate(payload))


def message(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BBIH", kind, PROTO_TERMINAL, 1, 0) + payload


def connect(start: bytes) -> bytes:
    """A CONNECT of a terminal: limit, key, hold, flags, mark, start."""
    return message(CONNECT, bytes(8) + bytes(16) + bytes(4) + b"\0" + bytes(16) + start)


def seen(data: bytes, *, step: int) -> list[bytes]:
    """What is told of bytes that come in pieces."""
    found: list[bytes] = []
    watch = StartWatch(LIMIT, found.append)
    for at in range(0, len(data), step):
        watch.read(memoryview(data)[at : at + step])
    return found


def test_each_start_is_told_however_its_message_is_cut_and_whatever_is_between() -> None:
    long = connect(b"long" * 30_000)
    frames = [
        frame(BINARY, connect(b"whole")),
        frame(BINARY, message(DATA, random.randbytes(70_000))),
        frame(PING, b"ping"),
        frame(BINARY, connect(b"in parts")[:1], fin=False),
        frame(PING, b""),
        frame(CONTINUATION, connect(b"in parts")[1:20], fin=False),
        frame(CONTINUATION, connect(b"in parts")[20:]),
        frame(BINARY, b"", fin=False),
        frame(CONTINUATION, b"", fin=False),
        frame(CONTINUATION, connect(b"behind nothing")),
        frame(BINARY, b"", fin=False),
        frame(CONTINUATION, message(DATA, random.randbytes(300))),
        frame(BINARY, message(DATA, b"x" * 200), fin=False),
        frame(CONTINUATION, connect(b"is data")),
        frame(BINARY, long),
        frame(BINARY, message(DATA, b"")),
        frame(BINARY, connect(b"last")),
    ]
    expected = [b"whole", b"in parts", b"behind nothing", b"long" * 30_000, b"last"]
    for step in (1, 2, 7, 1000, 1 << 20):
        assert seen(b"".join(frames), step=step) == expected, step


def test_a_data_set_is_not_kept() -> None:
    watch = StartWatch(LIMIT, lambda start: None)
    data = frame(BINARY, message(DATA, bytes(1 << 20)))
    watch.read(memoryview(data)[:500_000])
    assert len(watch._rest) == 0
