"""The docker backend: a task is a container, with the tunnel client bind-mounted and wrapped around its command.

Containers outlive the runner. Those that it started carry labels, so that a runner started anew finds them again.
Docker's events are taken as hints: whatever one says, the container is inspected and its state reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import aiodocker
import aiohttp
import structlog
from aiodocker.exceptions import DockerError

from kohakuriver.errors import KohakuRiverError, LocalAddressError, NotFoundError, UnavailableError, UsageError
from kohakuriver.runner.backends.base import Backend, ExecRequest, ExecSession, Reporter
from kohakuriver.runner.backends.docker import exec as docker_exec
from kohakuriver.runner.backends.docker.network import task_network
from kohakuriver.runner.backends.namespace import ContainerNetwork
from kohakuriver.runner.backends.process.tasks import describe_exit, last_words
from kohakuriver.runner.services.direct import DirectTarget
from kohakuriver.runner.services.ssh_helper import CONTAINER_PORT, OWN_SSHD, SshHelper, until_listening
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.tunnel_helper import TunnelHelper
from kohakuriver.runtime import cancel_all

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
        self._networks: dict[str, ContainerNetwork] = {}
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
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        await self._first_look.wait()

    async def close(self, tasks: list[TaskRecord], *, stop_tasks: bool) -> None:
        await cancel_all([*self._looks, *([self._watcher] if self._watcher else [])])
        if stop_tasks and self._client is not None:
            ours = [task for task in tasks if task.active and not task.adopted]
            await asyncio.gather(*(self._stop_at_end(task) for task in ours))
        for task in tasks:
            self._leave_network(task)
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
                        "no Docker engine answers: no task can be a container until one does", reason=_why(error)
                    )
            except KohakuRiverError as error:
                log.warning("trouble with the Docker engine", reason=error.message)
            if self._client is not None:
                log.warning("the Docker engine went away")
            await self._disconnect()
            self._first_look.set()
            await asyncio.sleep(_RETRY_SECONDS)

    async def _follow(self) -> None:
        client = _new_client()
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
            self._leave_network(task)
            self._report(task.container, "lost", "its container was removed")
            return
        state = show["State"]
        if not state["Running"]:
            self._leave_network(task)
            self._report(task.container, *await self._ending(task, state))
            return
        task.stopped = False
        if task.no_client:
            await self._enter_network(task, show)
            self._report(task.container, "running", PAUSED if state["Paused"] else NO_CLIENT)
            return
        self._report(task.container, "running", PAUSED if state["Paused"] else None)
        try:
            await self._ensure_client(task, show)
            if task.ssh_keys:
                await self._ensure_ssh(task, show)
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
        with self._handling(task), _sentences(f"start the task from image {task.image}"):
            await self._need_image(task)
            network = await task_network(self._docker)
            task.tunnel_url = await self._reach(await self._gateway(network))
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
        with self._handling(task), _sentences(f"adopt the container {task.engine_name}"):
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

    # What is reached with no tunnel client inside

    async def _make_reachable(self, task: TaskRecord, show: dict[str, Any]) -> None:
        """Put the tunnel client in; where that can't be done the runner dials from the container's own network."""
        if not task.no_client:
            try:
                await self._ensure_client(task, show)
                return
            except KohakuRiverError as error:
                try:
                    await self._enter_network(task, show)
                except UnavailableError:
                    raise error from None
                log.info("no tunnel client can be put in", container=task.engine_name, reason=error.message)
                task.no_client = True
        else:
            await self._enter_network(task, show)

    async def _enter_network(self, task: TaskRecord, show: dict[str, Any]) -> None:
        """Hold the network of a container that runs: that of its present start."""
        self._leave_network(task)
        try:
            network = await asyncio.get_running_loop().run_in_executor(None, ContainerNetwork, show["State"]["Pid"])
        except OSError as error:
            raise UnavailableError(
                f"The runner can't enter the network of container {task.engine_name} ({error.strerror}), which takes "
                "root on the engine's own machine; adopt it without --no-client.",
                code="no_network",
            ) from error
        again = await self._docker.containers.container(show["Id"]).show()
        if again["State"]["Pid"] != show["State"]["Pid"]:  # it went before we looked: the number may be another's
            network.close()
            raise UnavailableError(f"The container {task.engine_name} has just ended.", code="task_not_running")
        self._networks[task.container] = network

    def _leave_network(self, task: TaskRecord) -> None:
        if network := self._networks.pop(task.container, None):
            network.close()

    def target(self, task: TaskRecord) -> DirectTarget | None:
        network = self._networks.get(task.container)
        return None if network is None else DirectTarget(network=network)

    async def stop(self, task: TaskRecord) -> None:
        with self._handling(task):
            await self._stop(task, STOP_SECONDS)

    async def _stop(self, task: TaskRecord, seconds: int) -> None:
        with _sentences("stop the container"):
            task.stopped = True
            try:
                await self._docker.containers.container(task.engine_id or task.container).stop(t=seconds)
            except DockerError as error:
                if error.status != 404:
                    raise

    async def start_again(self, task: TaskRecord) -> None:
        with self._handling(task), _sentences("start the container again"):
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
        with self._handling(task), _sentences("remove the container"):
            self._leave_network(task)
            if task.adopted:
                await self._end_client(task)
            else:
                try:
                    await self._docker.containers.container(task.engine_id or task.container).delete(force=True, v=True)
                except DockerError as error:
                    if error.status != 404:
                        raise
        self._tasks.pop(task.container, None)
        self._helper.forget(task.container)

    async def exec(self, task: TaskRecord, request: ExecRequest) -> ExecSession:
        with _sentences("run a command in the container"):
            return await docker_exec.start(self._docker, task.engine_id or task.container, request)

    # The tunnel client inside

    async def _ensure_client(self, task: TaskRecord, show: dict[str, Any]) -> None:
        """See to it that a running container has a tunnel client that dials where the runner listens now.

        A container of ours brings its own, unless the runner's address has changed since.
        """
        url = await self._reach(await self._gateway_of(show))
        own_dials_it = not task.adopted and task.tunnel_url == url
        put_in_dials_it = task.exec_url == url and task.exec_start == show["State"]["StartedAt"]
        if not own_dials_it and not (put_in_dials_it and await self._client_runs(task)):
            await self._put_client(task, show, url)

    async def _client_runs(self, task: TaskRecord) -> bool:
        try:
            return bool((await self._docker.containers.exec(task.exec_id or "").inspect())["Running"])
        except DockerError:
            return False

    async def _put_client(self, task: TaskRecord, show: dict[str, Any], url: str) -> None:
        container: Any = self._docker.containers.container(show["Id"])  # not all annotated
        with _sentences("put the tunnel client into the container"):
            if task.adopted:
                await container.put_archive("/", self._helper.archive(task.container))
            command = self._helper.adopted_command(task.container, url)
            client = await container.exec(command, stdout=False, stderr=False, environment=self._helper.settings)
            await client.start(detach=True)
        task.exec_id = client.id
        task.exec_start = show["State"]["StartedAt"]
        task.exec_url = url

    async def _end_client(self, task: TaskRecord) -> None:
        """End the tunnel client in an adopted container, as far as we may: the container itself goes on."""
        if task.exec_id is None:
            return
        with contextlib.suppress(DockerError, OSError):
            inspected = await self._docker.containers.exec(task.exec_id or "").inspect()
            pid = int(inspected.get("Pid") or 0)
            if inspected["Running"] and pid and task.container.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGTERM)

    # The SSH server inside

    async def _ensure_ssh(self, task: TaskRecord, show: dict[str, Any]) -> None:
        """See to it that a running container has its SSH server."""
        started = show["State"]["StartedAt"]
        if show["State"]["Paused"] or (
            task.ssh_exec_start == started and await self._exec_pid(task.ssh_exec_id) is not None
        ):
            return
        with _sentences("start the SSH server in the container"):
            container: Any = self._docker.containers.container(show["Id"])  # not all annotated
            environment = dict(line.split("=", 1) for line in show["Config"]["Env"] or () if "=" in line)
            await container.put_archive("/", self._ssh.archive(task, environment))
            own = await self._own_sshd(show["Id"])
            # As root, whoever the image's user is: it is root's SSH that a server of one's own is known for.
            command = self._ssh.container_command(own)
            server = await container.exec(command, stdout=False, stderr=False, user="0:0")
            # Known before it runs: whoever cuts this look short must not leave a server that the next one starts again.
            task.ssh_exec_id, task.ssh_exec_start, task.ssh_port = server.id, started, CONTAINER_PORT
            await server.start(detach=True)
        pid = await self._exec_pid(server.id)
        if pid is None or not await until_listening(pid, CONTAINER_PORT):
            program = own or "the one that kohakuriver brings"
            raise UnavailableError(f"its SSH server ({program}) did not start.", code="no_ssh_server")

    async def _own_sshd(self, engine_id: str) -> str | None:
        """The path of the sshd that is in the container, None where there is none."""
        for path in OWN_SSHD:
            if await self._has(engine_id, path):
                return path
        return None

    async def _has(self, engine_id: str, path: str) -> bool:
        try:
            await self._docker.containers.container(engine_id).get_archive(path)
        except DockerError as error:
            if error.status != 404:
                raise
            return False
        return True

    async def _exec_pid(self, exec_id: str | None) -> int | None:
        """The process, as this node numbers it, of a command that runs in a container; None when it has ended."""
        try:
            inspected = await self._docker.containers.exec(exec_id or "").inspect()
        except DockerError:
            return None
        return int(inspected.get("Pid") or 0) if inspected["Running"] else None

    async def _reach(self, gateway: str) -> str:
        try:
            return await self._listen_at(gateway)
        except (LocalAddressError, OSError) as error:
            raise UnavailableError(
                f"Containers would reach the runner at {gateway}, but it can't listen there ({error}); "
                "start the runner with --bind 0.0.0.0.",
                code="no_gateway",
            ) from error

    async def _gateway_of(self, show: dict[str, Any]) -> str:
        """The node's address as a container sees it."""
        mode = show["HostConfig"]["NetworkMode"]
        if mode == "host":
            return "127.0.0.1"
        if mode.startswith("container:"):
            return await self._gateway_of(await self._docker.containers.container(mode.partition(":")[2]).show())
        for network in show["NetworkSettings"]["Networks"].values():
            with contextlib.suppress(UnavailableError):
                return await self._gateway(network["NetworkID"])
        raise UnavailableError(
            "The container is on no bridge network, so it can't reach the runner; only a runner that is root on the "
            "engine's own machine reaches into it.",
            code="no_gateway",
        )

    async def _gateway(self, network: str) -> str:
        show = await (await self._docker.networks.get(network)).show()
        for config in (show.get("IPAM") or {}).get("Config") or []:
            if show["Driver"] == "bridge" and ":" not in config["Subnet"]:
                # An engine that has not used the network yet does not always name its gateway.
                return str(config.get("Gateway") or next(ip_network(config["Subnet"]).hosts()))
        raise UnavailableError(f"The network {show['Name']} has no gateway on this node.", code="no_gateway")

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
                look = asyncio.get_running_loop().create_task(self._look_again(task))
                self._looks.add(look)
                look.add_done_callback(self._looks.discard)


def _why(error: Exception) -> str:
    """Why there is no engine, where the program that asked knows it: may not, or none runs."""
    cause = error.__cause__ or error
    text = getattr(error, "strerror", None) or getattr(cause, "strerror", None) or str(error)
    return text or "it did not answer in time"


def _new_client() -> aiodocker.Docker:
    try:
        return aiodocker.Docker()
    except (AssertionError, ValueError) as error:
        raise OSError("there is no engine's socket") from error


@contextlib.contextmanager
def _sentences(what: str) -> Iterator[None]:
    """Turn the engine's errors into sentences that say what could not be done."""
    try:
        yield
    except DockerError as error:
        reason = str(error.message).strip().rstrip(".")
        raise KohakuRiverError(f"Docker could not {what}: {reason}.", code="docker", status=409) from error
    except (aiohttp.ClientError, OSError) as error:
        raise UnavailableError(
            f"Docker could not {what}: the engine does not answer ({error}).", code="no_engine"
        ) from error


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
