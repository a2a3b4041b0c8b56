"""The client's side of the opening handshake, up to the ``CONNECTED`` of a forward session (docs/protocol.md §2–§5).

Built on the ``websockets`` library's sans-I/O ``ClientProtocol``: it makes the request and judges the answer; the
frames that follow are the link's.
"""

from __future__ import annotations

import asyncio
import os
import ssl as tls
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidURI
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from kohakuriver._frame import FIRST, LAST, WS_TEXT, FrameViolation, FrameWalker, Message
from kohakuriver.errors import (
    HostUnreachableError,
    KohakuRiverError,
    NotAllowedError,
    NotFoundError,
    UnavailableError,
    UsageError,
    from_answer,
)
from kohakuriver.resolve import resolving
from kohakuriver.tls import hung_up
from kohakuriver.tls import reason as tls_reason
from kohakuriver.tunnel.link import Link, LinkHandler
from kohakuriver.tunnel.message_link import MAX_MESSAGE, MessageLink
from kohakuriver.tunnel.protocol import TUNNEL_V2

MAX_HEAD = 64 * 1024
MAX_GREETING = 4096


@dataclass(frozen=True)
class _Asked:
    """Whose WebSocket is to be opened: what runs there, "host" or "runner", and its URL."""

    url: str
    peer: str

    @property
    def where(self) -> str:
        """The server as people write it: with http and https."""
        parts = urlsplit(self.url)
        return f"{parts.scheme.replace('ws', 'http', 1)}://{parts.netloc}"

    def unreachable(self, reason: str) -> HostUnreachableError:
        """The error for a server that can't be reached, with the reason as a clause."""
        return HostUnreachableError(
            f"The {self.peer} at {self.where} can't be reached: {reason.rstrip('.')}.", url=self.where
        )

    def late(self, what: str, timeout: float) -> HostUnreachableError:
        """The error for a server that did not do `what` in time."""
        message = f"The {self.peer} at {self.where} did not {what} within {timeout:g} s."
        return HostUnreachableError(message, code="timed_out", status=504)

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

    def __init__(self, asked: _Asked, protocol: ClientProtocol, headers: dict[str, str]) -> None:
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
        self._fail(str(exc) if exc else hung_up(self.asked.url))

    def _fail(self, reason: str) -> None:
        self._done = True
        if not self.answered.done():
            self.answered.set_exception(self.asked.unreachable(reason))
        self.transport.abort()


async def open_link(
    url: str,
    walker: FrameWalker,
    handler: LinkHandler,
    *,
    token: str | None = None,
    subprotocols: Sequence[str] = (TUNNEL_V2,),
    ssl: tls.SSLContext | None = None,
    timeout: float = 10.0,
    peer: str = "host",
) -> Link:
    """Dial ``url`` (ws:// or wss://) and go through the opening handshake; the link has started when this returns.

    ``timeout`` is in seconds, for all of it; ``peer`` is what runs there, for messages. Raises HostUnreachableError
    where nobody answers or not a server of ours, else the error that it tells (docs/protocol.md §4).
    """
    opening = await _dial(_Asked(url, peer), token, subprotocols, ssl, timeout)
    link = Link(handler, walker, masks=True, version=2 if opening.protocol.subprotocol == TUNNEL_V2 else 1)
    opening.hand_over(link)
    return link


async def open_messages(
    url: str,
    *,
    token: str | None = None,
    subprotocols: Sequence[str] = (),
    ssl: tls.SSLContext | None = None,
    timeout: float = 10.0,
    peer: str = "host",
    max_message: int = MAX_MESSAGE,
) -> MessageLink:
    """Like `open_link`, for a WebSocket of whole messages, each of at most ``max_message`` bytes."""
    opening = await _dial(_Asked(url, peer), token, subprotocols, ssl, timeout, max_message)
    link = MessageLink(opening.protocol, subprotocol=opening.protocol.subprotocol)
    opening.hand_over(link)
    return link


