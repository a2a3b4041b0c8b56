"""Straight paths: a user's own link to this runner, beside the session's link that comes from the host.

The session stays the host's: it begins and ends there, and what it may do was said by the host's ticket. The straight
path is a part of it that carries its streams. The runner tells the host how many bytes went that way, and hears by the
answers that the host is there. Sources: docs/protocol.md §4, "The straight path"; docs/security.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from typing import Protocol
from urllib.parse import quote

import structlog

from kohakuriver.errors import UnauthenticatedError
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.message_link import may_close_with
from kohakuriver.tunnel.protocol import STRAIGHT_SECRET, CloseCode, StraightOffer, WentStraight, ws_ping

__all__ = ["GOOD_SECONDS", "Leg", "Paths", "Straights"]

GOOD_SECONDS = 30.0
"""How long a ticket for a straight path is good."""

HOST_WENT = frozenset({CloseCode.ABNORMAL, CloseCode.GOING_AWAY})
"""How the host's link ends where the host itself goes; by any other code it has ended the session."""

BEYOND = "its connections lead beyond the task, and the host says of each whether it may be"

OF_ITS_HOST = "its host lets no session past itself; it does not know how, or it limits their rate"

log = structlog.get_logger("kohakuriver.tunnel")


class Leg(Protocol):
    """What a runner has of one link of a session."""

    container: str
    beyond: bool
    """Whether its streams lead beyond the task."""

    @property
    def user_link(self) -> Link | None:
        """The link, None where it has gone."""

    def let_go(self) -> int:
        """Another link carries the session's streams: they are not on this one any more. How many were relayed."""

    def passed(self) -> tuple[int, int]:
        """Bytes that went through it: to the container, to the user."""


