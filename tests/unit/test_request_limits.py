"""How HTTP requests take turns; what they may be is in tests/integration/test_limits.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from kohakuriver.fair_turns import FairTurns
from kohakuriver.web.request_limits import STARTED_AT_ONCE, Body, BodyBudget

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_few_requests_are_begun_in_a_turn_and_all_of_one_user_in_order(run: Run) -> None:
    async def main() -> None:
        starts, begun = FairTurns(STARTED_AT_ONCE), list[tuple[str, int]]()

        def begin(who: str, number: int) -> None:
            def work() -> bool:
                begun.append((who, number))
                return True

            starts.begin(work, who)

        for number in range(3 * STARTED_AT_ONCE):
            begin("eve", number)
        begin("ann", 0)
        assert begun == [("eve", number) for number in range(STARTED_AT_ONCE)]
        await asyncio.sleep(0)
        assert len(begun) == 2 * STARTED_AT_ONCE
        assert ("ann", 0) in begun  # though eve had asked for so much before
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [number for who, number in begun if who == "eve"] == list(range(3 * STARTED_AT_ONCE))

    run(main())


def test_one_that_fails_keeps_nobody_waiting() -> None:
    async def main() -> None:
        failed: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, about: failed.append(about["exception"]))
        starts, done = FairTurns(1), asyncio.Event()

        def last() -> bool:
            done.set()
            return True

        def fail() -> bool:
            raise RuntimeError("no")

        starts.begin(lambda: True, "eve")
        starts.begin(fail, "eve")
        starts.begin(last, "eve")
        await done.wait()
        assert len(failed) == 1

    asyncio.run(main())


def holding(budget: BodyBudget, size: int, user: str | None = None, *, of_node: bool = False) -> Body:
    body = Body(budget, BodyBudget(1, 1))
    body.of_node = of_node
    body.take(size)  # what comes with a head, before anybody knows whose it is
    if user is not None:
        body.belongs_to(user)
    return body


def test_users_who_take_all_that_bodies_may_have_keep_no_node_from_being_heard() -> None:
    budget = BodyBudget(1 << 20, 1 << 18)
    users = [holding(budget, 1 << 18, name) for name in ("ann", "bob", "eve", "zed")]
    assert all(budget.fits(body) and budget.fits_its_user(body) for body in users)
    more = holding(budget, 100_000, "una")
    assert budget.fits_its_user(more)
    assert not budget.fits(more)
    beat = holding(budget, 400_000, of_node=True)
    assert budget.fits(beat)
    assert not budget.fits(holding(budget, 60_000))


def test_a_users_bodies_together_have_a_share_which_is_free_again_with_each() -> None:
    budget = BodyBudget(1 << 20, 1 << 18)
    first, second = (holding(budget, 200_000, "eve") for _ in range(2))
    assert not budget.fits_its_user(second)
    assert budget.fits_its_user(holding(budget, 200_000, "ann"))
    first.let_go()
    assert budget.fits_its_user(second)
