"""Tasks for Python code, as the command line has them: `kohakuriver.create`, `run`, `status`, `stop`, `logs`, `ports`,
`tasks`.

Each has a twin for code without a loop, and for code beside one, as in a notebook: `create_sync` and so on.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, ParamSpec, TypeVar

from kohakuriver.client.api import Forward, ForwardSync, forward, forward_sync
from kohakuriver.client.forward import PortSpec
from kohakuriver.client.host import HostClient, ListeningPort, LogLine, NewTask
from kohakuriver.client.host import Task as View
from kohakuriver.config import Settings, load_settings
from kohakuriver.errors import UsageError
from kohakuriver.quotas import byte_count, seconds_in
from kohakuriver.runtime import new_event_loop, serve
from kohakuriver.task import Pull

__all__ = [
    "ListeningPort",
    "Task",
    "TaskSync",
    "create",
    "create_sync",
    "logs",
    "logs_sync",
    "ports",
    "ports_sync",
    "run",
    "run_sync",
    "status",
    "status_sync",
    "stop",
    "stop_sync",
    "tasks",
    "tasks_sync",
]

P = ParamSpec("P")
T = TypeVar("T")

WAIT_SECONDS = 120.0
_FIRST_LOOK, _LAST_LOOK = 0.1, 2.0


class _Known:
    """A task as it was when it was last looked at: `view` has all that the host tells of it."""

    def __init__(self, view: View, settings: Settings) -> None:
        self.view = view
        self._settings = settings

    def __repr__(self) -> str:
        code = "" if self.exit_code is None else f", exit code {self.exit_code}"
        why = f": {self.message}" if self.message else ""
        return f"<task {self.name} ({self.id}) on {self.node}, {self.status}{code}{why}>"

    @property
    def id(self) -> int:
        """Its number, by which it is found whatever its name is."""
        return self.view.task_id

    @property
    def name(self) -> str:
        """Its unique name."""
        return self.view.name

    @property
    def node(self) -> str:
        """The name of the node that it is on."""
        return self.view.node

    @property
    def status(self) -> str:
        """`starting`, `running`, `stopped`, `failed` or `lost`."""
        return self.view.status

    @property
    def message(self) -> str | None:
        """Why it is in that state, where there is something to say."""
        return self.view.message

    @property
    def exit_code(self) -> int | None:
        """What it has ended with, 128 + N by signal N; None while it runs, and where nobody knows."""
        return self.view.exit_code

    @property
    def _place(self) -> dict[str, Any]:
        """The host that it was asked of, as the arguments of a forward."""
        ca_file = self._settings.ca_file
        return {"host": self._settings.named, "token": self._settings.token, "ca_file": ca_file and str(ca_file)}


class Task(_Known):
    """A task, for code on a loop. What its methods do is also seen in its properties."""

    async def refresh(self) -> Task:
        """Look at it again. Raises NotFoundError once it was removed."""
        return await self._ask(lambda host: host.task(str(self.id)))

    async def wait(self, timeout: float = WAIT_SECONDS) -> Task:
        """Wait until a forward to it would succeed. UnavailableError: it failed, or `timeout` seconds went by."""
        return await self._ask(lambda host: host.wait(str(self.id), timeout=timeout))

    async def ended(self, timeout: float | None = None) -> Task:
        """Wait until it runs no more. Raises TimeoutError after `timeout` seconds, None for any number."""
        pause = _FIRST_LOOK
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        async with HostClient(self._settings) as host:
            while self.status in ("starting", "running"):
                if deadline is not None and asyncio.get_running_loop().time() >= deadline:
                    raise TimeoutError(f"Task {self.name} has not ended within {timeout:g} s.")
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_LOOK)
                self.view = await host.task(str(self.id))
        return self

    async def stop(self) -> Task:
        """End what it runs; `restart` runs it again."""
        return await self._ask(lambda host: host.stop(str(self.id)))

    async def restart(self) -> Task:
        """Run it again; open forwards find it by themselves."""
        return await self._ask(lambda host: host.restart(str(self.id)))

    async def remove(self) -> None:
        """End it and forget it, with all that it printed."""
        await self._ask(lambda host: host.remove(str(self.id)))

    def logs(
        self, *, follow: bool = False, tail: int | None = None, since: datetime | None = None
    ) -> AsyncIterator[LogLine]:
        """What it printed, as the function `logs` has it."""
        return _logs(self._settings, str(self.id), follow, tail, since)

    async def ports(self) -> list[ListeningPort]:
        """The ports that listen in it, as the function `ports` has them."""
        return await _ports(self._settings, str(self.id))

    def forward(self, ports: PortSpec | Sequence[PortSpec] = (), **options: Any) -> Forward:
        """A forward to it, with the options of the function `forward`."""
        return forward(self.id, ports, **{**self._place, **options})

    async def _ask(self, question: Callable[[HostClient], Coroutine[Any, Any, View]]) -> Task:
        async with HostClient(self._settings) as host:
            self.view = await question(host)
        return self


class TaskSync(_Known):
    """A task, for code without a loop, and beside one: each method returns when the thing is done."""

    def refresh(self) -> TaskSync:
        """Look at it again. Raises NotFoundError once it was removed."""
        return self._do(Task.refresh)

    def wait(self, timeout: float = WAIT_SECONDS) -> TaskSync:
        """Wait until a forward to it would succeed. UnavailableError: it failed, or `timeout` seconds went by."""
        return self._do(lambda task: task.wait(timeout))

    def ended(self, timeout: float | None = None) -> TaskSync:
        """Wait until it runs no more. Raises TimeoutError after `timeout` seconds, None for any number."""
        return self._do(lambda task: task.ended(timeout))

    def stop(self) -> TaskSync:
        """End what it runs; `restart` runs it again."""
        return self._do(Task.stop)

    def restart(self) -> TaskSync:
        """Run it again; open forwards find it by themselves."""
        return self._do(Task.restart)

    def remove(self) -> None:
        """End it and forget it, with all that it printed."""
        self._do(Task.remove)

    def logs(
        self, *, follow: bool = False, tail: int | None = None, since: datetime | None = None
    ) -> Iterator[LogLine]:
        """What it printed, as the function `logs` has it."""
        return _one_by_one(_logs(self._settings, str(self.id), follow, tail, since))

    def ports(self) -> list[ListeningPort]:
        """The ports that listen in it, as the function `ports` has them."""
        return _done(_ports(self._settings, str(self.id)))

    def forward(self, ports: PortSpec | Sequence[PortSpec] = (), **options: Any) -> ForwardSync:
        """A forward to it, with the options of the function `forward_sync`."""
        return forward_sync(self.id, ports, **{**self._place, **options})

    def _do(self, what: Callable[[Task], Coroutine[Any, Any, object]]) -> TaskSync:
        task = Task(self.view, self._settings)
        _done(what(task))
        self.view = task.view
        return self


async def create(
    image: str | None = None,
    command: Sequence[str] = (),
    *,
    name: str | None = None,
    node: str | None = None,
    backend: str | None = None,
    env: Mapping[str, str] | None = None,
    mounts: Sequence[str] = (),
    volumes: Sequence[str] = (),
    memory: int | str | None = None,
    cpus: float | None = None,
    pids: int | None = None,
    shm_size: int | str | None = None,
    ttl: int | str | None = None,
    idle_stop: int | str | None = None,
    entrypoint: Sequence[str] | None = None,
    workdir: str | None = None,
    run_as: str | None = None,
    pull: Pull | None = None,
    devices: Sequence[str] = (),
    labels: Sequence[str] = (),
    restart: str | None = None,
    gpus: int | str | None = None,
    network: str | None = None,
    preserve_host: bool = False,
    keep_prefix: bool = False,
    ssh_keys: Sequence[str] = (),
    wait: float | None = WAIT_SECONDS,
    host: str | None = None,
    token: str | None = None,
    ca_file: str | None = None,
) -> Task:
    """Start a task, and wait until its tunnel is connected, for `wait` seconds at most; None doesn't wait.

    Args:
        image: the container image; None with the backend "process", whose command runs on the node.
        command: the program and its arguments; without one a container runs its image's own.
        name: unique; None has one made up.
        node: the node's name; None for the least loaded one that fits.
        env: variables for the command.
        mounts: `SRC:DST[:ro]` each, directories of the node.
        volumes: `NAME:/TARGET[:ro]` each, what you keep under that name on the node.
        memory: bytes, or a size such as "8g"; `shm_size` (/dev/shm) too.
        cpus: processors, as 1.5.
        pids: processes and threads at a time.
        ttl: how long after its start it is stopped, in seconds or as "8h".
        idle_stop: it is stopped when nobody was connected for so long; likewise.
        entrypoint: in place of the image's own; () for none.
        workdir: where the command runs in the container, `run_as` the user, `USER[:GROUP]`; None for the image's own.
        pull: when the image is fetched: "missing", as for None, "always" or "never".
        devices: `/dev/NAME[:/dev/INSIDE][:rwm]` each, of the node; for admins.
        labels: `K=V` each, of the container, for programs of the node; for admins.
        gpus: how many, "all", or those with the numbers "0,1" or "device=0".
        restart: when it runs again: "no", "on-failure", "on-failure:N", "always" or "unless-stopped".
        network: "none" for a container that reaches nothing; forwards and terminals reach it all the same.
        preserve_host: its services are told the addresses that browsers have, in the place of localhost.
        keep_prefix: they are told paths as browsers have them, where all apps of the host are under one origin.
        ssh_keys: public keys that its SSH server lets in; without one it has no SSH server.
        host: as `token` and `ca_file` by default what the command line's settings say.

    Raises UsageError, NotAllowedError, UnavailableError or HostUnreachableError.
    """
    if image is None and backend in (None, "docker"):
        raise UsageError('A task needs a container image, or backend="process" to run its command on the node.')
    if isinstance(command, str):
        raise UsageError('command takes a list of words, such as ["python3", "train.py"].')
    new = NewTask(
        name=name,
        node=node,
        backend=backend,
        image=image,
        command=list(command),
        env=dict(env or {}),
        mounts=list(mounts),
        volumes=list(volumes),
        memory=_size(memory, "memory"),
        cpus=cpus,
        pids=pids,
        shm_size=_size(shm_size, "shm_size"),
        ttl=_time(ttl, "ttl"),
        idle_stop=_time(idle_stop, "idle_stop"),
        entrypoint=None if entrypoint is None else list(entrypoint),
        workdir=workdir,
        run_as=run_as,
        pull=pull,
        devices=list(devices),
        labels=list(labels),
        restart=restart,
        gpus=None if gpus is None else str(gpus),
        network=network,
        preserve_host=preserve_host,
        keep_prefix=keep_prefix,
        ssh_keys=list(ssh_keys),
    )
    settings = load_settings(host=host, token=token, ca_file=ca_file)
    async with HostClient(settings) as client:
        view = await client.create(new)
        if wait is not None:
            view = await client.wait(str(view.task_id), timeout=wait)
    return Task(view, settings)


async def run(
    image: str | None = None, command: Sequence[str] = (), *, timeout: float | None = None, **options: Any
) -> Task:
    """Start a task, and wait until it has ended, for `timeout` seconds at most (TimeoutError; it goes on then).

    `options` are those of `create`. `exit_code` of the answer says how it ended, and its `logs` what it printed; it
    stays until it is removed.
    """
    task = await create(image, command, **{**options, "wait": None})
    return await task.ended(timeout)


async def status(
    task: str | int, *, host: str | None = None, token: str | None = None, ca_file: str | None = None
) -> Task:
    """The task with that id or name, as it is now. Raises NotFoundError, NotAllowedError or HostUnreachableError."""
    settings = load_settings(host=host, token=token, ca_file=ca_file)
    async with HostClient(settings) as client:
        return Task(await client.task(str(task)), settings)


async def stop(
    task: str | int, *, host: str | None = None, token: str | None = None, ca_file: str | None = None
) -> Task:
    """End what a task runs; the answer is the task. Raises as `status` does, and UnavailableError."""
    return await (await status(task, host=host, token=token, ca_file=ca_file)).stop()


async def tasks(*, host: str | None = None, token: str | None = None, ca_file: str | None = None) -> list[Task]:
    """The tasks that are the caller's or shared with them, for admins all; the oldest first."""
    settings = load_settings(host=host, token=token, ca_file=ca_file)
    async with HostClient(settings) as client:
        return [Task(view, settings) for view in await client.tasks()]


