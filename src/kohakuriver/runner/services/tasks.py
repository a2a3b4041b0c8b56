"""The tasks of this node: what the host asked for, what became of it, and who has to hear of that."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import structlog

from kohakuriver.errors import KohakuRiverError, NotFoundError, UnavailableError
from kohakuriver.runner.backends.base import Backend, ExecRequest, ExecSession
from kohakuriver.runner.services.direct import DirectTarget
from kohakuriver.runner.services.state import State, TaskRecord, next_revision
from kohakuriver.text import printable

__all__ = ["START_SECONDS", "TaskManager"]

log = structlog.get_logger("kohakuriver.runner")

START_SECONDS = 20.0
"""A start that takes longer (an image is being pulled) goes on in the background."""

SAVE_AGAIN_SECONDS = 5.0

LONGEST_MESSAGE = 500
"""Characters of what is told about a task."""


class Drop(Protocol):
    """Ends the streams of a container with a reason, and with `gone` its sessions too."""

    def __call__(self, container: str, reason: str, *, gone: bool = False) -> None: ...


def _drop_nothing(container: str, reason: str, *, gone: bool = False) -> None:
    pass


class TaskManager:
    """All tasks of a node, whatever runs them.

    `on_change` is called after every change. `drop` is set once the tunnel server is there.
    """

    def __init__(self, state: State, on_change: Callable[[], None]) -> None:
        self._state = state
        self._on_change = on_change
        self._backends: dict[str, Backend] = {}
        self._tasks: dict[str, TaskRecord] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._saving = False
        self._unsaved = False
        self._draining = False
        self.drop: Drop = _drop_nothing

    # Life of the runner

    async def open(self, backends: dict[str, Backend]) -> None:
        """Take up the tasks from before the restart."""
        self._backends = backends
        self._tasks = {task.container: task for task in self._state.load_tasks()}
        for task in self._tasks.values():
            task.tunnel = task.tunnel and task.dialled
        for name, backend in backends.items():
            await backend.open([task for task in self._tasks.values() if task.backend == name], self._found)
        for task in self._tasks.values():
            if task.backend not in backends and task.active:
                self.report(task.container, "lost", f"the runner was started without the backend {task.backend}")
        self._changed()

    def _found(self, task: TaskRecord) -> None:
        self._tasks[task.container] = task
        self._changed()

    async def close(self, *, stop_tasks: bool) -> None:
        """Take no new tasks and end the backends, with those of their tasks that don't outlive the runner."""
        self._draining = True
        for start in list(self._starts.values()):
            start.cancel()
        await asyncio.gather(*self._starts.values(), return_exceptions=True)
        for name, backend in self._backends.items():
            await backend.close([task for task in self._tasks.values() if task.backend == name], stop_tasks=stop_tasks)
        self._write_down()

    @property
    def offered(self) -> list[str]:
        """The backends that new tasks can be started with now."""
        return [name for name, backend in self._backends.items() if backend.available]

    # What the host asks for

    def all(self) -> list[TaskRecord]:
        """All tasks."""
        return list(self._tasks.values())

    def get(self, container: str) -> TaskRecord:
        """The task of that container. Raises NotFoundError."""
        task = self._tasks.get(container)
        if task is None:
            raise NotFoundError(f"This node has no task in {container!r}.")
        return task

    async def create(self, task: TaskRecord) -> TaskRecord:
        """Start a new task; the same one asked for again is the one that is there."""
        if task.container in self._tasks:
            return self._tasks[task.container]
        backend = self._backend(task.backend)
        self._tasks[task.container] = task
        start = asyncio.get_running_loop().create_task(self._exclusively(task, backend.start))
        self._starts[task.container] = start
        start.add_done_callback(lambda _: self._starts.pop(task.container, None))
        done, _ = await asyncio.wait({start}, timeout=START_SECONDS)
        if not done:
            start.add_done_callback(lambda start: self._started_late(task, start))
        elif error := _failure(start):
            self._forget(task)
            raise error
        self._changed()
        return task

    def _started_late(self, task: TaskRecord, start: asyncio.Task[None]) -> None:
        if error := _failure(start):
            self.report(task.container, "failed", error.message.rstrip("."))

    async def adopt(self, task: TaskRecord) -> TaskRecord:
        """Make a task of what runs already; the answer is the task that it is already, if so."""
        if task.container in self._tasks:
            return self._tasks[task.container]
        backend = self._backend(task.backend)
        task.adopted = True
        self._tasks[task.container] = task
        try:
            async with self._locks[task.container]:
                adopted = await backend.adopt(task)
        except BaseException:
            self._forget(task)
            raise
        if adopted is not task:
            self._forget(task)
        self._changed()
        return adopted

    async def stop(self, container: str) -> TaskRecord:
        """Stop a task on purpose."""
        task = self.get(container)
        await self._cancel_start(task)
        backend = self._backend_of(task)
        async with self._locks[container]:
            was_active = task.active
            await backend.stop(task)
            if was_active:
                self.report(container, "stopped")
        return task

    async def restart(self, container: str) -> TaskRecord:
        """Start a task again, after stopping it if it runs."""
        task = self.get(container)
        self._refuse_while_draining()
        await self._cancel_start(task)
        backend = self._backend_of(task)
        async with self._locks[container]:
            await backend.stop(task)
            # Only now: a tunnel client that still runs would be back at once, and pass for the new one.
            self.drop(container, f"task {task.name} is restarted")
            self.report(container, "starting")
            try:
                await backend.start_again(task)
            except KohakuRiverError as error:
                self.report(container, "failed", error.message.rstrip("."))
                raise
        return task

    async def remove(self, container: str) -> TaskRecord:
        """Stop a task and forget it. Raises NotFoundError."""
        task = self.get(container)
        await self._cancel_start(task)
        backend = self._backends.get(task.backend)
        if backend is not None:
            await self._exclusively(task, backend.remove)
        self._forget(task)
        self.drop(container, f"task {task.name} was removed", gone=True)
        return task

    async def exec(self, task_id: int, request: ExecRequest) -> tuple[str, ExecSession]:
        """Run a command inside a task; the task's container, and the session, which the caller closes.

        Raises NotFoundError, or UnavailableError where the task does not run or its backend can't do this.
        """
        task = next((task for task in self._tasks.values() if task.task_id == task_id), None)
        if task is None:
            raise NotFoundError(f"This node has no task {task_id}.")
        backend = self._backend_of(task)
        if task.status != "running":
            raise UnavailableError(
                f"Task {task.name} is not running; start it with `kohakuriver vps restart {task.name}`.",
                code="task_not_running",
            )
        return task.container, await backend.exec(task, request)

    async def _exclusively(self, task: TaskRecord, action: Callable[[TaskRecord], Awaitable[None]]) -> None:
        async with self._locks[task.container]:
            await action(task)

    async def _cancel_start(self, task: TaskRecord) -> None:
        if start := self._starts.get(task.container):
            start.cancel()
            await asyncio.wait({start})

    def _backend(self, name: str) -> Backend:
        self._refuse_while_draining()
        backend = self._backends.get(name)
        if backend is None or not backend.available:
            raise UnavailableError(
                f"This node does not offer the backend {name} now; it offers {', '.join(self.offered) or 'none'}.",
                code="backend_not_offered",
            )
        return backend

    def _backend_of(self, task: TaskRecord) -> Backend:
        backend = self._backends.get(task.backend)
        if backend is None:
            raise UnavailableError(
                f"The runner was started without the backend {task.backend}; start it with `--backend {task.backend}`.",
                code="backend_not_offered",
            )
        return backend

    def _refuse_while_draining(self) -> None:
        if self._draining:
            raise UnavailableError("The node is shutting down; use another one.", code="node_offline")

    # What happens by itself

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
        self._changed()

    def tunnel_changed(self, container: str, connected: bool) -> None:
        """A tunnel client came or went."""
        task = self._tasks.get(container)
        if task is not None and task.dialled:
            self.report(container, task.status, "a tunnel client in it is connected" if connected else None)
        elif task is not None and task.tunnel != connected:
            task.tunnel = connected
            task.revision = next_revision()
            self._on_change()

    def note(self, container: str, sentence: str) -> None:
        """Say with a task what is wrong with it, though it goes on as it does."""
        task = self._tasks.get(container)
        if task is not None:
            self.report(container, task.status, sentence, task.exit_code)

    def check_tunnel_token(self, container: str, token: str) -> bool:
        """Whether a tunnel client may be this container's: it is a task's, and the token is its own."""
        return container in self._tasks and self._state.check_tunnel_token(container, token)

    def agent(self, container: str, runner_url: str) -> dict[str, str]:
        """What a tunnel client in the machine of an address task is started with.

        Raises NotFoundError, or UnavailableError for another kind of task, or where no client can speak to this node.
        """
        task = self.get(container)
        if task.backend != "address":
            raise UnavailableError(
                f"Task {task.name} is no machine: it gets its tunnel client by itself.", code="not_supported"
            )
        if runner_url.startswith("https:"):
            raise UnavailableError(
                "This task's node serves TLS, which no tunnel client speaks; the machine is reached by its address.",
                code="not_supported",
            )
        return {"container": container, "runner_url": runner_url, "token": self._state.tunnel_token(container)}

    def target_of(self, container: str) -> DirectTarget | None:
        """What the runner itself dials for this container, None where a tunnel client does it."""
        task = self._tasks.get(container)
        backend = None if task is None else self._backends.get(task.backend)
        return None if task is None or backend is None else backend.target(task)

    def reports(self) -> list[dict[str, Any]]:
        """What the host hears about all tasks."""
        return [task.report() for task in self._tasks.values()]

    def _forget(self, task: TaskRecord) -> None:
        self._tasks.pop(task.container, None)
        self._locks.pop(task.container, None)
        self._changed()

    def _changed(self) -> None:
        self._on_change()
        if not self._saving:
            self._saving = True
            asyncio.get_running_loop().call_soon(self._save)

    def _write_down(self) -> bool:
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
        if self._write_down():
            self._saving = False
        else:
            asyncio.get_running_loop().call_later(SAVE_AGAIN_SECONDS, self._save)


def _failure(start: asyncio.Task[None]) -> KohakuRiverError | None:
    """Why a start failed, in a sentence for users whatever went wrong."""
    if start.cancelled():
        return UnavailableError("The start was interrupted.", code="task_not_running")
    error = start.exception()
    if error is None or isinstance(error, KohakuRiverError):
        return error
    log.error("a task could not be started", exc_info=error)
    return KohakuRiverError("The runner failed to start the task; its log says why.")


def _ended(status: str, message: str | None) -> str:
    return f"{'was stopped' if status == 'stopped' and not message else status}{f': {message}' if message else ''}"
