"""Hop 2: a splice between a user's session at the host and the same session at the runner (docs/protocol.md §4).

Frames pass as they are, with the mask that they came with; only their headers are walked, so that WebSocket control
frames stay between neighbours and nothing malformed gets through.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import quote

import structlog

from kohakuriver._frame import SpliceWalker
from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.host.services.audit import ranges
from kohakuriver.limits import Limits
from kohakuriver.session.carried import Carrier, Passed, Route, at_runner
from kohakuriver.session.pace import PacedReads
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest, greet
from kohakuriver.tunnel.dial import open_session
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.message_link import may_close_with
from kohakuriver.tunnel.ports import port_in, ports_in, ports_query
from kohakuriver.tunnel.protocol import TUNNEL_V2, CloseCode

log = structlog.get_logger("kohakuriver.proxy")


Authorize = Callable[["str | None", str, int, str, "frozenset[int] | None"], Awaitable[Route]]


class Splice:
    """One direction's end: what comes from ``link`` goes to ``other.link``."""

    def __init__(self, walker: SpliceWalker, session: ProxySession) -> None:
        self.walker = walker
        self.session = session
        self.link: Link
        self.other: Splice

    def link_received(self, link: Link, start: int, stop: int) -> int:
        data, view, walker, target = link.intake.buffer.data, link.intake.buffer.view, self.walker, self.other.link
        events = 0
        while True:
            end, event, consumed = walker.splice(data, start, stop)
            if end > start:
                self._pass(target, view, start, end)
            if event is not None:
                link.control(event)
                events += 1
                if link.intake.turn_over(events):
                    break
            elif consumed == start or consumed >= stop:
                break
            start = consumed
        if target.out.blocked:
            link.intake.pause(self)
            target.out.wait_drained(self)
        return consumed

    def _pass(self, target: Link, view: memoryview, start: int, end: int) -> None:
        """Pass a range on; a small frame that waits for a frame border goes in at the first one."""
        if target.out.urgent:
            border = self.walker.boundary
            if border > start:
                target.send(view[start:border])
                start = border
        if start < end:
            target.send(view[start:end], not self.walker.at_boundary)

    def link_writable(self) -> None:
        """The other side's link has drained."""
        self.link.intake.resume(self)

    def link_drained(self, link: Link) -> None:
        pass

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        self.other.link.close(may_close_with(code), reason or "the other side of the session went")
        self.session.closed(self, code, reason)


class RatedSplice(Splice):
    """A direction that may take only so many bytes a second. ``rate`` is in bytes a second."""

    def __init__(self, walker: SpliceWalker, session: ProxySession, rate: int) -> None:
        super().__init__(walker, session)
        self.pace = PacedReads(rate)

    def link_received(self, link: Link, start: int, stop: int) -> int:
        consumed = super().link_received(link, start, stop)
        self.pace.took(link, consumed - start)
        return consumed


class ProxySession:
    """One user's session through this host."""

    def __init__(self, proxy: TunnelProxy, route: Route) -> None:
        self.limits = proxy.limits
        self.carried = proxy.carrier.carry(self, route)
        self.user = self._side(masked=True)
        self.container_side = self._side(masked=False)
        self.user.other, self.container_side.other = self.container_side, self.user

    def _side(self, *, masked: bool) -> Splice:
        walker = SpliceWalker(masked=masked, max_message=self.limits.max_message)
        rate = self.limits.max_rate
        return RatedSplice(walker, self, rate) if rate else Splice(walker, self)

    def begin(self, user: Link, runner: Link) -> None:
        """Both links are there."""
        self.user.link, self.container_side.link = user, runner
        for side in (self.user, self.container_side):
            if isinstance(side, RatedSplice):
                side.pace.begin(side.link)

    def cut(self, code: int, reason: str) -> None:
        """Close both links. Where the right to go on is gone nothing more is passed, either way."""
        for link in (self.user.link, self.container_side.link):
            (link.fail if code == CloseCode.POLICY else link.close)(code, reason)

    def closed(self, side: Splice, code: int, reason: str) -> None:
        """One of the two links has gone; the other follows."""
        self.carried.end("user" if side is self.user else "node", code, reason)
        self.carried.over()

    def passed(self) -> Passed:
        """Bytes of frames' payloads so far."""
        return self.user.walker.bytes_passed, self.container_side.walker.bytes_passed


class TunnelProxy:
    """All forward sessions of a host.

    Args:
        authorize: (bearer token or None, task's id or name, port, "tcp" or "udp", the ports that it may reach or None
            for all) → where the session goes. Raises KohakuRiverError.
        trusted: how runners that serve TLS are checked; None for the system's authorities.
        limits: what a session may take.
    """

    def __init__(
        self,
        *,
        authorize: Authorize,
        trusted: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.authorize = authorize
        self.trusted = trusted
        self.limits = limits or Limits()
        self.carrier: Carrier[ProxySession] = Carrier(self.limits)

    @property
    def sessions(self) -> Collection[ProxySession]:
        """Those that are open."""
        return self.carrier.open.keys()

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that this proxy answers."""
        return [TunnelRoute("/ws/forward/{task_id}/{port}", self._open)]

    def snapshot(self) -> dict[str, int]:
        """Sessions now, and bytes of frames' payloads passed since the start."""
        return self.carrier.snapshot()

    async def close(self) -> None:
        """Close every session."""
        self.carrier.cut_all("the host is shutting down")

    async def _open(self, request: UpgradeRequest, task: str, port: str) -> None:
        """Answer a command line or a browser."""
        try:
            await self._open_session(request, task, port_in(port))
        except KohakuRiverError as error:
            log.info("session refused", task=task, port=port, peer=request.peer, reason=str(error))
            raise

    async def _open_session(self, request: UpgradeRequest, task: str, port: int) -> None:
        """Open the session at the runner first: its answer decides ours, the version included."""
        proto = request.query.get("proto", "tcp")
        if proto not in ("tcp", "udp"):
            raise UsageError(f"proto must be tcp or udp, not {proto!r}")
        ports = ports_in(request.query)
        route = await self.authorize(request.token, task, port, proto, ports)
        session = ProxySession(self, route)
        query = f"proto={proto}" if ports is None else f"proto={proto}&{ports_query(ports)}"
        about = {"proto": proto, "port": port, "ports": None if ports is None else ranges(ports)}
        with session.carried:
            runner = await self._open_at_runner(session, route, request, f"{port}?{query}")
            self._splice(session, request, runner, about)

    async def _open_at_runner(
        self, session: ProxySession, route: Route, request: UpgradeRequest, port_and_query: str
    ) -> Link:
        with at_runner(route):
            return await open_session(
                route.runner(f"/ws/forward/{quote(route.container, safe='')}/{port_and_query}", self.trusted),
                subprotocols=(TUNNEL_V2,) if request.offers_v2 else (),
                # The walker is the session's own, so that what it counts and where it stands stay with it.
                walker=session.container_side.walker,
            )

    def _splice(self, session: ProxySession, request: UpgradeRequest, runner: Link, about: dict[str, Any]) -> None:
        try:
            user = request.accept(session.user.walker, session.user, version=runner.version)
        except KohakuRiverError:  # the user has hung up
            runner.close()
            raise
        session.begin(user, runner)
        session.carried.begin(request.peer, **about, version=runner.version)
        greet(user, "CONNECTED")
        runner.hand_over(session.container_side)
        session.carried.hang_on_right()
