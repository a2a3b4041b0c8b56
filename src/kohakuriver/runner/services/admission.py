"""What a session may open: which ports, how many streams at once, how many a second."""

from __future__ import annotations

import asyncio

from kohakuriver.limits import Limits
from kohakuriver.rates import TokenBucket
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel.protocol import ErrorText

__all__ = ["Admission"]


class Admission:
    """Whether one session may open one more stream."""

    def __init__(self, limits: Limits, ticket: Ticket | None, named: frozenset[int] | None) -> None:
        """``named`` are the ports that the session is confined to beside what its ticket says, None for all."""
        self._limits = limits
        self._ticket = ticket
        self._named = named
        self._clock = asyncio.get_running_loop().time
        rate = limits.max_connects
        self._bucket = TokenBucket(rate, rate, self._clock()) if rate else None

    def _allows(self, port: int) -> bool:
        by_ticket = self._ticket is None or self._ticket.allows(port)
        return by_ticket and (self._named is None or port in self._named)

    def refusal(self, port: int, streams: int) -> ErrorText | None:
        """Why a stream to ``port`` may not be opened while ``streams`` are open, or None."""
        most, rate = self._limits.max_streams, self._limits.max_connects
        if not self._allows(port):
            return ErrorText("EACCES", f"port {port} is not part of this forward")
        if most and streams >= most:
            return ErrorText("EMFILE", f"this forward has {most} connections open, which is as many as the node allows")
        if self._bucket is not None and not self._bucket.try_take(self._clock()):
            sentence = f"this forward opens more than {rate} connections a second, which the node does not allow"
            return ErrorText("EAGAIN", sentence)
        return None
