"""The docker backend: a task is a container, with the tunnel client bind-mounted and wrapped around its command.

Containers outlive the runner. Those that it started carry labels, so that a runner started anew finds them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiodocker
import structlog
from aiodocker.exceptions import DockerError

from kohakuriver.config import path_segment
from kohakuriver.errors import KohakuRiverError, LocalAddressError, NotFoundError, UnavailableError
from kohakuriver.images import Registries
from kohakuriver.mount_roots import MountRoots
from kohakuriver.relay.direct import DirectTarget
from kohakuriver.relay.open_ports import TaskSockets
from kohakuriver.runner.backends.base import (
    Backend,
    ExecRequest,
    ExecSession,
    Reporter,
    Surroundings,
)
from kohakuriver.runner.backends.docker import exec as docker_exec
from kohakuriver.runner.backends.docker.bounds import warn_of_unbounded
from kohakuriver.runner.backends.docker.describe import Description, ending, of_runner, task_in, task_of
from kohakuriver.runner.backends.docker.engine import limit, sentences
from kohakuriver.runner.backends.docker.fence import Fence
from kohakuriver.runner.backends.docker.inside import Inside
from kohakuriver.runner.backends.docker.logs import open_logs
from kohakuriver.runner.backends.docker.network import (
    ENGINE_DNS,
    addresses_of,
    fence_in,
    gateway,
    gateway_of,
    has_node_network,
    task_network,
)
from kohakuriver.runner.backends.docker.pull import Images
from kohakuriver.runner.backends.docker.untouched import Untouched
from kohakuriver.runner.backends.docker.watch import EngineWatch, Looker
from kohakuriver.runner.backends.docker.whose_kernel import is_rootless, why_no_sockets
from kohakuriver.runner.backends.printed import LogRequest, Printed
from kohakuriver.runner.services.doors import SOCKET, Doors
from kohakuriver.runner.services.fair_queue import FairQueue
from kohakuriver.runner.services.gpus import Gpu, Grant, granted
from kohakuriver.runner.services.ssh_helper import SshHelper
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.tunnel_helper import DOOR, TunnelHelper
from kohakuriver.tunnel.accept import Peer
from kohakuriver.tunnel.protocol import PortScope

__all__ = ["DockerBackend"]

log = structlog.get_logger("kohakuriver.runner")

STOP_SECONDS = 10
"""What a container has between its stop signal and KILL; when the runner itself ends, less."""

DRAIN_STOP_SECONDS = 3

CALLS, CALLS_OF_A_USER = 32, 8
"""What the engine is asked to do at a time, of all users and of one. Its client has connections for 100."""

STARTS, STARTS_OF_A_USER = 8, 1
"""Commands in containers that it starts at a time: each start is some 50 ms of work for several of its programs."""

NO_BINARY = "its kohakuriver was installed without cargo, and lacks the static tunnel client, which containers need"
CLIENT_AGAIN_SECONDS = 2.0
"""After how long a tunnel client that was put into a container, and has ended, is started again."""
REMOVED = "its container was removed"
REMOVED_ADOPTED = "its container was removed; one that is made again under its name is taken up by itself"
PAUSED = "its container is paused"
NO_CLIENT = "it has no tunnel client inside; its node dials its ports from the container's network"


class DockerBackend(Backend):
    """Containers on the engine of this node.

    `instance` marks containers as this runner's; `doors` are their sockets, by which those that it made reach it where
    the engine lets them. For others `listen_at` makes the runner reachable at one of the node's addresses and gives the
    URL. `on_availability` is called when the engine comes or goes.

    Large because a `Backend` is: most methods are one thing that can be asked of it.
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
        doors: Doors,
        listen_at: Callable[[str], Awaitable[str]],
        on_availability: Callable[[], None],
        registries: Registries,
        mount_roots: MountRoots,
        pull_seconds: float,
        gpus: Sequence[Gpu] = (),
    ) -> None:
        self._gpus = gpus
        self._node = node
        self._instance = instance
        self._helper = helper
        self._ssh = ssh
        self._report = report
        self._doors = doors
        self._no_doors: str | None = None
        self._listen_at = listen_at
        self._mount_roots = mount_roots
        self._description = Description(node, instance, helper, ssh, doors)
        self._tasks: dict[str, TaskRecord] = {}
        self._watch = EngineWatch(node, look_around=self._look_around, on_event=self._event, on_change=on_availability)
        self._looker = Looker(self._refresh)
        self._inside = Inside(lambda: self._docker, helper, ssh)
        self._untouched = Untouched(lambda: self._docker)
        self._fence = Fence()
        self._calls = FairQueue(CALLS, CALLS_OF_A_USER)
        self._starts = FairQueue(STARTS, STARTS_OF_A_USER)
        self._images = Images(lambda: self._docker, node, registries, seconds=pull_seconds)
        self._found: Callable[[TaskRecord], None] = lambda _task: None

    @classmethod
    def made(cls, around: Surroundings) -> DockerBackend:
        return cls(
            node=around.node,
            instance=around.state.instance,
            helper=around.helper,
            ssh=around.ssh,
            report=around.report,
            doors=around.doors,
            listen_at=around.listen_at,
            on_availability=around.on_change,
            registries=around.registries,
            mount_roots=around.mount_roots,
            gpus=around.gpus,
            pull_seconds=around.limits.pull_timeout,
        )

    @property
    def trouble(self) -> str | None:
        if not self._watch.answers:
            return self._watch.trouble
        return None if self._helper.has_binary else NO_BINARY

    @property
    def _docker(self) -> aiodocker.Docker:
        return self._watch.docker

    # Life of the runner

    async def open(self, tasks: list[TaskRecord], found: Callable[[TaskRecord], None]) -> None:
        self._tasks = {task.container: task for task in tasks}
        self._found = found
        for task in tasks:
            if task.active:
                self._open_door(task)
        await self._watch.open()

    async def close(self, tasks: list[TaskRecord], *, stop_tasks: bool) -> None:
        await self._watch.end()
        await self._looker.close()
        if stop_tasks and self._watch.answers:
            ours = [task for task in tasks if task.active and not task.adopted]
            await asyncio.gather(*(self._stop_at_end(task) for task in ours))
        for task in tasks:
            self._untouched.leave(task)
        await self._watch.close()

    async def _stop_at_end(self, task: TaskRecord) -> None:
        try:
            await self._stop(task, DRAIN_STOP_SECONDS)
        except KohakuRiverError as error:
            log.warning("a task could not be stopped", task=task.task_id, reason=error.message)
        else:
            self._report(task.container, "stopped", "it ended with the runner")

    async def _look_around(self) -> None:
        """Report every task's state, also of those that only our labels on their containers tell of."""
        about = await self._docker.system.info()
        warn_of_unbounded(about)
        self._judge_doors(about)
        await fence_in(self._docker, self._fence)
        filters = json.dumps({"label": [of_runner(self._instance)]})
        for container in await self._docker.containers.list(all=True, filters=filters):
            show = await container.show()
            labels = show["Config"]["Labels"]
            if task_in(labels) not in self._tasks:
                task = self._tasks[task_in(labels)] = task_of(labels, show)
                self._found(task)
        for task in list(self._tasks.values()):
            await self._looker.look(task)

    def _judge_doors(self, about: Mapping[str, Any]) -> None:
        """Find out whether containers can have doors, and say so where they can't."""
        before, self._no_doors = self._no_doors, why_no_sockets(self._docker, about)
        if self._no_doors is None or self._no_doors == before:
            return
        log.info("containers reach this runner over TCP", reason=self._no_doors)
        if is_rootless(about):
            log.warning(
                "THIS ENGINE IS ROOTLESS: its containers' tunnels don't find this runner, because the gateway of their "
                "network is in a network namespace of the engine; run the runner as the engine's user, or use an "
                "engine that runs as root, with user namespaces"
            )

    def _event(self, event: dict[str, Any]) -> None:
        """Look at the tasks that an event is about."""
        actor = event.get("Actor", {})
        engine_id, attributes = event.get("id") or actor.get("ID"), actor.get("Attributes", {})
        command = attributes.get("execID")  # of those that have ended in a container, the tunnel client counts
        for task in list(self._tasks.values()):
            if task.engine_id != engine_id and not (task.adopted and task.engine_name == attributes.get("name")):
                continue
            if command is None:
                self._looker.look_soon(task)
            elif command == task.exec_id:
                self._looker.look_later(task, CLIENT_AGAIN_SECONDS, partial(self._has, task))

    def _has(self, task: TaskRecord) -> bool:
        return self._tasks.get(task.container) is task

    async def _shown(self, container: str) -> dict[str, Any] | None:
        """What the engine says of a container, by its id or name; None where it has none."""
        try:
            return dict(await self._docker.containers.container(path_segment(container)).show())
        except DockerError as error:
            if error.status != 404:
                raise
            return None

    async def _made_again(self, task: TaskRecord) -> dict[str, Any] | None:
        """The container that has the name of an adopted one, which was removed: it is the task's from now on."""
        if not task.adopted or task.engine_name is None:
            return None
        show = await self._shown(task.engine_name)
        if show is None or not show["State"]["Running"] or show["Name"] != f"/{task.engine_name}":
            return None
        if any(other.engine_id == show["Id"] for other in self._tasks.values()):
            return None
        log.info("a container that was made again is taken up", task=task.task_id, container=task.engine_name)
        task.engine_id, task.image = show["Id"], show["Config"]["Image"]
        return show

    async def _refresh(self, task: TaskRecord) -> None:
        """Report what the engine says about a task; a container that was started anew gets its tunnel client."""
        show = await self._shown(task.engine_id or task.container) or await self._made_again(task)
        if show is None:
            self._untouched.leave(task)
            self._report(task.container, "lost", REMOVED_ADOPTED if task.adopted else REMOVED)
            return
        state = show["State"]
        if not state["Running"]:
            self._untouched.leave(task)
            self._report(task.container, *await ending(self._docker, task, state), state["ExitCode"])
            return
        task.stopped = False
        if task.no_client:
            await self._untouched.enter(task, show)
            self._report(task.container, "running", PAUSED if state["Paused"] else NO_CLIENT)
            return
        self._report(task.container, "running", PAUSED if state["Paused"] else None)
        try:
            task.tunnel_from = await addresses_of(self._docker, show)
            await self._inside.ensure_client(task, show, await self._url_for(task, show))
            if task.ssh_keys:
                await self._inside.ensure_ssh(task, show)
        except KohakuRiverError as error:
            self._report(task.container, "running", error.message.rstrip("."))

    # Tasks

    @contextlib.asynccontextmanager
    async def _doing(self, what: str, task: TaskRecord) -> AsyncIterator[None]:
        """While the engine is asked, in the turn of whoever wants it, to do something with a task."""
        with self._looker.handling(task), sentences(what):
            async with self._calls.place():
                yield

    async def _mounts(self, task: TaskRecord) -> list[str]:
        """What is mounted in a task, once more checked. Raises NotAllowedError or UsageError."""
        return await asyncio.to_thread(self._mount_roots.resolved, task.mounts, task.mounts_for)

    async def start(self, task: TaskRecord) -> None:
        assert task.image is not None
        await self._mounts(task)
        if task.ssh_keys:
            self._ssh.prepare(task)
        with sentences(f"pull the image {task.image}"):
            image = await self._images.need(
                task.image, partial(self._report, task.container, "starting"), task.pull or "missing"
            )
        async with self._doing(f"start the task from image {task.image}", task):
            with self._doors.unless_it_fails(task.container):
                await self._start(task, image)
            await self._refresh(task)

    async def _grant(self, task: TaskRecord) -> Grant:
        """What gives a task's container its GPUs. May raise DockerError, UnavailableError."""
        return granted(task.gpu_ids, self._gpus, await self._docker.system.info() if task.gpu_ids else {}, self._node)

    async def _start(self, task: TaskRecord, image: Mapping[str, Any]) -> None:
        """Make its container and start that; one that can't be started is gone again."""
        assert task.image is not None
        network = await self._network_for(task)
        described = replace(task, mounts=await self._mounts(task))
        task.mounted = described.mounts
        try:
            container = await self._docker.containers.create(
                self._description.config(described, image, network, await self._grant(task)), name=task.container
            )
        except DockerError as error:
            if error.status == 404:
                raise self._images.missing(task.image) from error
            raise
        task.engine_id = container.id
        task.engine_name = task.container
        self._tasks[task.container] = task
        try:
            await self._inside.give_next_token(task, container.id)
            await container.start()
        except BaseException:
            self._tasks.pop(task.container)
            with contextlib.suppress(DockerError):
                await container.delete(force=True, v=True, timeout=limit())
            raise

    async def _network_for(self, task: TaskRecord) -> str:
        """The network of a container that is about to be made, and how that reaches the runner."""
        network = task.network or await task_network(self._docker, self._fence)
        task.tunnel_url = self._new_door(task)
        if task.tunnel_url is None and task.network:
            raise UnavailableError(
                f"A container without a network does not reach the runner of node {self._node} "
                f"({self._no_doors or 'there are no Unix sockets'}); leave --network out, or use another node.",
                code="no_door",
            )
        task.tunnel_url = task.tunnel_url or await self._reach(await gateway(self._docker, network))
        return network

    async def adopt(self, task: TaskRecord) -> TaskRecord:
        assert task.engine_name is not None
        async with self._doing(f"adopt the container {task.engine_name}", task):
            show = await self._shown(task.engine_name)
            if show is None:
                raise NotFoundError(
                    f"Node {self._node} has no container {task.engine_name!r}; `docker ps` there shows what it has."
                )
            _check_adoptable(task.engine_name, show)
            for other in [other for other in self._tasks.values() if f"/{other.engine_name}" == show["Name"]]:
                await self._looker.look(other)  # the task of a container that had this name takes this one up
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
        async with self._doing("stop the container", task):
            await self._stop(task, STOP_SECONDS)

    async def _stop(self, task: TaskRecord, seconds: int) -> None:
        with sentences("stop the container"):
            task.stopped = True
            try:
                await self._docker.containers.container(task.engine_id or task.container).stop(
                    t=seconds, timeout=limit(seconds)
                )
            except DockerError as error:
                if error.status != 404:
                    raise

    async def start_again(self, task: TaskRecord) -> None:
        if await self._mounts(task) != task.mounted and task.mounted:
            raise UnavailableError(
                f"What task {task.name} mounts leads elsewhere than when its container was made; make a new task.",
                code="mount_moved",
            )
        async with self._doing("start the container again", task):
            task.stopped, task.tunnel_from = False, None
            self._open_door(task)
            engine_id = task.engine_id or task.container
            try:
                if not task.adopted:
                    await self._inside.give_next_token(task, engine_id)
                await self._docker.containers.container(engine_id).start()
            except DockerError as error:
                if error.status != 404:
                    raise
            else:
                await self._refresh(task)
                return
        if task.adopted:
            gone = f"The container {task.engine_name} was removed; make it again there, and it is this task again."
            raise UnavailableError(gone)
        await self.start(task)

    async def remove(self, task: TaskRecord) -> None:
        async with self._doing("remove the container", task):
            self._untouched.leave(task)
            if task.adopted:
                await self._inside.end_client(task)
            else:
                try:
                    container = self._docker.containers.container(task.engine_id or task.container)
                    await container.delete(force=True, v=True, timeout=limit())
                except DockerError as error:
                    if error.status != 404:
                        raise
        self._tasks.pop(task.container, None)
        await self.discard(task)

    async def discard(self, task: TaskRecord) -> None:
        self._doors.close(task.container)
        self._helper.forget(task.container)

    async def remove_volume(self, volume: str) -> None:
        with sentences("remove the volume"):
            async with self._calls.place():
                try:
                    found = await self._docker.volumes.get(volume)  # type: ignore[no-untyped-call]
                    await found.delete()
                except DockerError as error:
                    if error.status != 404:
                        raise

    async def exec(self, task: TaskRecord, request: ExecRequest) -> ExecSession:
        with sentences("run a command in the container"):
            at = docker_exec.Engine(self._docker, self._calls, self._starts)
            return await docker_exec.start(at, task.engine_id or task.container, request)

    async def logs(self, task: TaskRecord, request: LogRequest) -> Printed:
        if task.engine_id is None:
            raise UnavailableError(
                f"Task {task.name} has printed nothing yet: its container is still being made; try again in a moment.",
                code="task_not_running",
            )
        with sentences("read what the container printed"):
            async with self._calls.place():
                return await open_logs(self._docker, task.engine_id, request)

    async def _make_reachable(self, task: TaskRecord, show: dict[str, Any]) -> None:
        """Put the tunnel client in; where that can't be done the runner dials from the container's own network."""
        if not task.no_client:
            try:
                await self._inside.ensure_client(task, show, await self._url_for(task, show))
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

    async def comes_from(self, task: TaskRecord, peer: Peer) -> bool:
        if task.tunnel_from is not None and _among(task.tunnel_from, peer):
            return True
        with sentences("say where the container is"):
            show = await self._shown(task.engine_id or task.container)
            if show is not None and show["State"]["Running"]:
                task.tunnel_from = await addresses_of(self._docker, show)
                return _among(task.tunnel_from, peer)
        if task.tunnel_from is None:
            # It ended before anybody asked, and its addresses are forgotten: that is no theft.
            raise UnavailableError(f"The container {task.container} has ended.", code="task_not_running")
        return False

    async def sockets(self, task: TaskRecord) -> TaskSockets:
        """All of its network; where that is the node's, those of the container's own processes."""
        if not task.adopted:
            return TaskSockets(hidden=ENGINE_DNS)
        with sentences("say what the container shares with its node"):
            show = await self._shown(task.engine_id or task.container)
            on_the_node = show is not None and await has_node_network(self._docker, show)
        if show is None or not on_the_node:
            return TaskSockets(hidden=ENGINE_DNS)
        if show["HostConfig"].get("PidMode"):
            raise UnavailableError(
                f"Task {task.name} shares its network and its processes with its node: which ports are its own can't "
                "be told from the node's; forward one by its number.",
                code="ports_unknown",
            )
        return TaskSockets(PortScope.SEEN)

    async def give_token(self, task: TaskRecord) -> None:
        with sentences("give the container a new token"):
            show = await self._shown(task.engine_id or task.container)
            if show is not None and not task.no_client:
                await self._inside.ensure_client(task, show, await self._url_for(task, show))

    def target(self, task: TaskRecord) -> DirectTarget | None:
        return self._untouched.target(task)

    def _new_door(self, task: TaskRecord) -> str | None:
        """How a container that is about to be made reaches its own door, None where it has to go over TCP."""
        if self._no_doors is not None or self._doors.open(task.container, _for_all) is None:
            return None
        return f"unix:{DOOR}/{SOCKET}"

    def _open_door(self, task: TaskRecord) -> None:
        """See that somebody listens at the door of a task that was made with one."""
        if task.has_door:
            self._doors.open(task.container, _for_all)

    async def _url_for(self, task: TaskRecord, show: dict[str, Any]) -> str:
        """How a container reaches the runner. One that was made with a door keeps it."""
        if task.tunnel_url is not None and task.has_door:
            if self._doors.open(task.container, _for_all) is None:
                raise UnavailableError("its socket of the runner can't be made; the log says why.", code="no_door")
            return task.tunnel_url
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


def _for_all(folder: Path, path: Path) -> None:
    """A container's programs may be anybody. On the node nobody gets that far: the task's directory is closed."""
    folder.chmod(0o755)
    path.chmod(0o666)


def _among(addresses: list[str], peer: Peer) -> bool:
    """Whether a peer is at one of a container's addresses, or, where it has none of its own, on the node."""
    return peer.address in addresses if addresses else peer.on_this_machine


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
