"""The server's side of the opening handshake: tunnel WebSockets on uvicorn's port (docs/protocol.md §2, §4).

uvicorn reads the HTTP request and hands an upgrade to the class in its ``ws=`` setting. ``serve_ws`` makes that
class: paths of ours go through the ``websockets`` library's sans-I/O ``ServerProtocol`` to a link, so that the data
path never touches ASGI; all other WebSockets go to uvicorn's own implementation.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from kohakuriver._frame import FrameWalker, build_ws
from kohakuriver.errors import KohakuRiverError, NotAllowedError
from kohakuriver.tunnel.link import Link, LinkHandler
from kohakuriver.tunnel.protocol import OP_TEXT, TUNNEL_V2

MAX_EARLY = 64 * 1024

logger = logging.getLogger("kohakuriver.tunnel")


@dataclass
class UpgradeRequest:
    """One WebSocket's opening handshake, waiting for our answer.

    ``path`` is decoded and without its query; ``token`` is the bearer credential, None where there is none.
    """

    path: str
    query: dict[str, str]
    token: str | None
    peer: str
    offers_v2: bool
    headers: Headers
    _upgrade: Upgrade = field(repr=False)

    def accept(self, walker: FrameWalker, handler: LinkHandler, *, version: int = 2) -> Link:
        """Answer 101 with the subprotocol of ``version`` (1: none); the link has started when this returns."""
        return self._upgrade.accept(walker, handler, version if self.offers_v2 else 1)

    def reject(self, status: int, code: str, message: str) -> None:
        """Answer with an HTTP error and close."""
        self._upgrade.reject(status, {"error": code, "message": message})

    def fail(self, error: KohakuRiverError, *, close_code: int = 1008) -> None:
        """Refuse a session in the peer's version: an HTTP status, or on v1 the text ``Error: …`` and a close.

        Missing or wrong credentials are HTTP statuses in either version.
        """
        if self.offers_v2 or isinstance(error, NotAllowedError):
            self.reject(error.status, error.code, str(error))
            return
        link = self.accept(FrameWalker(masked=True), Ignore(), version=1)
        greet(link, f"Error: {error}")
        link.close(close_code, str(error))

    @property
    def gone(self) -> bool:
        """Whether the peer has hung up while it waited."""
        return self._upgrade.gone


class TunnelRoute(Protocol):
    """A family of WebSocket paths that links are opened on."""

    def match(self, path: str) -> bool:
        """Whether ``path`` is one of them."""

    async def open(self, request: UpgradeRequest) -> None:
        """Answer the request: accept, reject or fail. KohakuRiverError that it raises is passed to ``fail``."""


class Ignore:
    """The handler of a link that is only being closed."""

    def link_received(self, link: Link, start: int, stop: int) -> int:
        while True:
            messages, consumed = link.walker.walk(link.buffer.data, start, stop)
            for message in messages:
                if message[0] > 0x101:
                    link.control(message)
            if not messages:
                return consumed
            start = consumed

    def link_drained(self, link: Link) -> None:
        pass

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        pass


def greet(link: Link, text: str) -> None:
    """Send a session's first message."""
    link.send(build_ws(OP_TEXT, text.encode()))


