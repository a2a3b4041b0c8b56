"""Hop 4: the container's end of a tunnel, which accepts streams and dials (docs/protocol.md §2–§3).

The Python tunnel client is one, and so is a runner for tasks that it reaches by address.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

from kohakuriver.tunnel.endpoint import AnyStream, Endpoint, Share
from kohakuriver.tunnel.error_text import LACKING, service_error
from kohakuriver.tunnel.keeper import UNKNOWN, Keeper
from kohakuriver.tunnel.kept import Identity, accepted_kept
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import (
    CLOSE,
    CONNECTED,
    ERROR,
    FULL_HOLD,
    LONGEST_HOLD,
    MARK,
    PROTO_TCP,
    PROTO_UDP,
    RESUME,
    RESUMED,
    REVOKE,
    SESSION_ID,
    Attached,
    ErrorText,
    Opening,
    Resuming,
    Roll,
    hold_after,
    parse_limit,
    parse_seconds,
)
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.sockets import not_itself
from kohakuriver.tunnel.states import Role, State
from kohakuriver.tunnel.stream import accepted
from kohakuriver.tunnel.streams import Streams
from kohakuriver.tunnel.udp import UdpStream, family_of
from kohakuriver.tunnel.udp_service import Refusals, UdpService

_NOT_CARRIED = ErrorText("EPROTONOSUPPORT", "only TCP and UDP are carried here")
_NOT_NEWER = ErrorText("ESTALE", "the connection has been taken up again since")

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

    Large because the messages that open a stream and those that take one up again lead to the same dials.

    Args:
        hosts: addresses to try in turn, e.g. ``("127.0.0.1", "::1")``.
        where: how error texts name the place, e.g. "in the task".
        refuses: (port, streams that are open) → why a stream may not be opened, or None. What a CONNECT calls port 0 is
            ``default_port``.
        network: where to dial from instead of this process's own network; it says itself which addresses.
        keeper: the streams that outlive links, of all links that lead to the same place.
        mark: whose all streams of this link are, where that is known here and not from a runner's messages.
        share: what its streams may hold together with those of other endpoints.
    """

    role = Role.ACCEPTOR
    linger = 0.2  # a service that has closed rarely waits for more

    def __init__(
        self,
        hosts: Sequence[str] = ("127.0.0.1", "::1"),
        *,
        config: EndpointConfig | None = None,
        where: str = "in the task",
        refuses: Callable[[int, int], ErrorText | None] = lambda port, streams: None,
        default_port: int = 0,
        network: Network | None = None,
        keeper: Keeper | None = None,
        mark: bytes | None = None,
        share: Share | None = None,
    ) -> None:
        super().__init__(config, share)
        self.keeper = Keeper() if keeper is None else keeper
        self._mark = mark
        self._hold = FULL_HOLD
        self.network = network
        self.hosts = hosts
        self.where = where
        self.refuses = refuses
        self.default_port = default_port
        self.refusals = Refusals()
        self._dialling: dict[asyncio.Task[None], AnyStream | None] = {}

    def accept(self, client_id: int, proto: int, port: int, payload: bytes) -> None:
        streams = self.streams
        if client_id == SESSION_ID or streams is None or client_id in streams.by_id:
            self.totals.unknown_messages += 1
            return
        port = port or self.default_port
        opening = Opening.parse(payload)
        identity = None if opening is None else self._identity(opening, port)
        if identity is not None and self.keeper.knows(identity.name):
            return
        refusal = self.refuses(port, len(streams)) if proto in (PROTO_TCP, PROTO_UDP) else _NOT_CARRIED
        if refusal is not None:
            streams.link.send_message(ERROR, client_id, refusal.pack(), proto=proto)
        elif proto == PROTO_UDP:
            peer = self._accept_udp(streams, client_id, port, identity)
            self.dial_soon(self._dial_udp(peer), peer)
        else:
            if opening is not None and identity is not None:
                stream = TcpStream(self, port, accepted_kept(self.rules, identity, opening.limit))
                self.keeper.enter(identity, stream)
            else:
                stream = TcpStream(self, port, accepted(self.rules, parse_limit(payload)))
            stream.at = streams.enter(stream, client_id)
            self.dial_soon(self._dial_tcp(stream), stream)

    def _identity(self, opening: Opening, port: int) -> Identity:
        return Identity(opening.key, min(opening.hold, LONGEST_HOLD), self._whose(opening.mark), port)

    def _whose(self, mark: bytes) -> bytes:
        return mark if self._mark is None else self._mark

    def _accept_udp(self, streams: Streams, client_id: int, port: int, identity: Identity | None) -> UdpStream:
        stream = UdpStream(self, port, identity)
        stream.hold()  # at once: its first datagrams may have come in the same read
        stream.at = streams.enter_udp(stream, client_id)
        if identity is not None:
            self.keeper.enter(identity, stream)
        return stream

    # -- kept streams ------------------------------------------------------------------------------------------

    def kept_message(self, kind: int, client_id: int, proto: int, port: int, payload: bytes) -> None:
        asked = Resuming.parse(payload) if kind == RESUME else None
        roll = Roll.parse(payload) if kind == RESUME and client_id == SESSION_ID else None
        if asked is not None and client_id != SESSION_ID and self.streams is not None:
            if client_id not in self.streams.by_id:
                self._resume(self.streams, client_id, proto, port or self.default_port, asked)
        elif roll is not None:
            self.keeper.call_roll(self._whose(roll.mark) + roll.opener, roll.epoch)
        elif kind == REVOKE and client_id == SESSION_ID and self._mark is None and len(payload) >= MARK:
            reason = payload[MARK:].decode("utf-8", "replace")
            self.keeper.revoke(payload[:MARK], ErrorText("EACCES", reason))
        else:
            self.totals.unknown_messages += 1

    def _resume(self, streams: Streams, client_id: int, proto: int, port: int, asked: Resuming) -> None:
        """Go on with a stream under another id, or say why not (rules 1, 5 and 8 of kept streams)."""
        name = self._whose(asked.mark) + asked.key
        stream = self.keeper.find(name)
        identity = None if stream is None else stream.identity
        if stream is None or identity is None:
            self._too_late(streams, client_id, proto, name)
        elif identity.port != port or isinstance(stream, UdpStream) != (proto == PROTO_UDP):
            streams.link.send_message(ERROR, client_id, UNKNOWN.pack(), proto=proto)
        elif asked.epoch <= identity.epoch:
            streams.link.send_message(ERROR, client_id, _NOT_NEWER.pack(), proto=proto)
        else:
            stream.unlink()
            self.keeper.attached(stream)
            identity.epoch = asked.epoch
            self._go_on(streams, client_id, stream, asked)

    def _go_on(self, streams: Streams, client_id: int, stream: AnyStream, asked: Resuming) -> None:
        stream.owner = self
        if isinstance(stream, UdpStream):
            stream.at = streams.enter_udp(stream, client_id, again=True)
            stream.send(RESUMED, Attached(0, 0, 0).pack())
        elif stream.kept is not None:
            stream.attach(streams.enter(stream, client_id, again=True), stream.kept.resume(asked, self.budget))

    def _too_late(self, streams: Streams, client_id: int, proto: int, name: bytes) -> None:
        tombstone = self.keeper.tombstone(name)
        if tombstone is None:
            self.keeper.never_was(name)
        answer = streams.link.send_message
        if tombstone is not None and not tombstone.error:
            answer(RESUMED, client_id, tombstone.attachment, proto=proto)
            answer(CLOSE, client_id, proto=proto)
        else:
            answer(ERROR, client_id, UNKNOWN.pack() if tombstone is None else tombstone.error, proto=proto)

    def detach_stream(self, stream: AnyStream, payload: bytes) -> None:
        asked = parse_seconds(payload)
        self._hold = FULL_HOLD if asked is None else asked[0]
        if not stream.detach():
            self._closed_by_peer(stream)
        self._hold = FULL_HOLD

    def _closed_by_peer(self, stream: AnyStream) -> None:
        """DETACH of a stream that is not kept is CLOSE."""
        if isinstance(stream, UdpStream):
            stream.over()
        else:
            stream.act(stream.core.remote_close())

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        self._hold = hold_after(code)
        super().link_closed(link, code, reason)

    def stream_detached(self, stream: AnyStream) -> None:
        self.keeper.detached(stream, self._hold)

    def stream_over(self, stream: AnyStream) -> None:
        self.keeper.over(stream)

    # -- dialling ----------------------------------------------------------------------------------------------

    def dial_soon(self, dial: Coroutine[Any, Any, None], stream: AnyStream | None = None) -> None:
        """Dial until the endpoint is closed; for a kept stream until it is over."""
        task = asyncio.get_running_loop().create_task(dial)
        self._dialling[task] = stream
        task.add_done_callback(self._dialling.pop)

    async def _dial_tcp(self, stream: TcpStream) -> None:
        first: BaseException | None = None
        try:
            hosts = await self._addresses(stream.port, udp=False)
        except OSError as exc:
            stream.failed(exc)
            return
        for host in hosts:
            failure = await self._try(stream, host)
            if failure is None:
                return
            elsewhere = isinstance(failure, OSError) and failure.errno in _ELSEWHERE
            # The first answer tells most: the next address may not even exist, as ::1 without IPv6.
            first = first if first is not None and elsewhere else failure
            if not elsewhere:
                break
        stream.failed(first or OSError(errno.EHOSTUNREACH, "no address"))

    async def udp_addresses(self, port: int) -> Iterable[str]:
        """Where datagrams for `port` are sent, in turn. Raises OSError where this end lacks something."""
        return await self._addresses(port, udp=True)

    async def _addresses(self, port: int, *, udp: bool) -> Iterable[str]:
        """Where to dial; none in a network that has gone. Raises OSError where this end lacks something."""
        if self.network is None:
            return self.addresses(port, udp=udp)
        try:
            return await self.network.addresses(port, udp=udp)
        except OSError as exc:
            if exc.errno in LACKING:
                raise
            return ()

    def addresses(self, port: int, *, udp: bool) -> Iterable[str]:
        """The addresses to try for `port` in this process's own network, one at least."""
        return self.hosts

    async def open_socket(self, host: str, kind: int) -> socket.socket:
        """A non-blocking socket that reaches `host`. Raises OSError."""
        if self.network is not None:
            return await self.network.open_socket(family_of(host), kind)
        sock = socket.socket(family_of(host), kind)
        sock.setblocking(False)
        return sock

    async def _connect(self, stream: TcpStream, host: str) -> None:
        loop = asyncio.get_running_loop()
        sock = await self.open_socket(host, socket.SOCK_STREAM)
        try:
            await loop.sock_connect(sock, (host, stream.port))
            not_itself(sock)
            if (
                stream.core.state is State.OVER
            ):  # a transport that is reset as soon as it is made would leave the socket
                sock.close()
                return
            await loop.create_connection(lambda: stream, sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _try(self, stream: TcpStream, host: str) -> BaseException | None:
        try:
            await asyncio.wait_for(self._connect(stream, host), self.config.dial_timeout)
        except (OSError, asyncio.TimeoutError) as exc:
            return exc
        return None

    def socket_ready(self, stream: TcpStream) -> None:
        stream.act(stream.core.dialled())

    def socket_error(self, stream: TcpStream, exc: BaseException) -> ErrorText:
        return service_error(exc, stream.port, self.where)

    async def _dial_udp(self, stream: UdpStream) -> None:
        service = UdpService(stream, self)
        try:
            await service.open()
        except OSError as exc:
            stream.send(ERROR, service_error(exc, stream.port, self.where).pack())
            stream.over()
            return
        if stream.gone:
            service.close()
            return
        stream.send(CONNECTED)
        stream.release()

    async def close(self) -> None:
        """End every stream and dial, but for those that wait for another link; the link is left to its owner."""
        if self.streams is not None:
            self.detach("the tunnel is closed")
        for task, stream in list(self._dialling.items()):
            if stream is None or stream.identity is None:
                task.cancel()
