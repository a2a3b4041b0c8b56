"""What changes is told to those who look on: who hears of what, how soon, and until when."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import pytest

from kohakuriver.host.services import feed
from kohakuriver.host.services.feed import LOOK_SECONDS, MOST_FOLLOWERS, TICK_SECONDS
from kohakuriver.host.services.open_sessions import SHORTEST_SECONDS
from kohakuriver.store import Task, User
from tests.support.browser import Browser
from tests.support.host_only import HostUnderTest

Run = Callable[[Coroutine[Any, Any, None]], None]
Check = Callable[[HostUnderTest], Coroutine[Any, Any, None]]

PATIENCE = 30.0


class Told:
    """What one who looks on was told, as it is now."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines
        self.parts: dict[str, dict[str, Any]] = {}
        self.last: dict[str, Any] = {}

    async def more(self) -> dict[str, Any]:
        """The next line that says something."""
        while True:
            line = await asyncio.wait_for(anext(self._lines), PATIENCE)
            if line:
                break
        self.last = json.loads(line)
        for name, part in self.last.items():
            if name not in ("gone", "error", "message", "status"):
                self.parts.setdefault(name, {}).update(part)
        for name, keys in self.last.get("gone", {}).items():
            for key in keys:
                del self.parts[name][key]
        return self.last

    async def until(self, condition: Callable[[Told], object]) -> None:
        """Read until it holds."""
        while not condition(self):
            await self.more()

    def names(self) -> set[str]:
        return {task["name"] for task in self.parts.get("tasks", {}).values()}


@contextlib.asynccontextmanager
async def followed(client: httpx.AsyncClient, query: str = "") -> AsyncIterator[Told]:
    async with client.stream("GET", f"/api/events{query}") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/x-ndjson"
        yield Told(answer.aiter_lines())