class Upgrade(asyncio.Protocol):
    """One connection between uvicorn's HTTP parser and its link (or uvicorn's own WebSocket protocol)."""

    def __init__(self, routes: Sequence[TunnelRoute], config: Config, state: ServerState, app: dict[str, Any]) -> None:
        self._routes = routes
        self._uvicorn = (config, state, app)
        self._state = state
        self._other: WebSocketsSansIOProtocol | None = None
        self._handshake = ServerProtocol(select_subprotocol=lambda _, offered: self._select(offered), max_size=None)
        self._request: Request | None = None
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._early = b""
        self._task: asyncio.Task[None] | None = None
        self._answered = False
        self._version = 1
        self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._other is not None:
            self._other.data_received(data)
        elif self._task is not None:  # frames before our 101: a client that obeys RFC 6455 sends none
            self._early += data
            if len(self._early) > MAX_EARLY:
                self._transport.abort()
        else:
            self._begin(data)

    def _begin(self, data: bytes) -> None:
        target = data.split(b" ", 2)[1].decode("latin-1")
        parts = urlsplit(target)
        path = unquote(parts.path)
        route = next((route for route in self._routes if route.match(path)), None)
        if route is None:
            self._hand_to_uvicorn(data)
            return
        self._state.connections.add(self)  # type: ignore[arg-type]  # any object with shutdown() will do
        self._handshake.receive_data(data)
        events = self._handshake.events_received()
        if not events or not isinstance(events[0], Request):
            self._task = asyncio.get_running_loop().create_task(_nothing())
            self.reject(400, {"error": "bad_request", "message": "this is not a WebSocket handshake"})
            return
        self._request = events[0]
        request = self._describe(path, dict(parse_qsl(parts.query)), self._request.headers)
        self._task = asyncio.get_running_loop().create_task(self._open(route, request))

    def _hand_to_uvicorn(self, data: bytes) -> None:
        self._other = WebSocketsSansIOProtocol(*self._uvicorn)
        self._other.connection_made(self._transport)
        self._other.data_received(data)
        # uvicorn sets us as the protocol when we return; its own takes over right after that.
        asyncio.get_running_loop().call_soon(self._transport.set_protocol, self._other)

    def _describe(self, path: str, query: dict[str, str], headers: Headers) -> UpgradeRequest:
        scheme, _, credential = headers.get("Authorization", "").partition(" ")
        token = credential.strip() if scheme.lower() == "bearer" and credential.strip() else None
        offered = ",".join(headers.get_all("Sec-WebSocket-Protocol"))
        name = self._transport.get_extra_info("peername")
        peer = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "?"
        offers_v2 = TUNNEL_V2 in {item.strip() for item in offered.split(",")}
        return UpgradeRequest(path, query, token, peer, offers_v2, headers, self)

    async def _open(self, route: TunnelRoute, request: UpgradeRequest) -> None:
        try:
            await route.open(request)
        except KohakuRiverError as error:
            if not self._answered:
                request.fail(error, close_code=1008 if error.status < 500 else 1011)
        except Exception:
            logger.exception("the opening of %s failed", request.path)
            if not self._answered:
                self.reject(500, {"error": "failed", "message": "this WebSocket could not be opened; see the log"})

    def _select(self, offered: Sequence[Subprotocol]) -> Subprotocol | None:
        return Subprotocol(TUNNEL_V2) if self._version == 2 and TUNNEL_V2 in offered else None

    def accept(self, walker: FrameWalker, handler: LinkHandler, version: int) -> Link:
        """Answer 101. Where the request is not a valid handshake, the answer says so and the link is dead."""
        assert self._request is not None
        self._answered = True
        self._version = version
        link = Link(handler, walker, masks=False, version=version)
        response = self._handshake.accept(self._request)
        self._handshake.send_response(response)
        connections = self._state.connections
        connections.discard(self)
        connections.add(link)  # type: ignore[arg-type]
        link.on_lost = lambda: connections.discard(link)
        self._transport.writelines(self._handshake.data_to_send())
        link.start(self._transport, self._early)
        if response.status_code != 101:
            link.abort()
        return link

    def reject(self, status: int, body: dict[str, str]) -> None:
        """Answer with an HTTP error."""
        self._answered = True
        self._state.connections.discard(self)
        content = json.dumps(body).encode()
        headers = Headers([("Content-Type", "application/json"), ("Content-Length", str(len(content)))])
        headers["Connection"] = "close"
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        self._transport.write(Response(status, http.HTTPStatus(status).phrase, headers, content).serialize())
        self._transport.close()

    def shutdown(self) -> None:
        """The server is going down."""
        if not self._answered:
            self.reject(503, {"error": "unavailable", "message": "the server is shutting down"})

    def eof_received(self) -> bool:
        if self._other is not None:
            self._other.eof_received()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._state.connections.discard(self)
        if self._other is not None:
            self._other.connection_lost(exc)
        elif self._task is not None and not self._answered:
            self._task.cancel()


async def _nothing() -> None:
    pass


def serve_ws(routes: Sequence[TunnelRoute]) -> type[asyncio.Protocol]:
    """The class for ``uvicorn.Config(ws=…)`` that serves ``routes`` and leaves other WebSockets to uvicorn."""

    class RoutedUpgrade(Upgrade):
        def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
            super().__init__(routes, config, server_state, app_state)

    return RoutedUpgrade
