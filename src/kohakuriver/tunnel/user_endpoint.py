"""Hop 1: the user's end of a tunnel, which listens and opens streams (docs/protocol.md §2–§3)."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kohakuriver.errors import LocalAddressError
from kohakuriver.resolve import resolving
from kohakuriver.tunnel.endpoint import AnyStream, Endpoint
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import CLOSE, CONNECT, CloseCode, ErrorText, parse_limit
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.states import Role, State
from kohakuriver.tunnel.udp import UdpListener, UdpStream

LISTEN_BACKLOG = 4096


@dataclass
class ListeningSocket:
    """A local address that leads to a port of the task."""

    host: str
    port: int
    remote_port: int
    proto: str
    close: Callable[[], None] = field(repr=False)
    sock: socket.socket = field(repr=False)


class UserEndpoint(Endpoint):
    """Hop 1: listens on local addresses and opens a stream for each connection.

    It outlives its link: ``attach`` gives it the first one and, after a loss, the next. A connection that is
    accepted in between is held for ``reattach_wait`` seconds, then reset; after ``outage`` seconds it is reset at once.
    """

    role = Role.OPENER

    def __init__(
        self,
        *,
        config: EndpointConfig | None = None,
        on_stream_error: Callable[[int, ErrorText], None] = lambda port, text: None,
        on_detach: Callable[[str], None] = lambda reason: None,
    ) -> None:
        super().__init__(config)
        self.on_stream_error = on_stream_error
        self.on_detach = on_detach
        self._waiting: dict[TcpStream, asyncio.TimerHandle] = {}
        self._detached_at = time.monotonic()
        self._listening: list[ListeningSocket] = []

    def attach(self, link: Link) -> None:
        """Use ``link`` from now on; what waits for one is opened."""
        super().attach(link)
        waiting, self._waiting = self._waiting, {}
        for stream, timer in waiting.items():
            timer.cancel()
            self.open_tcp(stream)

    def detach(self, reason: str) -> None:
        super().detach(reason)
        self._detached_at = time.monotonic()
        self.on_detach(reason)

    def socket_ready(self, stream: TcpStream) -> None:
        if self.open_tcp(stream):
            return
        outage = time.monotonic() - self._detached_at
        patience = self.config.reattach_wait if outage < self.config.outage else 0.0
        loop = asyncio.get_running_loop()
        self._waiting[stream] = loop.call_later(patience, self._waited_too_long, stream)

    def _waited_too_long(self, stream: TcpStream) -> None:
        self._waiting.pop(stream, None)
        self.on_stream_error(stream.port, ErrorText("ENOTCONN", "the connection to the host is lost"))
        stream.link_lost()

    def socket_gone(self, stream: TcpStream) -> None:
        timer = self._waiting.pop(stream, None)
        if timer is not None:
            timer.cancel()

    def open_tcp(self, stream: TcpStream) -> bool:
        """Open a stream; False while there is no link."""
        streams = self.streams
        if streams is None:
            return False
        stream.at = streams.enter(stream, streams.new_id())
        stream.act(stream.core.link(streams.link.version))
        stream.update_reading()
        return True

    def open_udp(self, stream: UdpStream) -> bool:
        """Open a stream for a new source address; False while there is no link."""
        streams = self.streams
        if streams is None:
            return False
        stream.at = streams.enter_udp(stream, streams.new_id())
        stream.send(CONNECT)
        return True

    def connected(self, stream: TcpStream, payload: bytes) -> None:
        stream.act(stream.core.connected(parse_limit(payload)))
        stream.update_reading()

    def has_reached(self, source: tuple[str, int]) -> bool:
        """Whether the stream of the local connection from `source` has been opened in the task."""
        return self.streams is not None and any(
            isinstance(stream, TcpStream) and stream.core.state is State.OPEN and stream.source()[:2] == source[:2]
            for stream in self.streams.by_id.values()
        )

    def stream_failed(self, stream: AnyStream, text: ErrorText) -> None:
        self.on_stream_error(stream.port, text)

    async def listen_tcp(self, host: str, port: int, remote_port: int) -> ListeningSocket:
        """Listen on ``host:port`` (0: any free port). Raises LocalAddressError if that can't be had."""
        loop = asyncio.get_running_loop()
        sock = _bind(host, port, socket.SOCK_STREAM)
        server = await loop.create_server(lambda: TcpStream(self, remote_port), sock=sock, backlog=LISTEN_BACKLOG)
        listening = ListeningSocket(host, sock.getsockname()[1], remote_port, "tcp", server.close, sock)
        self._listening.append(listening)
        return listening

    async def listen_udp(self, host: str, port: int, remote_port: int) -> ListeningSocket:
        """The same for UDP: one stream per source address (§3 rule 12)."""
        loop = asyncio.get_running_loop()
        sock = _bind(host, port, socket.SOCK_DGRAM)
        address = sock.getsockname()
        transport, _ = await loop.create_datagram_endpoint(lambda: UdpListener(self, remote_port, sock), sock=sock)
        listening = ListeningSocket(host, address[1], remote_port, "udp", transport.close, sock)
        self._listening.append(listening)
        return listening

    async def close(self) -> None:
        """Stop listening, end every stream, close the link."""
        for listening in self._listening:
            listening.close()
        for stream in list(self._waiting):
            stream.link_lost()
        streams = self.streams
        if streams is None:
            return
        for open_stream in list(streams.by_id.values()):
            open_stream.send(CLOSE)
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        streams.link.on_lost = lambda: None if gone.done() else gone.set_result(None)
        streams.link.close(CloseCode.NORMAL, "the forward has ended")
        await gone


def _bind(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    try:
        with resolving():
            info = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)[0]
    except OSError as exc:
        raise LocalAddressError(f"{host} is not an address of this machine: {exc.strerror or exc}.") from exc
    sock = socket.socket(info[0], info[1], info[2])
    try:
        sock.setblocking(False)
        if kind == socket.SOCK_STREAM and os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
        if kind == socket.SOCK_STREAM:
            sock.listen(LISTEN_BACKLOG)
    except OSError as exc:
        sock.close()
        what = "is already in use" if exc.errno == errno.EADDRINUSE else f"can't be bound ({exc.strerror or exc})"
        message = f"{host}:{port} {what}; choose another with --local-port (0 takes any free one)."
        raise LocalAddressError(message) from exc
    return sock
