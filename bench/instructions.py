"""Count the instructions that the hot path's calls take: the same on every run, however busy the machine is.

    python -m bench.instructions

Each call is replayed under valgrind's callgrind 1000 and 3000 times; the difference, divided by 2000, is what one call
takes, the loop around it included. Needs valgrind.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from kohakuriver import _frame
from kohakuriver.limits import Limits
from kohakuriver.relay.admission import Admission, ConnectRates
from kohakuriver.relay.hub import Hub
from kohakuriver.relay.legs import RelayLeg, SessionLeg, TunnelLeg
from kohakuriver.runtime import new_event_loop
from kohakuriver.tunnel import buffers as _buffers
from kohakuriver.tunnel.kept import Identity, KeptCore
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.opener import KeptStreams
from kohakuriver.tunnel.protocol import (
    ACK,
    CLOSE,
    CONNECT,
    CONNECTED,
    DATA,
    EOF,
    MARK,
    PROTO_TCP,
    Opening,
    pack_limit,
    pack_pair,
)
from kohakuriver.tunnel.protocol import KEY as KEY_SIZE
from kohakuriver.tunnel.send_queue import SendQueue
from kohakuriver.tunnel.states import Role, State
from kohakuriver.tunnel.stream import Reading, Rules, StreamCore
from kohakuriver.tunnel.streams import Totals, Turns
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from kohakuriver.tunnel.v1_rules import V1Rules
from kohakuriver.tunnel.windows import Budget

KEY = 0xA1B2C3D4
FEW, MANY = 1000, 3000
ACKED_AFTER = 1 << 20  # bytes: a quarter of a window that has grown a little
SIZES = {"64": 64, "32K": 32 * 1024, "64K": 64 * 1024}


def frame(size: int, key: int = -1) -> tuple[bytearray, int, int]:
    buf = bytearray(_frame.HEADROOM) + _frame.build_frame(_frame.TYPE_DATA, 0, 7, 0, bytes(size), key)
    return buf, _frame.HEADROOM, len(buf)


def forward_sends(size: int) -> Callable[[], object]:
    buf = bytearray(_frame.HEADROOM + size)
    arguments = (buf, _frame.HEADROOM, len(buf), _frame.TYPE_DATA, 0, 7, 0, KEY)
    return lambda: _frame.frame_in_place(*arguments)


def host_passes_on(size: int) -> Callable[[], object]:
    walker, arguments = _frame.SpliceWalker(masked=True), frame(size, KEY)
    return lambda: walker.splice(*arguments)


def runner_passes_on(size: int) -> Callable[[], object]:
    walker, table = _frame.RelayWalker(masked=True), _frame.RoutingTable()
    table.add(7, "target", 9)
    buf, start, stop = frame(size, KEY)
    head = bytes(buf[: start + 32])

    def relay() -> object:
        buf[: len(head)] = head  # the frame's header was rewritten in place
        return walker.relay(buf, start, stop, table)

    return relay


def forward_receives(size: int) -> Callable[[], object]:
    walker, arguments = _frame.FrameWalker(masked=False), frame(size)
    return lambda: walker.walk(*arguments)


class TakesAll:
    """A sink that is never full."""

    def write(self, data: Any) -> int:
        return len(data)


def stream_of(core: StreamCore, rules: Rules) -> TcpStream:
    """An open stream on a link that takes all it is given."""
    core.speak(2)
    core.state, core.reading = State.OPEN, Reading.FLOWING
    core.sending.raise_to(1 << 60)
    stream = TcpStream(SimpleNamespace(rules=rules, totals=Totals()), 1, core)
    out = SendQueue(lambda: None)
    out.begin(TakesAll())  # type: ignore[arg-type]
    link = SimpleNamespace(
        loop_buffer=_buffers.receive_buffer(), next_key=_frame.MaskKeys().next, out=out, send=out.send
    )
    stream.at = SimpleNamespace(link=link, turns=Turns({}, rules.budget), id=7)  # type: ignore[assignment]
    return stream


def stream_sends(size: int) -> Callable[[], object]:
    """A read of a local socket, whole: what the extension does is part of it."""
    rules = Rules(Role.OPENER, Budget(), V1Rules(1 << 20, 0.0))
    return read_by(stream_of(StreamCore(rules), rules), size)


def read_by(stream: TcpStream, size: int) -> Callable[[], object]:
    def read() -> None:
        stream.get_buffer(-1)
        stream.buffer_updated(size)

    return read


def kept_stream_sends(size: int) -> Callable[[], object]:
    """The same of one that outlives its links, with an acknowledgement for every quarter of a window."""
    rules = Rules(Role.OPENER, Budget(), V1Rules(1 << 20, 0.0))
    core = KeptCore(rules, Identity(bytes(KEY_SIZE), 60))
    core.attached = True
    read, sending = read_by(stream_of(core, rules), size), core.sending

    def read_and_hear() -> None:
        read()
        if sending.sent - core.acked >= ACKED_AFTER:
            core.take(ACK, pack_limit(sending.sent))

    return read_and_hear


class Still(asyncio.Transport):
    """A transport that does nothing."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def write(self, data: Any) -> None:
        pass

    def write_eof(self) -> None:
        pass