async def _dial(
    asked: _Asked,
    token: str | None,
    subprotocols: Sequence[str],
    ssl: tls.SSLContext | None,
    timeout: float,
    max_message: int = MAX_MESSAGE,
) -> _Opening:
    try:
        return await asyncio.wait_for(_open(asked, token, subprotocols, ssl, max_message), timeout)
    except asyncio.TimeoutError as exc:
        raise asked.late("answer", timeout) from exc


async def _open(
    asked: _Asked, token: str | None, subprotocols: Sequence[str], ssl: tls.SSLContext | None, max_message: int
) -> _Opening:
    """An opening that was answered with 101, reading paused."""
    try:
        uri = parse_uri(asked.url)
    except (InvalidURI, ValueError) as exc:
        raise UsageError(f"{asked.url} is not a WebSocket address.") from exc
    offered = [Subprotocol(s) for s in subprotocols] or None
    protocol = ClientProtocol(uri, subprotocols=offered, max_size=max_message)
    headers = {"User-Agent": "kohakuriver"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    context = (ssl or tls.create_default_context()) if uri.secure else None
    loop = asyncio.get_running_loop()
    try:
        with resolving():
            _, opening = await loop.create_connection(
                lambda: _Opening(asked, protocol, headers), uri.host, uri.port, ssl=context
            )
    except OSError as exc:
        # asyncio puts the address where the system's own words would be.
        number = exc.errno if isinstance(exc, ConnectionError) else None
        words = exc.strerror or str(exc) if number is None else os.strerror(number)
        raise asked.unreachable(tls_reason(exc) or words) from exc
    try:
        response = await opening.answered
        asked.check(protocol, response)
    except BaseException:
        opening.transport.abort()
        raise
    return opening


class _Greeting:
    """Holds a fresh session link until its first message: the text ``CONNECTED``, or ``Error: …``."""

    def __init__(self) -> None:
        self.text: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._parts = b""

    def link_received(self, link: Link, start: int, stop: int) -> int:
        count = 0
        while not self.text.done():
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
                raise FrameViolation(1002, "a session begins with the text CONNECTED")
            link.control(message)
            return
        self._parts = (b"" if flags & FIRST else self._parts) + bytes(link.intake.buffer.view[start:stop])
        if len(self._parts) > MAX_GREETING:
            raise FrameViolation(1009, "the session's first message is too long")
        if flags & LAST:
            link.walker.allow_text = False
            link.intake.pause(self)
            self.text.set_result(self._parts.decode("utf-8", "replace"))

    def link_drained(self, link: Link) -> None:
        pass

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        if not self.text.done():
            self.text.set_exception(HostUnreachableError(reason or f"the session was closed with code {code}"))


async def open_session(
    url: str,
    *,
    token: str | None = None,
    subprotocols: Sequence[str] = (TUNNEL_V2,),
    ssl: tls.SSLContext | None = None,
    timeout: float = 10.0,
    peer: str = "host",
    walker: FrameWalker | None = None,
) -> Link:
    """Open a forward session and wait for its ``CONNECTED``.

    The link that is returned reads nothing until ``hand_over`` gives it its handler. Raises
    KohakuRiverError: from the HTTP status (v2), or from the ``Error: …`` text (v1).
    """
    greeting = _Greeting()
    walker = walker or FrameWalker(masked=False)
    walker.allow_text = True
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    link = await open_link(
        url, walker, greeting, token=token, subprotocols=subprotocols, ssl=ssl, timeout=timeout, peer=peer
    )
    opened = False
    try:
        text = await asyncio.wait_for(greeting.text, max(0.0, deadline - loop.time()))
        if text != "CONNECTED":
            raise greeting_error(text)
        opened = True
    except asyncio.TimeoutError as exc:
        raise _Asked(url, peer).late("open the session", timeout) from exc
    finally:
        if not opened:
            link.abort()
    return link


def greeting_error(text: str) -> KohakuRiverError:
    """The error that a v1 session's first message stands for."""
    reason = text.removeprefix("Error:").strip() or "the session was refused"
    lower = reason.lower()
    if "no such" in lower or "not found" in lower:
        return NotFoundError(reason)
    if "not allowed" in lower or "credential" in lower:
        return NotAllowedError(reason)
    return UnavailableError(reason, code="tunnel_not_connected" if "not connected" in lower else None)
