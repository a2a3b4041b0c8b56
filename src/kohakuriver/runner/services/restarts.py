"""Running tasks again that have ended, where their restart policy says so (docs/guide/tasks.md)."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from kohakuriver.errors import KohakuRiverError
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.task_book import TaskBook
from kohakuriver.runtime import cancel_all
from kohakuriver.tunnel.backoff import STEADY, Backoff
from kohakuriver.web.background import in_background

__all__ = ["FIRST_PAUSE", "LONGEST_PAUSE", "Restarts"]

log = structlog.get_logger("kohakuriver.runner")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds until a task that has ended runs again: the first time, and at most, as it ends again and again."""


@dataclass
class _Course:
    """How it went with a task since this runner began: its failures in a row, and what is due."""

    backoff: Backoff = field(default_factory=lambda: Backoff(FIRST_PAUSE, LONGEST_PAUSE))
    began: float = -math.inf
    due: asyncio.Task[None] | None = None
    starting: asyncio.Task[None] | None = None
    said: str = ""

    @property
    def under_way(self) -> list[asyncio.Task[None]]:
        """The work that waits, or that is done now."""
        return [work for work in (self.due, self.starting) if work is not None]


class Restarts:
    """Has ended tasks run again. `start` starts one again, and may raise KohakuRiverError."""

    def __init__(self, book: TaskBook, start: Callable[[TaskRecord], Awaitable[None]]) -> None:
        self._book = book
        self._start = start
        self._courses: dict[str, _Course] = {}
        self._open = self._closed = False
        book.on_end = self._ended

    def open(self) -> None:
        """The tasks from before the restart are known: those run again that ended with their node."""
        self._open = True
        for task in self._book.all():
            if _policy(task) != "no" and task.cut_off and not task.halted and not task.active:
                self.take_up(task)
                self._have_back(task, self._courses.setdefault(task.container, _Course()))

    async def close(self) -> None:
        """From now on tasks end because their node does, and run again with it."""
        self._closed = True
        await cancel_all([work for course in self._courses.values() for work in course.under_way])

    async def interrupt(self, task: TaskRecord) -> bool:
        """Somebody wants something else of a task that is just being started, if it is."""
        course = self._courses.get(task.container)
        if course is None or course.starting is None:
            return False
        await cancel_all([course.starting])
        return True

    def leave(self, task: TaskRecord) -> None:
        """Somebody ends the task: it is not to run again by itself."""
        task.halted, task.cut_off = True, False
        course = self._courses.pop(task.container, None)
        if course is not None and course.due is not None:
            course.due.cancel()

    def take_up(self, task: TaskRecord) -> None:
        """Somebody has the task run from now on, with its failures forgotten."""
        task.halted = task.cut_off = False
        task.failures = 0

    def _ended(self, task: TaskRecord) -> None:
        if task.halted or _policy(task) == "no":
            return
        course = self._courses.setdefault(task.container, _Course())
        if self._closed:
            task.cut_off = True
        elif not self._open:
            task.cut_off = task.status != "lost" and (task.exit_code is None or _wants(task))
        elif course.due is not None:  # an engine that tells late how it ended
            self._book.report(task.container, "starting", course.said)
        elif task.exit_code is not None and _wants(task):
            self._count(task, course, time.monotonic() - course.began)

    def _count(self, task: TaskRecord, course: _Course, lived: float | None) -> None:
        """Have it run again, if it has not failed too often; `lived` is in seconds, None where it did not start."""
        course.backoff.ended(lived)
        task.failures = 1 if lived is not None and lived >= STEADY else task.failures + 1
        most = _most(task)
        if task.failures <= most:
            self._have_back(task, course)
        else:
            log.info("a task has failed too often to run again", task=task.task_id, times=most)

    def _have_back(self, task: TaskRecord, course: _Course) -> None:
        pause = course.backoff.ceiling
        course.said = "; ".join(filter(None, [task.message, f"it runs again in {pause:g} s"]))
        course.due = in_background(self._after(task, course, pause), "running a task again")
        self._book.report(task.container, "starting", course.said)

    async def _after(self, task: TaskRecord, course: _Course, pause: float) -> None:
        await asyncio.sleep(pause)
        course.due, course.began = None, time.monotonic()
        if self._courses.get(task.container) is not course or task.halted:
            return
        course.starting = asyncio.current_task()
        try:
            await self._start(task)
        except KohakuRiverError as error:
            self._not_started(task, course, error.message.rstrip("."), its_fault=error.code != "no_engine")
        except Exception as error:  # as a disk that is full
            log.error("a task could not be started again", task=task.task_id, exc_info=error)
            self._not_started(task, course, f"it could not be started: {error}", its_fault=True)
        finally:
            course.starting = None

    def _not_started(self, task: TaskRecord, course: _Course, why: str, *, its_fault: bool) -> None:
        self._book.report(task.container, "failed", why)
        if not its_fault:
            course.backoff.ended(None)
            self._have_back(task, course)
        elif self._courses.get(task.container) is course and not task.halted:
            self._count(task, course, None)


def _policy(task: TaskRecord) -> str:
    return "no" if task.adopted else (task.restart or "no").partition(":")[0]


def _most(task: TaskRecord) -> float:
    """How often in a row it may fail and run again."""
    return int((task.restart or "").partition(":")[2] or 0) or math.inf


def _wants(task: TaskRecord) -> bool:
    """Whether what has ended by itself is to run again."""
    policy = _policy(task)
    return policy in ("always", "unless-stopped") or (policy == "on-failure" and task.status == "failed")
