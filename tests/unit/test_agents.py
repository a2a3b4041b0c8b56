"""Which task an agent is, decided in one transaction: by its own id, its token, and the name that it asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.errors import KohakuRiverError, NotAllowedError, UnauthenticatedError
from kohakuriver.store import Accounts, Agents, Store, Task
from kohakuriver.store.accounts import digest
from kohakuriver.store.agents import KEPT_SECONDS, LOST_SECONDS, Coming, Taken
from kohakuriver.task import TaskOrder
from tests.support.databases import database_url

Run = Callable[[Coroutine[Any, Any, None]], None]
DAY = 86_400.0


class Room:
    """Two hosts' nodes, ann with a token of her own and one for an agent, and a clock that a test sets."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now = 100 * DAY
        self.accounts = Accounts(store, clock=lambda: self.now)
        self.agents = Agents(store, self.accounts, clock=lambda: self.now)
        self._last = 1000

    async def begin(self) -> None:
        for name in ("@a", "@b"):
            await self.store.put_node(name, {"url": "http://h:1", "last_seen": self.now}, b"key")
        await self.accounts.add_user("ann", "user")
        await self.token("hers", kind="user")

    async def token(self, secret: str, *, kind: str = "agent", lasts: float = DAY) -> None:
        """Make a token of ann's."""
        end = None if kind == "user" else self.now + lasts
        await self.accounts.add_token(secret, kind=kind, name="ann", label=secret, expires_at=end)

    async def comes(
        self, client: str, name: str = "", *, token: str = "hers", task: int | None = None, node: str = "@a"
    ) -> Taken:
        """An agent dials in."""

        def made(task_id: int) -> Task:
            order = TaskOrder(task_id=task_id, container=f"c-{task_id}", backend="agent", name=name or f"n{task_id}")
            return Task.ordered(order, node=node, owner="ann", now=self.now)

        self._last += 1
        return await self.agents.take(Coming(digest(token), client, name, task, made), node, self._last)

    async def is_(self, taken: Taken, status: str, *, tunnel: bool = False, **more: Any) -> None:
        """Its host writes down what has become of a task."""
        values = {"status": status, "tunnel": tunnel, "revision": taken.task.revision + 1, **more}
        await self.agents.change(taken.task.node, {taken.task.task_id: values})

    async def there(self) -> set[int]:
        return {task.task_id for node in ("@a", "@b") for task in (await self.agents.of_node(node)).values()}


@asynccontextmanager
async def a_room(directory: Path) -> AsyncIterator[Room]:
    store = await Store.open(database_url(directory))
    try:
        room = Room(store)
        await room.begin()
        yield room
    finally:
        await store.close()


def on_room(check: Callable[[Room], Coroutine[Any, Any, None]]) -> Callable[[Run, Path], None]:
    """A test with a room of its own."""

    def test(run: Run, tmp_path: Path) -> None:
        async def main() -> None:
            async with a_room(tmp_path) as room:
                await check(room)

        run(main())

    test.__doc__ = check.__doc__
    return test


@on_room
async def test_an_agent_is_one_task_however_often_it_asks(room: Room) -> None:
    first, second = await asyncio.gather(room.comes("client", "lab"), room.comes("other"))
    again = await room.comes("client", "lab")  # the answer was lost: it does not know its task's id
    known = await room.comes("client", "lab", task=first.task.task_id)
    assert {taken.task.task_id for taken in (first, again, known)} == {first.task.task_id}
    assert [taken.made for taken in (first, second, again, known)] == [True, True, False, False]


@on_room
async def test_a_token_for_an_agent_makes_one_task_also_where_two_come_at_once(room: Room) -> None:
    await room.token("once")
    came = await asyncio.gather(*(room.comes(f"c{n}", token="once") for n in range(4)), return_exceptions=True)
    [taken] = [each for each in came if isinstance(each, Taken)]
    refused = [each for each in came if isinstance(each, NotAllowedError)]
    assert [error.code for error in refused] == ["token_used"] * 3
    room.now += 2 * DAY  # its time was for making the task
    assert (await room.comes(taken.task.engine_name or "", token="once")).task.task_id == taken.task.task_id
    await room.accounts.revoke_token("once", "ann")
    with pytest.raises(UnauthenticatedError, match="was revoked"):
        await room.comes(taken.task.engine_name or "", token="once")
    links = [(taken.task.task_id, digest("once"))]
    assert await room.agents.withdrawn(links) == {taken.task.task_id: "this token was revoked"}


@on_room
async def test_a_token_that_has_expired_makes_none(room: Room) -> None:
    await room.token("late", lasts=1)
    room.now += 2
    with pytest.raises(UnauthenticatedError, match="has expired"):
        await room.comes("client", token="late")