async def ports(
    task: str | int, *, host: str | None = None, token: str | None = None, ca_file: str | None = None
) -> list[ListeningPort]:
    """The ports that listen in a task now, by number; a thousand at most.

    Raises as `status` does, and UnavailableError where it can't be known.
    """
    return await _ports(load_settings(host=host, token=token, ca_file=ca_file), str(task))


async def _ports(settings: Settings, task: str) -> list[ListeningPort]:
    async with HostClient(settings) as client:
        return list((await client.ports(task)).ports)


def logs(
    task: str | int,
    *,
    follow: bool = False,
    tail: int | None = None,
    since: datetime | None = None,
    host: str | None = None,
    token: str | None = None,
    ca_file: str | None = None,
) -> AsyncIterator[LogLine]:
    """What a task printed, a line at a time, the oldest first: `async for line in logs("lab")`.

    With `follow` also what it prints from now on, until it ends. `tail` is how many of the last lines, None for all
    that are kept; `since` leaves out what was printed before (a moment without a time zone is local time).
    Raises as `status` does, and UnavailableError where nothing can be read.
    """
    settings = load_settings(host=host, token=token, ca_file=ca_file)
    return _logs(settings, str(task), follow, tail, since)


async def _logs(
    settings: Settings, task: str, follow: bool, tail: int | None, since: datetime | None
) -> AsyncIterator[LogLine]:
    moment = None if since is None else since.astimezone(timezone.utc).isoformat()
    async with HostClient(settings) as client:
        async for line in client.logs(task, follow=follow, tail=tail, since=moment):
            yield line


