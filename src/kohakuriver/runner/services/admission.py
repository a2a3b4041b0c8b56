"""What a session may open: which ports, how many streams at once, how many a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

from kohakuriver.limits import Limits
from kohakuriver.rates import TokenBucket
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel.protocol import ErrorText

__all__ = ["Admission", "ConnectRates"]


class ConnectRates:
    """New streams a second, of each user in all sessions together.

    Args:
        rate: streams a second; as many may come at once. 0 is no limit.
        clock: seconds.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._buckets: dict[Hashable, TokenBucket] = {}

    def try_take(self, who: Hashable) -> bool:
        """Whether they may open one more stream now."""
        if not self.rate:
            return True
        now = self._clock()
        bucket = self._buckets.get(who)
        if bucket is None:
            # Of those who opened nothing for a second nothing need be remembered.
            self._buckets = {known: each for known, each in self._buckets.items() if not each.is_full(now)}
            bucket = self._buckets[who] = TokenBucket(self.rate, self.rate, now)
        return bucket.try_take(now)


class Admission:
    """Whether one session may open one more stream."""

    def __init__(
        self, limits: Limits, rates: ConnectRates, ticket: Ticket | None, named: frozenset[int] | None
    ) -> None:
        """``named`` are the ports that the session is confined to beside what its ticket says, None for all."""
        self._limits = limits
        self._rates = rates
        self._ticket = ticket
        self._named = named
        # Whose share it takes from: of a session of nobody in particular it is its own.
        self.who: Hashable = self if ticket is None else ticket.user

    def _allows(self, port: int) -> bool:
        by_ticket = self._ticket is None or self._ticket.allows(port)
        return by_ticket and (self._named is None or port in self._named)

    def refusal(self, port: int, streams: int) -> ErrorText | None:
        """Why a stream to ``port`` may not be opened while ``streams`` are open, or None."""
        most, rate = self._limits.max_streams, self._rates.rate
        if not self._allows(port):
            return ErrorText("EACCES", f"port {port} is not part of this forward")
        if most and streams >= most:
            return ErrorText("EMFILE", f"this forward has {most} connections open, which is as many as the node allows")
        if not self._rates.try_take(self.who):
            sentence = f"your forwards open more than {rate} connections a second on this node, which does not allow it"
            return ErrorText("EAGAIN", sentence)
        return None
