"""`StartWatch` of the host's tunnel proxy: a start is seen however it is sent, and a data set is stepped over."""

from __future__ import annotations

import random
import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kohakuriver._frame import FrameViolation, SpliceWalker
from kohakuriver.host.services.tunnel_proxy import MAX_START, ProxySession, Splice, StartWatch, TerminalSplice
from kohakuriver.tunnel.link import Link
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


class Ends:
    """A user's session at the host, as its splice sees it: `happened` is what was told and passed, in order."""

    def __init__(self) -> None:
        self.happened: list[tuple[str, bytes]] = []
        self.splice = TerminalSplice(SpliceWalker(masked=True, max_message=LIMIT), cast(ProxySession, None))
        self.splice.watch = StartWatch(LIMIT, lambda start: self.happened.append(("told", start)))
        self.splice.other = cast(Splice, SimpleNamespace(link=self))
        self.out = SimpleNamespace(urgent=False, blocked=False)

    def send(self, data: memoryview, more: bool = False) -> None:
        self.happened.append(("passed", bytes(data)))

    def control(self, event: object) -> None:
        pass

    def receive(self, data: bytes) -> None:
        """The user has sent this."""
        buffer = SimpleNamespace(data=bytearray(data), view=memoryview(bytearray(data)))
        intake: Any = SimpleNamespace(buffer=buffer, turn_over=lambda events: False)
        link = SimpleNamespace(intake=intake, control=self.control)
        self.splice.link_received(cast(Link, link), 0, len(data))


def test_no_start_gets_past_the_host_untold_because_of_what_comes_right_behind_it() -> None:
    ends, start = Ends(), frame(BINARY, connect(b"rm -rf"))
    with pytest.raises(FrameViolation):
        ends.receive(start + b"\xf0\x80")
    assert ends.happened == [("told", b"rm -rf"), ("passed", start)]


def test_of_a_control_frame_between_the_parts_of_a_start_nothing_is_taken_for_the_start() -> None:
    ends, whole = Ends(), connect(b"in parts")
    ends.receive(frame(BINARY, whole[:20], fin=False) + frame(PING, b"ping") + frame(CONTINUATION, whole[20:]))
    assert [what for what in ends.happened if what[0] == "told"] == [("told", b"in parts")]
    assert [what for what, _ in ends.happened] == ["passed", "told", "passed"]


@pytest.mark.parametrize("parts", [2, 3])
def test_a_start_that_is_too_long_to_be_read_is_not_passed_on_to_its_end(parts: int) -> None:
    ends, whole = Ends(), connect(bytes(MAX_START))
    size = len(whole) // parts + 1
    frames = [
        frame(CONTINUATION if at else BINARY, whole[at : at + size], fin=at + size >= len(whole))
        for at in range(0, len(whole), size)
    ]
    for each in frames[:-1]:
        ends.receive(each)
    with pytest.raises(FrameViolation) as raised:
        ends.receive(frames[-1])
    assert raised.value.code == 1009
    assert ends.happened == [("passed", each) for each in frames[:-1]]
