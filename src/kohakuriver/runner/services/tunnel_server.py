"""Hop 3: where the users of a container meet on its one tunnel (docs/protocol.md §3–§5).

A *session* is one user's link, a *tunnel* the container's. Both only relay: a message keeps its bytes, and its
ClientID is changed for one that is unique on the other side. Each direction of each link has a routing table that
the frame walker looks ids up in; Python sees only the messages that open, end or half-close a stream.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import structlog

from kohakuriver._frame import WHOLE, WS_TEXT, FrameWalker, Message, RelayWalker, RoutingTable
from kohakuriver.errors import NotAllowedError, UnauthenticatedError, UnavailableError, UsageError
from kohakuriver.limits import Limits, TokenBucket
from kohakuriver.runner.services.traffic import COUNTS, Rates
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest, greet
from kohakuriver.tunnel.buffers import Assembler
from kohakuriver.tunnel.endpoint import ContainerEndpoint, EndpointConfig
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.ports import ports_in
from kohakuriver.tunnel.protocol import (
    CLOSE,
    CONNECT,
    CONNECTED,
    DATA,
    EOF,
    ERROR,
    PING,
    PONG,
    PROTO_TCP,
    SESSION_ID,
    WINDOW,
    CloseCode,
    Counts,
    ErrorText,
)

MAX_CONTROL = 1 << 20
# What a v1 session may have waiting before its tunnel is read no further; v1 can't slow one stream down.
V1_BACKLOG = 1 << 20
# A v2 session's windows are at most 64 MiB, so more than this waiting means that the container ignores them.
V2_BACKLOG = 96 << 20
RENEGOTIATE = 1012
# How long after a user's CLOSE a v1 tunnel client may answer it (seconds); users who wait for less say CLOSE again.
V1_REPLY = 60.0
# How a container's end says that a user broke a window: it can't close the tunnel, which is all users'.
PASSED_WINDOW = "EPROTO"
NO_TUNNEL = ErrorText("ENOTCONN", "the task's tunnel is not connected; is the task running?")

log = structlog.get_logger("kohakuriver.tunnel")
A = TypeVar("A", bound="Side")


class Admission:
    """Whether one session may open one more stream."""

    def __init__(self, limits: Limits, ticket: Ticket | None, named: frozenset[int] | None) -> None:
        """``named`` are the ports that the session is confined to beside what its ticket says, None for all."""
        self._limits = limits
        self._ticket = ticket
        self._named = named
        self._clock = asyncio.get_running_loop().time
        rate = limits.max_connects
        self._bucket = TokenBucket(rate, rate, self._clock()) if rate else None

    def _allows(self, port: int) -> bool:
        by_ticket = self._ticket is None or self._ticket.allows(port)
        return by_ticket and (self._named is None or port in self._named)

    def refusal(self, port: int, streams: int) -> ErrorText | None:
        """Why a stream to ``port`` may not be opened while ``streams`` are open, or None."""
        most, rate = self._limits.max_streams, self._limits.max_connects
        if not self._allows(port):
            return ErrorText("EACCES", f"port {port} is not part of this forward")
        if most and streams >= most:
            return ErrorText("EMFILE", f"this forward has {most} connections open, which is as many as the node allows")
        if self._bucket is not None and not self._bucket.try_take(self._clock()):
            sentence = f"this forward opens more than {rate} connections a second, which the node does not allow"
            return ErrorText("EAGAIN", sentence)
        return None


class Counted(Protocol):
    """What bytes of a container go through."""

    container: str

    def counts(self) -> Counter[str]:
        """How many, and what its endpoint reported."""


class Side:
    """One link of the relay, with its table of ids to the other side's links."""

    def __init__(self, server: TunnelServer, container: str) -> None:
        self.server = server
        self.container = container
        self.walker = RelayWalker(masked=True, max_message=server.limits.max_message)
        self.table = RoutingTable()
        self.link: Link = cast(Link, None)
        self.unknown_messages = 0
        self.unroutable = 0
        self.reported: Counter[str] = Counter()
        self._assembler = Assembler(MAX_CONTROL)

    def link_received(self, link: Link, start: int, stop: int) -> int:
        data, view, relay = link.buffer.data, link.buffer.view, self.walker.relay
        events = 0
        while True:
            runs, event, consumed = relay(data, start, stop, self.table)
            if runs:
                self._pass(runs, view)
            if event is not None:
                self._event(event, view)
                events += 1
                if link.turn_over(events):
                    return consumed
            elif consumed == start or consumed >= stop:
                return consumed
            start = consumed

    def _pass(self, runs: list[tuple[Any, int, int]], view: memoryview) -> None:
        """Send the runs, those of one target together."""
        i, count = 0, len(runs)
        while i < count:
            target: Side = runs[i][0]
            views = [view[runs[i][1] : runs[i][2]]]
            i += 1
            while i < count and runs[i][0] is target:
                views.append(view[runs[i][1] : runs[i][2]])
                i += 1
            if len(views) == 1:
                target.link.send(views[0])
            else:
                target.link.send_many(views)
            self.passed_to(target)

    def _event(self, message: Message, view: memoryview) -> None:
        if message[0] >= WS_TEXT:
            self.link.control(message)
            return
        payload = self._assembler.add(view[message[4] : message[5]], message[6])
        if payload is not None:
            self.message(message[0], message[1], message[2], message[3], payload)

    def message(self, kind: int, proto: int, client_id: int, port: int, payload: bytes) -> None:
        """A message that the walker does not relay by itself."""
        if kind in (CLOSE, ERROR):
            self.end(kind, proto, client_id, payload)
        elif kind == EOF:
            self.half_close(proto, client_id)
        elif kind in (PING, PONG):
            self._ping(kind, proto, client_id, payload)
        elif kind in (DATA, WINDOW, CONNECTED):
            self._route(kind, proto, client_id, payload)
        else:
            self.unknown_messages += 1

    def _route(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        """Pass on what the walker would have, had it not come in fragments; nothing longer can be meant."""
        route = self.table.get(client_id)
        if route is None or len(payload) > WHOLE:
            self.unroutable += 1
            return
        target, other_id = cast("tuple[Side, int]", route)
        target.link.send_message(kind, other_id, payload, proto=proto)
        self.passed_to(target)

    def _ping(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        """A PING on a stream's id goes to the stream's other end; any other is ours to answer."""
        route = self.table.get(client_id)
        if route is not None:
            target, other_id = cast("tuple[Side, int]", route)
            target.link.send_message(kind, other_id, payload, proto=proto, urgent=True)
        elif kind == PING:
            counts = Counts.parse(payload)
            if client_id == SESSION_ID and counts is not None:
                self.reported.update(counts._asdict())
            self.link.send_message(PONG, client_id, payload, proto=proto, urgent=True)

    def counts(self) -> Counter[str]:
        """What came from this side, and what its endpoint reported."""
        raise NotImplementedError

    def passed_to(self, target: Side) -> None:
        """Bytes were just sent to ``target``: see to backpressure."""
        raise NotImplementedError

    def end(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        """CLOSE or ERROR came from this side."""
        raise NotImplementedError

    def half_close(self, proto: int, client_id: int) -> None:
        """EOF came from this side; after both, the ids are free."""
        route = self.table.get(client_id)
        if route is None:
            return
        target, other_id = cast("tuple[Side, int]", route)
        target.link.send_message(EOF, other_id, proto=proto)
        session, user_id = self.user_side(client_id, target, other_id)
        others = session.ended.get(user_id)
        if others is None:
            session.ended[user_id] = self
        elif others is not self:
            self.table.remove(client_id)
            target.table.remove(other_id)
            del session.ended[user_id]

    def user_side(self, client_id: int, target: Side, other_id: int) -> tuple[Session, int]:
        """Of a stream's two (side, id) pairs, the user's."""
        raise NotImplementedError


class Tunnel(Side):
    """A container's one link."""

    def __init__(self, server: TunnelServer, container: str) -> None:
        super().__init__(server, container)
        self._last_id = 0

    def counts(self) -> Counter[str]:
        return self.reported + Counter({"bytes_to_user": self.walker.bytes_routed})

    @property
    def version(self) -> int:
        """What the container's tunnel client speaks."""
        return self.link.version

    def new_id(self) -> int:
        """A ClientID that is free on this tunnel."""
        while True:
            self._last_id = self._last_id + 1 if self._last_id < 0xFFFFFFFF else 1
            if self._last_id not in self.table:
                return self._last_id

    def passed_to(self, target: Side) -> None:
        queued = target.link.queued
        if queued <= V1_BACKLOG:
            return
        if cast(Session, target).version == 1:
            self.link.pause_reading(target)
        elif queued > V2_BACKLOG:
            target.link.fail(1008, "more is waiting for this session than its windows allow")

    def end(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        route, told = self.table.remove(client_id), False
        if route is not None:
            session, user_id = cast("tuple[Session, int]", route)
            session.table.remove(user_id)
            session.ended.pop(user_id, None)
            told = session.forget_closing(user_id)
            session.link.send_message(kind, user_id, payload, proto=proto)
            if kind == ERROR and self.version >= 2 and (text := ErrorText.parse(payload)).code == PASSED_WINDOW:
                session.link.fail(CloseCode.PROTOCOL_ERROR, str(text))
        if self.version == 1 and not told:  # its entry stays until it gets one (§3 rule 9)
            self.link.send_message(CLOSE, client_id, proto=proto)

    def user_side(self, client_id: int, target: Side, other_id: int) -> tuple[Session, int]:
        return cast(Session, target), other_id

    def link_drained(self, link: Link) -> None:
        pass  # the sessions that wait are the link's waiters

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        self.server.tunnel_closed(self, reason or "its tunnel client is gone")


class Session(Side):
    """One user's link to one container."""

    def __init__(
        self, server: TunnelServer, container: str, port: int, proto: int, admission: Admission, newest: int
    ) -> None:
        """``newest`` is the latest version that the user's side speaks."""
        super().__init__(server, container)
        self.newest = newest
        self._closing: dict[int, asyncio.TimerHandle] = {}
        self.port = port
        self.proto = proto
        self.admission = admission
        self.ended: dict[int, Side] = {}

    def counts(self) -> Counter[str]:
        return self.reported + Counter({"bytes_to_container": self.walker.bytes_routed})

    @property
    def version(self) -> int:
        """What this session was opened with: never more than its tunnel speaks."""
        return self.link.version

    def passed_to(self, target: Side) -> None:
        if target.link.blocked:
            self.link.pause_reading(self)
            target.link.wait_drained(self)

    def link_writable(self) -> None:
        """The tunnel takes more."""
        self.link.resume_reading(self)

    def message(self, kind: int, proto: int, client_id: int, port: int, payload: bytes) -> None:
        if kind == CONNECT:
            self._connect(proto, client_id, port or self.port, payload)
        else:
            super().message(kind, proto, client_id, port, payload)

    def _connect(self, proto: int, client_id: int, port: int, payload: bytes) -> None:
        if client_id in self._closing:  # its user waits for no reply
            self._free(client_id)
        if client_id == SESSION_ID or client_id in self.table:
            self.unknown_messages += 1
            return
        tunnel = self.server.tunnels.get(self.container)
        refusal = self.admission.refusal(port, len(self.table) - len(self._closing))
        if refusal is not None:
            self.link.send_message(ERROR, client_id, refusal.pack(), proto=proto)
        elif tunnel is None:
            self.link.send_message(ERROR, client_id, NO_TUNNEL.pack(), proto=proto)
        else:
            tunnel_id = tunnel.new_id()
            self.table.add(client_id, tunnel, tunnel_id)
            tunnel.table.add(tunnel_id, self, client_id)
            payload = payload if self.version >= 2 else b""
            tunnel.link.send_message(CONNECT, tunnel_id, payload, proto=proto, port=port, urgent=True)
            self.server.streams_opened += 1

    def end(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        route = self.table.get(client_id)
        if route is None:
            return
        tunnel, tunnel_id = cast("tuple[Tunnel, int]", route)
        told = client_id in self._closing
        if kind == CLOSE and tunnel.version == 1 and proto == PROTO_TCP and not told:
            timer = asyncio.get_running_loop().call_later(V1_REPLY, self._free, client_id)
            self._closing[client_id] = timer  # the service may have a reply to the end of its input
        else:
            self._free(client_id)
        if tunnel.version >= 2:
            tunnel.link.send_message(kind, tunnel_id, payload, proto=proto)
        elif not told:
            tunnel.link.send_message(CLOSE, tunnel_id, proto=proto)

    def _free(self, client_id: int) -> None:
        """Let go of a stream's two ids."""
        self.forget_closing(client_id)
        self.ended.pop(client_id, None)
        route = self.table.remove(client_id)
        if route is not None:
            tunnel, tunnel_id = cast("tuple[Tunnel, int]", route)
            tunnel.table.remove(tunnel_id)

    def forget_closing(self, client_id: int) -> bool:
        """Wait no longer for the reply to a CLOSE; whether one was waited for."""
        timer = self._closing.pop(client_id, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def user_side(self, client_id: int, target: Side, other_id: int) -> tuple[Session, int]:
        return self, client_id

    def lost(self, client_ids: list[int], reason: str) -> None:
        """The tunnel that these streams ran on is gone."""
        text = ErrorText("ECONNRESET", f"the task's tunnel went away ({reason})").pack()
        link = self.link
        for client_id in client_ids:
            self.forget_closing(client_id)
            self.table.remove(client_id)
            self.ended.pop(client_id, None)
        if client_ids:
            link.send(b"".join(link.build_message(ERROR, each, text, proto=self.proto) for each in client_ids))

    def link_drained(self, link: Link) -> None:
        tunnel = self.server.tunnels.get(self.container)
        if tunnel is not None:
            tunnel.link.resume_reading(self)

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        for client_id in list(self._closing):
            self._free(client_id)
        closing: dict[Tunnel, list[bytes]] = {}
        for stream in self.table.items():
            tunnel, tunnel_id = cast("tuple[Tunnel, int]", stream[1])
            tunnel.table.remove(tunnel_id)
            closing.setdefault(tunnel, []).append(tunnel.link.build_message(CLOSE, tunnel_id, proto=self.proto))
        self.table = RoutingTable()
        for tunnel, frames in closing.items():
            tunnel.link.send(b"".join(frames))  # at once: one system call each would keep everybody else waiting
        self.link_drained(link)
        self.server.session_closed(self)


class TunnelServer:
    """All tunnels and sessions of a runner.

    Args:
        check_tunnel_token: (container id, token) → whether the token is that container's own.
        check_ticket: the ticket's claims; raises UnauthenticatedError or NotAllowedError.
        address_of: the IP of a container id of the address backend, which the runner dials itself, else None.
        on_tunnel_change: called with (container id, connected).
        config: windows and times of the streams that the runner dials itself.
        limits: what a session may take.
    """

    def __init__(
        self,
        *,
        allow_anonymous: bool,
        check_tunnel_token: Callable[[str, str], bool],
        check_ticket: Callable[[str], Ticket],
        address_of: Callable[[str], str | None],
        on_tunnel_change: Callable[[str, bool], None] = lambda container, connected: None,
        config: EndpointConfig | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.allow_anonymous = allow_anonymous
        self.check_tunnel_token = check_tunnel_token
        self.check_ticket = check_ticket
        self.address_of = address_of
        self.on_tunnel_change = on_tunnel_change
        self.config = config
        self.tunnels: dict[str, Tunnel] = {}
        self.sessions: dict[Session, None] = {}
        self.direct: dict[DirectSession, None] = {}
        self.streams_opened = 0
        self._closed: dict[str, Counter[str]] = {}
        self._rates = Rates()

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that this server answers."""
        return [_TunnelPath(self), _ForwardPath(self)]

    def tunnel_connected(self, container: str) -> bool:
        """Whether streams to this container can be opened now."""
        return container in self.tunnels or self.address_of(container) is not None

    def drop(self, container: str, reason: str, *, gone: bool = False) -> None:
        """The task has ended: its streams end at once. ``gone``: for good, so its sessions end too."""
        tunnel = self.tunnels.get(container)
        if tunnel is not None:
            tunnel.link.abort()
            self.tunnel_closed(tunnel, reason)
        for session in [s for s in self.sessions if s.container == container and gone]:
            session.link.close(1008, reason)
        for direct in [d for d in self.direct if d.container == container]:
            direct.link.close(1008 if gone else 1012, reason)
        if gone:
            self._closed.setdefault("", Counter()).update(self._closed.pop(container, {}))

    def snapshot(self) -> dict[str, Any]:
        """Counts of now, and totals since the start, of all and of each container that has a tunnel or had traffic."""
        counts = self._counts()
        rates = self._rates.look(counts)
        containers = {
            name: {**self._describe(name), **{key: counts[name][key] for key in COUNTS}, **rates[name]}
            for name in {*counts, *self.tunnels}
            if name
        }
        return {
            "sessions": len(self.sessions) + len(self.direct),
            "streams": sum(c["streams"] for c in containers.values()),
            **{key: sum(c[key] for c in counts.values()) for key in COUNTS},
            "containers": containers,
        }

    def _counts(self) -> defaultdict[str, Counter[str]]:
        """Totals by container, "" standing for all that are gone."""
        counts = defaultdict(Counter, {name: Counter(closed) for name, closed in self._closed.items()})
        parts: list[Counted] = [*self.sessions, *self.tunnels.values(), *self.direct]
        for part in parts:
            counts[part.container].update(part.counts())
        return counts

    def _describe(self, container: str) -> dict[str, Any]:
        tunnel = self.tunnels.get(container)
        direct = [d for d in self.direct if d.container == container]
        return {
            "version": tunnel.version if tunnel is not None else 0,
            "peer": tunnel.link.label if tunnel is not None else "",
            "sessions": sum(s.container == container for s in self.sessions) + len(direct),
            "streams": (len(tunnel.table) if tunnel is not None else 0)
            + sum(d.endpoint.stats().streams for d in direct),
            "unknown_messages": tunnel.unknown_messages if tunnel is not None else 0,
        }

    def count(self, part: Counted) -> None:
        """A link is gone: keep what it had counted."""
        self._closed.setdefault(part.container, Counter()).update(part.counts())

    async def close(self) -> None:
        """Close every link; they go as their peers answer."""
        for tunnel in list(self.tunnels.values()):
            tunnel.link.close(1001, "the runner is shutting down")
        for session in list(self.sessions):
            session.link.close(1001, "the runner is shutting down")
        for direct in list(self.direct):
            direct.link.close(1001, "the runner is shutting down")

    # -- called by the two paths and by links ------------------------------------------------------------------

    def tunnel_opened(self, tunnel: Tunnel) -> None:
        """Enter a container's tunnel; one that was there is replaced (§4)."""
        old = self.tunnels.get(tunnel.container)
        self.tunnels[tunnel.container] = tunnel
        if old is not None:
            self.count(old)
            self._end_streams(old, "it was replaced by a newer one")
            old.link.close(CloseCode.REPLACED, "replaced by a newer tunnel of this container")
        for session in [s for s in self.sessions if s.container == tunnel.container]:
            if session.version != min(session.newest, tunnel.version):  # its streams went with the tunnel before
                session.link.close(RENEGOTIATE, "the container's new tunnel client speaks another version")
        log.info("tunnel connected", container=tunnel.container, version=tunnel.version, peer=tunnel.link.label)
        self.on_tunnel_change(tunnel.container, True)

    def tunnel_closed(self, tunnel: Tunnel, reason: str) -> None:
        """A tunnel's link has gone. The clean-up of a replaced one leaves the newer alone."""
        self._end_streams(tunnel, reason)
        if self.tunnels.get(tunnel.container) is tunnel:
            del self.tunnels[tunnel.container]
            self.count(tunnel)
            log.info("tunnel disconnected", container=tunnel.container, reason=reason)
            self.on_tunnel_change(tunnel.container, False)

    def _end_streams(self, tunnel: Tunnel, reason: str) -> None:
        for session in [s for s in self.sessions if s.container == tunnel.container]:
            session.lost([user_id for _, user_id in tunnel.table.remove_target(session)], reason)
            session.link.resume_reading(session)  # it may have waited for the tunnel that went

    def session_closed(self, session: Session) -> None:
        """A user's link has gone."""
        if self.sessions.pop(session, self) is None:
            self.count(session)

    def direct_closed(self, session: DirectSession) -> None:
        """The link of a session that this runner serves by itself has gone."""
        if self.direct.pop(session, self) is None:
            self.count(session)

    def require_ticket(self, request: UpgradeRequest, container: str, port: int) -> Ticket | None:
        """The request's ticket if it is good for this container and port; None for an anonymous v1 host."""
        if request.token is None:
            if self.allow_anonymous:
                return None
            raise UnauthenticatedError("this runner takes sessions only with its host's ticket")
        ticket = self.check_ticket(request.token)
        if ticket.container != container or not ticket.allows(port):
            raise NotAllowedError(f"the ticket is not for port {port} of {container}")
        return ticket


class DirectSession:
    """A session whose target the runner dials itself: this runner is the container-side endpoint."""

    def __init__(self, server: TunnelServer, container: str, endpoint: ContainerEndpoint) -> None:
        self.server = server
        self.container = container
        self.endpoint = endpoint
        self.link: Link = cast(Link, None)

    def link_received(self, link: Link, start: int, stop: int) -> int:
        return self.endpoint.link_received(link, start, stop)

    def link_drained(self, link: Link) -> None:
        self.endpoint.link_drained(link)

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        self.endpoint.link_closed(link, code, reason)
        self.server.direct_closed(self)

    def counts(self) -> Counter[str]:
        """What went through it."""
        stats = self.endpoint.stats()
        return Counter(
            bytes_to_container=stats.bytes_received,
            bytes_to_user=stats.bytes_sent,
            udp_dropped=stats.udp_dropped,
            stalls=stats.stalls,
        )


class _TunnelPath:
    """``/ws/tunnel/{container_id}``: dialled by a tunnel client."""

    path = "/ws/tunnel/{container_id}"
    _path = re.compile(r"/ws/tunnel/([^/]+)$")

    def __init__(self, server: TunnelServer) -> None:
        self.server = server

    def match(self, path: str) -> bool:
        return self._path.match(path) is not None

    async def open(self, request: UpgradeRequest) -> None:
        found = self._path.match(request.path)
        assert found is not None
        container = found[1]
        if request.token is None and not self.server.allow_anonymous:
            raise UnauthenticatedError("a tunnel client must show its container's token")
        if request.token is not None and not self.server.check_tunnel_token(container, request.token):
            raise NotAllowedError(f"the token is not that of {container}")
        tunnel = Tunnel(self.server, container)
        tunnel.link = request.accept(tunnel.walker, tunnel)
        tunnel.link.label = request.peer
        self.server.tunnel_opened(tunnel)


class _ForwardPath:
    """``/ws/forward/{container}/{port}``: dialled by the host."""

    path = "/ws/forward/{container}/{port}"
    _path = re.compile(r"/ws/forward/([^/]+)/(\d{1,5})$")

    def __init__(self, server: TunnelServer) -> None:
        self.server = server

    def match(self, path: str) -> bool:
        return self._path.match(path) is not None

    async def open(self, request: UpgradeRequest) -> None:
        found = self._path.match(request.path)
        assert found is not None
        container, port = found[1], int(found[2])
        if not 1 <= port <= 65535:
            raise UsageError(f"{port} is not a port: give one between 1 and 65535")
        ticket = self.server.require_ticket(request, container, port)
        proto = 1 if request.query.get("proto") == "udp" else 0
        admission = Admission(self.server.limits, ticket, ports_in(request.query))
        address = self.server.address_of(container)
        if address is not None:
            self._open_direct(request, container, port, admission, address)
            return
        tunnel = self.server.tunnels.get(container)
        if tunnel is None:
            message = f"the tunnel of {container} is not connected; is the task running?"
            raise UnavailableError(message, code="tunnel_not_connected")
        session = Session(self.server, container, port, proto, admission, newest=2 if request.offers_v2 else 1)
        session.link = request.accept(session.walker, session, version=tunnel.version)
        self.server.sessions[session] = None
        greet(session.link, "CONNECTED")

    def _open_direct(
        self, request: UpgradeRequest, container: str, port: int, admission: Admission, address: str
    ) -> None:
        endpoint = ContainerEndpoint(
            (address,),
            config=self.server.config,
            where=f"at {address}",
            refuses=admission.refusal,
            default_port=port,
        )
        session = DirectSession(self.server, container, endpoint)
        walker = FrameWalker(masked=True, max_message=self.server.limits.max_message)
        session.link = request.accept(walker, session)
        greet(session.link, "CONNECTED")
        endpoint.attach(session.link)
        session.link.handler = session
        self.server.direct[session] = None
