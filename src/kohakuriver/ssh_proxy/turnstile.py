"""A rate for what strangers can make a program do: of one source, and of all together."""

from __future__ import annotations

import asyncio

from kohakuriver.errors import UnavailableError
from kohakuriver.rates import TokenBucket

__all__ = ["Turnstile"]

BURST_SECONDS = 2.0
"""So many seconds' worth, and one at least, may come at once."""
TOTAL = 5
"""How many sources may use their whole rate at the same time."""
MOST_SOURCES = 4096


class Turnstile:
    """Lets `rate` a second of one source through, and five times as many of all. Who comes too early waits.

    Args:
        rate: how many a second.
        patience: nobody waits for longer than so many seconds; who would have to is refused at once.
    """

    def __init__(self, rate: float, patience: float) -> None:
        self._rate = rate
        self._patience = patience
        self._burst = max(1.0, rate * BURST_SECONDS)
        self._all = TokenBucket(rate * TOTAL, self._burst * TOTAL, 0.0)
        self._sources: dict[str, TokenBucket] = {}

    async def turn(self, source: str) -> None:
        """Wait for the turn of a source. Raises UnavailableError where that would take too long."""
        for bucket in (self._bucket(source), self._all):
            wait = bucket.reserve(asyncio.get_running_loop().time(), self._patience)
            if wait is None:
                raise UnavailableError("Too many connections came at once; try again in a few seconds.")
            if wait:
                await asyncio.sleep(wait)

    def _bucket(self, source: str) -> TokenBucket:
        bucket = self._sources.pop(source, None) or TokenBucket(self._rate, self._burst, 0.0)
        self._sources[source] = bucket
        if len(self._sources) > MOST_SOURCES:  # who was not seen for longest begins anew; the rate of all holds
            del self._sources[next(iter(self._sources))]
        return bucket
