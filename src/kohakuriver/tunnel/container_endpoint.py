"""Hop 4: the container's end of a tunnel, which accepts streams and dials (docs/protocol.md §2–§3).

The Python tunnel client is one, and so is a runner for tasks that it reaches by address.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

from kohakuriver.resolve import resolving
from kohakuriver.tunnel.endpoint import Endpoint
from kohakuriver.tunnel.error_text import service_error
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import (
    CONNECTED,
    ERROR,
    PROTO_UDP,
    SESSION_ID,
    ErrorText,
    parse_limit,
)
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.states import Role
from kohakuriver.tunnel.stream import accepted
from kohakuriver.tunnel.streams import Streams
from kohakuriver.tunnel.udp import UdpSocket, UdpStream, connected, connected_datagram_socket, family_of

# After these a service may still listen on another address of its container.
_ELSEWHERE = {errno.ECONNREFUSED, errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EAFNOSUPPORT}


class Network(Protocol):
    """Another network than this process's own, to dial from. Its methods raise OSError."""

    async def addresses(self, port: int, *, udp: bool) -> Sequence[str]:
        """The addresses to try for `port`, in turn."""

    async def open_socket(self, family: int, kind: int) -> socket.socket:
        """A non-blocking socket that is in that network."""


class ContainerEndpoint(Endpoint):
    """Hop 4: accepts streams and dials the service.

    Args:
        hosts: addresses to try in turn, e.g. ``("127.0.0.1", "::1")``.
        where: how error texts name the place, e.g. "in the container".
        refuses: (port, streams that are open) → why a stream may not be opened, or None. What a CONNECT calls port 0 is
            ``default_port``.
        network: where to dial from instead of this process's own network; it says itself which addresses.
    """

    role = Role.ACCEPTOR
    linger = 0.2  # a service that has closed rarely waits for more

    def __init__(
        self,
        hosts: Sequence[str] = ("127.0.0.1", "::1"),
        *,
        config: EndpointConfig | None = None,
        where: str = "in the container",
        refuses: Callable[[int, int], ErrorText | None] = lambda port, streams: None,
        default_port: int = 0,
        network: Network | None = None,
    ) -> None:
        super().__init__(config)
        self.network = network
        self.hosts = hosts
        self.where = where
        self.refuses = refuses
        self.default_port = default_port
        self._dialling: set[asyncio.Task[None]] = set()

    def accept(self, client_id: int, proto: int, port: int, payload: bytes) -> None:
        streams = self.streams
        if client_id == SESSION_ID or streams is None or client_id in streams.by_id:
            self.totals.unknown_messages += 1
            return
        port = port or self.default_port
        refusal = self.refuses(port, len(streams))
        if refusal is not None:
            streams.link.send_message(ERROR, client_id, refusal.pack(), proto=proto)
        elif proto == PROTO_UDP:
            self._dial_soon(self._dial_udp(self._accept_udp(streams, client_id, port)))
        else:
            core = accepted(self.rules, parse_limit(payload))
            stream = TcpStream(self, port, core)
            stream.at = streams.enter(stream, client_id)
            self._dial_soon(self._dial_tcp(stream))

    def _accept_udp(self, streams: Streams, client_id: int, port: int) -> UdpStream:
        stream = UdpStream(self, port)
        stream.hold()  # at once: its first datagrams may have come in the same read
        stream.at = streams.enter_udp(stream, client_id)
        return stream

    def _dial_soon(self, dial: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(dial)
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    async def _dial_tcp(self, stream: TcpStream) -> None:
        first: BaseException | None = None
        for host in await self._addresses(stream.port, udp=False):
            failure = await self._try(stream, host)
            if failure is None:
                return
            elsewhere = isinstance(failure, OSError) and failure.errno in _ELSEWHERE
            # The first answer tells most: the next address may not even exist, as ::1 without IPv6.
            first = first if first is not None and elsewhere else failure
            if not elsewhere:
                break
        stream.failed(first or OSError(errno.EHOSTUNREACH, "no address"))

    async def _addresses(self, port: int, *, udp: bool) -> Iterable[str]:
        """Where to dial; none in a network that has gone."""
        if self.network is None:
            return self.addresses(port, udp=udp)
        try:
            return await self.network.addresses(port, udp=udp)
        except OSError:
            return ()

    def addresses(self, port: int, *, udp: bool) -> Iterable[str]:
        """The addresses to try for `port` in this process's own network, one at least."""
        return self.hosts

    async def _connect_from(self, network: Network, stream: TcpStream, host: str) -> None:
        loop = asyncio.get_running_loop()
        sock = await network.open_socket(family_of(host), socket.SOCK_STREAM)
        try:
            await loop.sock_connect(sock, (host, stream.port))
            await loop.create_connection(lambda: stream, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _try(self, stream: TcpStream, host: str) -> BaseException | None:
        dial: Coroutine[Any, Any, object]
        if self.network is not None:
            dial = self._connect_from(self.network, stream, host)
        else:
            dial = asyncio.get_running_loop().create_connection(lambda: stream, host, stream.port)
        try:
            with resolving():
                await asyncio.wait_for(dial, self.config.dial_timeout)
        except (OSError, asyncio.TimeoutError) as exc:
            return exc
        return None

    def socket_ready(self, stream: TcpStream) -> None:
        stream.act(stream.core.dialled())

    def socket_error(self, stream: TcpStream, exc: BaseException) -> ErrorText:
        return service_error(exc, stream.port, self.where)

    async def _datagram_socket(self, port: int) -> socket.socket:
        if self.network is None:
            return connected_datagram_socket(next(iter(self.addresses(port, udp=True))), port)
        host = (await self.network.addresses(port, udp=True))[0]
        return connected(await self.network.open_socket(family_of(host), socket.SOCK_DGRAM), host, port)

    async def _dial_udp(self, stream: UdpStream) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock = await self._datagram_socket(stream.port)
            transport, _ = await loop.create_datagram_endpoint(lambda: UdpSocket(stream, sock), sock=sock)
        except OSError as exc:
            stream.send(ERROR, service_error(exc, stream.port, self.where).pack())
            stream.over()
            return
        if stream.at is None:
            transport.close()
            return
        stream.send(CONNECTED)
        stream.release()

    async def close(self) -> None:
        """End every stream and dial; the link is left to its owner."""
        for task in list(self._dialling):
            task.cancel()
        if self.streams is not None:
            self.streams.lost()
