"""What a session may open: which ports, how many streams at once, how many a second; and what its user may have."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable

from kohakuriver.limits import Limits
from kohakuriver.rates import TokenBucket
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel.protocol import PROTO_TCP, PROTO_TERMINAL, ErrorText
from kohakuriver.tunnel.turns import Turn

__all__ = ["Admission", "ConnectRates", "OpenStreams"]


class ConnectRates:
    """New streams a second, of each user in all sessions together.

    Args:
        rate: streams a second of those whose ticket says nothing of it. 0 is no limit.
        clock: seconds.
    """

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._buckets: dict[Hashable, TokenBucket] = {}

    def try_take(self, who: Hashable, rate: int) -> bool:
        """Whether they may open one more stream now, of `rate` a second; as many may come at once. 0 is any number."""
        if not rate:
            return True
        now = self._clock()
        bucket = self._buckets.get(who)
        if bucket is None:
            # Of those who opened nothing for a second nothing need be remembered.
            self._buckets = {known: each for known, each in self._buckets.items() if not each.is_full(now)}
            bucket = self._buckets[who] = TokenBucket(rate, rate, now)
        elif bucket.rate != rate:  # it was changed for this user between two sessions
            bucket.change(rate, rate, now)
        return bucket.try_take(now)


class OpenStreams:
    """How many streams each user has open on this node, in all sessions together.

    Args:
        most: of all users together, 0 for any number. When there are as many, nobody may open one more who has an equal
            part of them already.
        share: of one user, 0 for any number.
    """

    def __init__(self, most: int = 0, share: int = 0) -> None:
        self._most = most
        self._share = share
        self._of: Counter[Hashable] = Counter()
        self.total = 0

    def change(self, who: Hashable, by: int) -> None:
        """They have so many more open, or less where `by` is negative."""
        self.total += by
        self._of[who] += by
        if not self._of[who]:
            del self._of[who]

    def refusal(self, who: Hashable) -> ErrorText | None:
        """Why they may not open one more, or None."""
        have = self._of[who]
        if self._share and have >= self._share:
            sentence = f"your forwards have {have} connections open on this node, which is as many as it allows"
            return ErrorText("EMFILE", sentence)
        if self._most and self.total >= self._most and have * len(self._of) >= self._most:
            sentence = f"{self.total} connections are open on this node, which is as many as it allows, {have} of yours"
            return ErrorText("EMFILE", sentence)
        return None


class Admission:
    """Whether one session may open one more stream."""

    def __init__(
        self,
        limits: Limits,
        rates: ConnectRates,
        ticket: Ticket | None,
        named: frozenset[int] | None,
        streams: OpenStreams | None = None,
        *,
        terminal: bool = False,
        beyond: str = "",
    ) -> None:
        """``named`` are the ports that the session is confined to beside what its ticket says, None for all.

        A ``terminal`` session opens one terminal at a time, and no port; no other session opens any. Where it is for
        connections ``beyond`` the task, it opens any number of those, of this kind alone.
        """
        self.turn: Turn | None = None  # in which what the session asks for is worked off
        self.terminal = terminal
        self.beyond = beyond
        self.ticket = ticket
        self._limits = limits
        self._rates = rates
        self._streams = streams or OpenStreams()
        self._counted = 0
        self._named = named
        self._rate = rates.rate if ticket is None or ticket.connects is None else ticket.connects
        # Whose share it takes from: of a session of nobody in particular it is its own.
        self.who: Hashable = self if ticket is None else ticket.user
        self.user = "" if ticket is None or ticket.user is None else ticket.user

    def again(self) -> Admission:
        """That of another link of the same session."""
        return Admission(self._limits, self._rates, self.ticket, self._named, self._streams, terminal=self.terminal)

    def _allows(self, port: int) -> bool:
        by_ticket = self.ticket is None or self.ticket.allows(port)
        return by_ticket and (self._named is None or port in self._named)

    def count(self, streams: int) -> None:
        """The session has so many streams now."""
        if streams != self._counted:
            self._streams.change(self.who, streams - self._counted)
            self._counted = streams

    def refusal(self, port: int, streams: int, proto: int = PROTO_TCP, *, moves: bool = False) -> ErrorText | None:
        """Why a stream to ``port`` may not be opened while the session has ``streams``, or None.

        One that ``moves`` between two links of the session was opened before: it takes nothing of its user's rate.
        """
        most, rate = self._limits.max_streams, self._rate
        if self.terminal != (proto == PROTO_TERMINAL):
            return ErrorText("EACCES", f"this session is for {'a terminal' if self.terminal else 'ports'} alone")
        if self.terminal and streams and not self.beyond:
            return ErrorText("EMFILE", "this session has its terminal already")
        if not self.terminal and not self._allows(port):
            return ErrorText("EACCES", f"port {port} is not part of this forward")
        if most and streams >= most:
            return ErrorText("EMFILE", f"this forward has {most} connections open, which is as many as the node allows")
        if (refusal := self._streams.refusal(self.who)) is not None:
            return refusal
        if not moves and not self._rates.try_take(self.who, rate):
            if self.turn is not None:
                self.turn.rest()
            sentence = f"your forwards open more than {rate} connections a second on this node, which does not allow it"
            return ErrorText("EAGAIN", sentence)
        return None
