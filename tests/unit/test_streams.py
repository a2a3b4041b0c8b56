from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from kohakuriver._frame import FrameWalker
from kohakuriver.tunnel import streams
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.opener import KeptStreams
from kohakuriver.tunnel.protocol import ACK, CONNECT, CONNECTED, DATA, EOF, pack_limit, pack_pair
from kohakuriver.tunnel.sockets import NOTSENT_LOWAT
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from tests.support.peers.fake_transport import FakeTransport, Wire

Run = Callable[[Coroutine[Any, Any, None]], None]
Program = tuple[socket.socket, TcpStream]


class User:
    """A user's end whose link is written down."""

    def __init__(self) -> None:
        self.wire, self.endpoint = Wire(masked=True), UserEndpoint(kept=KeptStreams(60))
        link = Link(self.endpoint, FrameWalker(masked=False), masks=True)
        link.start(self.wire)
        self.endpoint.attach(link)
        self.wire.kinds()

    def opens(self) -> TcpStream:
        stream = TcpStream(self.endpoint, 7)
        FakeTransport().connect(stream)
        return stream

    async def opens_and_ends(self) -> TcpStream:
        """A connection that both sides have ended; its peer is not told yet that it is known here."""
        stream = self.opens()
        self.endpoint._tcp_message(stream, CONNECTED, pack_pair(1 << 20, 0))
        stream.eof_received()
        self.endpoint._tcp_message(stream, EOF, pack_pair(0, 1))
        await asyncio.sleep(0)
        return stream


def test_the_last_ack_of_a_connection_goes_with_the_connect_of_the_next(run: Run) -> None:
    async def main() -> None:
        user = User()
        for _ in range(2):
            await user.opens_and_ends()
        assert user.wire.kinds() == [[CONNECT], [EOF], [CONNECT, ACK], [EOF]]
        user.opens()
        assert user.wire.kinds() == [[CONNECT, ACK]]

    run(main())


def test_the_last_ack_goes_by_itself_where_nothing_follows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LATE", 0.0)

    async def main() -> None:
        user = User()
        stream = await user.opens_and_ends()
        for _ in range(8):
            await asyncio.sleep(0)
        assert user.wire.kinds() == [[CONNECT], [EOF], [ACK]]
        assert stream.at is not None, "its peer has not answered yet"
        assert pack_limit(1) == stream.core._payload(ACK)

    run(main())


def test_the_last_ack_goes_with_what_is_sent_soon(run: Run) -> None:
    async def main() -> None:
        user = User()
        await user.opens_and_ends()
        user.wire.kinds()
        table = user.endpoint.streams
        assert table is not None
        table.send_soon(9, ACK, pack_limit(5))
        await asyncio.sleep(0)
        assert user.wire.kinds() == [[ACK, ACK]]

    run(main())


def test_a_link_that_is_lost_takes_what_was_late_with_it(run: Run) -> None:
    async def main() -> None:
        user = User()
        stream = await user.opens_and_ends()
        user.endpoint.detach("lost")
        wire = user.wire = Wire(masked=True)
        link = Link(user.endpoint, FrameWalker(masked=False), masks=True)
        link.start(wire)
        user.endpoint.attach(link)
        await asyncio.sleep(2 * streams.LATE)
        assert ACK not in [kind for write in wire.kinds() for kind in write]
        assert stream.at is not None

    run(main())


@contextlib.asynccontextmanager
async def a_program(user: User, says: bytes = b"", *, before: bool = False) -> AsyncIterator[Program]:
    """A program that connects to a port of this end, and what it `says` before that is accepted; its stream.

    `before` it another one has connected, and has reset its connection at once.
    """
    listening = await user.endpoint.listen_tcp("127.0.0.1", 0, 7)
    if before:
        with socket.create_connection(("127.0.0.1", listening.port)) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with socket.create_connection(("127.0.0.1", listening.port)) as program:
        program.sendall(says)
        await user.wire.written.wait()
        assert user.endpoint.streams is not None
        (stream,) = user.endpoint.streams.by_id.values()
        assert isinstance(stream, TcpStream)
        yield program, stream
    listening.close()
    user.endpoint.detach("lost", keeps=False)
    await asyncio.sleep(0)


def test_what_a_program_says_at_once_goes_with_the_connect(run: Run) -> None:
    async def main() -> None:
        user = User()
        async with a_program(user, b"GET /") as (program, _):
            assert user.wire.kinds() == [[CONNECT, DATA]]
            program.sendall(b" HTTP/1.1")
            await user.wire.written.wait()
            assert user.wire.kinds() == [[DATA]]
            assert user.endpoint.totals.bytes_sent == len(b"GET / HTTP/1.1")

    run(main())


def test_connections_have_the_options_of_their_listener(run: Run) -> None:
    async def main() -> None:
        async with a_program(User()) as (_, stream):
            assert stream._transport is not None
            sock = stream._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == NOTSENT_LOWAT

    run(main())


def test_a_connection_that_was_reset_before_it_was_accepted_opens_nothing(run: Run) -> None:
    async def main() -> None:
        user = User()
        async with a_program(user, b"GET /", before=True):
            assert user.wire.kinds() == [[CONNECT, DATA]]

    run(main())
