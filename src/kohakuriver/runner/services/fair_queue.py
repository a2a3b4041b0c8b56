"""Whose work is done next, where there is room for some of it at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator

from kohakuriver.asking import asker

__all__ = ["FairQueue"]


class FairQueue:
    """Room for `places` things at a time, of which one user has `share` at most.

    Those who wait go on in turns: one thing of each user, in the order in which they came. Whose work it is says
    `asking`; what this program does by itself counts as one more user's.
    """

    def __init__(self, places: int, share: int) -> None:
        self._free = places
        self._share = share
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for room, and have it until the end of the `async with`. Nobody may ask for a second place within."""
        who = str(asker().known.get("user", ""))
        await self._take(who)
        try:
            yield
        finally:
            self._give_back(who)

    async def _take(self, who: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(turn)
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the place was there in the same moment
                self._give_back(who)
            raise

    def _give_back(self, who: str) -> None:
        self._free += 1
        self._held[who] -= 1
        if not self._held[who]:
            del self._held[who]
        self._hand_out()

    def _hand_out(self) -> None:
        """Give the places that are free to the next ones."""
        while self._free and (who := self._next()) is not None:
            waiting = self._waiting.pop(who)
            turn = waiting.popleft()
            if waiting:
                self._waiting[who] = waiting  # behind the others
            if not turn.done():
                self._free -= 1
                self._held[who] += 1
                turn.set_result(None)

    def _next(self) -> str | None:
        return next((who for who in self._waiting if self._held[who] < self._share), None)
