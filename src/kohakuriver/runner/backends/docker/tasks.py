"""The docker backend: a task is a container, with the tunnel client bind-mounted and wrapped around its command.

Containers outlive the runner. Those that it started carry labels, so that a runner started anew finds them again.
Docker's events are taken as hints: whatever one says, the container is inspected and its state reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiodocker
import aiohttp
import structlog
from aiodocker.exceptions import DockerError

from kohakuriver.errors import KohakuRiverError, LocalAddressError, NotFoundError, UnavailableError, UsageError
from kohakuriver.runner.backends.base import Backend, ExecRequest, ExecSession, Reporter
from kohakuriver.runner.backends.docker import exec as docker_exec
from kohakuriver.runner.backends.docker.engine import new_client, sentences, why
from kohakuriver.runner.backends.docker.inside import Inside
from kohakuriver.runner.backends.docker.network import gateway, gateway_of, task_network
from kohakuriver.runner.backends.docker.untouched import Untouched
from kohakuriver.runner.backends.process.tasks import describe_exit, last_words
from kohakuriver.runner.services.direct import DirectTarget
from kohakuriver.runner.services.ssh_helper import SshHelper
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.tunnel_helper import TunnelHelper
from kohakuriver.runtime import cancel_all
from kohakuriver.web.background import in_background

__all__ = ["DockerBackend"]

log = structlog.get_logger("kohakuriver.runner")

STOP_SECONDS = 10
"""What a container has between its stop signal and KILL; when the runner itself ends, less."""

DRAIN_STOP_SECONDS = 3

PAUSED = "its container is paused"
NO_CLIENT = "it has no tunnel client inside; its node dials its ports from the container's network"

_LABEL_TASK = "kohakuriver.task"
_LABEL_NODE = "kohakuriver.node"
_LABEL_NAME = "kohakuriver.name"
_LABEL_CONTAINER = "kohakuriver.container"
_LABEL_RUNNER = "kohakuriver.runner"
_LABEL_URL = "kohakuriver.tunnel-url"

_ENGINE_SECONDS = 5.0
_RETRY_SECONDS = 5.0
_EVENTS = ("start", "die", "destroy", "pause", "unpause")


class DockerBackend(Backend):
    """Containers on the engine of this node.

    `instance` marks containers as this runner's. `listen_at` makes the runner reachable at one of the node's addresses
    and gives the URL; `on_availability` is called when the engine comes or goes.
    """

    name = "docker"

    def __init__(
        self,
        *,
        node: str,
        instance: str,
        helper: TunnelHelper,
        ssh: SshHelper,
        report: Reporter,
        listen_at: Callable[[str], Awaitable[str]],
        on_availability: Callable[[], None],
    ) -> None:
        self._node = node
        self._instance = instance
        self._helper = helper
        self._ssh = ssh
        self._report = report
        self._listen_at = listen_at
        self._on_availability = on_availability
        self._client: aiodocker.Docker | None = None
        self._tasks: dict[str, TaskRecord] = {}
        self._inside = Inside(lambda: self._docker, helper, ssh)
        self._untouched = Untouched(lambda: self._docker)
        self._busy: set[str] = set()
        self._missed: set[str] = set()
        self._looks: set[asyncio.Task[None]] = set()
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._first_look = asyncio.Event()
        self._found: Callable[[TaskRecord], None] = lambda _task: None

    @property
    def available(self) -> bool:
        return self._client is not None

    # Life of the runner

    async def open(self, tasks: list[TaskRecord], found: Callable[[TaskRecord], None]) -> None:
        self._tasks = {task.container: task for task in tasks}
        self._found = found
        self._watcher = in_background(self._watch(), "following the Docker engine")
        await self._first_look.wait()

    async def close(self, tasks: list[TaskRecord], *, stop_tasks: bool) -> None:
        await cancel_all([*self._looks, *([self._watcher] if self._watcher else [])])
        if stop_tasks and self._client is not None:
            ours = [task for task in tasks if task.active and not task.adopted]
            await asyncio.gather(*(self._stop_at_end(task) for task in ours))
        for task in tasks:
            self._untouched.leave(task)
        if self._client is not None:
            await self._client.close()

    async def _stop_at_end(self, task: TaskRecord) -> None:
        try:
            await self._stop(task, DRAIN_STOP_SECONDS)
        except KohakuRiverError as error:
            log.warning("a task could not be stopped", task=task.task_id, reason=error.message)
        else:
            self._report(task.container, "stopped", "it ended with the runner")

    async def _watch(self) -> None:
        """Follow the engine's events, and look for the engine again whenever it goes."""
        while True:
            try:
                await self._follow()
            except (aiohttp.ClientError, DockerError, OSError, asyncio.TimeoutError) as error:
                if not self._first_look.is_set():
                    log.warning(
                        "no Docker engine answers: no task can be a container until one does", reason=why(error)
                    )
            except KohakuRiverError as error:
                log.warning("trouble with the Docker engine", reason=error.message)
            except Exception:  # unheard, it would end the watch, and tasks would be shown for ever as they are now
                log.exception("what the Docker engine told could not be taken in")
            if self._client is not None:
                log.warning("the Docker engine went away")
            await self._disconnect()
            self._first_look.set()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _follow(self) -> None:
        client = new_client()
        try:
            await asyncio.wait_for(client.version(), _ENGINE_SECONDS)
        except BaseException:
            await client.close()
            raise
        self._client = client
        self._on_availability()
        # Events from a little before we look: what happens meanwhile is seen twice rather than never.
        since = f"{time.time() - 1:.3f}"
        filters = json.dumps({"type": ["container"], "event": list(_EVENTS)})
        events: Any = client.events  # not annotated
        subscriber = events.subscribe(create_task=False)
        running = asyncio.get_running_loop().create_task(events.run(since=since, filters=filters))
        try:
            await self._look_around()
            self._first_look.set()
            while (event := await subscriber.get()) is not None:
                await self._event(event)
            await running
        finally:
            await cancel_all([running])

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()
            self._on_availability()

    async def _look_around(self) -> None:
        """Report every task's state, also of those that only our labels on their containers tell of."""
        filters = json.dumps({"label": [f"{_LABEL_RUNNER}={self._instance}"]})
        for container in await self._docker.containers.list(all=True, filters=filters):
            show = await container.show()
            labels = show["Config"]["Labels"]
            if labels[_LABEL_CONTAINER] not in self._tasks:
                task = self._tasks[labels[_LABEL_CONTAINER]] = _from_labels(labels, show)
                self._found(task)
        for task in list(self._tasks.values()):
            await self._look(task)

    async def _event(self, event: dict[str, Any]) -> None:
        engine_id = event.get("id") or event.get("Actor", {}).get("ID")
        for task in list(self._tasks.values()):
            if task.engine_id == engine_id:
                await self._look_again(task)

    async def _look_again(self, task: TaskRecord) -> None:
        try:
            await self._look(task)
        except (DockerError, KohakuRiverError) as error:
            log.warning("a container's state could not be read", task=task.task_id, reason=str(error))

    async def _look(self, task: TaskRecord) -> None:
        """Refresh a task, until we begin to change it ourselves: what was seen before that is out of date."""
        if task.container in self._busy:
            self._missed.add(task.container)
            return
        if older := self._looking.get(task.container):
            older.cancel()
        look = self._looking[task.container] = asyncio.get_running_loop().create_task(self._refresh(task))
        try:
            await asyncio.wait({look})
            if not look.cancelled():
                look.result()
        finally:
            look.cancel()
            if self._looking.get(task.container) is look:
                del self._looking[task.container]

    async def _refresh(self, task: TaskRecord) -> None:
        """Report what the engine says about a task; a container that was started anew gets its tunnel client."""
        try:
            show = await self._docker.containers.container(task.engine_id or task.container).show()
        except DockerError as error:
            if error.status != 404:
                raise
            self._untouched.leave(task)
            self._report(task.container, "lost", "its container was removed")
            return
        state = show["State"]
        if not state["Running"]:
            self._untouched.leave(task)
            self._report(task.container, *await self._ending(task, state), state["ExitCode"])
            return
        task.stopped = False
        if task.no_client:
            await self._untouched.enter(task, show)
            self._report(task.container, "running", PAUSED if state["Paused"] else NO_CLIENT)
            return
        self._report(task.container, "running", PAUSED if state["Paused"] else None)
        try:
            await self._inside.ensure_client(task, show, await self._url_for(show))
            if task.ssh_keys:
                await self._inside.ensure_ssh(task, show)
        except KohakuRiverError as error:
            self._report(task.container, "running", error.message.rstrip("."))

    async def _ending(self, task: TaskRecord, state: dict[str, Any]) -> tuple[str, str | None]:
        if task.stopped:
            return "stopped", None
        if state["OOMKilled"]:
            return "failed", "it ran out of memory and was ended by the kernel"
        if state.get("Error"):
            return "failed", str(state["Error"])
        status, message = describe_exit(state["ExitCode"])
        with contextlib.suppress(DockerError):
            container = self._docker.containers.container(task.engine_id or task.container)
            message += last_words(state["ExitCode"], await container.log(stdout=True, stderr=True, tail=20))
        return status, message

    # Tasks

    async def start(self, task: TaskRecord) -> None:
        assert task.image is not None
        if task.ssh_keys:
            self._ssh.prepare(task)
        with self._handling(task), sentences(f"start the task from image {task.image}"):
            await self._need_image(task)
            network = await task_network(self._docker)
            task.tunnel_url = await self._reach(await gateway(self._docker, network))
            try:
                container = await self._docker.containers.create(self._config(task, network), name=task.container)
            except DockerError as error:
                if error.status == 404:
                    raise _no_image(task.image, self._node) from error
                raise
            task.engine_id = container.id
            task.engine_name = task.container
            self._tasks[task.container] = task
            try:
                await container.start()
            except BaseException:
                self._tasks.pop(task.container)
                with contextlib.suppress(DockerError):
                    await container.delete(force=True)
                raise
            await self._refresh(task)

    async def _need_image(self, task: TaskRecord) -> None:
        assert task.image is not None
        try:
            await self._docker.images.inspect(task.image)
        except DockerError as error:
            if error.status != 404:
                raise
        else:
            return
        self._report(task.container, "starting", f"pulling the image {task.image}")
        try:
            await self._docker.images.pull(task.image)
        except DockerError as error:
            raise _no_image(task.image, self._node, error.message) from error

    def _config(self, task: TaskRecord, network: str) -> dict[str, Any]:
        assert task.tunnel_url is not None
        tunnel = self._helper.container_environment(task.container, task.tunnel_url)
        env = {**self._helper.settings, **task.env, **tunnel}
        mounts = [
            {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": True}
            for source, target in [*self._helper.mounts(task.container), *(self._ssh.mounts() if task.ssh_keys else [])]
        ]
        return {
            "Image": task.image,
            "Entrypoint": self._helper.container_command(task.command),
            "Cmd": [],
            "Env": [f"{name}={value}" for name, value in env.items()],
            "Labels": {
                _LABEL_TASK: str(task.task_id),
                _LABEL_NAME: task.name,
                _LABEL_NODE: self._node,
                _LABEL_CONTAINER: task.container,
                _LABEL_RUNNER: self._instance,
                _LABEL_URL: task.tunnel_url,
            },
            "HostConfig": {"Mounts": [*mounts, *map(_mount, task.mounts)], "NetworkMode": network},
        }

    async def adopt(self, task: TaskRecord) -> TaskRecord:
        assert task.engine_name is not None
        with self._handling(task), sentences(f"adopt the container {task.engine_name}"):
            try:
                show = await self._docker.containers.container(task.engine_name).show()
            except DockerError as error:
                if error.status != 404:
                    raise
                raise NotFoundError(
                    f"Node {self._node} has no container {task.engine_name!r}; `docker ps` there shows what it has."
                ) from error
            _check_adoptable(task.engine_name, show)
            known = next((other for other in self._tasks.values() if other.engine_id == show["Id"]), task)
            known.engine_id = show["Id"]
            known.engine_name = show["Name"].lstrip("/")
            known.image = show["Config"]["Image"]
            if known is task:
                await self._make_reachable(task, show)
                self._tasks[task.container] = task
            await self._refresh(known)
            return known

    async def stop(self, task: TaskRecord) -> None:
        with self._handling(task):
            await self._stop(task, STOP_SECONDS)

    async def _stop(self, task: TaskRecord, seconds: int) -> None:
        with sentences("stop the container"):
            task.stopped = True
            try:
                await self._docker.containers.container(task.engine_id or task.container).stop(t=seconds)
            except DockerError as error:
                if error.status != 404:
                    raise

    async def start_again(self, task: TaskRecord) -> None:
        with self._handling(task), sentences("start the container again"):
            task.stopped = False
            try:
                await self._docker.containers.container(task.engine_id or task.container).start()
            except DockerError as error:
                if error.status != 404:
                    raise
            else:
                await self._refresh(task)
                return
        if task.adopted:
            raise UnavailableError(f"The container {task.engine_name} was removed, so it can't be started again.")
        await self.start(task)

    async def remove(self, task: TaskRecord) -> None:
        with self._handling(task), sentences("remove the container"):
            self._untouched.leave(task)
            if task.adopted:
                await self._inside.end_client(task)
            else:
                try:
                    await self._docker.containers.container(task.engine_id or task.container).delete(force=True, v=True)
                except DockerError as error:
                    if error.status != 404:
                        raise
        self._tasks.pop(task.container, None)
        self._helper.forget(task.container)

    async def exec(self, task: TaskRecord, request: ExecRequest) -> ExecSession:
        with sentences("run a command in the container"):
            return await docker_exec.start(self._docker, task.engine_id or task.container, request)

    async def _make_reachable(self, task: TaskRecord, show: dict[str, Any]) -> None:
        """Put the tunnel client in; where that can't be done the runner dials from the container's own network."""
        if not task.no_client:
            try:
                await self._inside.ensure_client(task, show, await self._url_for(show))
                return
            except KohakuRiverError as error:
                try:
                    await self._untouched.enter(task, show)
                except UnavailableError:
                    raise error from None
                log.info("no tunnel client can be put in", container=task.engine_name, reason=error.message)
                task.no_client = True
        else:
            await self._untouched.enter(task, show)

    def target(self, task: TaskRecord) -> DirectTarget | None:
        return self._untouched.target(task)

    async def _url_for(self, show: dict[str, Any]) -> str:
        """How a container reaches the runner."""
        return await self._reach(await gateway_of(self._docker, show))

    async def _reach(self, address: str) -> str:
        try:
            return await self._listen_at(address)
        except (LocalAddressError, OSError) as error:
            raise UnavailableError(
                f"Containers would reach the runner at {address}, but it can't listen there ({error}); "
                "start the runner with --bind 0.0.0.0.",
                code="no_gateway",
            ) from error

    # Help

    @property
    def _docker(self) -> aiodocker.Docker:
        if self._client is None:
            raise UnavailableError(
                f"The Docker engine of node {self._node} does not answer; start it there.", code="no_engine"
            )
        return self._client

    @contextlib.contextmanager
    def _handling(self, task: TaskRecord) -> Iterator[None]:
        """What the engine says about the task meanwhile is our own doing, and is looked at afterwards."""
        self._busy.add(task.container)
        if look := self._looking.get(task.container):
            look.cancel()
            self._missed.add(task.container)
        try:
            yield
        finally:
            self._busy.discard(task.container)
            if task.container in self._missed:
                self._missed.discard(task.container)
                look = in_background(self._look_again(task), "looking at a container")
                self._looks.add(look)
                look.add_done_callback(self._looks.discard)


def _no_image(image: str, node: str, reason: str = "") -> NotFoundError:
    why = f" ({' '.join(reason.split()).rstrip('.')})" if reason else ""
    return NotFoundError(
        f"The image {image!r} is not on node {node} and can't be pulled{why}; check its name or load it there.",
        code="image_not_found",
    )


def _check_adoptable(name: str, show: dict[str, Any]) -> None:
    state = show["State"]
    if not state["Running"]:
        raise UnavailableError(
            f"The container {name} does not run; start it with `docker start {name}`.", code="task_not_running"
        )
    if state["Paused"]:
        raise UnavailableError(
            f"The container {name} is paused; let it go on with `docker unpause {name}`.", code="task_not_running"
        )


def _from_labels(labels: dict[str, str], show: dict[str, Any]) -> TaskRecord:
    """The task of a container whose record got lost."""
    return TaskRecord(
        task_id=int(labels[_LABEL_TASK]),
        container=labels[_LABEL_CONTAINER],
        backend="docker",
        name=labels[_LABEL_NAME],
        image=show["Config"]["Image"],
        engine_id=show["Id"],
        engine_name=labels[_LABEL_CONTAINER],
        tunnel_url=labels[_LABEL_URL],
    )


def _mount(text: str) -> dict[str, Any]:
    """`SRC:DST[:ro]` in the engine's words; SRC is a path on the node or the name of a volume."""
    source, target, *mode = text.split(":")
    if not source.startswith("/") and "/" in source:
        raise UsageError(f"--mount {text}: {source!r} must be a whole path on the node, or a volume's name.")
    kind = "bind" if source.startswith("/") else "volume"
    return {"Type": kind, "Source": source, "Target": target, "ReadOnly": mode == ["ro"]}
