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
from tests.support.host_only import a_host

Run = Callable[[Coroutine[Any, Any, None]], None]


async def _remove(task_id: int) -> None:
    raise AssertionError(f"nobody removes task {task_id} here")


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
            token = (tmp_path / "host/node-token").read_text().strip()
            identity = NodeIdentity("n1", "http://127.0.0.1:1", "one", host.url, token)
            registration = Registration(
                identity,
                State(tmp_path / "runner"),
                heartbeat=heartbeat,
                backends=lambda: {"process": None},
                remove=_remove,
            )
            running = asyncio.ensure_future(registration.run())
            await asyncio.wait_for(told.wait(), 20)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await registration.close()

    (tmp_path / "host").mkdir()
    run(check())
    assert "a heartbeat could not be made" in capsys.readouterr().out
