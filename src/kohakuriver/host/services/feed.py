"""What changes, told to those who look on: their tasks, nodes, sessions, rates, and the ports that listen in a task.

The host looks once for all who look on. It looks at once when it hears of a change. It also looks every two seconds:
another host on the same database may have changed something, a node may have gone silent, a right or a login may have
ended. Sessions and rates are this host's own; it looks at them once a second.

Each follower is told the difference to what it was told last. A follower that reads slowly misses steps in between, but
never the outcome, and it holds nobody up.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeAlias

import structlog

from kohakuriver.changes import Changes
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, UnauthenticatedError, UnavailableError
from kohakuriver.host.schemas import NodeView
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.host.services.open_sessions import OpenSession, OpenSessions
from kohakuriver.host.services.tasks import Tasks
from kohakuriver.runtime import cancel_all
from kohakuriver.store import Accounts, Store, Use
from kohakuriver.task import TaskView

__all__ = ["Feed"]

TICK_SECONDS = 1.0
"""How often sessions are looked at, and whether those who look on are still logged in."""

LOOK_SECONDS = 1.9
"""How often all is looked at, on the first tick after it: within two seconds."""

SOONEST_SECONDS = 0.2
"""Changes that come closer together are told together."""

MOST_FOLLOWERS = 64
"""Of one user."""

_WHOLE = ("shared_with",)  # the dashboard takes rights back by these names

LONGEST = 1000
"""Characters of one thing that is told of a task, as its command."""

MOST_SESSIONS = 200
"""Of how many sessions one is told, the newest; `GET /api/sessions` has all."""

_NO_TASK = 0

Part: TypeAlias = dict[str, Any]
Parts: TypeAlias = dict[str, Part]

log = structlog.get_logger("kohakuriver.host")


class Feed:
    """All who look on at this host."""

    def __init__(
        self,
        store: Store,
        accounts: Accounts,
        tasks: Tasks,
        nodes: Nodes,
        sessions: OpenSessions,
        changes: Changes[int],
    ) -> None:
        self._store = store
        self._accounts = accounts
        self._tasks = tasks
        self._nodes = nodes
        self._sessions = sessions
        self._changes = changes
        self._followers: set[_Follower] = set()
        self._begun = asyncio.Event()
        self._of_user: dict[tuple[str, str], Parts] = {}
        self._node_views: Part = {}
        self._open: list[OpenSession] = []
        self._rates: Part = {}
        self._ports: dict[str, Part] = {}
        self._looking: set[asyncio.Task[None]] = set()

    def open(self, caller: Caller, ports_of: str | None) -> _Follower:
        """What the caller may see, from now on, as lines of JSON; with the ports of a task, by its id.

        Raises UnavailableError "too_many_events".
        """
        if sum(follower.caller.name == caller.name for follower in self._followers) >= MOST_FOLLOWERS:
            raise UnavailableError(
                f"You have {MOST_FOLLOWERS} of these open already; close some.", code="too_many_events", status=429
            )
        follower = _Follower(caller, ports_of, self._left)
        self._followers.add(follower)
        self._begun.set()
        return follower

    def _left(self, follower: _Follower) -> None:
        self._followers.discard(follower)

    def close(self) -> None:
        """End them all: the host shuts down."""
        for follower in self._followers:
            follower.end(HostUnreachableError("The host is shutting down.", status=503))

    async def run(self) -> None:
        """Look, while somebody looks on, until cancelled."""
        with self._changes.watch_all() as changed:
            try:
                while True:
                    await self._begun.wait()
                    self._begun.clear()  # who has come may have left already
                    await self._run_while_followed(changed)
            finally:
                await cancel_all(list(self._looking))

    async def _run_while_followed(self, changed: asyncio.Event) -> None:
        due = time.monotonic()
        while self._followers:
            self._begun.clear()
            await self._check_logins()
            if changed.is_set() or time.monotonic() >= due:
                changed.clear()
                due = time.monotonic() + LOOK_SECONDS
                await self._look()
            self._open = self._sessions.look()
            self._rates = _rates(self._open)
            for follower in list(self._followers):
                if _who(follower.caller) in self._of_user:
                    follower.show(self._seen_by(follower))
            await self._pause(changed)
        self._of_user, self._ports = {}, {}

    async def _pause(self, changed: asyncio.Event) -> None:
        """Until it is time to look again: soon after a change or a newcomer, else after a second."""
        await asyncio.sleep(SOONEST_SECONDS)
        waits = [asyncio.ensure_future(event.wait()) for event in (changed, self._begun)]
        await asyncio.wait(waits, timeout=TICK_SECONDS - SOONEST_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        await cancel_all(waits)
        if self._begun.is_set():
            changed.set()

    async def _look(self) -> None:
        """Look at all that is in the database. One that fails changes nothing."""
        try:
            everything = await self._tasks.all()
            callers = {_who(follower.caller): follower.caller for follower in self._followers}
            self._of_user = {
                who: _of_tasks([view for _, _, view in await self._tasks.of_these(everything, caller)])
                for who, caller in callers.items()
            }
            self._node_views = {view.name: _steady(view) for view in await self._nodes.views()}
        except KohakuRiverError:
            return  # as every request says that needs it
        except Exception:
            log.exception("what changes can't be told")
            return
        for task_id in self._wanted_ports():
            self._look_into(task_id)

    async def _check_logins(self) -> None:
        uses = {Use(follower.caller.digest, _NO_TASK) for follower in self._followers}
        try:
            withdrawn = await self._accounts.withdrawn(uses)
            roles = await self._accounts.roles(follower.caller.name for follower in self._followers)
        except KohakuRiverError:
            return  # the database fails, as every request says that needs it
        for follower in list(self._followers):
            if Use(follower.caller.digest, _NO_TASK) in withdrawn:
                follower.end(UnauthenticatedError("You are not logged in here any more.", code="logged_out"))
            elif roles.get(follower.caller.name, follower.caller.role) != follower.caller.role:
                follower.end(UnavailableError("Your role is another one now; look again.", code="role_changed"))

    def _wanted_ports(self) -> set[str]:
        wanted = {follower.ports_of for follower in self._followers if follower.ports_of is not None}
        self._ports = {task_id: found for task_id, found in self._ports.items() if task_id in wanted}
        return wanted

    def _look_into(self, task_id: str) -> None:
        """Ask a task which ports listen in it, unless the last question is still under way."""
        if any(looking.get_name() == task_id for looking in self._looking):
            return
        looking = asyncio.get_running_loop().create_task(self._ask_ports(task_id), name=task_id)
        self._looking.add(looking)
        looking.add_done_callback(self._looking.discard)

    async def _ask_ports(self, task_id: str) -> None:
        try:
            found = await self._tasks.ports(*await self._store.task_and_node(task_id))
        except KohakuRiverError as error:
            self._ports[task_id] = {"ports": [], "more": False, "error": error.message}
        else:
            self._ports[task_id] = {**found.model_dump(mode="json"), "error": None}

    def _seen_by(self, follower: _Follower) -> Parts:
        """All that there is to be told to one who looks on."""
        caller, usable = follower.caller, self._of_user[_who(follower.caller)]
        sessions = [each for each in self._open if each.may_be_seen_by(caller)][:MOST_SESSIONS]
        return usable | {
            "nodes": self._node_views,
            "sessions": {each.id: each.view(caller).model_dump(mode="json") for each in sessions},
            "rates": {task_id: rate for task_id, rate in self._rates.items() if task_id in usable["tasks"]},
            "ports": {
                of: found for of, found in self._ports.items() if of == follower.ports_of and of in usable["tasks"]
            },
        }


def _who(caller: Caller) -> tuple[str, str]:
    """Whose view it is: an admin who becomes a user sees less at once."""
    return caller.name, caller.role


def _rates(sessions: list[OpenSession]) -> Part:
    """Bytes a second of all sessions of each task, to the container and to the user."""
    rates: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for each in sessions:
        to_container, to_user = rates[str(each.task_id)]
        rates[str(each.task_id)] = (to_container + each.rates[0], to_user + each.rates[1])
    return dict(rates)


def _of_tasks(views: list[TaskView]) -> Parts:
    """The parts that are about tasks."""
    return {
        "tasks": {str(view.task_id): _without_traffic(view) for view in views},
        "traffic": {str(view.task_id): asdict(view.traffic) for view in views},
    }


def _without_traffic(view: TaskView) -> Part:
    """A task as told; what went through it is told by itself, since it changes all the time."""
    told = view.to_json()
    del told["traffic"]
    return {name: value if name in _WHOLE else _short(value) for name, value in told.items()}


def _short(value: Any) -> Any:
    """A text or a list of texts with its first `LONGEST` characters; `GET /api/tasks/{task}` has all.

    Each follower has all tasks in memory until they are read, and one user has 64 of these.
    """
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]}…"
    if not isinstance(value, list):
        return value
    kept, room = list[str](), LONGEST
    for each in map(str, value):
        if len(each) >= room:
            return [*kept, f"{each[:room]}…"]
        kept.append(each)
        room -= len(each) + 1
    return value


def _steady(view: NodeView) -> Part:
    """A node as told: of one that is online it changes all the time when it was heard of, and what passed through."""
    told = view.model_dump(mode="json", exclude={"traffic"})
    return told if view.status == "offline" else told | {"last_seen": None}


class _Follower:
    """One who looks on, as a `Source` of lines."""

    def __init__(self, caller: Caller, ports_of: str | None, left: Callable[[_Follower], None]) -> None:
        self.caller = caller
        self.ports_of = ports_of
        self._left = left
        self._told: Parts = {}
        self._now: Parts | None = None
        self._news = asyncio.Event()
        self._ended: KohakuRiverError | None = None

    def show(self, now: Parts) -> None:
        """How everything is now."""
        self._now = now
        self._news.set()

    def end(self, error: KohakuRiverError) -> None:
        """Tell nothing more but this."""
        self._ended = self._ended or error
        self._news.set()

    async def read(self) -> bytes | None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._ended is not None:
                raise self._ended
            assert self._now is not None
            news = _news(self._told, self._now)
            first = not self._told
            self._told = self._now
            if news or first:
                return json.dumps(news, separators=(",", ":")).encode() + b"\n"

    async def close(self) -> None:
        self._left(self)


def _news(before: Parts, now: Parts) -> dict[str, Any]:
    """What is not as it was: by part what is new or different, and under "gone" what is not there any more."""
    news: dict[str, Any] = {}
    gone: dict[str, list[str]] = {}
    for name, part in now.items():
        old = before.get(name, {})
        if old is part:
            continue
        if fresh := {key: value for key, value in part.items() if old.get(key) != value}:
            news[name] = fresh
        if missing := [key for key in old if key not in part]:
            gone[name] = missing
    return news | ({"gone": gone} if gone else {})
