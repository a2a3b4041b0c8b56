"""The WebSocket paths of a runner: where tunnel clients and the host come in (docs/protocol.md §4–§5)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog

from kohakuriver._frame import FrameWalker
from kohakuriver.errors import NotAllowedError, UnauthenticatedError, UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.relay.admission import Admission
from kohakuriver.relay.direct import DirectSession, DirectTarget
from kohakuriver.relay.hub import Hub
from kohakuriver.relay.legs import SessionLeg, TunnelLeg
from kohakuriver.relay.shares import Shares
from kohakuriver.relay.straight import Paths, Straights
from kohakuriver.relay.terminal_room import TerminalRoom
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel.accept import Peer, TunnelRoute, UpgradeRequest, greet
from kohakuriver.tunnel.ports import beyond_of, port_in, ports_in
from kohakuriver.tunnel.protocol import MARK, straight_greeting
from kohakuriver.tunnel.settings import EndpointConfig

__all__ = ["TunnelServer"]

log = structlog.get_logger("kohakuriver.tunnels")

TERMINAL = "terminal"
"""In the place of a port: the session is for a terminal."""


class TunnelServer:
    """Takes tunnels and sessions in, and enters them in its hub.

    Args:
        check_tunnel: (container id, token, the client's id, where it comes from) → what tells it from other clients;
            raises KohakuRiverError where it may not be this container's. None where tunnel clients come by `take_in`.
        check_ticket: the ticket's claims; raises UnauthenticatedError or NotAllowedError.
        check_terminal_ticket: the same of one that opens terminals.
        room: how many of those there may be.
        target_of: what the runner dials itself for a container id while no tunnel client is there, None where only
            a tunnel client does it.
        mark: (user, container id) → what the container's end knows the user by, 16 bytes, the same over restarts.
        on_entered, on_left: called with a container id when a session is opened there, and when it has ended.
        on_tunnel_change: called with (container id, connected).
        expected: whether the tunnel of a container id is about to come, which was connected before this runner began.
        on_trouble: called with (container id, sentence, address) when something is wrong with a task's tunnel.
        config: windows and times of the streams that the runner dials itself.
        limits: what a session may take.
        straights: the straight paths; without it, there are none.
    """

    def __init__(
        self,
        *,
        allow_anonymous: bool,
        check_tunnel: Callable[[str, str, str, Peer], Awaitable[str]] | None = None,
        check_ticket: Callable[[str], Ticket],
        check_terminal_ticket: Callable[[str], Ticket],
        target_of: Callable[[str], DirectTarget | None] = lambda container: None,
        room: TerminalRoom | None = None,
        mark: Callable[[str, str], bytes] = lambda user, container: bytes(MARK),
        expected: Callable[[str], bool] = lambda container: False,
        on_tunnel_change: Callable[[str, bool], None] = lambda container, connected: None,
        on_trouble: Callable[[str, str, str], None] = lambda container, sentence, address: None,
        on_entered: Callable[[str], None] = lambda container: None,
        on_left: Callable[[str], None] = lambda container: None,
        config: EndpointConfig | None = None,
        limits: Limits | None = None,
        straights: Straights | None = None,
    ) -> None:
        self._straights = straights or Straights("", "its node has none", lease=0.0)
        self.hub = Hub(on_tunnel_change, on_trouble, lambda container: target_of(container) is not None, expected)
        self.hub.on_left = on_left
        self._on_entered = on_entered
        self._limits = limits or Limits()
        self._shares = Shares(self._limits)
        self._allow_anonymous = allow_anonymous
        self._check_tunnel = check_tunnel
        self._check_ticket = check_ticket
        self._check_terminal_ticket = check_terminal_ticket
        self._room = room or TerminalRoom(self._limits)
        self._target_of = target_of
        self._mark = mark
        self._config = config

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that this server answers."""
        return [*self.container_routes(), *self.session_routes()]

    def container_routes(self) -> list[TunnelRoute]:
        """Those of them that tunnel clients dial."""
        return [TunnelRoute("/ws/tunnel/{container_id}", self._open_tunnel)]

    def session_routes(self, prefix: str = "") -> list[TunnelRoute]:
        """Those that the host dials, and users who go straight to this runner; `prefix` begins their paths."""
        return [
            TunnelRoute(prefix + "/ws/forward/{container}/{port}", self._open_session),
            TunnelRoute(prefix + "/ws/straight/{container}", self._open_straight),
        ]

    def snapshot(self) -> dict[str, Any]:
        """Counts of now, and totals since the start, of all and of each container that has a tunnel or had traffic."""
        return self.hub.traffic.snapshot()

    def revoke(self, container: str, user: str, reason: str) -> None:
        """A user's right to a container has gone, while no session of that user was open."""
        mark = self._mark(user, container)
        self.hub.end_orphans(container, mark, reason)
        self.hub.revoke(container, mark, reason)

    async def close(self) -> None:
        """Close every link; they go as their peers answer."""
        self.hub.close()

    # What comes in

    async def _open_tunnel(self, request: UpgradeRequest, container: str) -> None:
        """Take a tunnel client in. Raises KohakuRiverError where that may not be."""
        client: str | None = None
        if request.token is not None:
            client = await self._entitled(request, container, request.token)
        elif self._allow_anonymous:
            if request.whence.door not in ("", container):
                raise NotAllowedError(f"this is not the socket of {container}")
            await self.hub.check_replacement(container, None, request.whence.address)
        else:
            raise UnauthenticatedError("a tunnel client must show its container's token")
        self.take_in(request, container, client)

    def take_in(
        self, request: UpgradeRequest, container: str, client: str | None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Take a tunnel client in that was found to be the container's; `headers` are more of the answer's.

        Raises HostUnreachableError where it has hung up.
        """
        tunnel = TunnelLeg(self.hub, container, self._limits.max_message, client)
        tunnel.link = request.accept(tunnel.walker, tunnel, headers=headers)
        tunnel.link.label = request.peer
        self.hub.tunnel_opened(tunnel)

    async def _entitled(self, request: UpgradeRequest, container: str, token: str) -> str:
        """What tells a tunnel client from others that may be the container's now. Raises KohakuRiverError.

        Another that is connected takes a while to answer, in which the token may become worthless, or a third come.
        """
        assert self._check_tunnel is not None
        while True:
            client = await self._check_tunnel(container, token, request.client, request.whence)
            there = self.hub.tunnel_of(container)
            if there is None:
                return client
            await self.hub.check_replacement(container, client, request.whence.address)
            await self._check_tunnel(container, token, request.client, request.whence)
            if self.hub.tunnel_of(container) in (there, None):
                return client

    async def _open_session(self, request: UpgradeRequest, container: str, named: str) -> None:
        """Take a session in. Raises KohakuRiverError where that may or can not be."""
        if named == TERMINAL:
            await self._open_terminal(request, container)
            return
        port = port_in(named)
        ticket = self._ticket(request, container, port)
        if self._target_of(container) is None:
            await self.hub.back(container)
        admission = Admission(self._limits, self._shares.rates, ticket, ports_in(request.query), self._shares.streams)
        target = self._target_of(container)
        if target is not None and self.hub.tunnel_of(container) is None:
            self._open_direct(request, container, port, admission, target)
        else:
            self._open_relayed(request, container, port, admission)
        log.info("session opened", container=container, port=port, peer=request.peer)

    async def _open_terminal(self, request: UpgradeRequest, container: str) -> None:
        """Take a session in that is for a terminal. Raises KohakuRiverError where that may or can not be."""
        ticket = self._ticket(request, container, None)
        beyond = beyond_of(request.query)
        admission = Admission(
            self._limits, self._shares.rates, ticket, None, self._shares.streams, terminal=True, beyond=beyond
        )
        await self.hub.back(container)
        tunnel = self.hub.tunnel_of(container)
        if tunnel is None or tunnel.version < 2 or not request.offers_v2:
            sentence = f"no terminal of {container} can be had that outlives its connection"
            raise UnavailableError(sentence, code="no_lasting_terminal")
        number = container.rpartition("-")[2]
        task = ticket.task if ticket is not None else None
        leave = self._room.enter(task or (int(number) if number.isdecimal() else 0), admission.user)
        try:
            session = self._open_relayed(request, container, 0, admission)
        except BaseException:
            leave()
            raise
        session.on_closed = leave
        log.info("session opened", container=container, port=TERMINAL, peer=request.peer)

    def _ticket(self, request: UpgradeRequest, container: str, port: int | None) -> Ticket | None:
        """The request's ticket if it is good for this container and port, None being that it is for a terminal.

        None for an anonymous v1 host.
        """
        if request.token is None:
            if self._allow_anonymous:
                return None
            raise UnauthenticatedError("this runner takes sessions only with its host's ticket")
        ticket = (self._check_terminal_ticket if port is None else self._check_ticket)(request.token)
        if ticket.container != container or not (port is None or ticket.allows(port)):
            what = "a terminal" if port is None else f"port {port}"
            raise NotAllowedError(f"the ticket is not for {what} of {container}")
        return ticket

    async def _open_straight(self, request: UpgradeRequest, container: str) -> None:
        """Take the straight path of a session in. Raises KohakuRiverError where that may or can not be."""
        paths, proof = self._straights.take(request.token, container)
        greeting, through = straight_greeting(proof), paths.through
        if through.user_link is None or not request.offers_v2:
            raise UnavailableError("the session that this is for has ended", code="session_over")
        if isinstance(through, DirectSession):
            self._serve_direct(request, through.again(self.hub.keepers.of(container)), paths, greeting)
        elif isinstance(through, SessionLeg):
            self._serve_relayed(request, through.again(), paths, greeting)

    def _paths(self, through: SessionLeg | DirectSession, ticket: Ticket | None) -> Paths:
        return Paths(self._straights, through, ticket)

    def _open_relayed(self, request: UpgradeRequest, container: str, port: int, admission: Admission) -> SessionLeg:
        tunnel = self.hub.tunnel_of(container)
        if tunnel is None:
            message = f"the tunnel of {container} is not connected; is the task running?"
            raise UnavailableError(message, code="tunnel_not_connected")
        session = SessionLeg(
            self.hub,
            container,
            self._limits.max_message,
            port=port,
            proto=1 if request.query.get("proto") == "udp" else 0,
            admission=admission,
            newest=2 if request.offers_v2 else 1,
            mark=self._mark(admission.user, container),
        )
        self._serve_relayed(request, session, None, "CONNECTED", tunnel.version)
        return session

    def _serve_relayed(
        self, request: UpgradeRequest, session: SessionLeg, paths: Paths | None, greeting: str, version: int = 2
    ) -> None:
        session.link = request.accept(session.walker, session, version=version)
        if paths is not None or session.link.version >= 2:
            session.paths = paths or self._paths(session, session.admission.ticket)
        self._shares.take_part(session.link, session.admission)
        self.hub.sessions[session] = None
        self._on_entered(session.container)
        greet(session.link, greeting)
        if paths is not None:
            paths.begin(session)

    def _open_direct(
        self, request: UpgradeRequest, container: str, port: int, admission: Admission, target: DirectTarget
    ) -> None:
        session = DirectSession(
            container,
            target,
            port=port,
            admission=admission,
            config=self._config,
            keeper=self.hub.keepers.of(container),
            mark=self._mark(admission.user, container),
            share=self._shares.held_by(admission.who),
            on_closed=self.hub.direct_closed,
        )
        self._serve_direct(request, session, None, "CONNECTED")

    def _serve_direct(
        self, request: UpgradeRequest, session: DirectSession, paths: Paths | None, greeting: str
    ) -> None:
        link = request.accept(FrameWalker(masked=True, max_message=self._limits.max_message), session)
        if paths is not None or link.version >= 2:
            session.paths = paths or self._paths(session, session.admission.ticket)
        self._shares.take_part(link, session.admission)
        greet(link, greeting)
        session.attach(link)
        self.hub.direct[session] = None
        self._on_entered(session.container)
        if paths is not None:
            paths.begin(session)
