"""Hop 2: a splice between a user's session at the host and the same session at the runner (docs/protocol.md §4).

Frames pass as they are, with the mask that they came with; only their headers are walked, so that WebSocket control
frames stay between neighbours and nothing malformed gets through.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

import structlog

from kohakuriver._frame import SpliceWalker
from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.tunnel.handshake import open_session
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import TUNNEL_V2
from kohakuriver.tunnel.server import TunnelRoute, UpgradeRequest, greet

RUNNER_TIMEOUT = 10.0

log = structlog.get_logger("kohakuriver.proxy")


@dataclass(frozen=True)
class ForwardTarget:
    """Where a session goes: the runner's ``ws://`` address, the container's id there, and the ticket to show."""

    runner_ws_url: str
    container: str
    ticket: str | None


Authorize = Callable[["str | None", str, int, str], Awaitable[ForwardTarget]]


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
        self.session.closed()


class ProxySession:
    """One user's session through this host."""

    def __init__(self, proxy: TunnelProxy, container: str) -> None:
        self.proxy = proxy
        self.container = container
        self.user = Splice(SpliceWalker(masked=True), self)
        self.container_side = Splice(SpliceWalker(masked=False), self)
        self.user.other, self.container_side.other = self.container_side, self.user

    def closed(self) -> None:
        """One of the two links has gone; the other follows."""
        self.proxy.forget(self)


class TunnelProxy:
    """All forward sessions of a host.

    Args:
        authorize: (bearer token or None, task's id or name, port, "tcp" or "udp") → where the session goes. Raises
            KohakuRiverError.
    """

    def __init__(self, *, authorize: Authorize) -> None:
        self.authorize = authorize
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
            session.user.link.close(1001, "the host is shutting down")
            session.container_side.link.close(1001, "the host is shutting down")

    def forget(self, session: ProxySession) -> None:
        """A session has ended."""
        if self.sessions.pop(session, self) is None:
            self._closed_to_container += session.user.walker.bytes_passed
            self._closed_to_user += session.container_side.walker.bytes_passed

    async def open(self, request: UpgradeRequest, task: str, port: int) -> None:
        """Open the session at the runner first: its answer decides ours, the version included."""
        proto = request.query.get("proto", "tcp")
        if proto not in ("tcp", "udp"):
            raise UsageError(f"proto must be tcp or udp, not {proto!r}")
        target = await self.authorize(request.token, task, port, proto)
        url = f"{target.runner_ws_url}/ws/forward/{quote(target.container, safe='')}/{port}?proto={proto}"
        session = ProxySession(self, target.container)
        offered = (TUNNEL_V2,) if request.offers_v2 else ()
        # The walker is the session's own, so that what it counts and where it stands stay with it.
        walker = session.container_side.walker
        runner = await open_session(
            url, token=target.ticket, subprotocols=offered, timeout=RUNNER_TIMEOUT, make_walker=_reuse(walker)
        )
        self._splice(session, request, runner)

    def _splice(self, session: ProxySession, request: UpgradeRequest, runner: Link) -> None:
        session.container_side.link = runner
        try:
            user = request.accept(session.user.walker, session.user, version=runner.version)
        except KohakuRiverError:  # the user has hung up
            runner.close()
            raise
        session.user.link = user
        self.sessions[session] = None
        greet(user, "CONNECTED")
        runner.hand_over(session.container_side)


def _reuse(walker: SpliceWalker) -> Callable[..., SpliceWalker]:
    def make(*, masked: bool, allow_text: bool) -> SpliceWalker:
        walker.allow_text = allow_text
        return walker

    return make


class _ForwardPath:
    """``/ws/forward/{task_id}/{port}``: dialled by a command line or a browser."""

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
