"""Hop 2: a splice between a user's session at the host and the same session at the runner (docs/protocol.md §4).

Frames pass as they are, with the mask that they came with; only their headers are walked, so that WebSocket control
frames stay between neighbours and nothing malformed gets through.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

import structlog

from kohakuriver._frame import SpliceWalker
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotAllowedError, UsageError
from kohakuriver.limits import Limits
from kohakuriver.session.grant import NO_GRANT, Grant
from kohakuriver.session.idle import IdleWatch
from kohakuriver.session.pace import PacedReads
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest, greet
from kohakuriver.tunnel.dial import open_session
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.ports import ports_in, ports_query
from kohakuriver.tunnel.protocol import TUNNEL_V2, CloseCode

RUNNER_TIMEOUT = 10.0

log = structlog.get_logger("kohakuriver.proxy")


@dataclass(frozen=True)
class ForwardTarget:
    """Where a session goes: the runner's ``ws://`` or ``wss://`` address, the container's id there, the ticket to show.

    ``grant`` is the session's right to go on.
    """

    runner_ws_url: str
    container: str
    ticket: str | None
    grant: Grant = NO_GRANT


Authorize = Callable[["str | None", str, int, str, "frozenset[int] | None"], Awaitable[ForwardTarget]]


class Splice:
    """One direction's end: what comes from ``link`` goes to ``other.link``."""

    def __init__(self, walker: SpliceWalker, session: ProxySession) -> None:
        self.walker = walker
        self.session = session
        self.link: Link = cast(Link, None)
        self.other: Splice = cast(Splice, None)

    def link_received(self, link: Link, start: int, stop: int) -> int:
        data, view, walker, target = link.buffer.data, link.buffer.view, self.walker, self.other.link
        events = 0
        while True:
            end, event, consumed = walker.splice(data, start, stop)
            if end > start:
                self._pass(target, view, start, end)
            if event is not None:
                link.control(event)
                events += 1
                if link.turn_over(events):
                    break
            elif consumed == start or consumed >= stop:
                break
            start = consumed
        if target.blocked:
            link.pause_reading(self)
            target.wait_drained(self)
        return consumed

    def _pass(self, target: Link, view: memoryview, start: int, end: int) -> None:
        """Pass a range on; a small frame that waits for a frame border goes in at the first one."""
        if target.urgent:
            border = self.walker.boundary
            if border >= start:
                target.send(view[start:border])
                target.frame_border()
                start = border
        if start < end:
            target.send(view[start:end])
            target.mid_frame = not self.walker.at_boundary

    def link_writable(self) -> None:
        """The other side's link has drained."""
        self.link.resume_reading(self)

    def link_drained(self, link: Link) -> None:
        pass

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        # 1005 and 1006 only say what was seen here; they may not stand in a close frame (RFC 6455 §7.4.1).
        self.other.link.close(1011 if code in (1005, 1006) else code, reason or "the other side of the session went")
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

    def __init__(self, proxy: TunnelProxy, target: ForwardTarget) -> None:
        self.proxy = proxy
        self.target = target
        self.ending: tuple[str, int, str] | None = None
        self.user = self._side(masked=True)
        self.container_side = self._side(masked=False)
        self.user.other, self.container_side.other = self.container_side, self.user

    def _side(self, *, masked: bool) -> Splice:
        walker, rate = (
            SpliceWalker(masked=masked, max_message=self.proxy.limits.max_message),
            self.proxy.limits.max_rate,
        )
        return RatedSplice(walker, self, rate) if rate else Splice(walker, self)

    def begin(self, user: Link, runner: Link) -> None:
        """Both links are there."""
        self.user.link, self.container_side.link = user, runner
        for side in (self.user, self.container_side):
            if isinstance(side, RatedSplice):
                side.pace.begin(side.link)

    def close(self, code: int, reason: str) -> None:
        """Close both links, because this host wants it."""
        self.ending = self.ending or ("host", code, reason)
        self.user.link.close(code, reason)
        self.container_side.link.close(code, reason)

    def end(self, reason: str) -> None:
        """The session's right to go on is gone: nothing more of it is passed, either way."""
        self.ending = self.ending or ("host", CloseCode.POLICY, reason)
        self.user.link.fail(CloseCode.POLICY, reason)
        self.container_side.link.fail(CloseCode.POLICY, reason)

    def closed(self, side: Splice, code: int, reason: str) -> None:
        """One of the two links has gone; the other follows."""
        self.ending = self.ending or ("user" if side is self.user else "node", code, reason)
        self.proxy.forget(self)

    def passed(self) -> dict[str, int]:
        """Bytes of frames' payloads, each way."""
        return {
            "bytes_to_container": self.user.walker.bytes_passed,
            "bytes_to_user": self.container_side.walker.bytes_passed,
        }


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
        self._idle = IdleWatch(self.limits.idle_timeout)
        self.sessions: dict[ProxySession, None] = {}
        self._closed_to_container = 0
        self._closed_to_user = 0

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that this proxy answers."""
        return [_ForwardPath(self)]

    def snapshot(self) -> dict[str, Any]:
        """Sessions now, and bytes of frames' payloads passed since the start."""
        return {
            "sessions": len(self.sessions),
            "bytes_to_container": self._closed_to_container + sum(s.user.walker.bytes_passed for s in self.sessions),
            "bytes_to_user": self._closed_to_user + sum(s.container_side.walker.bytes_passed for s in self.sessions),
        }

    async def close(self) -> None:
        """Close every session."""
        for session in list(self.sessions):
            session.close(1001, "the host is shutting down")

    def forget(self, session: ProxySession) -> None:
        """A session has ended."""
        if self.sessions.pop(session, self) is not None:
            return
        self._idle.discard(session)
        passed = session.passed()
        self._closed_to_container += passed["bytes_to_container"]
        self._closed_to_user += passed["bytes_to_user"]
        by, code, reason = session.ending or ("host", 1006, "")
        session.target.grant.closed(**passed, ended_by=by, code=code, reason=reason)

    async def open(self, request: UpgradeRequest, task: str, port: int) -> None:
        """Open the session at the runner first: its answer decides ours, the version included."""
        proto = request.query.get("proto", "tcp")
        if proto not in ("tcp", "udp"):
            raise UsageError(f"proto must be tcp or udp, not {proto!r}")
        ports = ports_in(request.query)
        target = await self.authorize(request.token, task, port, proto, ports)
        session = ProxySession(self, target)
        query = f"proto={proto}" if ports is None else f"proto={proto}&{ports_query(ports)}"
        about = {"proto": proto, "port": port, "ports": None if ports is None else sorted(ports)}
        try:
            runner = await self._open_at_runner(session, request, f"{port}?{query}")
            self._splice(session, request, runner, about)
        except BaseException:
            target.grant.release()
            raise

    async def _open_at_runner(self, session: ProxySession, request: UpgradeRequest, port_and_query: str) -> Link:
        target = session.target
        try:
            return await open_session(
                f"{target.runner_ws_url}/ws/forward/{quote(target.container, safe='')}/{port_and_query}",
                token=target.ticket,
                subprotocols=(TUNNEL_V2,) if request.offers_v2 else (),
                ssl=self.trusted,
                timeout=RUNNER_TIMEOUT,
                peer="runner",
                # The walker is the session's own, so that what it counts and where it stands stay with it.
                make_walker=_reuse(session.container_side.walker),
            )
        except NotAllowedError as error:  # of the host, not of the user: whose credentials are good
            raise HostUnreachableError(f"the task's node did not take the host's ticket: {error}") from error

    def _splice(self, session: ProxySession, request: UpgradeRequest, runner: Link, about: dict[str, Any]) -> None:
        try:
            user = request.accept(session.user.walker, session.user, version=runner.version)
        except KohakuRiverError:  # the user has hung up
            runner.close()
            raise
        session.begin(user, runner)
        self.sessions[session] = None
        session.target.grant.opened(**{"from": request.peer}, **about, version=runner.version)
        self._idle.add(
            session, lambda: sum(session.passed().values()), lambda reason: session.close(CloseCode.IDLE, reason)
        )
        greet(user, "CONNECTED")
        runner.hand_over(session.container_side)
        session.target.grant.attach(session.end)


def _reuse(walker: SpliceWalker) -> Callable[..., SpliceWalker]:
    def make(*, masked: bool, allow_text: bool) -> SpliceWalker:
        walker.allow_text = allow_text
        return walker

    return make


class _ForwardPath:
    """``/ws/forward/{task_id}/{port}``: dialled by a command line or a browser."""

    path = "/ws/forward/{task_id}/{port}"
    _path = re.compile(r"/ws/forward/([^/]+)/([^/]+)$")

    def __init__(self, proxy: TunnelProxy) -> None:
        self.proxy = proxy

    def match(self, path: str) -> bool:
        return self._path.match(path) is not None

    async def open(self, request: UpgradeRequest) -> None:
        found = self._path.match(request.path)
        assert found is not None
        port = int(found[2]) if found[2].isascii() and found[2].isdigit() and len(found[2]) <= 5 else 0
        if not 1 <= port <= 65535:
            raise UsageError(f"{found[2]} is not a port: give one between 1 and 65535")
        try:
            await self.proxy.open(request, found[1], port)
        except KohakuRiverError as error:
            log.info("session refused", task=found[1], port=port, peer=request.peer, reason=str(error))
            raise
