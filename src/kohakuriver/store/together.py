"""Questions that many ask at a time, asked of the database once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from kohakuriver.fair_turns import FairTurns

__all__ = ["Together"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

HEAR_AT_ONCE = 4
"""Who hears an answer before everything else gets its turn: some 2 ms of what they do with it."""


class Together(Generic[K, T]):
    """Asks `ask` about a key.

    Of one key, one question is under way, however many want to know. Those who come meanwhile share the next one: no
    answer is older than the wish for it. They hear of it a few at a time: thousands who hear at once would all go on
    with their work before anything else gets its turn.
    """

    def __init__(self, ask: Callable[[K], Coroutine[Any, Any, T]]) -> None:
        self._ask = ask
        self._turns = FairTurns(HEAR_AT_ONCE)
        self._under_way: dict[K, asyncio.Task[T]] = {}
        self._next: dict[K, asyncio.Task[T]] = {}

    async def __call__(self, key: K) -> T:
        """The answer. Raises what `ask` raises."""
        question = self._next.get(key)
        if question is None:
            before = self._under_way.get(key)
            question = asyncio.get_running_loop().create_task(self._answer(key, before))
            question.add_done_callback(_heard)
            (self._under_way if before is None else self._next)[key] = question
        await asyncio.wait({question})
        await self._turns.turn(key)
        return question.result()

    async def _answer(self, key: K, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait({before})
            self._under_way[key] = self._next.pop(key)
        try:
            return await self._ask(key)
        finally:
            if key not in self._next:
                del self._under_way[key]


def _heard(question: asyncio.Task[Any]) -> None:
    """Who asked may be gone: that a question failed is no news then."""
    if not question.cancelled():
        question.exception()
