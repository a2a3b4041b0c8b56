"""Turns: links that share one get no more done than a link by itself, in the order in which they came."""

from __future__ import annotations

import asyncio

from kohakuriver.tunnel.turns import REST_SECONDS, TURN, Turn


class Busy:
    """A link that always has more to work off: `done` is how much it has."""

    def __init__(self, name: str, turn: Turn, done: list[str], size: int = TURN) -> None:
        self.name, self.turn, self.done, self.size = name, turn, done, size

    def go_on(self) -> None:
        self.done.append(self.name)
        self.turn.spend(self.size)
        self.turn.wait(self.go_on)


async def iterations(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_who_shares_a_turn_gets_it_one_after_the_other_and_as_much_as_one_alone() -> None:
    async def main() -> None:
        alone, shared = Turn(), Turn()
        done: list[str] = []
        for busy in [Busy("alone", alone, done), *(Busy(f"{i} of 3", shared, done) for i in range(3))]:
            busy.turn.wait(busy.go_on)
        await iterations(9)
        assert done.count("alone") == 9
        assert [name for name in done if name != "alone"] == [f"{i} of 3" for i in range(3)] * 3

    asyncio.run(main())


def test_what_one_leaves_of_a_turn_is_for_the_next() -> None:
    async def main() -> None:
        turn = Turn()
        done: list[str] = []
        for i in range(8):
            turn.wait(Busy(f"{i}", turn, done, TURN // 4).go_on)
        await iterations(1)
        assert done == ["0", "1", "2", "3"]
        await iterations(1)
        assert done == ["0", "1", "2", "3", "4", "5", "6", "7"]

    asyncio.run(main())


def test_a_turn_comes_back_though_nobody_waits() -> None:
    async def main() -> None:
        turn = Turn()
        turn.spend(TURN)
        assert turn.left == 0
        await iterations(2)
        assert turn.left == TURN

    asyncio.run(main())


def test_little_work_asks_nothing_of_the_loop_and_much_gets_no_more_than_a_turn() -> None:
    async def main() -> None:
        turn = Turn()
        for _ in range(TURN // 2):
            turn.spend(1)
            await iterations(1)
        assert turn.left == TURN // 2, "each of these reads has cost a callback"
        turn.spend(1)
        assert turn.left == TURN // 2 - 1, "what comes back in the same iteration is no bound"
        await iterations(2)
        assert turn.left == TURN

    asyncio.run(main())


def test_who_went_beyond_a_limit_gets_the_next_turn_after_a_while_and_others_theirs_at_once() -> None:
    async def main() -> None:
        over, other, again = Turn(), Turn(), asyncio.Event()
        done: list[str] = []
        other.wait(Busy("other", other, done).go_on)
        over.spend(TURN // 4)
        over.rest()
        began = asyncio.get_running_loop().time()
        over.spend(TURN)
        over.wait(again.set)
        await again.wait()
        assert asyncio.get_running_loop().time() - began >= REST_SECONDS
        assert len(done) > 1
        over.spend(TURN)
        await iterations(2)
        assert over.left == TURN  # it rested once

    asyncio.run(main())
