"""The WebSocket paths of a runner: where tunnel clients and the host come in (docs/protocol.md §4–§5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kohakuriver._frame import FrameWalker
from kohakuriver.errors import NotAllowedError, UnauthenticatedError, UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.runner.services.admission import Admission
from kohakuriver.runner.services.direct import DirectSession, DirectTarget
from kohakuriver.runner.services.hub import Hub
from kohakuriver.runner.services.relay import SessionLeg, TunnelLeg
from kohakuriver.runner.services.shares import Shares
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest, greet
from kohakuriver.tunnel.ports import port_in, ports_in
from kohakuriver.tunnel.settings import EndpointConfig

__all__ = ["TunnelServer"]


class TunnelServer:
    """Takes tunnels and sessions in, and enters them in its hub.

    Args:
        check_tunnel_token: (container id, token) → whether the token is that container's own.
        check_ticket: the ticket's claims; raises UnauthenticatedError or NotAllowedError.
        target_of: what the runner dials itself for a container id while no tunnel client is there, None where only
            a tunnel client does it.
        on_tunnel_change: called with (container id, connected).
        on_trouble: called with (container id, sentence) when something is wrong with a task's tunnel.
        config: windows and times of the streams that the runner dials itself.
        limits: what a session may take.
    """

    def __init__(
        self,
        *,
        allow_anonymous: bool,
        check_tunnel_token: Callable[[str, str], bool],
        check_ticket: Callable[[str], Ticket],
        target_of: Callable[[str], DirectTarget | None],
        on_tunnel_change: Callable[[str, bool], None] = lambda container, connected: None,
        on_trouble: Callable[[str, str], None] = lambda container, sentence: None,
        config: EndpointConfig | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.hub = Hub(on_tunnel_change, on_trouble, lambda container: target_of(container) is not None)
        self._limits = limits or Limits()
        self._shares = Shares(self._limits)
        self._allow_anonymous = allow_anonymous
        self._check_tunnel_token = check_tunnel_token
        self._check_ticket = check_ticket
        self._target_of = target_of
        self._config = config

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that this server answers."""
        return [*self.container_routes(), TunnelRoute("/ws/forward/{container}/{port}", self._open_session)]

    def container_routes(self) -> list[TunnelRoute]:
        """Those of them that tunnel clients dial; the host dials the others."""
        return [TunnelRoute("/ws/tunnel/{container_id}", self._open_tunnel)]

    def snapshot(self) -> dict[str, Any]:
        """Counts of now, and totals since the start, of all and of each container that has a tunnel or had traffic."""
        return self.hub.traffic.snapshot()

    async def close(self) -> None:
        """Close every link; they go as their peers answer."""
        self.hub.close()

    # What comes in

    async def _open_tunnel(self, request: UpgradeRequest, container: str) -> None:
        """Take a tunnel client in. Raises KohakuRiverError where that may not be."""
        if request.token is None and not self._allow_anonymous:
            raise UnauthenticatedError("a tunnel client must show its container's token")
        if request.token is not None and not self._check_tunnel_token(container, request.token):
            raise NotAllowedError(f"the token is not that of {container}")
        self.hub.check_replacement(container)
        tunnel = TunnelLeg(self.hub, container, self._limits.max_message)
        tunnel.link = request.accept(tunnel.walker, tunnel)
        tunnel.link.label = request.peer
        self.hub.tunnel_opened(tunnel)

    async def _open_session(self, request: UpgradeRequest, container: str, named: str) -> None:
        """Take a session in. Raises KohakuRiverError where that may or can not be."""
        port = port_in(named)
        ticket = self._ticket(request, container, port)
        admission = Admission(self._limits, self._shares.rates, ticket, ports_in(request.query))
        target = self._target_of(container)
        if target is not None and self.hub.tunnel_of(container) is None:
            self._open_direct(request, container, port, admission, target)
        else:
            self._open_relayed(request, container, port, admission)

    def _ticket(self, request: UpgradeRequest, container: str, port: int) -> Ticket | None:
        """The request's ticket if it is good for this container and port; None for an anonymous v1 host."""
        if request.token is None:
            if self._allow_anonymous:
                return None
            raise UnauthenticatedError("this runner takes sessions only with its host's ticket")
        ticket = self._check_ticket(request.token)
        if ticket.container != container or not ticket.allows(port):
            raise NotAllowedError(f"the ticket is not for port {port} of {container}")
        return ticket

    def _open_relayed(self, request: UpgradeRequest, container: str, port: int, admission: Admission) -> None:
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
        )
        session.link = request.accept(session.walker, session, version=tunnel.version)
        self._shares.take_part(session.link, admission.who)
        self.hub.sessions[session] = None
        greet(session.link, "CONNECTED")

    def _open_direct(
        self, request: UpgradeRequest, container: str, port: int, admission: Admission, target: DirectTarget
    ) -> None:
        session = DirectSession(
            container,
            target,
            port=port,
            admission=admission,
            config=self._config,
            on_closed=self.hub.direct_closed,
        )
        link = request.accept(FrameWalker(masked=True, max_message=self._limits.max_message), session)
        self._shares.take_part(link, admission.who)
        greet(link, "CONNECTED")
        session.attach(link)
        self.hub.direct[session] = None
