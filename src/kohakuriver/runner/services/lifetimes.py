"""When tasks are stopped by themselves: when their time to live is over, or when nobody was connected for a while.

The node keeps these times, since it outlives hosts and sees who is connected. Nothing is polled: a timer waits for what
comes next. Time is counted by the clock that nobody sets and that goes on while the machine sleeps; only over a reboot,
which that clock does not survive, the clock of the wall decides, and then no task has more time than it was given.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import structlog

from kohakuriver.errors import KohakuRiverError
from kohakuriver.quotas import time_in_words
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.task_book import TaskBook
from kohakuriver.web.background import in_background

__all__ = ["AGAIN_SECONDS", "BootClock", "Deadline", "Lifetimes", "Stop"]

log = structlog.get_logger("kohakuriver.runner")

AGAIN_SECONDS = 60.0
"""After how long it is tried again to stop a task that could not be stopped."""

WARNING_SECONDS = 300.0
"""How long before the end of its time to live those who are connected to a task are told, or a tenth of that time."""

_LONGEST_SLEEP = 3600.0  # timers don't count the time that the machine sleeps: at most so much late

Stop = Callable[[str, str, Callable[[], bool]], Awaitable[object]]
"""(container, why, whether it is still to be): stop a task."""


class BootClock:
    """Seconds since the machine was started, sleep included, and the wall's clock."""

    def ticks(self) -> float:
        """Seconds since the start of the machine."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    @cached_property
    def boot(self) -> str:
        """Which start of the machine this is; empty where nobody knows."""
        with contextlib.suppress(OSError):
            return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return ""


@dataclass(frozen=True)
class Deadline:
    """A moment to come, as both clocks had it, and how many seconds that was away when it was set."""

    boot: str
    ticks: float
    wall: float
    given: float

    @classmethod
    def after(cls, seconds: float, clock: BootClock) -> Deadline:
        """The moment that is so many seconds away."""
        return cls(clock.boot, clock.ticks() + seconds, clock.wall() + seconds, seconds)

    def left(self, clock: BootClock) -> float:
        """How many seconds it is away; less than 0 when it has passed."""
        if self.boot and self.boot == clock.boot:
            return self.ticks - clock.ticks()
        return min(self.wall - clock.wall(), self.given)

    def anew(self, clock: BootClock) -> Deadline:
        """The same moment as the clocks have it now: the machine may have been started again, the wall's clock set."""
        return replace(Deadline.after(self.left(clock), clock), given=self.given)

    def written(self) -> list[str | float]:
        """As it is kept."""
        return [self.boot, self.ticks, self.wall, self.given]

    @classmethod
    def read(cls, kept: list[str | float] | None) -> Deadline | None:
        """As it was kept; None where it was not."""
        if kept is None:
            return None
        boot, *numbers = kept
        ticks, wall, given = map(float, numbers)
        return cls(str(boot), ticks, wall, given)