async def make(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    answer = await client.post("/api/tasks", json={"name": name, "backend": "process"})
    assert answer.status_code == 201, answer.text
    task: dict[str, Any] = answer.json()
    return task


def test_each_hears_of_the_tasks_that_are_theirs_or_shared_with_them_and_of_no_others(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest) -> None:
        await (await host.runner()).beat()
        ann, _ = await host.person("ann")
        bob, _ = await host.person("bob")
        await make(ann, "lab")
        async with followed(ann) as of_ann, followed(bob) as of_bob, followed(host.user) as of_admin:
            await of_ann.until(lambda told: told.names() == {"lab"})
            await of_admin.until(lambda told: told.names() == {"lab"})
            await of_bob.more()
            assert of_bob.names() == set()
            assert "n1" in of_bob.parts["nodes"]
            await make(ann, "other")
            await of_ann.until(lambda told: told.names() == {"lab", "other"})
            assert (await ann.post("/api/tasks/lab/shares", json={"user": "bob"})).status_code == 201
            await of_bob.until(lambda told: told.names() == {"lab"})
            assert (await ann.delete("/api/tasks/lab/shares/bob")).status_code == 200
            await of_bob.until(lambda told: told.names() == set())
            assert (await ann.delete("/api/tasks/other")).status_code == 200
            await of_ann.until(lambda told: told.names() == {"lab"})

    on_host(check)


def test_a_change_is_told_when_the_host_hears_of_it_and_not_when_it_looks_next(
    on_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(host: HostUnderTest) -> None:
        runner = await host.runner()
        await runner.beat()
        task = await host.create(name="lab")
        async with followed(host.user) as told:
            await told.until(lambda told: told.names() == {"lab"})
            for status in ("stopped", "running"):
                runner.change(task["container"], status=status)
                await runner.beat()
                await told.until(lambda told, status=status: _status(told, task) == status)  # type: ignore[misc]
                assert set(told.last) <= {"tasks", "traffic", "nodes"}

    monkeypatch.setattr(feed, "LOOK_SECONDS", 10_000.0)
    on_host(check)


def _status(told: Told, task: dict[str, Any]) -> str:
    return str(told.parts["tasks"][str(task["task_id"])]["status"])


def test_rights_and_logins_are_looked_at_within_two_seconds() -> None:
    assert LOOK_SECONDS < 2 * TICK_SECONDS == 2.0


def test_who_is_not_logged_in_any_more_is_told_nothing_but_that(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        await (await host.runner()).beat()
        _, token = await host.person("ann")
        browser = Browser(host)
        await browser.log_in(token)
        ((name, value),) = browser.cookies.items()
        by_cookie = host.client(None)
        by_cookie.headers.update(
            {"Host": browser.authority, "Cookie": f"{name}={value}", "Sec-Fetch-Site": "same-origin"}
        )
        async with followed(by_cookie) as of_browser, followed(host.client(token)) as of_token:
            await of_browser.more()
            await of_token.more()
            await browser.ask("POST", "/logout")
            await of_browser.until(lambda told: "error" in told.last)
            assert (of_browser.last["error"], of_browser.last["status"]) == ("logged_out", 401)
            assert (await host.user.delete("/api/users/ann")).status_code == 200
            await of_token.until(lambda told: "error" in told.last)

    on_host(check)


def test_an_admin_who_becomes_a_user_is_told_no_more_as_an_admin(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        await (await host.runner()).beat()
        await host.create(name="of-another")
        _, token = await host.person("ann")
        await host.store.write(lambda session: setattr(session.get_one(User, "ann"), "role", "admin"))
        async with followed(host.client(token)) as before:
            await before.until(lambda told: bool(told.parts.get("tasks")))
            await host.store.write(lambda session: setattr(session.get_one(User, "ann"), "role", "user"))
            await before.until(lambda told: "error" in told.last)
            assert before.last["error"] == "role_changed"
            async with followed(host.client(token)) as after:
                await after.more()
                assert not after.parts.get("tasks")

    on_host(check)


def test_the_ports_of_a_task_are_told_while_somebody_looks_at_it_and_to_nobody_else(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest) -> None:
        runner = await host.runner()
        await runner.beat()
        ann, _ = await host.person("ann")
        bob, _ = await host.person("bob")
        task = await make(ann, "lab")
        port = {"port": 8888, "proto": "tcp", "address": "0.0.0.0", "program": "jupyter"}
        path, key = f"/api/tasks/{task['container']}/ports", str(task["task_id"])
        runner.answers[path] = (200, {"ports": [port]})
        assert (await bob.get("/api/events?ports=lab")).status_code == 403
        assert (await bob.get("/api/events?ports=none")).status_code == 404
        async with followed(ann, "?ports=lab") as told, followed(ann) as other:
            await told.until(lambda told: "ports" in told.parts)
            assert told.parts["ports"][key] == {"ports": [port], "more": False, "error": None}
            runner.answers[path] = (503, {"error": "no_tunnel", "message": "It is not connected."})
            await told.until(lambda told: told.parts["ports"][key]["error"])
            assert told.parts["ports"][key]["ports"] == []
            await make(ann, "last")
            await other.until(lambda told: "last" in told.names())
            assert "ports" not in other.parts

    on_host(check)


def test_sessions_and_their_rates_are_told_to_their_user_the_tasks_owner_and_admins(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest) -> None:
        await (await host.runner()).beat()
        ann, ann_token = await host.person("ann")
        bob, bob_token = await host.person("bob")
        await make(ann, "lab")
        assert (await ann.post("/api/tasks/lab/shares", json={"user": "bob"})).status_code == 201
        task, passed = await _task(host, "lab"), [0, 0]
        grants = {}
        for name, token in (("ann", ann_token), ("bob", bob_token)):
            caller = await host.forwards._credentials.session_caller(token)
            grants[name] = await host.grants.enter(caller, task)
            grants[name].counted(lambda: (passed[0], passed[1]))
            grants[name].opened(**{"from": f"10.0.0.1:{name}"}, proto="tcp", port=8888)
        for client, seen, sources in (
            (ann, ["ann", "bob"], {"10.0.0.1:ann", None}),
            (bob, ["bob"], {"10.0.0.1:bob"}),
            (host.user, ["ann", "bob"], {"10.0.0.1:ann", "10.0.0.1:bob"}),
        ):
            found = (await client.get("/api/sessions")).json()
            assert sorted(each["user"] for each in found) == seen
            assert {each["source"] for each in found} == sources
        async with followed(bob) as told:
            await told.until(lambda told: told.parts.get("sessions"))
            await asyncio.sleep(SHORTEST_SECONDS)
            passed[:] = [1_000_000, 3_000_000]
            key = str(task.task_id)
            await told.until(lambda told: told.parts.get("rates", {}).get(key, [0])[0] > 0)
            to_container, to_user = told.parts["rates"][key]
            assert 2.5 < to_user / to_container < 3.5
            (mine,) = told.parts["sessions"].values()
            assert (mine["user"], mine["bytes_to_user"]) == ("bob", 3_000_000)
            assert to_user == pytest.approx(2 * mine["to_user_per_second"], rel=0.1)  # ann's is as fast
            for grant in grants.values():
                grant.closed()
            await told.until(lambda told: not told.parts["sessions"] and key not in told.parts["rates"])
        assert (await host.user.get("/api/sessions")).json() == []

    on_host(check)


async def _task(host: HostUnderTest, name: str) -> Task:
    return (await host.store.task_and_node(name))[0]


def test_a_user_has_so_many_of_them_open_at_most(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        caller = await host.forwards._credentials.session_caller(host.admin_token)
        opened = [host.feed.open(caller, None) for _ in range(MOST_FOLLOWERS)]
        refused = await host.user.get("/api/events")
        assert (refused.status_code, refused.json()["error"]) == (429, "too_many_events")
        await opened[0].close()
        async with followed(host.user) as told:
            await told.more()
            host.feed.close()
            await told.until(lambda told: "error" in told.last)
            assert told.last["status"] == 503

    on_host(check)


def test_of_a_long_command_no_more_is_told_than_a_page_shows(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        await host.runner()
        task = await host.create(name="long", command=["x" * 2000, *["y"] * 3000], image="i", workdir="/" * 2000)
        await host.create(name="short", command=["true"] * 100, image="i")
        await host.create(name="edge", command=["x" * 998, "y", "z"], image="i")
        people = [f"user{number:04}" for number in range(150)]
        for name in people:
            await host.person(name)
            await host.user.post("/api/tasks/short/shares", json={"user": name})
        async with followed(host.user) as told:
            await told.until(lambda told: told.names() == {"long", "short", "edge"})
            seen = {each["name"]: each for each in told.parts["tasks"].values()}
        assert seen["long"]["command"] == ["x" * 1000 + "…"]
        assert seen["long"]["workdir"] == "/" * 1000 + "…"
        assert seen["short"]["command"] == ["true"] * 100
        assert seen["edge"]["command"] == ["x" * 998, "y…"]
        assert sorted(seen["short"]["shared_with"]) == people  # who takes one back goes by these
        whole = (await host.user.get(f"/api/tasks/{task['task_id']}")).json()
        assert len(whole["command"]) == 3001

    on_host(check)


def test_who_comes_and_leaves_at_once_while_the_last_one_leaves_holds_nothing_up(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        caller = await host.forwards._credentials.session_caller(host.admin_token)
        last = host.feed.open(caller, None)
        assert await last.read()
        await host.feed.open(caller, None).close()
        await last.close()
        await asyncio.sleep(TICK_SECONDS)  # after which it is seen that nobody looks on
        async with followed(host.user) as told:
            await told.more()

    on_host(check)
