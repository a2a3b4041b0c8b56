"""Pieces of work that are begun a few at a time, by turns between those who want them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

__all__ = ["FairTurns"]


class FairTurns:
    """Begins `most` pieces of work in one round of the event loop, before everything else gets its turn.

    Who wants a thousand waits for them, and nobody else does.
    """

    def __init__(self, most: int) -> None:
        self._most = self._left = most
        self._waiting: OrderedDict[Hashable, deque[Callable[[], bool]]] = OrderedDict()
        self._due = False

    def begin(self, work: Callable[[], bool], who: Hashable) -> None:
        """Do a piece of work: at once, or when it is the turn of `who`. It says whether there was still any to do."""
        loop = asyncio.get_running_loop()
        if not self._due:
            self._due = True
            loop.call_soon(self._renew, loop)
        if self._left and not self._waiting:
            self._left -= work()
        else:
            self._waiting.setdefault(who, deque()).append(work)

    async def turn(self, who: Hashable) -> None:
        """Return when it is the turn of `who`."""
        turn = asyncio.get_running_loop().create_future()

        def begin() -> bool:
            if turn.done():  # its peer has gone meanwhile
                return False
            turn.set_result(None)
            return True

        self.begin(begin, who)
        await turn

    def _renew(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._most
        try:
            while self._left and self._waiting:
                who, works = self._waiting.popitem(last=False)
                work = works.popleft()
                if works:
                    self._waiting[who] = works
                self._left -= work()
        finally:  # one piece that fails holds up no other
            self._due = self._left < self._most or bool(self._waiting)
            if self._due:
                loop.call_soon(self._renew, loop)
