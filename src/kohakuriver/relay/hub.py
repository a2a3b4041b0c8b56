"""Which tunnels and sessions a runner has, and what the coming and going of one means for the others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from kohakuriver.changes import Changes
from kohakuriver.errors import UnavailableError
from kohakuriver.relay.direct import DirectSession, Keepers
from kohakuriver.relay.legs import SessionLeg, TunnelLeg
from kohakuriver.relay.traffic import Counted, Traffic
from kohakuriver.tunnel.protocol import NOTICE, SESSION_ID, CloseCode

__all__ = ["EXPECTED_SECONDS", "QUARREL_SECONDS", "QUARREL_TIMES", "Hub"]

log = structlog.get_logger("kohakuriver.tunnel")

RENEGOTIATE = CloseCode.SERVICE_RESTART

ENDED_WITHIN = 0.3
"""Where a tunnel breaks because its task has ended, the task's end is known within so many seconds, most often."""

QUARREL_TIMES, QUARREL_SECONDS = 3, 30.0
"""A tunnel without a token may be replaced so often in so many seconds; then the one that is connected stays.

A tunnel client whose link died unseen replaces itself, once or twice. Two that run at a time would go on for ever.
"""

QUARREL_OVER_SECONDS = 300.0
"""After so long without another try of the client that was refused, nothing is said of it any more."""


EXPECTED_SECONDS = 30.0
"""For so long a tunnel is expected back after it was lost."""

BACK_WITHIN = 2.0
"""So many seconds a session waits for a tunnel that is expected back. Its user would only come again, and later.

A connection that is opened through a session which stays waits until the tunnel was gone for so long.
"""


MAX_REVOKED = 1000
"""Of so many users a container's next tunnel client is told that their right has gone; of more, of the newest."""


@dataclass
class Orphans:
    """Kept streams of one container whose tunnel has gone, by session, until the timer sends their users back."""

    timer: asyncio.TimerHandle
    streams: dict[SessionLeg, list[int]] = field(default_factory=dict)


