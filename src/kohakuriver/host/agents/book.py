"""The agents' tasks that are at this host, and what became of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from kohakuriver.errors import NotFoundError
from kohakuriver.relay.legs import TunnelLeg
from kohakuriver.store import Task
from kohakuriver.store.models import ACTIVE
from kohakuriver.task import TaskReport, describe_exit, next_revision, part_of
from kohakuriver.tunnel.protocol import CloseCode, exit_code_in

__all__ = ["AWAY_SECONDS", "AgentTask", "Book"]

AWAY_SECONDS = 30.0
"""After so long without its agent a task is lost: until then it most likely comes back."""

AWAY = "its agent is not connected at the moment"
LOST = "its agent is gone; it goes on when that is back"
STOPPED = "it was stopped"


@dataclass(kw_only=True)
class AgentTask(TaskReport):
    """One of them. `token` is the digest of what its agent showed, and `machine` where it runs, as it says.

    `away_since` is None while it is connected.

    `stopping` says that its agent was told to end, and `over` that it has.
    """

    container: str
    name: str
    owner: str = ""
    token: str = ""
    away_since: float | None = None
    machine: str = ""
    stopping: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    leg: TunnelLeg | None = None
    backend: str = "agent"
    dialled: bool = False

    @classmethod
    def of(cls, task: Task, now: float) -> AgentTask:
        """A task as the database has it, whose agent is not connected here."""
        known = part_of(task, TaskReport, without=("traffic",))
        return cls(**known, container=task.container, name=task.name or "", owner=task.owner, away_since=now)

    def came(self, leg: TunnelLeg) -> None:
        """Its agent is connected."""
        self.leg, self.away_since, self.stopping = leg, None, False
        self.over = asyncio.Event()  # it may have been another agent's, and ended with that
        self._is("running", f"its agent runs on {self.machine}" if self.machine else None)

    def went(self, now: float) -> None:
        """The link of its agent has gone: its task has ended, as the agent says, or may go on."""
        code, reason = (self.leg and self.leg.ended_by) or (CloseCode.ABNORMAL, "")
        self.leg, self.away_since = None, now
        exited = exit_code_in(code, reason)
        if exited is not None:
            status, message = describe_exit(exited)
            self.end("stopped" if self.stopping else status, STOPPED if self.stopping else message, exited)
        else:
            self._is(self.status, f"its agent may not come in: {reason}" if code == CloseCode.POLICY else AWAY)

    def hung_up(self, status: str) -> None:
        """Its agent was let in, and is gone before it was connected."""
        self._is(status, AWAY)

    def end(self, status: str, message: str, exit_code: int | None = None) -> None:
        """It has ended for good."""
        self._is(status, message)
        self.exit_code = exit_code
        self.over.set()

    def look(self, now: float) -> bool:
        """Call it lost where it is; whether that is news."""
        if self.status not in ACTIVE or self.away_since is None or now - self.away_since < AWAY_SECONDS:
            return False
        self._is("lost", LOST)
        return True

    @property
    def state(self) -> str:
        """How its agent is: "connected", "away", "lost", or "ended"."""
        if self.leg is not None:
            return "connected"
        return "ended" if self.over.is_set() else "lost" if self.status == "lost" else "away"

    def ended_long_ago(self, now: float) -> bool:
        """Whether nobody goes on with it any more, neither its agent nor who had a session of it."""
        return self.over.is_set() and self.away_since is not None and now - self.away_since >= AWAY_SECONDS

    def _is(self, status: str, message: str | None) -> None:
        self.status, self.message, self.tunnel = status, message, self.leg is not None
        self.exit_code = None
        self.revision = max(next_revision(), self.revision + 1)


class Book:
    """All of them, by the ids of their containers. `changed` is called when something about one is another."""

    def __init__(self, changed: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tasks: dict[str, AgentTask] = {}
        self._news: dict[int, AgentTask] = {}
        self._changed = changed
        self._clock = clock

    def __contains__(self, container: str) -> bool:
        return container in self._tasks

    def __iter__(self) -> Iterator[AgentTask]:
        return iter(list(self._tasks.values()))

    def __len__(self) -> int:
        return len(self._tasks)

    def get(self, container: str) -> AgentTask:
        """Raises NotFoundError."""
        try:
            return self._tasks[container]
        except KeyError:
            raise NotFoundError(f"There is no agent's task {container} here.") from None

    def add(self, task: Task) -> AgentTask:
        """Take a task in, as the database has it; one that is known stays as it is, but for what its agent has said."""
        known = self._tasks.get(task.container)
        if known is None:
            known = self._tasks[task.container] = AgentTask.of(task, self._clock())
        known.name, known.engine_name = task.name or "", task.engine_name
        known.revision = max(known.revision, task.revision)
        return known

    def forget(self, task: AgentTask) -> None:
        """It is at this host no more."""
        self._tasks.pop(task.container, None)
        self._news.pop(task.task_id, None)

    def tunnel_changed(self, container: str, leg: TunnelLeg | None) -> None:
        """Its agent has come, or gone."""
        if (task := self._tasks.get(container)) is not None:
            if leg is not None:
                task.came(leg)
            else:
                task.went(self._clock())
            self.note(task)

    def hung_up(self, task: Task) -> None:
        """An agent that was let in as this task never was connected."""
        known = self.add(task)
        if known.leg is None:
            known.hung_up(task.status)
        self.note(known)

    def look(self) -> None:
        """Find those that are lost."""
        for task in self:
            if task.look(self._clock()):
                self.note(task)

    def note(self, task: AgentTask) -> None:
        """Something about it is another."""
        self._news[task.task_id] = task
        self._changed()

    def news(self) -> dict[int, dict[str, Any]]:
        """What is to be written down of those that have changed; it is told once."""
        told, self._news = self._news, {}
        return {task_id: task.changes() for task_id, task in told.items()}

    def untold(self, tasks: Collection[int]) -> None:
        """What was told of these could not be written down. It is told again when somebody asks, and nobody is woken:
        whoever tried would try again at once, and without end."""
        self._news = {task.task_id: task for task in self if task.task_id in tasks} | self._news
