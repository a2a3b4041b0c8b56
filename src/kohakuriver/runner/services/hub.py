"""Which tunnels and sessions a runner has, and what the coming and going of one means for the others."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

import structlog

from kohakuriver.errors import UnavailableError
from kohakuriver.runner.services.direct import DirectSession
from kohakuriver.runner.services.relay import SessionLeg, TunnelLeg
from kohakuriver.runner.services.traffic import Counted, Traffic
from kohakuriver.tunnel.protocol import CloseCode

__all__ = ["QUARREL_SECONDS", "QUARREL_TIMES", "Hub"]

log = structlog.get_logger("kohakuriver.tunnel")

RENEGOTIATE = CloseCode.SERVICE_RESTART

QUARREL_TIMES, QUARREL_SECONDS = 3, 30.0

QUARREL_OVER_SECONDS = 300.0
"""After so long without another try of the client that was refused, nothing is said of it any more."""
"""A container's tunnel may be replaced so often in so many seconds; then the one that is connected stays.

A tunnel client whose link died unseen replaces itself, once or twice. Two that run at a time would go on for ever.
"""


class Hub:
    """All links of a runner, by container. `on_tunnel_change` is called with (container id, connected).

    `on_trouble` is called with a container id and a sentence, without a full stop, for those who look at its task; an
    empty one says that it is well again.
    `dialled` says whether this runner dials a container's ports by itself while no tunnel is there.
    """

    def __init__(
        self,
        on_tunnel_change: Callable[[str, bool], None] = lambda container, connected: None,
        on_trouble: Callable[[str, str], None] = lambda container, sentence: None,
        dialled: Callable[[str], bool] = lambda container: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_tunnel_change = on_tunnel_change
        self._on_trouble = on_trouble
        self._dialled = dialled
        self._clock = clock
        self._replaced: dict[str, deque[float]] = {}
        self._quarrels: dict[str, asyncio.TimerHandle] = {}
        self.tunnels: dict[str, TunnelLeg] = {}
        self.sessions: dict[SessionLeg, None] = {}
        self.direct: dict[DirectSession, None] = {}
        self.traffic = Traffic(self._parts)

    def _parts(self) -> list[Counted]:
        return [*self.sessions, *self.tunnels.values(), *self.direct]

    def tunnel_of(self, container: str) -> TunnelLeg | None:
        """The container's tunnel, None where none is connected."""
        return self.tunnels.get(container)

    # Coming

    def check_replacement(self, container: str) -> None:
        """Raise UnavailableError where tunnel clients of one container keep on replacing each other."""
        if container not in self.tunnels:
            return
        times, now = self._replaced.setdefault(container, deque(maxlen=QUARREL_TIMES)), self._clock()
        if len(times) == QUARREL_TIMES and now - times[0] < QUARREL_SECONDS:
            peer = self.tunnels[container].link.label
            log.warning("two tunnel clients run for one container; the connected one stays", container=container)
            self._on_quarrel(container)
            raise UnavailableError(
                f"another tunnel client of {container} is connected from {peer}; end one of the two",
                code="tunnel_taken",
            )
        times.append(now)

    def _on_quarrel(self, container: str) -> None:
        if before := self._quarrels.pop(container, None):
            before.cancel()
        loop = asyncio.get_running_loop()
        self._quarrels[container] = loop.call_later(QUARREL_OVER_SECONDS, self._quarrel_over, container)
        self._on_trouble(container, "two tunnel clients run for it, and only one can be connected; end one of them")

    def _quarrel_over(self, container: str) -> None:
        del self._quarrels[container]
        self._on_trouble(container, "")

    def tunnel_opened(self, tunnel: TunnelLeg) -> None:
        """Enter a container's tunnel; one that was there is replaced (docs/protocol.md §4)."""
        old = self.tunnels.get(tunnel.container)
        self.tunnels[tunnel.container] = tunnel
        if old is not None:
            self.traffic.keep(old)
            self._end_streams(old, "it was replaced by a newer one")
            old.link.close(CloseCode.REPLACED, "replaced by a newer tunnel of this container")
        for session in self._sessions_of(tunnel.container):
            if session.version != min(session.newest, tunnel.version):  # its streams went with the tunnel before
                session.link.close(RENEGOTIATE, "the container's new tunnel client speaks another version")
        for direct in self._direct_of(tunnel.container):
            direct.end(RENEGOTIATE, "a tunnel client has come, which reaches more")
        log.info("tunnel connected", container=tunnel.container, version=tunnel.version, peer=tunnel.link.label)
        self._on_tunnel_change(tunnel.container, True)

    # Going

    def tunnel_closed(self, tunnel: TunnelLeg, reason: str) -> None:
        """A tunnel's link has gone. The clean-up of a replaced one leaves the newer alone."""
        self._end_streams(tunnel, reason)
        if self.tunnels.get(tunnel.container) is tunnel:
            del self.tunnels[tunnel.container]
            self.traffic.keep(tunnel)
            log.info("tunnel disconnected", container=tunnel.container, reason=reason)
            self._on_tunnel_change(tunnel.container, False)
            if self._dialled(tunnel.container):
                for session in self._sessions_of(tunnel.container):
                    session.link.close(RENEGOTIATE, "the tunnel client has gone, and its node dials again")

    def _end_streams(self, tunnel: TunnelLeg, reason: str) -> None:
        for session in self._sessions_of(tunnel.container):
            session.lost([user_id for _, user_id in tunnel.table.remove_target(session)], reason)
            session.link.intake.resume(session)  # it may have waited for the tunnel that went

    def session_closed(self, session: SessionLeg) -> None:
        """A user's link has gone."""
        if self.sessions.pop(session, self) is None:
            self.traffic.keep(session)

    def direct_closed(self, session: DirectSession) -> None:
        """The link of a session that this runner serves by itself has gone."""
        if self.direct.pop(session, self) is None:
            self.traffic.keep(session)

    def drop(self, container: str, reason: str, *, gone: bool = False) -> None:
        """The task has ended: its streams end at once. ``gone``: for good, so its sessions end too."""
        tunnel = self.tunnels.get(container)
        if tunnel is not None:
            tunnel.link.abort()
            self.tunnel_closed(tunnel, reason)
        self._replaced.pop(container, None)
        if gone:
            for session in self._sessions_of(container):
                session.link.close(CloseCode.POLICY, reason)
        for direct in self._direct_of(container):
            direct.end(CloseCode.POLICY if gone else RENEGOTIATE, reason)
        if gone:
            self.traffic.forget(container)

    def close(self) -> None:
        """Close every link; they go as their peers answer."""
        tunnels, sessions, direct = self.tunnels.values(), self.sessions, self.direct
        for link in [
            *(each.link for each in tunnels),
            *(each.link for each in sessions),
            *(each.link for each in direct),
        ]:
            if link is not None:
                link.close(CloseCode.GOING_AWAY, "the runner is shutting down")

    def _sessions_of(self, container: str) -> list[SessionLeg]:
        return [session for session in self.sessions if session.container == container]

    def _direct_of(self, container: str) -> list[DirectSession]:
        return [session for session in self.direct if session.container == container]
