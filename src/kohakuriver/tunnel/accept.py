"""The server's side of the opening handshake: tunnel WebSockets on uvicorn's port (docs/protocol.md §2, §4).

uvicorn reads the HTTP request and hands an upgrade to the class in its ``ws=`` setting. ``serve_ws`` makes that
class: it goes through the ``websockets`` library's sans-I/O ``ServerProtocol`` to a link, so that the data path never
touches ASGI.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Protocol, cast
from urllib.parse import parse_qsl, unquote

from uvicorn.config import Config
from uvicorn.server import ServerState
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from kohakuriver import tracing
from kohakuriver._frame import WS_TEXT, FrameWalker
from kohakuriver.asking import Asker, asker, asking, peer_name
from kohakuriver.errors import (
    HostUnreachableError,
    KohakuRiverError,
    NotAllowedError,
    NotFoundError,
    UsageError,
)
from kohakuriver.proxies import Proxies
from kohakuriver.tunnel.bearer import bearer_token
from kohakuriver.tunnel.link import Link, LinkHandler
from kohakuriver.tunnel.message_link import MAX_MESSAGE, MessageLink
from kohakuriver.tunnel.ports import goes_on
from kohakuriver.tunnel.protocol import CLIENT_HEADER, REFUSAL_HEADER, TUNNEL_V2, CloseCode, ws_text

MAX_EARLY = 64 * 1024

logger = logging.getLogger("kohakuriver.tunnel")


class OriginCheck(Protocol):
    """What judges a request by its `Host` and `Origin` headers and the address that it came to."""

    def check(self, hosts: list[str], origins: list[str], local: str | None) -> None:
        """Return where the request may go on; raises NotAllowedError where not."""


@dataclass(frozen=True)
class Peer:
    """Where a request comes from, and to which of this machine's addresses: without ports, "?" where unknown.

    `door` is the id of the container on whose own Unix socket it came, "" where it came over the network.
    """

    address: str
    local: str = "?"
    door: str = ""

    @classmethod
    def at_door(cls, container: str) -> Peer:
        """One that came by a container's own socket."""
        return cls(f"the socket of {container}", door=container)

    @property
    def on_this_machine(self) -> bool:
        """Whether it comes from this machine itself."""
        if self.door:
            return True
        return self.address != "?" and (self.address == self.local or ip_address(self.address).is_loopback)


@dataclass
class UpgradeRequest:
    """One WebSocket's opening handshake, waiting for our answer.

    ``path`` is decoded and without its query; ``token`` is the bearer credential, None where there is none.
    """

    path: str
    query: dict[str, str]
    token: str | None
    peer: str
    subprotocols: frozenset[str]
    headers: Headers
    _upgrade: Upgrade = field(repr=False)

    @property
    def client(self) -> str:
        """What a tunnel client says to be itself by, "" where it says nothing."""
        return ",".join(self.headers.get_all(CLIENT_HEADER))

    @property
    def whence(self) -> Peer:
        """Where it comes from."""
        return self._upgrade.whence

    @property
    def over_tls(self) -> bool:
        """Whether it came over TLS of ours, or of a proxy's whose word counts."""
        return self._upgrade.over_tls

    @property
    def offers_v2(self) -> bool:
        """Whether the peer speaks v2 of the tunnel protocol."""
        return TUNNEL_V2 in self.subprotocols

    @property
    def goes_on(self) -> bool:
        """Whether it is for a session that goes on for one that was lost."""
        return goes_on(self.query)

    def accept(
        self, walker: FrameWalker, handler: LinkHandler, *, version: int = 2, headers: Mapping[str, str] | None = None
    ) -> Link:
        """Answer 101 with the subprotocol of ``version`` (1: none); the link has started when this returns.

        ``headers`` are more of the answer's.
        """
        return self._upgrade.accept(walker, handler, version if self.offers_v2 else 1, headers or {})

    def accept_messages(self, subprotocol: str | None = None) -> MessageLink:
        """Answer 101 with `subprotocol` where the peer offers it; the WebSocket has started when this returns."""
        return self._upgrade.accept_messages(subprotocol if subprotocol in self.subprotocols else None)

    def reject(self, status: int, code: str, message: str) -> None:
        """Answer with an HTTP error and close."""
        self._upgrade.reject(status, {"error": code, "message": message})

    def fail(self, error: KohakuRiverError) -> None:
        """Refuse a session in the peer's version: an HTTP status, or on v1 the text ``Error: …`` and a close.

        Missing or wrong credentials are HTTP statuses in either version. The close code is 1008 for what the user can
        see to, 1011 for what is out of reach just now: no tunnel, no runner, time-out (docs/protocol.md §4). What kind
        of error it is stands in a header of the answer, for hosts.
        """
        if self.offers_v2 or isinstance(error, NotAllowedError):
            self.reject(error.status, error.code, str(error))
            return
        refusal = {REFUSAL_HEADER: f"{error.status} {error.code}"}
        link = self._upgrade.accept(FrameWalker(masked=True), Ignore(), 1, refusal)
        greet(link, f"Error: {error}")
        out_of_reach = error.status >= 500 or error.code == "tunnel_not_connected"
        link.close(CloseCode.INTERNAL_ERROR if out_of_reach else CloseCode.POLICY, str(error))

    @property
    def gone(self) -> bool:
        """Whether the peer has hung up while it waited."""
        return self._upgrade.gone


