"""What a host does about agents' tasks when the database, an agent or its link fails at the wrong moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kohakuriver.errors import HostUnreachableError, KohakuRiverError, UnauthenticatedError
from kohakuriver.host.agents.book import AWAY_SECONDS
from kohakuriver.host.agents.entry import AgentEntry
from kohakuriver.host.agents.node import AgentNode
from kohakuriver.host.services.credentials import Caller
from kohakuriver.limits import Limits
from kohakuriver.tunnel.accept import UpgradeRequest
from tests.unit.test_agents import DAY, Room, a_room

Run = Callable[[Coroutine[Any, Any, None]], None]


class Link:
    """That of an agent; whether it was broken off."""

    def __init__(self) -> None:
        self.label, self.version, self.aborted = "", 2, False

    def abort(self) -> None:
        self.aborted = True

    def close(self, *_: object) -> None:
        self.aborted = True


class Session(SimpleNamespace):
    """That of a user."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class Host:
    """A host's node and entry on a room's database; the hub's links are not real ones.

    Instead of `Nodes` and `Credentials` it stands itself.
    """

    def __init__(self, room: Room, directory: Path) -> None:
        self.room, self.now = room, 0.0
        self.remove: list[int] = []
        self.written: list[tuple[str, int | None]] = []
        me = cast(Any, self)
        self.node = AgentNode(
            directory,
            room.store,
            room.agents,
            me,
            limits=Limits(),
            mark_key=b"key",
            audit=me,
            told=lambda ids: None,
            heartbeat_seconds=5,
            clock=lambda: self.now,
        )
        self.node.name = "@a"
        self.entry = AgentEntry(self.node, room.agents, me, me, me, me, clock=lambda: room.now)

    async def enter(self, *_: object, **__: object) -> Any:
        return SimpleNamespace(ticket_key=b"key")

    async def agent(self, secret: str) -> Any:
        token, user = await self.room.accounts.token(secret)
        assert token is not None
        assert user is not None
        return Caller(user.name, user.role), token

    async def heartbeat(self, *_: object) -> Any:
        return SimpleNamespace(remove=self.remove)

    def count(self, _: object) -> None:
        pass

    def write(self, event: str, **fields: Any) -> None:
        self.written.append((event, fields.get("code")))

    def came_back(self, _: object) -> None:
        pass

    def refused(self, *_: object, **__: object) -> None:
        pass

    async def dials(self, client: str, *, token: str = "hers", name: str = "desk", hangs_up: bool = False) -> Link:
        """An agent dials in. Raises KohakuRiverError."""
        link = Link()

        def accept(*_: object, **__: object) -> Link:
            if hangs_up:
                raise HostUnreachableError("the peer hung up during the handshake")
            return link

        request = SimpleNamespace(
            query={"name": name}, token=token, peer="192.0.2.7:4000", whence=SimpleNamespace(address="127.0.0.1")
        )
        request.offers_v2, request.client, request.accept = True, client * 32, accept
        await self.entry._open(cast(UpgradeRequest, request))
        return link

    async def task(self) -> Any:
        """The one that there is, as the database has it."""
        await self.node.write()
        (task,) = (await self.room.agents.of_node("@a")).values()
        return task


def on_host(check: Callable[[Host], Coroutine[Any, Any, None]]) -> Callable[[Run, Path], None]:
    """A test with a host of its own."""

    def test(run: Run, tmp_path: Path) -> None:
        async def main() -> None:
            async with a_host(tmp_path) as host:
                await check(host)

        run(main())

    return test


@contextlib.asynccontextmanager
async def a_host(directory: Path) -> AsyncIterator[Host]:
    async with a_room(directory) as room:
        host = Host(room, directory)
        try:
            yield host
        finally:
            for container in list(host.node.tunnels.hub.tunnels):
                host.node.tunnels.hub.drop(container, "the test is over")


def answering(host: Host, answers: bool) -> list[str]:
    """Have the agent that is connected answer when another one comes, or be silent; from where others come."""
    came: list[str] = []
    hub = host.node.tunnels.hub
    check = hub.check_replacement
    for leg in hub.tunnels.values():
        leg.answers = _says(answers)  # type: ignore[method-assign]

    async def checked(container: str, client: str | None, address: str) -> None:
        came.append(address)
        await check(container, client, address)

    hub.check_replacement = checked  # type: ignore[method-assign]
    return came


def _says(answer: bool) -> Callable[[], Coroutine[Any, Any, bool]]:
    async def answers() -> bool:
        return answer

    return answers


@on_host
async def test_a_database_that_fails_is_not_asked_again_at_once_and_is_told_later(host: Host) -> None:
    await host.dials("a")
    await host.task()
    tried, change = asyncio.Queue[None](), host.room.agents.change

    async def fails(*_: object) -> Any:
        tried.put_nowait(None)
        raise HostUnreachableError("The database is away.")

    host.room.agents.change = fails  # type: ignore[assignment,method-assign]
    running = asyncio.create_task(host.node.run())
    (task,) = host.node.book
    task.message = "news"
    host.node.book.note(task)
    await tried.get()
    for _ in range(100):
        await asyncio.sleep(0)
    assert tried.empty()
    running.cancel()
    host.room.agents.change = change  # type: ignore[method-assign]
    assert (await host.task()).message == "news"


