"""The client's side of the opening handshake, up to the ``CONNECTED`` of a forward session (docs/protocol.md §2–§5).

Built on the ``websockets`` library's sans-I/O ``ClientProtocol``: it makes the request and judges the answer; the
frames that follow are the link's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl as tls
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidURI
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI, parse_uri

from kohakuriver import tracing
from kohakuriver._frame import FIRST, LAST, WS_TEXT, FrameViolation, FrameWalker, Message
from kohakuriver.errors import (
    HostUnreachableError,
    KohakuRiverError,
    UnavailableError,
    UsageError,
    from_answer,
    from_status,
)
from kohakuriver.http_proxy import Connect, HttpProxy
from kohakuriver.no_connection import reason as why
from kohakuriver.resolve import resolving
from kohakuriver.tls import hung_up
from kohakuriver.tls import reason as tls_reason
from kohakuriver.tunnel.closing import CLOSE_WAIT
from kohakuriver.tunnel.link import Link, LinkHandler
from kohakuriver.tunnel.message_link import MAX_MESSAGE, MessageLink
from kohakuriver.tunnel.protocol import CLIENT_HEADER, REFUSAL_HEADER, TASK_HEADER, TUNNEL_V2, CloseCode
from kohakuriver.tunnel.sockets import not_itself
from kohakuriver.unix_sockets import address_of

MAX_HEAD = 64 * 1024
MAX_GREETING = 4096


@dataclass(frozen=True)
class Server:
    """Whose WebSocket is to be opened, and how.

    Args:
        url: its address, ws:// or wss://.
        token: the credential to show.
        ssl: how its certificate is checked where the address is wss://; None for the system's authorities.
        proxy: the HTTP proxy that leads there, None for none. Whoever runs for a user asks `http_proxy` for it.
        timeout: how long opening may take, in seconds.
        peer: what runs there, "host" or "runner", for messages.
        client: a tunnel client's id, which it made for itself; None for who is none.
        socket: the Unix socket that leads there instead of what the url names.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    ssl: tls.SSLContext | None = None
    proxy: HttpProxy | None = None
    timeout: float = 10.0
    peer: str = "host"
    client: str | None = field(default=None, repr=False)
    socket: Path | None = None

    @property
    def where(self) -> str:
        """The server as people write it: with http and https, or its socket."""
        if self.socket is not None:
            return f"unix:{self.socket}"
        parts = urlsplit(self.url)
        return f"{parts.scheme.replace('ws', 'http', 1)}://{parts.netloc}"

    def unreachable(self, reason: str) -> HostUnreachableError:
        """The error for a server that can't be reached, with the reason as a clause."""
        return HostUnreachableError(
            f"The {self.peer} at {self.where} can't be reached: {reason.rstrip('.')}.", url=self.where, reason=reason
        )

    def late(self, what: str) -> HostUnreachableError:
        """The error for a server that did not do `what` in time."""
        how = f"did not {what} within {self.timeout:g} s"
        message = f"The {self.peer} at {self.where} {how}."
        return HostUnreachableError(message, code="timed_out", status=504, reason=f"it {how}")

    def check(self, protocol: ClientProtocol, response: Response) -> None:
        """Raise what a refused handshake means."""
        if protocol.handshake_exc is None:
            return
        if response.status_code != 101:
            location = response.headers.get("Location", "")
            body = bytes(response.body or b"")
            raise from_answer(self.where, response.status_code, body, location=location, upgrade=True)
        if isinstance(protocol.handshake_exc, InvalidHandshake):
            raise self.unreachable(f"its WebSocket handshake is wrong: {protocol.handshake_exc}")
        raise protocol.handshake_exc