class TunnelRoute:
    """A family of WebSocket paths that links are opened on.

    Args:
        path: how the family is written down, each part that differs in braces: "/ws/forward/{task}/{port}".
        answer: answers a request (accept, reject or fail); called with it and the parts that the path has in the place
            of braces. A KohakuRiverError that it raises is passed to ``fail``; one that it returns was told already.
    """

    def __init__(self, path: str, answer: Callable[..., Awaitable[object]]) -> None:
        self.path = path
        self.answer = answer
        self._pattern = re.compile(re.sub(r"\{\w+\}", "([^/]+)", path))

    def match(self, path: str) -> tuple[str, ...] | None:
        """The parts of ``path`` where it is one of these, else None."""
        found = self._pattern.fullmatch(path)
        return None if found is None else found.groups()


class Ignore:
    """The handler of a link that is only being closed."""

    def link_received(self, link: Link, start: int, stop: int) -> int:
        count = 0
        while True:
            messages, consumed = link.walker.walk(link.intake.buffer.data, start, stop)
            for message in messages:
                if message[0] > WS_TEXT:
                    link.control(message)
            count += len(messages)
            if not messages or link.intake.turn_over(count):
                return consumed
            start = consumed

    def link_drained(self, link: Link) -> None:
        pass

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        pass


def greet(link: Link, text: str) -> None:
    """Send a session's first message."""
    link.send(ws_text(text))


def _address(name: object) -> str:
    """A socket's IP address, one of IPv4 always as such."""
    if not isinstance(name, tuple):
        return "?"
    parsed = ip_address(str(name[0]).partition("%")[0])
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