@on_host
async def test_an_agent_that_ignores_its_end_holds_up_no_heartbeat(host: Host) -> None:
    await host.dials("a")
    (task,) = host.node.book
    assert task.leg is not None
    asked: list[None] = []
    task.leg.ask_to_end = lambda: asked.append(None)  # type: ignore[method-assign]
    host.remove = [task.task_id]
    await asyncio.wait_for(host.node.look(), 5)
    await asyncio.sleep(0)
    await asyncio.wait_for(host.node.look(), 5)
    await asyncio.sleep(0)
    assert len(asked) == 1
    task.over.set()


@on_host
async def test_a_credential_that_is_no_good_ends_no_agents_link(host: Host) -> None:
    link, came = await host.dials("a"), answering(host, False)
    await host.task()
    for secret, lasts in (("late", -1.0), ("gone", DAY), ("used", DAY)):
        await host.room.token(secret, lasts=lasts)
    await host.room.accounts.revoke_token("gone", "ann")
    await host.room.comes("other", token="used", node="@b")
    for secret in ("late", "gone", "used"):
        with pytest.raises(KohakuRiverError) as refused:
            await host.dials("b", token=secret)
        assert isinstance(refused.value, UnauthenticatedError) or refused.value.code == "token_used"
    assert (link.aborted, came) == (False, [])


@on_host
async def test_an_agent_takes_the_name_of_one_that_is_silent_and_of_no_other(host: Host) -> None:
    first = await host.dials("a")
    came = answering(host, True)
    (first_leg,) = host.node.tunnels.hub.tunnels.values()
    task = await host.task()
    with pytest.raises(KohakuRiverError) as refused:
        await host.dials("b")
    assert (refused.value.code, first.aborted) == ("tunnel_taken", False)
    assert came == ["192.0.2.7"]  # as the proxy that it comes through says
    first_leg.answers = _says(False)  # type: ignore[method-assign]
    second = await host.dials("b")
    assert (first.aborted, second.aborted) == (True, False)
    assert (await host.task()).task_id == task.task_id


@on_host
async def test_an_agent_that_hangs_up_before_it_is_connected_keeps_its_name_from_nobody(host: Host) -> None:
    with pytest.raises(HostUnreachableError):
        await host.dials("a", hangs_up=True)
    assert (await host.task()).tunnel is False
    await host.dials("b")
    assert (await host.task()).status == "running"


@on_host
async def test_each_coming_of_an_agent_is_written_down_and_has_its_end_also_where_the_next_comes_before(
    host: Host,
) -> None:
    for _ in range(2):
        await host.dials("a")
    (known,) = host.node.book
    assert host.node.snapshot()["connected"] == 1
    host.node.tunnels.hub.drop(known.container, "it is gone")
    came = [("task_created", None), ("agent_connected", None)]
    assert host.written == [*came, ("agent_left", 4000), ("agent_connected", None), ("agent_left", 1006)]
    assert host.node.snapshot()["connected"] == 0


@on_host
async def test_a_task_whose_agent_was_let_in_and_never_heard_of_again_is_lost(host: Host) -> None:
    taken = await host.room.comes("a", "desk")  # and then this host failed it
    await host.node.enter()
    host.node.book.forget(host.node.book.get(taken.task.container))
    await host.node.look()
    await host.node.look()
    host.now += AWAY_SECONDS + 1
    await host.node.look()
    task = await host.task()
    assert (task.status, task.tunnel) == ("lost", False)


@on_host
async def test_a_task_that_moves_to_another_host_loses_none_of_its_connections(host: Host) -> None:
    link = await host.dials("a")
    await host.task()
    (known,) = host.node.book
    await host.room.comes(known.engine_name or "", "desk", node="@b")
    ended: list[bool] = []
    session = Session(
        container=known.container,
        lost=lambda ids, reason: [1],
        over=lambda ids, reason: ended.append(True),
        link=SimpleNamespace(close=lambda *_: ended.append(False), intake=SimpleNamespace(resume=lambda _: None)),
        go_on=lambda: None,
        counts=dict,
        gauges=dict,
        paths=None,
    )
    host.node.tunnels.hub.sessions[cast(Any, session)] = None
    await host.node.look()
    host.node.tunnels.hub.sessions.clear()
    assert link.aborted
    assert known.container not in host.node.book
    assert ended
    assert not any(ended)
    assert host.node.tunnels.hub.ended(known.container) == ""


@on_host
async def test_a_task_that_has_ended_is_in_the_database_alone_after_a_while(host: Host) -> None:
    await host.dials("a")
    (known,) = host.node.book
    leg = known.leg
    assert leg is not None
    leg.ended_by = (1000, "exit 3")
    host.node.tunnels.hub.tunnel_closed(leg, "it has ended")
    await asyncio.sleep(0)
    await host.node.look()
    assert known.container in host.node.book
    host.now += AWAY_SECONDS
    await host.node.look()
    assert known.container not in host.node.book
    assert host.node.tunnels.hub.ended(known.container) == ""
    task = await host.task()
    assert (task.status, task.exit_code) == ("failed", 3)
    await host.dials("b")
    assert (await host.task()).status == "running"
