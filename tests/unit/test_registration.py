"""A runner stays registered with its host, whatever goes wrong in between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.runner.services.registration import NodeIdentity, Registration
from kohakuriver.runner.services.state import State
from kohakuriver.store import Task
from tests.support.hops import until
from tests.support.host_only import a_host

Run = Callable[[Coroutine[Any, Any, None]], None]


async def _remove(task_id: int) -> None:
    raise AssertionError(f"nobody removes task {task_id} here")


def a_registration(
    directory: Path,
    host_url: str,
    heartbeat: Callable[[], dict[str, Any]],
    remove: Callable[[int], Coroutine[Any, Any, None]],
) -> Registration:
    """A node's registration with the host that has its state in `directory`."""
    token = (directory / "host/node-token").read_text().strip()
    identity = NodeIdentity("n1", "http://127.0.0.1:1", "one", host_url, token)
    state = State(directory / "runner")
    return Registration(identity, state, heartbeat=heartbeat, backends=lambda: {"process": None}, remove=remove)


def test_a_heartbeat_that_fails_is_logged_and_the_next_one_is_sent(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = asyncio.Event()
    beats = 0

    def heartbeat() -> dict[str, Any]:
        nonlocal beats
        beats += 1
        if beats == 1:
            raise KeyError("a bug of ours")
        told.set()
        return {"tasks": [], "traffic": {"sessions": 0}}

    async def check() -> None:
        async with a_host(tmp_path / "host") as host:
            registration = a_registration(tmp_path, host.url, heartbeat, _remove)
            running = asyncio.ensure_future(registration.run())
            await asyncio.wait_for(told.wait(), 20)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await registration.close()

    (tmp_path / "host").mkdir()
    run(check())
    assert "a heartbeat could not be made" in capsys.readouterr().out


def test_heartbeats_go_on_while_a_removed_task_takes_its_time_to_end(run: Run, tmp_path: Path) -> None:
    beats = 0
    removing: list[int] = []

    def heartbeat() -> dict[str, Any]:
        nonlocal beats
        beats += 1
        return {"tasks": [{"task_id": 7, "status": "running", "tunnel": False, "revision": 1}], "traffic": {}}

    async def never_ends(task_id: int) -> None:
        removing.append(task_id)
        await asyncio.Event().wait()

    async def check() -> None:
        async with a_host(tmp_path / "host") as host:
            registration = a_registration(tmp_path, host.url, heartbeat, never_ends)
            running = asyncio.ensure_future(registration.run())
            await until(lambda: beats > 0)
            moments = {"created_at": 1.0, "changed_at": 1.0}
            gone = {"task_id": 7, "name": None, "container": "c7", "backend": "process", "removed": True}
            await host.store.add_task(Task(**gone, node="n1", owner="admin", status="running", **moments))
            while not removing:
                registration.changed()
                await asyncio.sleep(0)
            for _ in range(3):
                before = beats
                registration.changed()
                await until(lambda: beats > before)  # noqa: B023  # it is waited for here
            assert removing == [7]
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await registration.close()

    (tmp_path / "host").mkdir()
    run(check())
