"""What is known of this node's tasks: who has to hear of a change, and how it is kept over a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import structlog

from kohakuriver.errors import NotFoundError
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.task import next_revision
from kohakuriver.text import printable

__all__ = ["LONGEST_MESSAGE", "TaskBook"]

log = structlog.get_logger("kohakuriver.runner")

SAVE_AGAIN_SECONDS = 5.0

LONGEST_MESSAGE = 500
"""Characters of what is told about a task."""


class Drop(Protocol):
    """Ends the streams of a container with a reason, and with `gone` its sessions too."""

    def __call__(self, container: str, reason: str, *, gone: bool = False) -> None: ...


def _drop_nothing(container: str, reason: str, *, gone: bool = False) -> None:
    pass


class TaskBook:
    """The records of all tasks of a node.

    `on_change` is called after every change. `drop` is set once the tunnel server is there. `on_end` is called with
    each task that runs no more, whatever the reason.
    """

    def __init__(self, state: State, on_change: Callable[[], None]) -> None:
        self._state = state
        self._on_change = on_change
        self._tasks: dict[str, TaskRecord] = {}
        self._saving = False
        self._unsaved = False
        self.drop: Drop = _drop_nothing
        self.on_end: Callable[[TaskRecord], None] = lambda _task: None

    def load(self) -> None:
        """Take up the tasks from before the restart."""
        self._tasks = {task.container: task for task in self._state.load_tasks()}
        for task in self._tasks.values():
            task.tunnel = task.tunnel and task.dialled

    def __contains__(self, container: object) -> bool:
        return container in self._tasks

    def add(self, task: TaskRecord) -> None:
        """A task that was not there."""
        self._tasks[task.container] = task
        self.changed()

    def forget(self, task: TaskRecord) -> None:
        """A task that is over."""
        self._tasks.pop(task.container, None)
        self.changed()

    def all(self) -> list[TaskRecord]:
        """All tasks."""
        return list(self._tasks.values())

    def get(self, container: str) -> TaskRecord:
        """The task of that container. Raises NotFoundError."""
        task = self._tasks.get(container)
        if task is None:
            raise NotFoundError(f"This node has no task in {container!r}.")
        return task

    def of_id(self, task_id: int) -> TaskRecord:
        """The task of that number. Raises NotFoundError."""
        for task in self._tasks.values():
            if task.task_id == task_id:
                return task
        raise NotFoundError(f"This node has no task {task_id}.")

    def of_backend(self, name: str) -> list[TaskRecord]:
        """The tasks that one backend runs."""
        return [task for task in self._tasks.values() if task.backend == name]

    def report(self, container: str, status: str, message: str | None = None, exit_code: int | None = None) -> None:
        """Take over a task's state; its streams end at once when it no longer runs."""
        task = self._tasks.get(container)
        # Not every database keeps all that a task can say, and heartbeats have to stay small.
        message = None if message is None else printable(message)[:LONGEST_MESSAGE]
        if task is None or (task.status, task.message, task.exit_code) == (status, message, exit_code):
            return
        ended = task.active and status not in ("starting", "running")
        task.status, task.message, task.exit_code = status, message, exit_code
        task.revision = next_revision()
        if ended:
            task.tunnel = False
            self.drop(container, f"task {task.name} {_ended(status, message)}")
        if task.dialled:
            task.tunnel = status == "running"
        log.info("task", task=task.task_id, name=task.name, status=status, **({"message": message} if message else {}))
        self.changed()
        if ended:
            self.on_end(task)

    def tunnel_changed(self, container: str, connected: bool) -> None:
        """A tunnel client came or went."""
        task = self._tasks.get(container)
        if task is not None and task.dialled:
            self.report(container, task.status, "a tunnel client in it is connected" if connected else None)
        elif task is not None and task.tunnel != connected:
            task.tunnel = connected
            task.revision = next_revision()
            self._on_change()

    def touch(self, task: TaskRecord) -> None:
        """Something else of a task is another."""
        task.revision = next_revision()
        self.changed()

    def note(self, container: str, sentence: str) -> None:
        """Say with a task what is wrong with it, though it goes on as it does; nothing any more if it is empty."""
        task = self._tasks.get(container)
        if task is not None and task.active:
            self.report(container, task.status, sentence or None, task.exit_code)

    def reports(self) -> list[dict[str, Any]]:
        """What the host hears about all tasks."""
        return [task.report() for task in self._tasks.values()]

    def changed(self) -> None:
        """Have the host hear of it, and the disk."""
        self._on_change()
        if not self._saving:
            self._saving = True
            asyncio.get_running_loop().call_soon(self._save)

    def write_down(self) -> bool:
        """Save the tasks; False where the disk takes nothing, which is said once and tried again."""
        try:
            self._state.save_tasks(self._tasks.values())
        except OSError as error:
            if not self._unsaved:
                log.error(
                    "the tasks can't be written down, and a restart would forget what changed; make room there",
                    directory=str(self._state.directory),
                    reason=error.strerror,
                )
            self._unsaved = True
            return False
        if self._unsaved:
            log.info("the tasks are written down again")
        self._unsaved = False
        return True

    def _save(self) -> None:
        if self.write_down():
            self._saving = False
        else:
            asyncio.get_running_loop().call_later(SAVE_AGAIN_SECONDS, self._save)


def _ended(status: str, message: str | None) -> str:
    return f"{'was stopped' if status == 'stopped' and not message else status}{f': {message}' if message else ''}"
