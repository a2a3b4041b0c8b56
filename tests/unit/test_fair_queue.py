from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from kohakuriver.asking import Asker, asking
from kohakuriver.runner.services.fair_queue import FairQueue
from kohakuriver.runtime import cancel_all

Run = Callable[[Coroutine[Any, Any, None]], None]


class Work:
    """One thing of a user's that takes until it is told to end; `begun` has the users in the order of their turns."""

    def __init__(self, queue: FairQueue, user: str, begun: list[str]) -> None:
        self.end = asyncio.Event()
        with asking(Asker(known={"user": user})):
            self.task = asyncio.get_running_loop().create_task(self._run(queue, user, begun))

    async def _run(self, queue: FairQueue, user: str, begun: list[str]) -> None:
        async with queue.place():
            begun.append(user)
            await self.end.wait()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_user_with_much_to_do_leaves_room_for_another(run: Run) -> None:
    async def main() -> None:
        begun: list[str] = []
        queue = FairQueue(4, 2)
        works = [Work(queue, "eve", begun) for _ in range(10)]
        await settled()
        works.append(Work(queue, "ann", begun))
        await settled()
        assert begun == ["eve", "eve", "ann"]
        await cancel_all([work.task for work in works])

    run(main())


def test_users_who_wait_take_turns_however_much_each_asked_for(run: Run) -> None:
    async def main() -> None:
        begun: list[str] = []
        queue = FairQueue(1, 1)
        works = [Work(queue, user, begun) for user in ("eve", "eve", "eve", "ann", "bob", "ann")]
        await settled()
        for work in works:
            work.end.set()
        await asyncio.gather(*(work.task for work in works))
        assert begun == ["eve", "eve", "ann", "bob", "eve", "ann"]  # the first found the place free

    run(main())


def test_whoever_gives_up_waiting_and_whoever_fails_leaves_no_place_taken(run: Run) -> None:
    async def main() -> None:
        begun: list[str] = []
        queue = FairQueue(1, 1)
        works = [Work(queue, user, begun) for user in ("eve", "ann", "bob")]
        await settled()
        works[1].task.cancel()  # it waits
        await settled()
        works[0].task.cancel()  # it has the place, which is bob's now
        await settled()
        works[2].task.cancel()
        await settled()
        assert begun == ["eve", "bob"]
        async with AsyncExitStack() as stack:
            await asyncio.wait_for(stack.enter_async_context(queue.place()), 5)

    run(main())


def test_a_place_that_comes_in_the_moment_of_giving_up_is_the_next_ones(run: Run) -> None:
    async def main() -> None:
        begun: list[str] = []
        queue = FairQueue(1, 1)
        works = [Work(queue, user, begun) for user in ("eve", "ann", "bob")]
        await settled()
        works[0].end.set()
        await works[0].task
        works[1].task.cancel()
        await settled()
        assert begun[-1] == "bob"
        await cancel_all([work.task for work in works])

    run(main())