class Lifetimes:
    """Stops the tasks of a node when their time has come.

    It is told of everybody who is connected: `entered` and `left`. `tell` says a sentence to those. A task is idle
    while it runs and nobody is; what it computes does not count, nor who has read its log, nor what a lost connection
    left for its return.
    """

    def __init__(self, book: TaskBook, stop: Stop, *, clock: BootClock | None = None) -> None:
        self._book = book
        self._stop = stop
        self._clock = clock or BootClock()
        self._users: Counter[str] = Counter()
        self._idle: dict[str, Deadline] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._again: dict[str, float] = {}
        self._warned: dict[str, Deadline] = {}
        self._look = asyncio.Event()
        self.tell: Callable[[str, str], None] = lambda container, sentence: None

    # What happens

    def entered(self, container: str) -> None:
        """Somebody is connected to a task."""
        self._users[container] += 1
        self._idle.pop(container, None)

    def left(self, container: str) -> None:
        """Somebody of those is not any more."""
        self._users[container] -= 1
        if self._users[container] <= 0:
            del self._users[container]
            self._look.set()

    def changed(self) -> None:
        """Something about some task is another."""
        self._look.set()

    def begin(self, task: TaskRecord) -> None:
        """A task is started: its time to live begins."""
        self._idle.pop(task.container, None)
        task.stop_reason = None
        self._set(task, None if task.ttl is None else Deadline.after(task.ttl, self._clock))

    def extend(self, task: TaskRecord, seconds: float) -> None:
        """Have a task's time to live be over so much later."""
        self._set(task, Deadline.after(self.left_of(task) + seconds, self._clock))
        self._look.set()

    def left_of(self, task: TaskRecord) -> float:
        """How many seconds of its time to live a task has left, which has one."""
        deadline = Deadline.read(task.deadline)
        return 0.0 if deadline is None else max(deadline.left(self._clock), 0.0)

    def _set(self, task: TaskRecord, deadline: Deadline | None) -> None:
        task.deadline = None if deadline is None else deadline.written()
        task.ends_at = None if deadline is None else round(deadline.wall, 1)

    # Over a restart of the runner

    def take_up(self) -> None:
        """Go on with the tasks from before the restart: nobody was connected while no runner was there."""
        for task in self._book.all():
            deadline, idle = Deadline.read(task.deadline), Deadline.read(task.idle_deadline)
            if deadline is not None:
                self._set(task, deadline.anew(self._clock))
            if idle is not None:
                self._idle[task.container] = idle.anew(self._clock)
            task.idle_deadline = None  # one that is killed writes nothing down: it counts from its start again

    def write_down(self) -> None:
        """Keep for the next runner since when tasks are idle."""
        self._count_idle()
        for task in self._book.all():
            idle = self._idle.get(task.container)
            task.idle_deadline = None if idle is None else idle.written()

    # Time

    async def run(self) -> None:
        """Stop tasks when their time has come, until cancelled."""
        while True:
            self._look.clear()
            wait = self._stop_due()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._look.wait(), min(wait, _LONGEST_SLEEP))

    def _stop_due(self) -> float:
        """Stop those whose time has come; in how many seconds that is so of the next."""
        self._count_idle()
        next_one = _LONGEST_SLEEP
        for task in self._book.all():
            if not task.active or task.container in self._ending:
                continue
            next_one = min(next_one, self._warn(task))
            left, _ = self._next_of(task)
            left = max(left, self._again.get(task.container, 0.0) - self._clock.ticks())
            if left > 0:
                next_one = min(next_one, left)
            else:
                ending = in_background(self._end(task), "stopping a task whose time has come")
                self._ending[task.container] = ending
        return next_one

    def _warn(self, task: TaskRecord) -> float:
        """Tell those who are connected that a task is about to be stopped; in how many seconds that is due."""
        deadline = Deadline.read(task.deadline)
        if deadline is None or self._warned.get(task.container) == deadline:
            return _LONGEST_SLEEP
        left = deadline.left(self._clock)
        due = left - min(WARNING_SECONDS, deadline.given / 10)
        if due > 0:
            return due
        self._warned[task.container] = deadline
        if self._users[task.container]:
            self.tell(
                task.container,
                f"Task {task.name} is stopped in {time_in_words(left)}, when its time to live is over; its owner adds "
                f"to it with `kohakuriver vps extend {task.name} 1h`.",
            )
        return _LONGEST_SLEEP

    def _count_idle(self) -> None:
        """Begin to count for tasks that are idle, and no more for those that don't run."""
        counted = {
            task.container: task.idle_stop
            for task in self._book.all()
            if task.idle_stop is not None and task.status == "running" and not self._users[task.container]
        }
        for container in [each for each in self._idle if each not in counted]:
            del self._idle[container]
        for container, seconds in counted.items():
            if container not in self._idle:
                self._idle[container] = Deadline.after(seconds, self._clock)

    def _next_of(self, task: TaskRecord) -> tuple[float, str]:
        """In how many seconds a task is to be stopped, for ever where it is not, and why."""
        ends = [(float("inf"), "")]
        if (deadline := Deadline.read(task.deadline)) is not None:
            given = f"of {time_in_words(task.ttl)} " if task.ttl and deadline.given == task.ttl else ""
            ends.append((deadline.left(self._clock), f"its time to live {given}is over"))
        if (idle := self._idle.get(task.container)) is not None:
            ends.append((idle.left(self._clock), f"idle for {time_in_words(task.idle_stop or 0)}"))
        return min(ends)

    async def _end(self, task: TaskRecord) -> None:
        _, why = self._next_of(task)
        log.info("a task's time has come", task=task.task_id, name=task.name, reason=why)
        self._again[task.container] = self._clock.ticks() + AGAIN_SECONDS
        try:
            await self._stop(task.container, why, lambda: self._next_of(task)[0] <= 0)
            self._again.pop(task.container)
        except KohakuRiverError as error:
            log.warning("a task can't be stopped whose time has come", task=task.task_id, reason=error.message)
        finally:
            self._ending.pop(task.container, None)
            self._look.set()