def _size(value: int | str | None, name: str) -> int | None:
    try:
        return byte_count(value) if isinstance(value, str) else value
    except ValueError:
        raise UsageError(f"{name} takes bytes, or a size such as '8g', not {value!r}.") from None


def _time(value: int | str | None, name: str) -> int | None:
    try:
        return seconds_in(value) if isinstance(value, str) else value
    except ValueError:
        raise UsageError(f"{name} takes seconds, or a time such as '8h', not {value!r}.") from None


@contextmanager
def _loop_on_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = new_event_loop()
    thread = threading.Thread(target=serve, args=(loop,), name="kohakuriver", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _done(work: Coroutine[Any, Any, T]) -> T:
    with _loop_on_a_thread() as loop:
        return asyncio.run_coroutine_threadsafe(work, loop).result()


def _one_by_one(lines: AsyncIterator[LogLine]) -> Iterator[LogLine]:
    async def following() -> LogLine | None:
        return await anext(lines, None)

    with _loop_on_a_thread() as loop:
        while (line := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not None:
            yield line


def _named(made: Callable[P, T], after: Callable[P, Any], gives: str) -> Callable[P, T]:
    """`made` with the name, the parameters and the words of its twin."""
    made = functools.wraps(after)(made)
    signature = inspect.signature(after).replace(return_annotation=gives)
    made.__signature__ = signature  # type: ignore[attr-defined]
    made.__name__ = made.__qualname__ = f"{after.__name__}_sync"
    made.__doc__ = f"`{after.__name__}` for code without a loop, and beside one.\n\n{inspect.getdoc(after)}"
    return made


def _sync(make: Callable[P, Coroutine[Any, Any, Task]]) -> Callable[P, TaskSync]:
    def made(*args: P.args, **options: P.kwargs) -> TaskSync:
        return _twin(_done(make(*args, **options)))

    return _named(made, make, "TaskSync")


def _twin(task: Task) -> TaskSync:
    return TaskSync(task.view, task._settings)


def _tasks_sync(*args: Any, **options: Any) -> list[TaskSync]:
    return [_twin(task) for task in _done(tasks(*args, **options))]


def _ports_sync(*args: Any, **options: Any) -> list[ListeningPort]:
    return _done(ports(*args, **options))


def _logs_sync(*args: Any, **options: Any) -> Iterator[LogLine]:
    return _one_by_one(logs(*args, **options))


create_sync = _sync(create)
run_sync = _sync(run)
status_sync = _sync(status)
stop_sync = _sync(stop)
tasks_sync = _named(_tasks_sync, tasks, "list[TaskSync]")
ports_sync = _named(_ports_sync, ports, "list[ListeningPort]")
logs_sync = _named(_logs_sync, logs, "Iterator[LogLine]")