@on_room
async def test_the_name_of_a_task_without_its_agent_is_taken_up_and_of_one_with_it_is_not(room: Room) -> None:
    old = await room.comes("old", "desk")
    await room.is_(old, "running", tunnel=True)
    with pytest.raises(KohakuRiverError, match="named 'desk' already"):
        await room.comes("new", "desk")
    await room.is_(old, "failed", revision=old.task.revision + 2)
    new = await room.comes("new", "desk")
    assert (new.task.task_id, new.made) == (old.task.task_id, False)
    with pytest.raises(KohakuRiverError) as replaced:
        await room.comes("old", "desk", task=old.task.task_id)
    assert replaced.value.code == "agent_replaced"


@on_room
async def test_what_was_stopped_or_removed_is_over_and_what_nobody_knows_is_new(room: Room) -> None:
    stopped, removed = await room.comes("one"), await room.comes("two")
    await room.is_(stopped, "stopped")
    await room.store.remove_task(removed.task.task_id)
    for client, taken in (("one", stopped), ("two", removed)):
        with pytest.raises(KohakuRiverError) as over:
            await room.comes(client, task=taken.task.task_id)
        assert (over.value.code, over.value.status) == ("agent_over", 410)
    assert (await room.comes("three", task=7)).made


@on_room
async def test_an_agent_that_comes_to_another_host_takes_its_task_there(room: Room) -> None:
    first = await room.comes("client", "lab")
    second = await room.comes("client", "lab", task=first.task.task_id, node="@b")
    assert (second.before, second.task.node) == ("@a", "@b")
    late = {first.task.task_id: {"status": "lost", "revision": second.task.revision + 1}}
    assert await room.agents.change("@a", late) == []  # what the host says that it was at before counts no more


@on_room
async def test_what_has_ended_is_forgotten_after_a_day_and_what_is_lost_after_thirty(room: Room) -> None:
    ended, lost, there = await room.comes("ended"), await room.comes("lost"), await room.comes("there")
    await room.is_(ended, "failed")
    await room.is_(lost, "lost")
    await room.is_(there, "running", tunnel=True)
    ids = [taken.task.task_id for taken in (ended, lost, there)]
    await room.agents.forget_the_gone()
    assert await room.there() == set(ids)
    room.now += KEPT_SECONDS + 1
    await room.agents.forget_the_gone()
    assert await room.there() == set(ids[1:])
    assert [node.name for node in await room.store.nodes()] == ["@a"]  # nothing is at the other host any more
    room.now += LOST_SECONDS
    await room.agents.forget_the_gone()
    assert await room.there() == {ids[2]}


@on_room
async def test_an_agent_that_takes_up_an_ended_task_and_hears_no_answer_is_not_told_that_it_is_over(room: Room) -> None:
    old = await room.comes("old", "desk")
    await room.is_(old, "failed", exit_code=3, message="it exited with code 3")
    await room.comes("new", "desk")
    again = await room.comes("new", "desk")
    assert (again.task.task_id, again.task.status) == (old.task.task_id, "starting")
    assert (again.task.exit_code, again.task.message) == (None, None)


@on_room
async def test_an_agent_that_was_let_in_has_its_name_also_while_it_is_not_connected_yet(room: Room) -> None:
    first = await room.comes("one", "desk")
    with pytest.raises(KohakuRiverError, match="named 'desk' already"):
        await room.comes("two", "desk")
    assert (await room.comes("one", "desk")).task.task_id == first.task.task_id


@on_room
async def test_at_the_limit_of_tasks_a_new_one_takes_the_place_of_the_agents_that_ended_first(
    room: Room,
) -> None:
    await room.accounts.set_limits("ann", {"tasks": 3})
    away, first, second = [await room.comes(client) for client in ("away", "first", "second")]
    await room.is_(away, "stopped")  # its agent has yet to be told
    for taken in (first, second):
        room.now += 1
        await room.is_(taken, "failed", exit_code=1)
    third = await room.comes("third")
    assert await room.there() == {taken.task.task_id for taken in (away, second, third)}
    await room.comes("fourth")
    with pytest.raises(KohakuRiverError) as refused:
        await room.comes("fifth")
    assert refused.value.code == "over_limit"


@on_room
async def test_agents_of_one_user_may_come_at_once_with_a_token_each(room: Room) -> None:
    secrets = [f"token{n}" for n in range(12)]
    await room.accounts.set_limits("ann", {"tasks": 20})
    for secret in secrets:
        await room.token(secret)
    came = await asyncio.gather(*(room.comes(f"c-{each}", token=each) for each in secrets))
    assert len({taken.task.task_id for taken in came}) == len(secrets)
