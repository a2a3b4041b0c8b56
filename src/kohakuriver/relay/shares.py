"""What all users of a runner share: streams, new ones a second, its one event loop, memory for what waits.

Each has one bound for the runner, or one rate for a user, over all of that user's sessions: a user with a hundred
sessions gets no more of it than a user with one.
"""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakValueDictionary

import structlog

from kohakuriver.limits import Limits
from kohakuriver.relay.admission import Admission, ConnectRates, OpenStreams
from kohakuriver.tunnel.backlog import Backlog, Queue
from kohakuriver.tunnel.endpoint import Share
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.turns import Turn
from kohakuriver.tunnel.windows import SESSION_BUDGET

__all__ = ["Shares"]

log = structlog.get_logger("kohakuriver.tunnel")


class Shares:
    """The shares of a runner's users."""

    def __init__(self, limits: Limits) -> None:
        self.rates = ConnectRates(limits.max_connects)
        self._backlog = Backlog(limits.max_backlog, limits.max_user_backlog, self._evicted)
        self.streams = OpenStreams(limits.max_node_streams, limits.max_user_streams)
        self._most_held = Share(limits.max_backlog or None)
        self._held: WeakValueDictionary[Hashable, Share] = WeakValueDictionary()
        self._turns: WeakValueDictionary[Hashable, Turn] = WeakValueDictionary()

    def take_part(self, link: Link, admission: Admission) -> None:
        """Let a session's link have its user's share, and no more."""
        who = admission.who
        turn = self._turns.get(who)
        if turn is None:
            turn = self._turns[who] = link.intake.turn
        link.intake.turn = admission.turn = turn
        link.out.count_in(self._backlog, who)

    def held_by(self, who: Hashable) -> Share:
        """What the streams of a user that this runner dials itself may hold, each way, in all sessions together."""
        share = self._held.get(who)
        if share is None:
            share = self._held[who] = Share(SESSION_BUDGET, self._most_held)
        return share

    def _evicted(self, queue: Queue) -> None:
        who = queue.owner if isinstance(queue.owner, str) else None
        log.warning("a session ends: too much waits for users who don't read it", user=who, waiting=self._backlog.total)