class Hub:
    """All links of a runner, by container. `on_tunnel_change` is called with (container id, connected).

    `on_trouble` is called with a container id, a sentence, without a full stop, for those who look at its task, and the
    address that the trouble comes from; an empty sentence says that it is well again.
    `dialled` says whether this runner dials a container's ports by itself while no tunnel is there, and `expected`
    whether a tunnel is about to come of which this runner has not seen any yet.

    Large because each method is one thing that can become of a link.
    """

    def __init__(
        self,
        on_tunnel_change: Callable[[str, bool], None] = lambda container, connected: None,
        on_trouble: Callable[[str, str, str], None] = lambda container, sentence, address: None,
        dialled: Callable[[str], bool] = lambda container: False,
        expected: Callable[[str], bool] = lambda container: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_tunnel_change = on_tunnel_change
        self._on_trouble = on_trouble
        self._dialled = dialled
        self._expected = expected
        self._clock = clock
        self._lost: dict[str, float] = {}
        self._ended: dict[str, str] = {}
        self._returning = Changes[str]()
        self._revoked: dict[str, dict[bytes, str]] = {}
        self._replaced: dict[str, deque[float]] = {}
        self._quarrels: dict[str, asyncio.TimerHandle] = {}
        self._orphans: dict[str, Orphans] = {}
        self.tunnels: dict[str, TunnelLeg] = {}
        self.sessions: dict[SessionLeg, None] = {}
        self.keepers = Keepers()
        self.direct: dict[DirectSession, None] = {}
        self.traffic = Traffic(self._parts)
        self.on_left: Callable[[str], None] = lambda container: None

    def _parts(self) -> list[Counted]:
        return [*self.sessions, *self.tunnels.values(), *self.direct]

    def tunnel_of(self, container: str) -> TunnelLeg | None:
        """The container's tunnel, None where none is connected."""
        return self.tunnels.get(container)

    async def back(self, container: str) -> None:
        """Wait for the container's tunnel where it is expected back, for `BACK_WITHIN` seconds at most."""
        lost = self._lost.get(container)
        soon = lost is not None and self._clock() - lost < EXPECTED_SECONDS
        if container in self.tunnels or not (soon or self._expected(container)):
            return
        with self._returning.watch(container) as came, contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(came.wait(), BACK_WITHIN)

    def expected_within(self, container: str) -> float:
        """For how many seconds more it is worth waiting for the container's tunnel; 0 where it is there."""
        lost = self._lost.get(container)
        if lost is None or container in self.tunnels:
            return 0.0
        return max(0.0, lost + BACK_WITHIN - self._clock())

    def ended(self, container: str) -> str:
        """Why nothing of the container's streams is there any more, its task having ended; "" where they may be."""
        return self._ended.get(container, "")

    def _wait_no_more(self, container: str) -> None:
        """The tunnel has come, or none comes."""
        self._lost.pop(container, None)
        self._returning.notify([container])
        for session in self._sessions_of(container):
            session.go_on()

    # Coming

    async def check_replacement(self, container: str, client: str | None, address: str) -> None:
        """Return where a tunnel client may take the place of what is connected, if anything is.

        The same client may at once: its link died unseen. Another one may not while the first answers. Raises
        UnavailableError "tunnel_taken".

        Args:
            client: what tells a client with a good token from others, "" where nothing does; None for one of version 1.
            address: where it comes from.
        """
        while (tunnel := self.tunnels.get(container)) is not None:
            if client is None and tunnel.client is None:
                self._count_replacement(container, address)
                return
            if (client and client == tunnel.client) or tunnel.client is None:
                return
            if await tunnel.answers():
                sentence = f"a second tunnel client came from {address} while the first answers, and was refused"
                self.say(container, f"{sentence}; end one of them", address)
                raise _taken(container, tunnel)
            if self.tunnels.get(container) is tunnel:
                return

    def _count_replacement(self, container: str, address: str) -> None:
        """Raise UnavailableError where tunnel clients without a token keep on replacing each other."""
        times, now = self._replaced.setdefault(container, deque(maxlen=QUARREL_TIMES)), self._clock()
        if len(times) == QUARREL_TIMES and now - times[0] < QUARREL_SECONDS:
            self.say(
                container, "two tunnel clients run for it, and only one can be connected; end one of them", address
            )
            raise _taken(container, self.tunnels[container])
        times.append(now)

    def say(self, container: str, sentence: str, address: str) -> None:
        """Say with a task what is wrong with its tunnel, for a while."""
        log.warning("a tunnel client was refused", container=container, reason=sentence)
        if before := self._quarrels.pop(container, None):
            before.cancel()
        loop = asyncio.get_running_loop()
        self._quarrels[container] = loop.call_later(QUARREL_OVER_SECONDS, self._quarrel_over, container)
        self._on_trouble(container, sentence, address)

    def _quarrel_over(self, container: str) -> None:
        del self._quarrels[container]
        self._on_trouble(container, "", "")

    def tunnel_opened(self, tunnel: TunnelLeg) -> None:
        """Enter a container's tunnel; one that was there is replaced (docs/protocol.md §4)."""
        old = self.tunnels.get(tunnel.container)
        self.tunnels[tunnel.container] = tunnel
        self._ended.pop(tunnel.container, None)
        if old is not None:
            self.traffic.keep(old)
            self._part(old, "it was replaced by a newer one")
            old.link.close(CloseCode.REPLACED, "replaced by a newer tunnel of this container")
        self._send_back(tunnel.container)
        for session in self._sessions_of(tunnel.container):
            if session.version != min(session.newest, tunnel.version):  # its streams went with the tunnel before
                session.link.close(RENEGOTIATE, "the container's new tunnel client speaks another version")
        self.keepers.end(tunnel.container, "a tunnel client has come, which reaches more")
        for direct in self._direct_of(tunnel.container):
            direct.end(RENEGOTIATE, "a tunnel client has come, which reaches more")
        for mark, reason in self._revoked.pop(tunnel.container, {}).items():
            tunnel.revoke(mark, reason)
        self._wait_no_more(tunnel.container)
        log.info("tunnel connected", container=tunnel.container, version=tunnel.version, peer=tunnel.link.label)
        self._on_tunnel_change(tunnel.container, True)

    # Going

    def tunnel_closed(self, tunnel: TunnelLeg, reason: str) -> None:
        """A tunnel's link has gone. The clean-up of a replaced one leaves the newer alone."""
        self._part(tunnel, reason)
        if self.tunnels.get(tunnel.container) is tunnel:
            del self.tunnels[tunnel.container]
            self._lost[tunnel.container] = self._clock()
            self.traffic.keep(tunnel)
            log.info("tunnel disconnected", container=tunnel.container, reason=reason)
            self._on_tunnel_change(tunnel.container, False)
            if self._dialled(tunnel.container):
                for session in self._sessions_of(tunnel.container):
                    session.link.close(RENEGOTIATE, "the tunnel client has gone, and its node dials again")

    def _part(self, tunnel: TunnelLeg, reason: str) -> None:
        """Part sessions from a tunnel that is gone. What happens to kept streams shows when it is known why."""
        parted: dict[SessionLeg, list[int]] = {}
        for tunnel_id, (session, user_id) in tunnel.table.items():  # once: a thousand sessions share 65,536 streams
            parted.setdefault(session, []).append(user_id)
            tunnel.table.remove(tunnel_id)
        for session in self._sessions_of(tunnel.container):
            kept = session.lost(parted.get(session, []), reason)
            session.link.intake.resume(session)  # it may have waited for the tunnel that went
            if kept:
                self._orphans_of(tunnel.container).streams.setdefault(session, []).extend(kept)

    def _orphans_of(self, container: str) -> Orphans:
        orphans = self._orphans.get(container)
        if orphans is None:
            timer = asyncio.get_running_loop().call_later(ENDED_WITHIN, self._send_back, container)
            orphans = self._orphans[container] = Orphans(timer)
        return orphans

    def _send_back(self, container: str) -> None:
        """Kept streams without a tunnel: their users open a session again, and resume (docs/protocol.md §3)."""
        for session in self._take_orphans(container):
            through = session.paths.through.user_link if session.paths is not None else None
            for link in (through, session.link):
                if link is not None:
                    link.close(RENEGOTIATE, "the task's tunnel went away")

    def _take_orphans(self, container: str) -> dict[SessionLeg, list[int]]:
        orphans = self._orphans.pop(container, None)
        if orphans is None:
            return {}
        orphans.timer.cancel()
        return {session: ids for session, ids in orphans.streams.items() if session in self.sessions}

    def session_closed(self, session: SessionLeg) -> None:
        """A user's link has gone."""
        if self.sessions.pop(session, self) is None:
            self.traffic.keep(session)
            self.on_left(session.container)

    def direct_closed(self, session: DirectSession) -> None:
        """The link of a session that this runner serves by itself has gone."""
        if self.direct.pop(session, self) is None:
            self.traffic.keep(session)
            self.on_left(session.container)

    def drop(self, container: str, reason: str, *, gone: bool = False) -> None:
        """The task has ended: its streams end at once. ``gone``: for good, so its sessions end too."""
        tunnel = self.tunnels.get(container)
        if tunnel is not None:
            tunnel.link.abort()
            self.tunnel_closed(tunnel, reason)
        for session, client_ids in self._take_orphans(container).items():
            session.over(client_ids, reason)  # the other end of them is no more
        self._ended[container] = reason  # streams may be about to come by another link, and be on none now
        self._replaced.pop(container, None)
        self._revoked.pop(container, None)
        self._wait_no_more(container)
        if gone:
            del self._ended[container]
            for session in self._sessions_of(container):
                session.link.close(CloseCode.POLICY, reason)
        self.keepers.end(container, reason)
        for direct in self._direct_of(container):
            direct.end(CloseCode.POLICY if gone else RENEGOTIATE, reason)
        if gone:
            self.traffic.forget(container)

    def forget(self, container: str) -> bool:
        """The task has ended a while ago: forget that, if nobody has a session of it yet, which is the answer."""
        if container in self.tunnels or self._all_of(container):
            return False
        self._ended.pop(container, None)
        self._lost.pop(container, None)
        self.traffic.forget(container)
        return True

    def moved(self, container: str, reason: str) -> None:
        """The container is another's now: users open their sessions again, are sent there, and go on."""
        tunnel = self.tunnels.get(container)
        if tunnel is not None:
            tunnel.link.abort()
            self.tunnel_closed(tunnel, reason)
        self._send_back(container)  # the tunnel client has all streams yet
        for session in self._sessions_of(container):
            session.link.close(RENEGOTIATE, reason)
        self.keepers.end(container, reason)
        for direct in self._direct_of(container):
            direct.end(RENEGOTIATE, reason)
        self._replaced.pop(container, None)
        self._revoked.pop(container, None)
        self._wait_no_more(container)

    def tell(self, container: str, sentence: str) -> None:
        """Say something to everybody who has a session open and can be told."""
        for each in self._all_of(container):
            link = each.user_link
            if link is not None and link.version >= 2 and not each.is_straight:
                link.send_message(NOTICE, SESSION_ID, sentence.encode(), urgent=True)

    def revoke(self, container: str, mark: bytes, reason: str) -> None:
        """A user's right to the container has gone: what the user left there ends, as soon as a tunnel is there."""
        tunnel = self.tunnels.get(container)
        if tunnel is not None:
            tunnel.revoke(mark, reason)
        else:
            revoked = self._revoked.setdefault(container, {})
            revoked[mark] = reason
            if len(revoked) > MAX_REVOKED:
                del revoked[next(iter(revoked))]
        self.keepers.revoke(container, mark, reason)

    def end_orphans(self, container: str, mark: bytes, reason: str) -> None:
        """End a user's straight paths whose host has gone: another one says that the right to them has."""
        for session in self._all_of(container):
            if session.is_straight and session.paths is not None and session.paths.orphaned and session.mark == mark:
                session.paths.end_straight(CloseCode.POLICY, reason)

    def close(self) -> None:
        """Close every link; they go as their peers answer."""
        self.keepers.close()
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

    def _all_of(self, container: str) -> list[SessionLeg | DirectSession]:
        return [*self._sessions_of(container), *self._direct_of(container)]

    def _direct_of(self, container: str) -> list[DirectSession]:
        return [session for session in self.direct if session.container == container]


def _taken(container: str, tunnel: TunnelLeg) -> UnavailableError:
    return UnavailableError(
        f"another tunnel client of {container} is connected from {tunnel.link.label}; end one of the two",
        code="tunnel_taken",
    )