class Straights:
    """All straight paths of a runner.

    Args:
        url: where users reach this runner.
        refusal: why they are not to, a clause; empty where they are.
        lease: for how many seconds a straight path may go on while nothing is heard from the host.
        clock: seconds.
    """

    def __init__(self, url: str, refusal: str, *, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self.refusal = refusal
        self.lease = lease
        self._clock = clock
        self._given: dict[bytes, tuple[Paths, bytes, float]] = {}

    def offer(self, paths: Paths, ticket: Ticket | None) -> StraightOffer:
        """What a user who asks for a straight path is told. Only the last ticket of each session is good."""
        self.forget(paths)
        if self.refusal:
            return StraightOffer(refusal=self.refusal)
        if paths.through.beyond:
            return StraightOffer(refusal=BEYOND)
        if ticket is None or ticket.tells is None:
            return StraightOffer(refusal=OF_ITS_HOST)
        shown, proof = secrets.token_bytes(STRAIGHT_SECRET), secrets.token_bytes(STRAIGHT_SECRET)
        paths.given = _kept(shown.hex())
        self._given[paths.given] = paths, proof, self._clock() + GOOD_SECONDS
        url = f"ws{self.url.removeprefix('http')}/ws/straight/{quote(paths.through.container, safe='')}"
        return StraightOffer(url, shown, proof)

    def take(self, shown: str | None, container: str) -> tuple[Paths, bytes]:
        """The session that a ticket is for, and what shows its user that this is the runner that gave it.

        It is used up with that. Raises UnauthenticatedError.
        """
        found = None if shown is None else self._given.pop(_kept(shown), None)
        if found is None or found[2] < self._clock() or found[0].through.container != container:
            raise UnauthenticatedError("This takes a ticket that a session was given just now, and each once.")
        found[0].given = b""
        return found[:2]

    def forget(self, paths: Paths) -> None:
        """No ticket of this session is good any more."""
        self._given.pop(paths.given, None)
        paths.given = b""


def _kept(shown: str) -> bytes:
    """What of a ticket is kept here: whoever reads this program's memory later can't show it."""
    return hashlib.sha256(shown.encode("utf-8", "replace")).digest()


class Paths:
    """The links of one session: that `through` the host, and perhaps one that is `straight` from its user.

    One of them is in use: that by which the last RESUME with a new epoch came (docs/protocol.md §4).
    """

    def __init__(self, straights: Straights, through: Leg, ticket: Ticket | None) -> None:
        self._straights = straights
        self._ticket = ticket
        self.through = through
        self.straight: Leg | None = None
        self.in_use = through
        self.given = b""
        self._epoch = 0
        self._forked = False  # there is a straight link, or was
        self._leaving = 0  # streams that have left one link, and are not on the other yet
        self._went = 0, 0  # by straight links that are gone
        self._timer: asyncio.TimerHandle | None = None
        self._received = 0
        self._heard_at = 0.0

    def offer(self) -> StraightOffer:
        """The user asks for a straight path."""
        return self._straights.offer(self, self._ticket)

    @property
    def orphaned(self) -> bool:
        """Whether there is a straight link, and the host's has gone."""
        return self.straight is not None and self.through.user_link is None

    def resumes(self, leg: Leg, epoch: int) -> bool:
        """A RESUME came by `leg`: whether it counts. With a new epoch all streams leave the link that they were on."""
        if epoch > self._epoch:
            both = (self.through, self.straight) if self._forked else ()
            self._left(sum(each.let_go() for each in both if each is not None))
            self._epoch, self.in_use = epoch, leg
        return self.in_use is leg

    def _left(self, streams: int) -> None:
        self._leaving = max(self._leaving, streams)

    def moves(self) -> bool:
        """Whether one more stream that is resumed has just left the other link: it is no new one to anybody."""
        moves = self._leaving > 0
        self._leaving -= moves
        return moves

    # -- the straight link -----------------------------------------------------------------------------------------

    def begin(self, straight: Leg) -> None:
        """A straight link has come; one that was there gives way to it."""
        if self.straight is not None:
            self.end_straight(CloseCode.SERVICE_RESTART, "a newer one has come")
            self.straight_closed(self.straight)
        self.straight, self._forked = straight, True
        link = self.through.user_link
        if link is not None:
            link.on_peer_closes = self.tell
            self._received = link.watch.received
        self._heard_at = asyncio.get_running_loop().time()
        if self._timer is None:
            self._tick()

    def straight_closed(self, leg: Leg, streams: int = 0) -> None:
        """A straight link has gone, which had so many streams."""
        if leg is not self.straight:
            return
        self._left(streams)
        self._went = self.went()
        self.straight, self.in_use = None, self.through
        self.tell()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def through_closed(self, code: int, reason: str) -> None:
        """The host's link has gone. Where the host did not say that the session ends, its lease goes on."""
        self._straights.forget(self)
        if code not in HOST_WENT:
            self.end_straight(may_close_with(code), reason)

    def end_straight(self, code: int, reason: str) -> None:
        """Close the straight link, if there is one. Where the right to go on is gone nothing more passes."""
        link = None if self.straight is None else self.straight.user_link
        if link is not None:
            (link.fail if code == CloseCode.POLICY else link.close)(code, reason)

    # -- what the host is told, and the lease ----------------------------------------------------------------------

    def went(self) -> tuple[int, int]:
        """Bytes that went straight so far: to the container, to the user."""
        now = (0, 0) if self.straight is None else self.straight.passed()
        return self._went[0] + now[0], self._went[1] + now[1]

    def tell(self) -> None:
        """Tell the host what went straight; its answer says that it is there."""
        link = self.through.user_link
        if link is not None:
            link.post(ws_ping(WentStraight(*self.went()).pack()))

    def _tick(self) -> None:
        """End what has no lease any more; tell the host."""
        loop = asyncio.get_running_loop()
        link, lease = self.through.user_link, self._straights.lease
        if link is not None and link.watch.received != self._received:
            self._received, self._heard_at = link.watch.received, loop.time()
        left = self._heard_at + lease - loop.time()
        if left <= 0:
            self._timer = None
            log.warning("a straight path ends: the host is not heard from", container=self.through.container)
            self.end_straight(CloseCode.SERVICE_RESTART, f"its node has not heard from the host for {lease:g} s")
            return
        self.tell()
        tells = lease if self._ticket is None or self._ticket.tells is None else self._ticket.tells
        self._timer = loop.call_later(min(tells, lease / 4, left), self._tick)
