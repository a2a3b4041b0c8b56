"""Questions that many ask at a time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.store.together import HEAR_AT_ONCE, Together
from tests.support.hops import until

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_who_comes_while_a_question_is_under_way_shares_the_next_one_and_gets_no_older_answer(run: Run) -> None:
    async def check() -> None:
        asked, go_on = 0, asyncio.Event()

        async def ask(key: str) -> tuple[str, int]:
            nonlocal asked
            asked += 1
            number = asked
            await go_on.wait()
            return key, number

        together = Together(ask)
        first = asyncio.ensure_future(together("a"))
        await until(lambda: asked == 1)
        others = [asyncio.ensure_future(together("a")) for _ in range(100)]
        await asyncio.sleep(0)
        others[0].cancel()  # who asked first of them goes, and the others hear all the same
        go_on.set()
        assert await first == ("a", 1)
        assert {await other for other in others[1:]} == {("a", 2)}
        assert await together("a") == ("a", 3)  # nothing is kept
        assert await together("b") == ("b", 4)
        assert not together._under_way
        assert not together._next

    run(check())


def test_a_question_that_fails_fails_for_those_who_shared_it_and_for_nobody_else(run: Run) -> None:
    async def check() -> None:
        failing = True

        async def ask(key: str) -> str:
            if failing:
                raise ValueError(key)
            return key

        together = Together(ask)
        shared = [asyncio.ensure_future(together("a")) for _ in range(3)]
        for each in shared:
            with pytest.raises(ValueError, match="a"):
                await each
        failing = False
        assert await together("a") == "a"

    run(check())


def test_those_who_share_an_answer_go_on_with_their_work_a_few_at_a_time(run: Run) -> None:
    async def check() -> None:
        async def ask(key: str) -> str:
            await asyncio.sleep(0)
            return key

        together = Together(ask)
        heard: list[int] = []
        turns = 0

        async def one() -> None:
            await together("a")
            heard.append(turns)

        asking = [asyncio.ensure_future(one()) for _ in range(101)]
        while not all(each.done() for each in asking):
            turns += 1
            await asyncio.sleep(0)
        assert max(Counter(heard).values()) <= 2 * HEAR_AT_ONCE

    run(check())
