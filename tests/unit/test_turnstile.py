"""Rates of what strangers may do, for one source and for all."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.errors import UnavailableError
from kohakuriver.ssh_proxy.turnstile import MOST_SOURCES, TOTAL, Turnstile

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_who_uses_up_its_own_rate_leaves_others_theirs_until_that_of_all_is_used_up(run: Run) -> None:
    async def check() -> None:
        turnstile = Turnstile(0.001, 0)
        for source in [str(number) for number in range(TOTAL)]:
            await turnstile.turn(source)
            with pytest.raises(UnavailableError, match="Too many"):
                await turnstile.turn(source)
        with pytest.raises(UnavailableError, match="Too many"):
            await turnstile.turn("one more")

    run(check())


def test_who_comes_too_early_waits_for_its_turn(run: Run) -> None:
    async def check() -> None:
        turnstile = Turnstile(20, 10)
        for _ in range(45):  # 40 of them may come at once
            await turnstile.turn("a")

    run(check())


def test_sources_without_number_take_no_memory_without_end(run: Run) -> None:
    async def check() -> None:
        turnstile = Turnstile(100_000, 0)
        for number in range(2 * MOST_SOURCES):
            await turnstile.turn(str(number))
        assert len(turnstile._sources) == MOST_SOURCES

    run(check())
