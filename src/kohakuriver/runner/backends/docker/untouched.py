"""Containers with nothing of ours inside: the runner holds their networks, and dials from there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiodocker

from kohakuriver.errors import UnavailableError
from kohakuriver.relay.direct import DirectTarget
from kohakuriver.runner.backends.namespace import ContainerNetwork
from kohakuriver.runner.services.state import TaskRecord

__all__ = ["Untouched"]


class Untouched:
    """The networks of such containers. `docker` gives the engine's client, or raises UnavailableError."""

    def __init__(self, docker: Callable[[], aiodocker.Docker]) -> None:
        self._docker = docker
        self._networks: dict[str, ContainerNetwork] = {}

    async def enter(self, task: TaskRecord, show: dict[str, Any]) -> None:
        """Hold the network of a container that runs: that of its present start."""
        self.leave(task)
        try:
            network = await asyncio.get_running_loop().run_in_executor(None, ContainerNetwork, show["State"]["Pid"])
        except OSError as error:
            raise UnavailableError(
                f"The runner can't enter the network of container {task.engine_name} ({error.strerror}), which takes "
                "root on the engine's own machine; adopt it without --no-client.",
                code="no_network",
            ) from error
        again = await self._docker().containers.container(show["Id"]).show()
        if again["State"]["Pid"] != show["State"]["Pid"]:  # it went before we looked: the number may be another's
            network.close()
            raise UnavailableError(f"The container {task.engine_name} has just ended.", code="task_not_running")
        self._networks[task.container] = network

    def leave(self, task: TaskRecord) -> None:
        """Let go of it, if it is held."""
        if network := self._networks.pop(task.container, None):
            network.close()

    def target(self, task: TaskRecord) -> DirectTarget | None:
        """What to dial for a task whose network is held."""
        network = self._networks.get(task.container)
        return None if network is None else DirectTarget(network=network)
