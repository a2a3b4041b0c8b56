"""Credentials that are no good: how fast one source may try, and never that it locks out somebody whose are good.

A source is an address, of IPv6 a /64, behind which there may be many users. A good credential is let in at once. Once a
source has shown many that are no good, its credentials are looked at one after the other: a good one then waits for
those before it, of which each is one look into the database, and the bad ones get their answers late.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

from kohakuriver.errors import UnauthenticatedError, UnavailableError
from kohakuriver.rates import TokenBucket

__all__ = ["Failures"]

BURST_SECONDS = 4
"""How many seconds' worth of failures of one source are answered at once."""

LONGEST_WAIT = 2.0
"""Seconds that an answer is kept back; where it would be longer, the source is told to come back later instead."""

TOO_MANY_FAILURES = "too_many_failures"
"""The code of the error."""

SOURCES = 4096
"""Sources that are told apart; of more the one that has failed least lately starts anew."""


class _Source:
    def __init__(self, rate: int, now: float) -> None:
        self.bucket = TokenBucket(rate, BURST_SECONDS * rate, now)
        self.turn = asyncio.Lock()


class Failures:
    """Who has shown credentials that are no good lately; `rate` of one source are answered in a second, 0 for any."""

    def __init__(self, *, rate: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._sources: OrderedDict[str, _Source] = OrderedDict()

    @contextlib.asynccontextmanager
    async def looking(self, origin: str) -> AsyncIterator[None]:
        """While a credential from `origin` is looked at."""
        source = self._sources.get(origin)
        if source is None or source.bucket.wait(self._clock()) == 0:
            yield
            return
        async with source.turn:
            yield

    async def failed(self, origin: str, error: UnauthenticatedError) -> None:
        """It was no good: back when this may be said. Raises UnavailableError "too_many_failures" (429)."""
        if not self._rate:
            return
        now = self._clock()
        source = self._sources.setdefault(origin, _Source(self._rate, now))
        self._sources.move_to_end(origin)
        if len(self._sources) > SOURCES:
            self._sources.popitem(last=False)
        if source.bucket.wait(now) > LONGEST_WAIT:
            raise UnavailableError(
                f"{error.message.rstrip('.')}; wait a moment: {origin} has shown too many that are no good.",
                code=TOO_MANY_FAILURES,
                status=429,
            ) from error
        await asyncio.sleep(source.bucket.take(1, now))
