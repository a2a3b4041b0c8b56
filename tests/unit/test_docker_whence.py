"""From where a container's tunnel client may come, by what the engine says of the container."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kohakuriver.errors import UnavailableError
from kohakuriver.runner.backends.docker.tasks import DockerBackend
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.tunnel.accept import Peer

INSIDE, ELSEWHERE = Peer("172.27.0.2"), Peer("172.27.0.3")


class Engine(DockerBackend):
    """A backend whose engine has one container, which has an address while it runs."""

    _docker: Any = SimpleNamespace()

    def __init__(self) -> None:
        self.running = True

    async def _shown(self, container: str) -> dict[str, Any] | None:
        networks = {"kohakuriver": {"IPAddress": INSIDE.address if self.running else ""}}
        return {
            "State": {"Running": self.running},
            "HostConfig": {"NetworkMode": "kohakuriver"},
            "NetworkSettings": {"Networks": networks},
        }


def record() -> TaskRecord:
    return TaskRecord(task_id=1, container="kohakuriver-vps-1", backend="docker")


def test_a_container_that_ended_at_once_is_no_theft() -> None:
    engine, task = Engine(), record()
    engine.running = False
    with pytest.raises(UnavailableError, match="has ended"):
        asyncio.run(engine.comes_from(task, INSIDE))
    with pytest.raises(UnavailableError, match="has ended"):
        asyncio.run(engine.comes_from(task, Peer("127.0.0.1")))  # nor may the node have its tunnel for that


def test_where_a_container_ran_is_known_after_its_end() -> None:
    engine, task = Engine(), record()
    assert asyncio.run(engine.comes_from(task, INSIDE))
    engine.running = False
    assert asyncio.run(engine.comes_from(task, INSIDE))
    assert not asyncio.run(engine.comes_from(task, ELSEWHERE))
