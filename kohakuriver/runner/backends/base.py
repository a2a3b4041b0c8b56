"""The one interface behind which the ways of running a task live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from kohakuriver.runner.state import TaskRecord

__all__ = ["Backend", "Reporter"]


class Reporter(Protocol):
    """What a backend calls with a task's state; `message` is for a person, without a full stop."""

    def __call__(self, container: str, status: str, message: str | None = None) -> None: ...


class Backend(ABC):
    """One way of running tasks.

    Methods return when the thing is done and may raise KohakuRiverError with a sentence that says what to do. They are
    never called twice at once for the same task. They may write into the record's fields about the engine and the
    tunnel client; status and message go through the reporter.
    """

    name: str

    @property
    def available(self) -> bool:
        """Whether new tasks can be started now."""
        return True

    @abstractmethod
    async def open(self, tasks: list[TaskRecord], found: Callable[[TaskRecord], None]) -> None:
        """Begin. `tasks` are this backend's from before the restart: their state is reported anew.

        `found` is called, now or later, with a task that runs and is not among them.
        """

    @abstractmethod
    async def start(self, task: TaskRecord) -> None:
        """Start a new task. One that can't be started leaves nothing behind."""

    @abstractmethod
    async def adopt(self, task: TaskRecord) -> TaskRecord:
        """Make what runs already reachable as this task; the answer is another task if it was adopted before."""

    @abstractmethod
    async def stop(self, task: TaskRecord) -> None:
        """Stop it; nothing to do when it does not run."""

    @abstractmethod
    async def start_again(self, task: TaskRecord) -> None:
        """Start a task that was stopped or ended."""

    @abstractmethod
    async def remove(self, task: TaskRecord) -> None:
        """Stop it and remove what it left. What was adopted goes on, without its tunnel."""

    @abstractmethod
    async def close(self, tasks: list[TaskRecord], *, stop_tasks: bool) -> None:
        """End. Tasks that can outlive the runner do, unless `stop_tasks`."""