class Upgrade(asyncio.Protocol):
    """One connection between uvicorn's HTTP parser and its link."""

    def __init__(
        self,
        routes: Sequence[TunnelRoute],
        guard: OriginCheck | None,
        state: ServerState,
        max_message: int,
        door: str,
        proxies: Proxies,
    ) -> None:
        self._routes = routes
        self._door = door
        self._guard = guard
        self._proxies = proxies
        self._state = state
        self._handshake = ServerProtocol(
            select_subprotocol=lambda _, offered: self._select(offered), max_size=max_message
        )
        self._request: Request | None = None
        self._description: UpgradeRequest | None = None
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._early = b""
        self._task: asyncio.Task[None] | None = None
        self._answered = False
        self._subprotocol: str | None = None
        self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    @property
    def whence(self) -> Peer:
        """Where the connection comes from."""
        if self._door:
            return Peer.at_door(self._door)
        return Peer(*(_address(self._transport.get_extra_info(name)) for name in ("peername", "sockname")))

    @property
    def over_tls(self) -> bool:
        """Whether the connection is one of TLS, or was to the proxy that asks for somebody."""
        name, request = self._transport.get_extra_info("peername"), self._request
        if request is not None and isinstance(name, tuple):
            told = self._proxies.tls(name[0], request.headers.get_all("X-Forwarded-Proto"))
            if told is not None:
                return told
        return self._transport.get_extra_info("ssl_object") is not None

    def data_received(self, data: bytes) -> None:
        if self._task is not None:  # frames before our 101: a client that obeys RFC 6455 sends none
            self._early += data
            if len(self._early) > MAX_EARLY:
                self._transport.abort()
        else:
            self._begin(data)

    def _begin(self, data: bytes) -> None:
        target = data.split(b" ", 2)[1].decode("latin-1")
        path, _, query = target.partition("?")
        self._state.connections.add(self)  # type: ignore[arg-type]  # any object with shutdown() will do
        self._task = asyncio.get_running_loop().create_task(self._open(unquote(path), query, data))

    async def _open(self, path: str, query: str, data: bytes) -> None:
        peer = self.whence.address if self._door else peer_name(self._transport.get_extra_info("peername"))
        try:
            with asking(Asker(peer, f"GET {path}")) as asker:
                request = self._read_request(path, query, data)
                tracing.begin(
                    tracing.id_in(_header(request, tracing.REQUEST_ID), _header(request, tracing.TRACEPARENT))
                )
                asker.known["request_id"] = tracing.request_id()
                await self._answer_request(request)
        except KohakuRiverError as error:
            self._refuse(error)
        except Exception:
            logger.exception("the opening of %r failed", path)
            if not self._answered:
                message = "this WebSocket could not be opened; see the log"
                self.reject(500, {"error": "failed", "message": message})

    async def _answer_request(self, request: UpgradeRequest) -> None:
        for route in self._routes:
            if (parts := route.match(request.path)) is not None:
                with tracing.span(f"GET {route.path}", "server", parent=_header(request, tracing.TRACEPARENT)):
                    await route.answer(request, *parts)
                return
        error = NotFoundError(f"There is no WebSocket at {request.path}; check the URL.", code="no_such_path")
        self.reject(error.status, error.to_json())

    def _refuse(self, error: KohakuRiverError) -> None:
        if self._answered:
            return
        if self._description is None:
            self.reject(error.status, error.to_json())
        else:
            self._description.fail(error)

    def _read_request(self, path: str, query: str, data: bytes) -> UpgradeRequest:
        """Check the handshake as a whole (RFC 6455 §4.2.1) before anybody acts on it.

        Raises UsageError, NotAllowedError for where it comes from, and UnauthenticatedError.
        """
        self._handshake.receive_data(data)
        events = self._handshake.events_received()
        if not events or not isinstance(events[0], Request):
            raise UsageError("this is not a WebSocket handshake")
        self._request = events[0]
        try:
            response = self._handshake.accept(self._request)
            if response.status_code != 101:
                raise UsageError(bytes(response.body or b"").decode("utf-8", "replace").strip())
            asker().source = self._source(self._request.headers)
            self._check_where_from(self._request.headers)
            description = self._describe(path, dict(parse_qsl(query)), self._request.headers, asker().source)
        except (LookupError, ValueError) as exc:  # a header twice that may be there once, and the like
            raise UsageError(f"this is not a WebSocket handshake: {exc}") from exc
        self._description = description
        return description

    def _source(self, headers: Headers) -> str:
        """Who asks; for whom a proxy does whose word counts."""
        name = self._transport.get_extra_info("peername")
        if self._door or not isinstance(name, tuple):
            return asker().source
        return peer_name(self._proxies.client(name[:2], headers.get_all("X-Forwarded-For")))

    def _check_where_from(self, headers: Headers) -> None:
        if self._guard is not None:
            name = self._transport.get_extra_info("sockname")
            local = name[0] if isinstance(name, tuple) else None
            self._guard.check(headers.get_all("Host"), headers.get_all("Origin"), local)

    def _describe(self, path: str, query: dict[str, str], headers: Headers, peer: str) -> UpgradeRequest:
        token = bearer_token(headers.get_all("Authorization"))
        offered = ",".join(headers.get_all("Sec-WebSocket-Protocol"))
        subprotocols = frozenset(item.strip() for item in offered.split(","))
        return UpgradeRequest(path, query, token, peer, subprotocols, headers, self)

    def _select(self, offered: Sequence[Subprotocol]) -> Subprotocol | None:
        return next((each for each in offered if each == self._subprotocol), None)

    def accept(self, walker: FrameWalker, handler: LinkHandler, version: int, headers: Mapping[str, str]) -> Link:
        """Answer 101. Raises HostUnreachableError if the peer has hung up: nobody would hear of that link again."""
        self._answer(TUNNEL_V2 if version == 2 else None, headers)
        link = Link(handler, walker, masks=False, version=version)
        self._hand_over(link)
        return link

    def accept_messages(self, subprotocol: str | None) -> MessageLink:
        """Answer 101. Raises HostUnreachableError if the peer has hung up."""
        self._answer(subprotocol, {})
        link = MessageLink(self._handshake, subprotocol=subprotocol)
        self._hand_over(link)
        return link

    def _answer(self, subprotocol: str | None, headers: Mapping[str, str]) -> None:
        assert self._request is not None
        if self.gone:
            raise HostUnreachableError("the peer hung up during the handshake")
        self._answered = True
        self._subprotocol = subprotocol
        response = self._handshake.accept(self._request)
        response.headers.update(headers)
        self._handshake.send_response(response)
        self._transport.writelines(self._handshake.data_to_send())

    def _hand_over(self, link: Link | MessageLink) -> None:
        connections = self._state.connections
        connections.discard(self)
        connections.add(link)  # type: ignore[arg-type]
        link.on_lost = lambda: connections.discard(link)
        link.start(self._transport, self._early)

    def reject(self, status: int, body: dict[str, str]) -> None:
        """Answer with an HTTP error."""
        self._answered = True
        self._state.connections.discard(self)
        if self.gone:
            return
        content = json.dumps(body | tracing.told(status)).encode()
        headers = Headers([("Content-Type", "application/json"), ("Content-Length", str(len(content)))])
        headers["Connection"] = "close"
        headers["X-Content-Type-Options"] = "nosniff"
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        self._transport.write(Response(status, http.HTTPStatus(status).phrase, headers, content).serialize())
        self._transport.close()

    def shutdown(self) -> None:
        """The server is going down."""
        if not self._answered:
            self.reject(503, {"error": "unavailable", "message": "the server is shutting down"})

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._state.connections.discard(self)
        if self._task is not None and not self._answered:
            self._task.cancel()


def _header(request: UpgradeRequest, name: str) -> str:
    """The header, "" where it is not there, or there twice."""
    found = request.headers.get_all(name)
    return found[0] if len(found) == 1 else ""


def serve_ws(
    routes: Sequence[TunnelRoute],
    guard: OriginCheck | None = None,
    *,
    max_message: int = MAX_MESSAGE,
    door: str = "",
    proxies: Proxies | None = None,
) -> type[asyncio.Protocol]:
    """The class for ``uvicorn.Config(ws=…)`` that serves ``routes`` and answers 404 for other WebSockets.

    ``guard`` says which Host and Origin headers are taken; without it, all. ``max_message`` is the most
    bytes that a message may have where whole ones are received; a link's walker has a limit of its own. ``door`` is the
    id of the container whose own Unix socket they are served on. ``proxies`` says whose word of where a request comes
    from counts; without it, nobody's.
    """

    class RoutedUpgrade(Upgrade):
        def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
            super().__init__(routes, guard, server_state, max_message, door, proxies or Proxies())

    return RoutedUpgrade