class _Opening(asyncio.Protocol):
    """A TCP connection on which the opening handshake runs."""

    def __init__(self, asked: Server, protocol: ClientProtocol, headers: dict[str, str]) -> None:
        self.asked = asked
        self.protocol = protocol
        self.headers = headers
        self.answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.rest = b""
        self._head: bytes | None = b""
        self._done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        request = self.protocol.connect()
        for name, value in self.headers.items():
            request.headers[name] = value
        self.protocol.send_request(request)
        for data in self.protocol.data_to_send():
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if self._done:
            self.rest += data
        elif self._head is None:
            self._feed(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end >= 0:
                self._take_head(self._head, end + 4)
            elif len(self._head) > MAX_HEAD:
                self._fail("its answer to the handshake has no end")

    def hand_over(self, link: Link | MessageLink) -> None:
        """Give the connection to `link`, with what came right behind the handshake."""
        link.start(self.transport, self.rest)
        self.transport.resume_reading()

    def _take_head(self, data: bytes, end: int) -> None:
        self._head = None
        if data.split(b" ", 2)[1:2] == [b"101"]:  # frames may follow at once: only the head is the library's
            self.rest, data = data[end:], data[:end]
            self.transport.pause_reading()
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        self.protocol.receive_data(data)
        self._check()

    def _check(self) -> None:
        for event in self.protocol.events_received():
            if isinstance(event, Response):
                self._done = True
                if not self.answered.done():
                    self.answered.set_result(event)
        if not self._done and self.protocol.handshake_exc is not None:
            nothing_came = isinstance(self.protocol.handshake_exc.__cause__, EOFError)
            self._fail(hung_up(self.asked.url) if nothing_came else str(self.protocol.handshake_exc))

    def eof_received(self) -> None:
        if not self._done:
            self.protocol.receive_eof()
            self._check()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None or isinstance(exc, ConnectionError):
            self._fail(hung_up(self.asked.url))
        else:
            self._fail(tls_reason(exc) or str(exc))

    def _fail(self, reason: str) -> None:
        self._done = True
        if not self.answered.done():
            self.answered.set_exception(self.asked.unreachable(reason))
        self.transport.abort()


class _Tunnel(asyncio.Protocol):
    """A TCP connection to a proxy, on which a tunnel to the server is asked for."""

    def __init__(self, proxy: HttpProxy, connect: Connect) -> None:
        self._proxy = proxy
        self._connect = connect
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._connect.request)

    def data_received(self, data: bytes) -> None:
        if self.opened.done():
            return
        try:
            if self._connect.feed(data):
                self.opened.set_result(None)
        except HostUnreachableError as error:
            self.opened.set_exception(error)

    def eof_received(self) -> None:
        self.data_received(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self.opened.done():
            self.opened.set_exception(self._proxy.unreachable(why(exc)))
        self.data_received(b"")


async def open_link(
    server: Server, walker: FrameWalker, handler: LinkHandler, *, subprotocols: Sequence[str] = (TUNNEL_V2,)
) -> Link:
    """Dial ``server`` and go through the opening handshake; the link has started when this returns.

    Raises HostUnreachableError where nobody answers or not a server of ours, else the error that it tells
    (docs/protocol.md §4).
    """
    opening = await _dial(server, subprotocols)
    return _link(opening, walker, handler)


def _link(opening: _Opening, walker: FrameWalker, handler: LinkHandler) -> Link:
    link = Link(handler, walker, masks=True, version=2 if opening.protocol.subprotocol == TUNNEL_V2 else 1)
    opening.hand_over(link)
    return link


async def open_messages(
    server: Server, *, subprotocols: Sequence[str] = (), max_message: int = MAX_MESSAGE
) -> MessageLink:
    """Like `open_link`, for a WebSocket of whole messages, each of at most ``max_message`` bytes."""
    opening = await _dial(server, subprotocols, max_message)
    link = MessageLink(opening.protocol, subprotocol=opening.protocol.subprotocol)
    opening.hand_over(link)
    return link


async def _dial(server: Server, subprotocols: Sequence[str], max_message: int = MAX_MESSAGE) -> _Opening:
    """An opening that was answered with 101, reading paused."""
    try:
        uri = parse_uri(server.url)
    except (InvalidURI, ValueError) as exc:
        raise UsageError(f"{server.url} is not a WebSocket address.") from exc
    offered = [Subprotocol(s) for s in subprotocols] or None
    protocol = ClientProtocol(uri, subprotocols=offered, max_size=max_message)
    headers = {"User-Agent": "kohakuriver", **tracing.headers()}
    if server.token:
        headers["Authorization"] = f"Bearer {server.token}"
    if server.client:
        headers[CLIENT_HEADER] = server.client
    opening = _Opening(server, protocol, headers)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + server.timeout
    tunnel = await _tunnel(server.proxy, uri, server.timeout) if server.proxy else None
    if tunnel is not None:
        opening.transport = tunnel
    try:
        # Also where this is given up in the moment in which the answer has come: up to Python 3.11 that is lost then.
        with _aborting_unless_done(lambda: opening.transport):
            await asyncio.wait_for(_open(opening, uri, tunnel), max(0.0, deadline - loop.time()))
    except asyncio.TimeoutError as exc:
        raise server.late("answer") from exc
    return opening


async def _tunnel(proxy: HttpProxy, uri: WebSocketURI, timeout: float) -> asyncio.Transport:
    """A connection that leads through `proxy` to the server."""

    transport: asyncio.Transport | None = None

    async def connect() -> asyncio.Transport:
        nonlocal transport
        tunnel = _Tunnel(proxy, Connect(proxy, uri.host, uri.port))
        context = tls.create_default_context() if proxy.secure else None
        with _asking(tunnel.opened):
            transport = await _connect(lambda: tunnel, proxy.host, proxy.port, context)
            await tunnel.opened
        return transport

    try:
        with _aborting_unless_done(lambda: transport):  # as in `_dial`
            return await asyncio.wait_for(connect(), timeout)
    except asyncio.TimeoutError as exc:
        raise proxy.late(timeout) from exc
    except OSError as exc:
        raise proxy.unreachable(why(exc)) from exc


async def _open(opening: _Opening, uri: WebSocketURI, tunnel: asyncio.Transport | None) -> None:
    """Go through the handshake, in a `tunnel` or by a connection of its own."""
    server = opening.asked
    context = (server.ssl or tls.create_default_context()) if uri.secure else None
    loop = asyncio.get_running_loop()
    with _asking(opening.answered):
        try:
            if server.socket is not None:
                await _connect_to_socket(lambda: opening, server.socket)
            elif tunnel is None:
                dialled = await _connect(lambda: opening, uri.host, uri.port, context)
                not_itself(dialled.get_extra_info("socket"))
            elif tunnel.is_closing():
                raise ConnectionResetError(errno.ECONNRESET, "")
            elif context is None:
                tunnel.set_protocol(opening)
                opening.connection_made(tunnel)
            else:
                secured = await loop.start_tls(tunnel, opening, context, server_hostname=uri.host)
                opening.connection_made(cast(asyncio.Transport, secured))
        except OSError as exc:
            raise server.unreachable(why(exc)) from exc
        server.check(opening.protocol, await opening.answered)


@contextlib.contextmanager
def _asking(answer: asyncio.Future[Any]) -> Iterator[None]:
    """While this lasts somebody waits for the answer; what it says, or would say, later is nothing that was missed."""
    try:
        yield
    finally:
        if not answer.cancel() and not answer.cancelled():
            answer.exception()


async def _connect(
    protocol: Callable[[], asyncio.Protocol], host: str, port: int, context: tls.SSLContext | None
) -> asyncio.Transport:
    """As the loop's own `create_connection`, of which uvloop's can't be left while it looks a name up."""
    loop = asyncio.get_running_loop()
    sock = await _connected(host, port)
    name = host if context is not None else None
    transport, _ = await loop.create_connection(protocol, sock=sock, ssl=context, server_hostname=name)
    return transport


async def _connect_to_socket(protocol: Callable[[], asyncio.Protocol], path: Path) -> None:
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        with address_of(path) as address:
            await loop.sock_connect(sock, address)
        await loop.create_unix_connection(protocol, sock=sock)
    except BaseException:
        sock.close()
        raise


async def _connected(host: str, port: int) -> socket.socket:
    """A socket that is connected to the first address that takes it. Raises OSError."""
    loop = asyncio.get_running_loop()
    with resolving():
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure = OSError(errno.EADDRNOTAVAIL, "it has no address")
    for family, kind, proto, _, address in addresses:
        sock = socket.socket(family, kind, proto)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
        except OSError as error:
            failure = error
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


@contextlib.contextmanager
def _aborting_unless_done(transport: Callable[[], asyncio.Transport | None]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if (left := transport()) is not None:
            left.abort()
        raise


class _Greeting:
    """Holds a fresh session link until its first message: the text ``CONNECTED``, or ``Error: …`` and a close."""

    def __init__(self, wanted: str) -> None:
        loop = asyncio.get_running_loop()
        self._wanted = wanted
        self.text: asyncio.Future[str] = loop.create_future()
        self.ended: asyncio.Future[int] = loop.create_future()
        self._opened = False
        self._parts = b""

    def link_received(self, link: Link, start: int, stop: int) -> int:
        count = 0
        while not self._opened:
            messages, consumed = link.walker.walk(link.intake.buffer.data, start, stop, 1)
            if not messages:
                return consumed
            start = consumed
            self._take(link, messages[0])
            count += 1
            if link.intake.turn_over(count):
                break
        return start

    def _take(self, link: Link, message: Message) -> None:
        kind, _, _, _, start, stop, flags = message
        if kind != WS_TEXT:
            if kind < WS_TEXT:
                raise FrameViolation(CloseCode.PROTOCOL_ERROR, "a session begins with the text CONNECTED")
            link.control(message)
            return
        self._parts = (b"" if flags & FIRST else self._parts) + bytes(link.intake.buffer.view[start:stop])
        if len(self._parts) > MAX_GREETING:
            raise FrameViolation(CloseCode.TOO_BIG, "the session's first message is too long")
        if flags & LAST and not self.text.done():
            self._told(link, self._parts.decode("utf-8", "replace"))

    def _told(self, link: Link, text: str) -> None:
        self._opened = text == self._wanted
        if self._opened:
            link.walker.allow_text = False
            link.intake.pause(self)
        self.text.set_result(text)

    def link_drained(self, link: Link) -> None:
        pass

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        if not self.text.done():
            self.text.set_exception(HostUnreachableError(reason or f"the session was closed with code {code}"))
        if not self.ended.done():
            self.ended.set_result(code)


async def open_session(
    server: Server,
    *,
    subprotocols: Sequence[str] = (TUNNEL_V2,),
    walker: FrameWalker | None = None,
    greeting: str = "CONNECTED",
) -> Link:
    """Open a forward session and wait for its first message, which is to be ``greeting``.

    The link that is returned reads nothing until ``hand_over`` gives it its handler. Raises KohakuRiverError: from the
    HTTP status (v2), or from what comes with the ``Error: …`` text (v1).
    """
    walker = walker or FrameWalker(masked=False)
    walker.allow_text = True
    with tracing.span(f"open a session at the {server.peer}", "client"):
        return await _open_session(server, subprotocols, walker, greeting)


async def _open_session(server: Server, subprotocols: Sequence[str], walker: FrameWalker, greeting: str) -> Link:
    first = _Greeting(greeting)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + server.timeout
    opening = await _dial(server, subprotocols)
    link = _link(opening, walker, first)
    opened = False
    try:
        text = await asyncio.wait_for(first.text, max(0.0, deadline - loop.time()))
        if text != greeting:
            if text.startswith("CONNECTED"):
                raise server.unreachable("what answers there is not the one that was meant")
            refusal = (await opening.answered).headers.get(REFUSAL_HEADER)
            raise greeting_error(text, refusal or await _close_code(first))
        link.task = (await opening.answered).headers.get(TASK_HEADER, "")
        opened = True
    except asyncio.TimeoutError as exc:
        raise server.late("open the session") from exc
    finally:
        if not opened:
            link.abort()
    return link


async def _close_code(first: _Greeting) -> int:
    await asyncio.wait({first.ended}, timeout=CLOSE_WAIT)
    return first.ended.result() if first.ended.done() else CloseCode.ABNORMAL


def greeting_error(text: str, how: str | int) -> KohakuRiverError:
    """The error that a v1 session's refusal stands for.

    Args:
        text: the session's first message.
        how: the header KohakuRiver-Error of the handshake's answer, which is HTTP status and code; or, from programs of
            version 1, which send none, the code that the session is then closed with.
    """
    reason = text.removeprefix("Error:").strip() or "the session was refused"
    if isinstance(how, int):
        return UnavailableError(reason, status=503 if how == CloseCode.INTERNAL_ERROR else None)
    status, _, code = how.partition(" ")
    return from_status(int(status) if status.isdecimal() else 500, reason, code or None)
