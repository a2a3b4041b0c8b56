"""Since when this host hears nodes: who says nothing to one that can't listen is not silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from kohakuriver.errors import KohakuRiverError

__all__ = ["OUTAGE_SECONDS", "Hearing"]

OUTAGE_SECONDS = 600.0
"""A host that has just begun takes a node for online that was heard of in so many seconds before."""


class Hearing:
    """Whether a node that was not heard of for a while may be there all the same.

    While the host had not begun, its database did not answer, or its machine slept, nobody could be heard. From the
    end of that on, nodes that were there before have as long as ever to say that they still are.

    Args:
        patience: after how many seconds of silence a node is offline.
        check: raises KohakuRiverError while what nodes say can't be written down.
    """

    def __init__(
        self, patience: float, check: Callable[[], Awaitable[None]], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._patience = patience
        self._check = check
        self._clock = clock
        self._again = clock()
        self._known_from = self._again - OUTAGE_SECONDS
        self._looked: float | None = None

    def is_silent(self, last_seen: float) -> bool:
        """Whether a node that was heard of then had the time to say something since."""
        now = self._clock()
        if now - last_seen <= self._patience:
            return False
        self._notice(now)
        return now - self._again > self._patience or last_seen < self._known_from

    async def look(self) -> None:
        """See whether nodes can be heard now."""
        try:
            await self._check()
        except KohakuRiverError:
            self._deaf(self._clock())
            return
        now = self._clock()
        self._notice(now)
        self._looked = now

    async def run(self) -> None:
        """Look often enough that no node is taken for silent meanwhile, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._patience / 6)

    def _notice(self, now: float) -> None:
        """That nobody has looked for long is that nothing went on here: the machine slept, or its clock was set."""
        if self._looked is not None and now - self._looked > self._patience / 2:
            self._deaf(now)

    def _deaf(self, now: float) -> None:
        """Nobody could be heard until now, since it was last looked."""
        if now - self._again > self._patience:  # else it was only just so, and who was waited for then still is
            self._known_from = (now if self._looked is None else self._looked) - self._patience
        self._again = now
