"""What a runner puts into containers that run: the tunnel client, and an SSH server."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiodocker
from aiodocker.exceptions import DockerError

from kohakuriver.errors import UnavailableError
from kohakuriver.runner.backends.docker.engine import TROUBLE, has, limit, sentences
from kohakuriver.runner.backends.docker.users import user_number
from kohakuriver.runner.services.ssh_helper import CONTAINER_PORT, OWN_SSHD, SshHelper, until_listening
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.tunnel_helper import FIRST_TOKEN, TunnelHelper, name_token, new_token

__all__ = ["Inside"]


NEXT_START = "next"
"""The `token_start` of a token that was laid down for a start that has not happened yet."""


class Inside:
    """Puts programs in, and sees that they run. `docker` gives the engine's client, or raises UnavailableError."""

    def __init__(self, docker: Callable[[], aiodocker.Docker], helper: TunnelHelper, ssh: SshHelper) -> None:
        self._docker = docker
        self._helper = helper
        self._ssh = ssh

    # The tunnel client inside

    async def ensure_client(self, task: TaskRecord, show: dict[str, Any], url: str) -> None:
        """See to it that a running container has a tunnel client that dials `url`, where the runner listens now.

        A container of ours brings its own, unless the runner's address has changed since.
        """
        own_dials_it = not task.adopted and task.tunnel_url == url
        put_in_dials_it = task.exec_url == url and task.exec_start == show["State"]["StartedAt"]
        if own_dials_it:
            task.token_name = FIRST_TOKEN
            await self._ensure_token(task, show, show["State"]["StartedAt"])
        elif put_in_dials_it and await self._client_runs(task):
            await self._ensure_token(task, show, task.exec_id)
        else:
            await self._put_client(task, show, url)

    async def _ensure_token(self, task: TaskRecord, show: dict[str, Any], start: str | None) -> None:
        """See to it that this start of a tunnel client has its token: it may have begun without us, or one is due."""
        if task.token_start != NEXT_START and task.token_start != start:
            new_token(task)
            await self._give_token(task, show)
        task.token_start = start

    async def _give_token(self, task: TaskRecord, show: dict[str, Any]) -> None:
        """Lay the task's token down in its container. May raise DockerError, UnavailableError."""
        user = await user_number(self._docker(), show["Id"], show["Config"].get("User") or "")
        container: Any = self._docker().containers.container(show["Id"])  # not all annotated
        await container.put_archive("/", self._helper.token_archive(task, user))

    async def give_next_token(self, task: TaskRecord, engine_id: str) -> None:
        """Lay a token down for the start that comes, where no other program of the container runs yet."""
        new_token(task)
        task.token_name = FIRST_TOKEN
        await self._give_token(task, dict(await self._docker().containers.container(engine_id).show()))
        task.token_start = NEXT_START

    async def _client_runs(self, task: TaskRecord) -> bool:
        try:
            return bool((await self._docker().containers.exec(task.exec_id or "").inspect())["Running"])
        except DockerError:
            return False

    async def _put_client(self, task: TaskRecord, show: dict[str, Any], url: str) -> None:
        container: Any = self._docker().containers.container(show["Id"])  # not all annotated
        with sentences("put the tunnel client into the container"):
            if task.adopted:
                await container.put_archive("/", self._helper.program_archive())
            new_token(task)
            name_token(task)
            await self._give_token(task, show)
            command = self._helper.adopted_command(task, url)
            client = await container.exec(command, stdout=False, stderr=False, environment=self._helper.settings)
            await client.start(detach=True, timeout=limit())
        task.exec_id = task.token_start = client.id
        task.exec_start = show["State"]["StartedAt"]
        task.exec_url = url

    async def end_client(self, task: TaskRecord) -> None:
        """End the tunnel client in an adopted container, as far as we may: the container itself goes on."""
        if task.exec_id is None:
            return
        with contextlib.suppress(*TROUBLE):
            inspected = await self._docker().containers.exec(task.exec_id or "").inspect()
            pid = int(inspected.get("Pid") or 0)
            if inspected["Running"] and pid and task.container.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGTERM)

    # The SSH server inside

    async def ensure_ssh(self, task: TaskRecord, show: dict[str, Any]) -> None:
        """See to it that a running container has its SSH server."""
        started = show["State"]["StartedAt"]
        if show["State"]["Paused"] or (
            task.ssh_exec_start == started and await self._exec_pid(task.ssh_exec_id) is not None
        ):
            return
        with sentences("start the SSH server in the container"):
            container: Any = self._docker().containers.container(show["Id"])  # not all annotated
            environment = dict(line.split("=", 1) for line in show["Config"]["Env"] or () if "=" in line)
            await container.put_archive("/", self._ssh.archive(task, environment))
            own = await self._own_sshd(show["Id"])
            # As root, whoever the image's user is: it is root's SSH that a server of one's own is known for.
            command = self._ssh.container_command(own)
            server = await container.exec(command, stdout=False, stderr=False, user="0:0")
            # Known before it runs: whoever cuts this look short must not leave a server that the next one starts again.
            task.ssh_exec_id, task.ssh_exec_start, task.ssh_port = server.id, started, CONTAINER_PORT
            await server.start(detach=True, timeout=limit())
        pid = await self._exec_pid(server.id)
        if pid is None or not await until_listening(pid, CONTAINER_PORT):
            program = own or "the one that kohakuriver brings"
            raise UnavailableError(f"its SSH server ({program}) did not start.", code="no_ssh_server")

    async def _own_sshd(self, engine_id: str) -> str | None:
        """The path of the sshd that is in the container, None where there is none."""
        for path in OWN_SSHD:
            if await has(self._docker(), engine_id, path):
                return path
        return None

    async def _exec_pid(self, exec_id: str | None) -> int | None:
        """The process, as this node numbers it, of a command that runs in a container; None when it has ended."""
        try:
            inspected = await self._docker().containers.exec(exec_id or "").inspect()
        except DockerError:
            return None
        return int(inspected.get("Pid") or 0) if inspected["Running"] else None
