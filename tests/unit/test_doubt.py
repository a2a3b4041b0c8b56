from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.tunnel import doubt
from kohakuriver.tunnel.opener import KeptStreams
from tests.unit.test_endpoint import Pair

Run = Callable[[Coroutine[Any, Any, None]], None]


class Clock:
    """A clock that a test sets, and the looks that are due by it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(doubt, "_clock", lambda: self.now)
        monkeypatch.setattr(doubt, "TICK", 3600.0)  # the test looks

    def look(self, of: doubt.Doubt, after: float) -> None:
        self.now += after
        if of._timer is not None:
            of._timer.cancel()
        of._look()


def asks(kept: KeptStreams) -> bool:
    return kept.doubt._asked is not None


async def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[Pair, Clock, KeptStreams, list[str], Any]:
    clock = Clock(monkeypatch)
    pair, kept, doubts = Pair(), KeptStreams(3600), list[str]()
    pair.user.kept = kept
    kept.on_doubt = lambda: doubts.append("doubt")
    assert pair.user.streams is not None
    kept.attach(pair.user.streams)
    user_side, _ = await pair.established()
    return pair, clock, kept, doubts, user_side


def test_what_is_not_acknowledged_for_2_s_is_asked_for_and_doubted_without_an_answer_in_2_s(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        pair, clock, kept, doubts, user_side = await watched(monkeypatch)
        user_side.feed(b"into the void")
        for _ in range(4):
            clock.look(kept.doubt, 0.5)
        assert not asks(kept)
        clock.look(kept.doubt, 0.5)
        assert asks(kept)
        clock.look(kept.doubt, 1.9)
        assert not doubts
        clock.look(kept.doubt, 0.1)
        assert doubts == ["doubt"]
        pair.close()

    run(main())


def test_a_link_that_is_asked_at_once_is_doubted_half_a_second_later(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        pair, clock, kept, doubts, _ = await watched(monkeypatch)
        kept.doubt.ask()
        assert asks(kept)
        clock.look(kept.doubt, 0.4)
        assert not doubts
        clock.look(kept.doubt, 0.1)
        assert doubts == ["doubt"]
        kept.doubt.ask()
        await pair.settle()
        assert not asks(kept)
        pair.close()

    run(main())


def test_a_link_that_answers_is_not_doubted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        pair, clock, kept, doubts, user_side = await watched(monkeypatch)
        user_side.feed(b"slow")
        for _ in range(8):
            clock.look(kept.doubt, 0.5)
        assert asks(kept)
        await pair.settle()
        assert not asks(kept)
        for _ in range(4):
            clock.look(kept.doubt, 0.5)
        assert not doubts
        pair.close()

    run(main())


def test_a_clock_that_has_jumped_asks_at_once_though_nothing_is_under_way(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        pair, clock, kept, doubts, _ = await watched(monkeypatch)
        monkeypatch.setattr(doubt, "TICK", 0.5)
        clock.look(kept.doubt, 0.5)
        assert not asks(kept)
        clock.look(kept.doubt, 600.0)
        assert asks(kept)
        clock.look(kept.doubt, 2.0)
        assert doubts == ["doubt"]
        kept.doubt.end()
        pair.close()
        await asyncio.sleep(0)

    run(main())
