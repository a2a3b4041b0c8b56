"""Restart policies: what runs again, when, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.errors import UnavailableError
from kohakuriver.runner.services import restarts
from kohakuriver.runner.services.restarts import Restarts
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.runner.services.task_book import TaskBook

Run = Callable[[Coroutine[Any, Any, object]], object]


class Node:
    """A runner's book of tasks, with one task that runs; what is started again is in `starts`."""

    def __init__(self, directory: Path, policy: str | None, **more: Any) -> None:
        self.state = State(directory)
        self.task = TaskRecord(
            **{"task_id": 1, "container": "c1", "backend": "process", "status": "running", "restart": policy, **more}
        )
        self.errors: list[Exception] = []
        self.begin([self.task])
        self.restarts.open()

    def begin(self, tasks: list[TaskRecord]) -> None:
        """A runner is started, and knows these tasks."""
        self.starts: asyncio.Queue[str] = asyncio.Queue()
        self.book = TaskBook(self.state, lambda: None)
        self.restarts = Restarts(self.book, self._start)
        for task in tasks:
            self.task = task
            self.book.add(task)

    async def _start(self, task: TaskRecord) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.book.report(task.container, "running")
        self.starts.put_nowait(task.container)

    def end(self, code: int | None) -> None:
        self.book.report("c1", "failed" if code else "stopped", "it ended", code)

    async def started(self) -> str:
        return await asyncio.wait_for(self.starts.get(), 30)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.0)


@pytest.mark.parametrize(
    ("policy", "code", "again"),
    [
        (None, 1, False),
        ("no", 1, False),
        ("on-failure", 1, True),
        ("on-failure", 0, False),
        ("always", 0, True),
        ("unless-stopped", 0, True),
        ("unless-stopped", 1, True),
        ("always", None, False),  # its container was removed
    ],
)
def test_what_has_ended_runs_again_where_its_policy_says_so(
    run: Run, tmp_path: Path, policy: str | None, code: int | None, again: bool
) -> None:
    async def check() -> None:
        node = Node(tmp_path, policy)
        node.end(code)
        assert node.task.status == ("starting" if again else "failed" if code else "stopped")
        if again:
            assert node.task.message == "it ended; it runs again in 0 s"
            assert await node.started() == "c1"
            assert node.task.status == "running"

    run(check())


def test_a_task_that_fails_too_often_in_a_row_runs_no_more(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        node = Node(tmp_path, "on-failure:2")
        for _ in range(2):
            node.end(1)
            await node.started()
        node.end(1)
        assert (node.task.status, node.task.message, node.task.exit_code) == ("failed", "it ended", 1)
        node.restarts.take_up(node.task)  # its user has it run again
        node.book.report("c1", "running")
        node.end(1)
        assert node.task.status == "starting"

    run(check())


def test_a_start_that_fails_is_a_failure_but_not_where_the_engine_is_away(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        node = Node(tmp_path, "on-failure:1")
        node.errors = [UnavailableError("No engine.", code="no_engine") for _ in range(3)]
        node.end(1)
        await node.started()
        node.restarts.take_up(node.task)
        node.errors = [UnavailableError("No such thing.", code="whatever")]
        node.end(1)
        due = node.restarts._courses["c1"].due
        assert due is not None
        await asyncio.wait_for(due, 30)
        assert (node.task.status, node.task.message, node.starts.qsize()) == ("failed", "No such thing", 0)

    run(check())


def test_a_start_that_fails_as_nobody_foresaw_is_tried_again(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        node = Node(tmp_path, "always")
        node.errors = [OSError(28, "No space left on device")]
        node.end(1)
        assert await node.started() == "c1"
        assert node.task.status == "running"

    run(check())


def test_what_is_being_started_when_somebody_stops_it_or_its_runner_is_not_waited_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(end: Callable[[Node], Coroutine[Any, Any, object]]) -> None:
        node = Node(tmp_path, "always")
        begun = asyncio.Event()

        async def for_ever(task: TaskRecord) -> None:
            begun.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(node.restarts, "_start", for_ever)
        node.end(1)
        await asyncio.wait_for(begun.wait(), 30)
        starting = node.restarts._courses["c1"].starting
        await asyncio.wait_for(end(node), 30)
        assert starting is not None
        assert starting.cancelled()

    run(check(lambda node: node.restarts.interrupt(node.task)))
    run(check(lambda node: node.restarts.close()))


def test_what_somebody_stops_while_it_waits_stays_stopped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 1000.0)

    async def check() -> None:
        node = Node(tmp_path, "always")
        node.end(1)
        due = node.restarts._courses["c1"].due
        assert due is not None
        node.restarts.leave(node.task)
        node.book.report("c1", "stopped")
        await asyncio.wait({due})
        assert due.cancelled()
        assert (node.task.status, node.starts.qsize()) == ("stopped", 0)

    run(check())


@pytest.mark.parametrize(
    ("policy", "halted", "back"),
    [
        ("no", False, False),
        ("on-failure", False, True),
        ("unless-stopped", False, True),
        ("unless-stopped", True, False),
        ("always", False, True),
        ("always", True, False),
    ],
)
def test_what_ended_with_its_node_is_back_with_it(
    run: Run, tmp_path: Path, policy: str, halted: bool, back: bool
) -> None:
    async def check() -> None:
        node = Node(tmp_path, policy)
        if halted:
            node.restarts.leave(node.task)
            node.book.report("c1", "stopped")
        await node.restarts.close()
        node.book.report("c1", "stopped", "it ended with the runner")
        node.book.write_down()
        node.begin(node.state.load_tasks())
        node.restarts.open()
        assert node.task.status == ("starting" if back else "stopped")
        if back:
            assert await node.started() == "c1"

    run(check())


@pytest.mark.parametrize(("code", "back"), [(None, True), (1, True), (0, False)])
def test_what_ended_while_its_runner_was_away_runs_again_if_it_was_cut_off_or_failed(
    run: Run, tmp_path: Path, code: int | None, back: bool
) -> None:
    async def check() -> None:
        node = Node(tmp_path, "on-failure")
        node.begin([node.task])
        node.end(code)  # the runner's first look
        node.restarts.open()
        assert (node.task.status == "starting") == back

    run(check())
