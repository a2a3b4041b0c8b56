"""Commands in containers, by a real engine."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiodocker
import pytest

from kohakuriver.runner.backends.base import ExecRequest
from kohakuriver.runner.backends.docker import exec as docker_exec
from kohakuriver.runner.services.fair_queue import FairQueue
from tests.support import docker_images
from tests.support.docker_images import docker
from tests.support.hops import until

pytestmark = pytest.mark.docker

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def container() -> Iterator[str]:
    docker_images.require_engine()
    name = f"kohakuriver-test-{uuid.uuid4().hex[:8]}"
    docker("run", "-d", "--name", name, docker_images.busybox_image(), "/bin/busybox", "sleep", "1000")
    yield name
    docker("rm", "-f", name)


def test_a_command_that_begins_while_its_user_goes_does_not_stay(run: Run, container: str) -> None:
    request = ExecRequest(["/bin/busybox", "sleep", "98765.5"])  # no process id looks like that

    async def look(at: docker_exec.Engine, cancelled: bool) -> None:
        starting = asyncio.ensure_future(docker_exec.start(at, container, request))
        if cancelled:
            await asyncio.sleep(random.random() * 0.1)
            starting.cancel()
        # Up to Python 3.11 `asyncio.wait_for` loses a cancellation that comes together with what it waits for.
        [started] = await asyncio.gather(starting, return_exceptions=cancelled)
        if isinstance(started, docker_exec.DockerExec):
            await started.close()

    async def main() -> None:
        async with aiodocker.Docker() as client:
            at = docker_exec.Engine(client, FairQueue(16, 16), FairQueue(16, 16))
            await asyncio.gather(*(look(at, number % 2 == 0) for number in range(30)))
            deadline = asyncio.get_running_loop().time() + 30
            while "98765.5" in docker("top", container):
                assert asyncio.get_running_loop().time() < deadline, "a command stays that nobody waits for"
                await asyncio.sleep(0.1)

    run(main())


async def _is_begun(client: aiodocker.Docker, container: str) -> bool:
    """Whether the engine is about to start something in it; then it may answer nobody who asks about the container."""
    try:
        show = await asyncio.wait_for(client.containers.container(container).show(), 2)
    except asyncio.TimeoutError:
        return True
    return bool(show["ExecIDs"])


def test_a_command_that_a_busy_engine_starts_late_does_not_stay(run: Run, container: str) -> None:
    request = ExecRequest(["/bin/busybox", "sleep", "98765.5"])
    inside = int(docker("inspect", "-f", "{{.State.Pid}}", container))
    (shim,) = (line for line in Path(f"/proc/{inside}/status").read_text().splitlines() if line.startswith("PPid:"))

    async def main() -> None:
        async with aiodocker.Docker() as client:
            at = docker_exec.Engine(client, FairQueue(16, 16), FairQueue(16, 16))
            os.kill(int(shim.split()[1]), signal.SIGSTOP)
            try:
                starting = asyncio.ensure_future(docker_exec.start(at, container, request))
                while not await _is_begun(client, container):  # noqa: ASYNC110  # the engine tells nobody
                    await asyncio.sleep(0.05)
                session = await asyncio.wait_for(starting, 30)
                await session.close()
                await asyncio.sleep(1)  # it took 2 s already, and nobody looks any more after them
            finally:
                os.kill(int(shim.split()[1]), signal.SIGCONT)
            await until(lambda: docker("inspect", "-f", "{{.ExecIDs}}", container) == "[]")
            assert "98765.5" not in docker("top", container)

    run(main())
