"""TLS handshakes begin at a rate, and in turns of those who ask: each costs about a millisecond of the loop's time."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

from kohakuriver.rates import TokenBucket

__all__ = ["HANDSHAKES_A_SECOND", "HandshakeQueue"]

HANDSHAKES_A_SECOND = 200
"""A fifth of a processor. 500 clients of a host that starts again are in within three seconds."""

BURST = 16
"""Handshakes that may begin at once: what a busy program is asked for in a moment, and a small part of 100 ms."""


class HandshakeQueue:
    """Who may begin a handshake now: `rate` a second, one of each source that waits, then the next of each.

    A source that asks for more than its turns waits for itself alone.
    """

    def __init__(self, rate: float = HANDSHAKES_A_SECOND) -> None:
        self._loop = asyncio.get_running_loop()
        self._bucket = TokenBucket(rate, BURST, self._loop.time())
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    async def turn(self, source: str) -> None:
        """Wait for the turn of a source, which is an address."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.setdefault(source, deque()).append(turn)
        if self._timer is None:
            self._hand_out()
        await turn

    def _hand_out(self) -> None:
        """Let as many begin as may now, and look again when the next one may."""
        self._timer = None
        while (turn := self._next()) is not None:
            if not self._bucket.try_take(self._loop.time()):
                self._timer = self._loop.call_later(1 / self._bucket.rate, self._hand_out)
                return
            self._take(turn)

    def _next(self) -> tuple[str, asyncio.Future[None]] | None:
        """The source whose turn it is, and what waits there for longest; whoever gave up is forgotten."""
        while self._waiting:
            source, waiting = next(iter(self._waiting.items()))
            while waiting and waiting[0].done():
                waiting.popleft()
            if waiting:
                return source, waiting[0]
            del self._waiting[source]
        return None

    def _take(self, turn: tuple[str, asyncio.Future[None]]) -> None:
        source, future = turn
        self._waiting[source].popleft()
        self._waiting.move_to_end(source)
        future.set_result(None)
