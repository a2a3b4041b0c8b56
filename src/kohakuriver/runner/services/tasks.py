"""The tasks of this node: what the host asks for is done by a backend, one thing at a time for each task."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from kohakuriver.backends import kind_of
from kohakuriver.errors import KohakuRiverError, UnavailableError, UsageError
from kohakuriver.quotas import LONGEST_TIME, time_in_words
from kohakuriver.relay.direct import DirectTarget
from kohakuriver.relay.open_ports import TaskSockets
from kohakuriver.runner.backends.base import Backend, ExecRequest, ExecSession
from kohakuriver.runner.backends.printed import LogRequest, Printed
from kohakuriver.runner.services.knock import Knocker
from kohakuriver.runner.services.lifetimes import Lifetimes
from kohakuriver.runner.services.restarts import Restarts
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.task_book import TaskBook
from kohakuriver.runner.services.tunnel_helper import new_token
from kohakuriver.tunnel.accept import Peer

__all__ = ["START_SECONDS", "TaskManager"]

log = structlog.get_logger("kohakuriver.runner")

START_SECONDS = 20.0
"""A start that takes longer (an image is being pulled) goes on in the background."""


_OPENING_SECONDS = 5.0
"""How long a tunnel client waits until a runner that was just started knows its tasks."""


class TaskManager:
    """What the host asks of this node's tasks, whatever runs them.

    `book` has their records, `lifetimes` stops them when their time has come.

    Large because hosts ask much: each method is one thing of that.
    """

    def __init__(self, book: TaskBook) -> None:
        self.book = book
        self.lifetimes = Lifetimes(book, self._stop_by_time)
        self._backends: dict[str, Backend] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._draining = False
        self._opened = asyncio.Event()
        self._knocker = Knocker()
        self._restarts = Restarts(book, self._run_again)

    # Life of the runner

    async def open(self, backends: dict[str, Backend]) -> None:
        """Take up the tasks from before the restart."""
        self._backends = backends
        self.book.load()
        self.lifetimes.take_up()
        for name, backend in backends.items():
            await backend.open(self.book.of_backend(name), self.book.add)
        for task in self.book.all():
            if task.backend not in backends and task.active:
                self.book.report(task.container, "lost", f"the runner was started without the backend {task.backend}")
        self._restarts.open()
        self.book.changed()
        self._opened.set()

    async def close(self, *, stop_tasks: bool) -> None:
        """Take no new tasks and end the backends, with those of their tasks that don't outlive the runner."""
        self._draining = True
        await self._restarts.close()
        for start in list(self._starts.values()):
            start.cancel()
        await asyncio.gather(*self._starts.values(), return_exceptions=True)
        for name, backend in self._backends.items():
            await backend.close(self.book.of_backend(name), stop_tasks=stop_tasks)
        self.lifetimes.write_down()
        self.book.write_down()

    @property
    def backends(self) -> dict[str, str | None]:
        """This runner's backends; why new tasks can't be started with one now, None where they can."""
        return {name: backend.trouble for name, backend in self._backends.items()}

    # What the host asks for

    async def create(self, task: TaskRecord) -> TaskRecord:
        """Start a new task; the same one asked for again is the one that is there."""
        if task.container in self.book:
            return self.book.get(task.container)
        backend = self._backend(task.backend)
        self.book.add(task)
        start = asyncio.get_running_loop().create_task(self._first_start(task, backend))
        self._starts[task.container] = start
        start.add_done_callback(lambda _: self._starts.pop(task.container, None))
        done, _ = await asyncio.wait({start}, timeout=START_SECONDS)
        if not done:
            start.add_done_callback(lambda start: self._started_late(task, start))
        elif error := _failure(start):
            self._forget(task)
            await backend.discard(task)  # else each try leaves a directory for ever
            raise error
        self.book.changed()
        return task

    async def _first_start(self, task: TaskRecord, backend: Backend) -> None:
        await self._exclusively(task, backend.start)
        self.lifetimes.begin(task)  # only now: an image may have been fetched before
        self.book.touch(task)

    def _started_late(self, task: TaskRecord, start: asyncio.Task[None]) -> None:
        if error := _failure(start):
            self.book.report(task.container, "failed", error.message.rstrip("."))

    async def adopt(self, task: TaskRecord) -> TaskRecord:
        """Make a task of what runs already; the answer is the task that it is already, if so."""
        if task.container in self.book:
            return self.book.get(task.container)
        backend = self._backend(task.backend)
        task.adopted = True
        self.book.add(task)
        try:
            async with self._locks[task.container]:
                adopted = await backend.adopt(task)
        except BaseException:
            self._forget(task)
            raise
        if adopted is not task:
            self._forget(task)
        self.book.changed()
        return adopted

    async def stop(self, container: str) -> TaskRecord:
        """Stop a task on purpose."""
        return await self._stop(self.book.get(container), None, lambda: True)

    async def _stop_by_time(self, container: str, why: str, still: Callable[[], bool]) -> None:
        await self._stop(self.book.get(container), why, still)

    async def _stop(self, task: TaskRecord, why: str | None, still: Callable[[], bool]) -> TaskRecord:
        """Stop a task, for the reason `why`, if that is `still` to be once it is its turn."""
        backend = self._backend_of(task)
        if not still():
            return task
        interrupted = await self._cancel_start(task)
        if why is None:
            self._restarts.leave(task)  # and what was to run again does not get the lock first
        async with self._locks[task.container]:
            if not interrupted and not still():
                return task
            self._restarts.leave(task)
            was_active = interrupted or task.active
            task.stop_reason = why
            await backend.stop(task)
            if was_active:
                self.book.report(task.container, "stopped", why)
        return task

    def extend(self, container: str, seconds: int, most: int) -> TaskRecord:
        """Have a task's time to live be over later, with `most` seconds left at most, 0 being any number.

        Raises NotFoundError, UsageError, or UnavailableError "task_not_running".
        """
        task = self.book.get(container)
        if task.deadline is None:
            raise UsageError(f"Task {task.name} has no time to live: nothing is to be extended.", code="no_ttl")
        if not task.active:
            raise UnavailableError(
                f"Task {task.name} is not running; `kohakuriver vps restart {task.name}` gives it its time anew.",
                code="task_not_running",
            )
        left = self.lifetimes.left_of(task) + seconds
        if left > LONGEST_TIME:
            raise UsageError(f"No task can have more than {time_in_words(LONGEST_TIME)} left.", code="over_limit")
        if most and left > most:
            more = time_in_words(max(most - left + seconds, 0))
            raise UsageError(
                f"Task {task.name} would have {time_in_words(left)} left, and its owner's limit 'ttl' is "
                f"{time_in_words(most)}; extend it by {more} at most.",
                code="over_limit",
            )
        self.lifetimes.extend(task, seconds)
        self.book.touch(task)
        return task

    async def restart(self, container: str) -> TaskRecord:
        """Start a task again, after stopping it if it runs."""
        task = self.book.get(container)
        self._refuse_while_draining()
        await self._cancel_start(task)
        backend = self._backend_of(task)
        self._restarts.leave(task)
        async with self._locks[container]:
            await backend.stop(task)
            # Only now: a tunnel client that still runs would be back at once, and pass for the new one.
            self.book.drop(container, f"task {task.name} is restarted")
            self._restarts.take_up(task)
            self.book.report(container, "starting")
            self.lifetimes.begin(task)
            try:
                await backend.start_again(task)
            except KohakuRiverError as error:
                self.book.report(container, "failed", error.message.rstrip("."))
                raise
            except Exception as error:  # as a disk that is full
                self.book.report(container, "failed", f"it could not be started: {error}")
                raise
        return task

    async def _run_again(self, task: TaskRecord) -> None:
        """Start a task as its restart policy wants it, if nobody has done otherwise meanwhile."""
        async with self._locks[task.container]:
            if task.container in self.book and not task.halted and task.status == "starting":
                task.cut_off = False
                await self._backend_of(task).start_again(task)

    async def remove(self, container: str) -> TaskRecord:
        """Stop a task and forget it. Raises NotFoundError."""
        task = self.book.get(container)
        await self._cancel_start(task)
        self._restarts.leave(task)
        backend = self._backends.get(task.backend)
        if backend is not None:
            await self._exclusively(task, backend.remove)
        self._forget(task)
        self.book.drop(container, f"task {task.name} was removed", gone=True)
        return task

    async def remove_volume(self, volume: str) -> None:
        """Remove a volume, by what the node's engine calls it. Raises UnavailableError with the reason."""
        for name in self._backends:
            if kind_of(name).mounts:
                await self._backend(name).remove_volume(volume)

    async def renew_token(self, container: str) -> TaskRecord:
        """Make the token of a task's tunnel client worthless, and give the client another. Raises NotFoundError."""
        task = self.book.get(container)
        backend = self._backend_of(task)
        async with self._locks[container]:
            new_token(task)
            self.book.write_down()  # a runner that ends here makes another when it is back
            if task.status == "running":
                await backend.give_token(task)
            self.book.changed()
        return task

    def tunnel_changed(self, container: str, connected: bool) -> None:
        """A tunnel client came or went."""
        self.book.tunnel_changed(container, connected)
        if container in self.book:
            task = self.book.get(container)
            if backend := self._backends.get(task.backend):
                backend.tunnel_changed(task, connected)

    async def comes_from(self, task: TaskRecord, peer: Peer) -> bool:
        """Whether a tunnel client is where the task runs. Raises UnavailableError where that can't be said yet."""
        try:
            await asyncio.wait_for(self._opened.wait(), _OPENING_SECONDS)
        except asyncio.TimeoutError:
            raise UnavailableError("The runner is still looking at its tasks; try again.", code="not_ready") from None
        return await self._backend_of(task).comes_from(task, peer)

    async def sockets(self, task: TaskRecord) -> TaskSockets:
        """Which sockets are a task's. Raises UnavailableError where they can't be told from others."""
        return await self._backend_of(task).sockets(task)

    async def exec(self, task_id: int, request: ExecRequest) -> tuple[str, ExecSession]:
        """Run a command inside a task; the task's container, and the session, which the caller closes.

        Raises NotFoundError, or UnavailableError where the task does not run or its backend can't do this.
        """
        task = self.book.of_id(task_id)
        backend = self._backend_of(task)
        if task.status != "running":
            raise UnavailableError(
                f"Task {task.name} is not running; start it with `kohakuriver vps restart {task.name}`.",
                code="task_not_running",
            )
        return task.container, await backend.exec(task, request)

    async def logs(self, container: str, request: LogRequest) -> Printed:
        """What a task printed; the caller closes it. Raises NotFoundError, or UnavailableError with the reason."""
        task = self.book.get(container)
        return await self._backend_of(task).logs(task, request)

    async def _exclusively(self, task: TaskRecord, action: Callable[[TaskRecord], Awaitable[None]]) -> None:
        async with self._locks[task.container]:
            await action(task)

    async def _cancel_start(self, task: TaskRecord) -> bool:
        """End a start of the task that is under way; whether one was."""
        if start := self._starts.get(task.container):
            start.cancel()
            await asyncio.wait({start})
        return await self._restarts.interrupt(task) or start is not None

    def _backend(self, name: str) -> Backend:
        self._refuse_while_draining()
        backend = self._backends.get(name)
        trouble = "its runner was started without it" if backend is None else backend.trouble
        if backend is None or trouble is not None:
            raise UnavailableError(
                f"This node does not offer the backend {name} now ({trouble}); use another node.",
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

    def agent(self, container: str, runner_url: str) -> dict[str, str]:
        """What a tunnel client in the machine of an address task is started with.

        Raises NotFoundError, or UnavailableError for another kind of task, or where no client can speak to this node.
        """
        task = self.book.get(container)
        if not kind_of(task.backend).dialled:
            raise UnavailableError(
                f"Task {task.name} is no machine: it gets its tunnel client by itself.", code="not_supported"
            )
        if runner_url.startswith("https:"):
            raise UnavailableError(
                "This task's node serves TLS, which no tunnel client speaks; the machine is reached by its address.",
                code="not_supported",
            )
        token = task.tunnel_token or new_token(task)
        self.book.changed()
        return {"container": container, "runner_url": runner_url, "token": token}

    async def answers(self, container: str) -> dict[str, Any]:
        """Whether the machine of an address task answers: `answers`, and if it does not `reason`.

        Raises NotFoundError, or UnavailableError for another kind of task.
        """
        task = self.book.get(container)
        if task.address is None:
            raise UnavailableError(f"Task {task.name} is no machine with an address.", code="not_supported")
        reason = await self._knocker.why_silent(task.address)
        return {"answers": reason is None, "reason": reason}

    def target_of(self, container: str) -> DirectTarget | None:
        """What the runner itself dials for this container, None where a tunnel client does it."""
        if container not in self.book:
            return None
        task = self.book.get(container)
        backend = self._backends.get(task.backend)
        return None if backend is None else backend.target(task)

    def _forget(self, task: TaskRecord) -> None:
        self._locks.pop(task.container, None)
        self.book.forget(task)


def _failure(start: asyncio.Task[None]) -> KohakuRiverError | None:
    """Why a start failed, in a sentence for users whatever went wrong."""
    if start.cancelled():
        return UnavailableError("The start was interrupted.", code="task_not_running")
    error = start.exception()
    if error is None or isinstance(error, KohakuRiverError):
        return error
    log.error("a task could not be started", exc_info=error)
    return KohakuRiverError("The runner failed to start the task; its log says why.")