def one_connection(kept: bool) -> Callable[[], Awaitable[object]]:
    """A connection as forward sees it, to its end: opened, a byte there and back, ended here and then there."""
    endpoint = UserEndpoint(kept=KeptStreams(60) if kept else None)
    link = Link(endpoint, _frame.FrameWalker(masked=False), masks=True)
    link.start(Still())
    link.out.begin(TakesAll())  # type: ignore[arg-type]
    endpoint.attach(link)

    def hear(stream: TcpStream, kind: int, payload: bytes) -> None:
        assert stream.at is not None
        frame = _frame.build_frame(kind, PROTO_TCP, stream.at.id, 0, payload)
        link.get_buffer(-1)[: len(frame)] = frame
        link.buffer_updated(len(frame))

    async def connect() -> None:
        stream = TcpStream(endpoint, 7, endpoint.new_core())
        stream.connection_made(Still())
        await asyncio.sleep(0)
        stream.get_buffer(-1)
        stream.buffer_updated(1)
        hear(stream, CONNECTED, pack_pair(1 << 18, 0) if kept else pack_limit(1 << 18))
        hear(stream, DATA, b"x")
        stream.eof_received()
        hear(stream, EOF, pack_pair(1, 2) if kept else b"")
        await asyncio.sleep(0)
        if kept:
            hear(stream, CLOSE, b"")
        stream.connection_lost(None)

    return connect


def passed_on(kept: bool) -> Callable[[], Awaitable[object]]:
    """The same as a runner sees it. Kept ones' last words come with the next message, as they mostly do."""
    hub = Hub()
    hub.tunnels["c"] = tunnel = TunnelLeg(hub, "c", _frame.MAX_MESSAGE)
    admission = Admission(Limits(), ConnectRates(0), None, None)
    session = SessionLeg(
        hub, "c", _frame.MAX_MESSAGE, port=7, proto=PROTO_TCP, admission=admission, newest=2, mark=bytes(MARK)
    )
    numbers, last = itertools.count(1), 0
    for leg in (tunnel, session):
        leg.link = Link(leg, leg.walker, masks=False)
        leg.link.start(Still())
        leg.link.out.begin(TakesAll())  # type: ignore[arg-type]

    def hear(leg: RelayLeg[Any], *messages: tuple[int, int, bytes]) -> None:
        frames = b"".join(_frame.build_frame(kind, PROTO_TCP, number, 0, each, KEY) for kind, number, each in messages)
        leg.link.get_buffer(-1)[: len(frames)] = frames
        leg.link.buffer_updated(len(frames))

    async def connect() -> None:
        nonlocal last
        number, before, last = next(numbers), last, 0
        opening = Opening(1 << 18, bytes(KEY_SIZE), 60).pack() if kept else pack_limit(1 << 18)
        acks = [(ACK, before, pack_limit(2))] if before else []
        hear(session, (CONNECT, number, opening), *acks, (DATA, number, b"x"))
        granted = pack_pair(1 << 18, 0) if kept else pack_limit(1 << 18)
        hear(tunnel, (CONNECTED, number, granted), *([(CLOSE, before, b"")] if before else []))
        hear(tunnel, (DATA, number, b"x"))
        ended = pack_pair(1, 1) if kept else b""
        hear(session, (EOF, number, ended))
        hear(tunnel, (EOF, number, ended))
        last = number if kept else 0
        await asyncio.sleep(0)

    return connect


def runner_connection(size: int) -> Callable[[], Awaitable[object]]:
    return passed_on(False)


def runner_kept_connection(size: int) -> Callable[[], Awaitable[object]]:
    return passed_on(True)


def connection(size: int) -> Callable[[], Awaitable[object]]:
    return one_connection(False)


def kept_connection(size: int) -> Callable[[], Awaitable[object]]:
    return one_connection(True)


READS = (forward_sends, host_passes_on, runner_passes_on, forward_receives, stream_sends, kept_stream_sends)
CONNECTIONS = (connection, kept_connection, runner_connection, runner_kept_connection)
CALLS: dict[str, Callable[[int], Callable[[], Any]]] = {call.__name__: call for call in (*READS, *CONNECTIONS)}


def count(name: str, size: str, times: int) -> int:
    """Instructions of a whole run of this file that makes the call so many times."""
    argv = [
        "valgrind",
        "--tool=callgrind",
        "--callgrind-out-file=/dev/null",
        sys.executable,
        "-m",
        "bench.instructions",
    ]
    env = {"PYTHONHASHSEED": "0"}  # where things lie in a dict is chance otherwise
    run = subprocess.run([*argv, name, size, str(times)], env=env, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", run.stderr)
    assert found is not None, run.stderr
    return int(found[1])


async def repeat(name: str, size: str, times: int) -> None:
    call = CALLS[name](SIZES[size])
    if CALLS[name] in CONNECTIONS:
        for _ in range(times):
            await call()
    else:
        for _ in range(times):
            call()


def main() -> None:
    if len(sys.argv) == 4:
        new_event_loop().run_until_complete(repeat(sys.argv[1], sys.argv[2], int(sys.argv[3])))
        return
    count("forward_sends", "64", 1)  # the first run also compiles what it imports
    for name in CALLS:
        for size in SIZES if CALLS[name] in READS else ["64"]:
            each = (count(name, size, MANY) - count(name, size, FEW)) / (MANY - FEW)
            print(f"{name:<22} {size:>4} bytes {each:10,.0f} instructions")


if __name__ == "__main__":
    main()
