"""What is started beside process tasks: when it counts as started, and that it ends with them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.errors import UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.runner.backends.base import ExecRequest
from kohakuriver.runner.backends.process import exec as process_exec
from kohakuriver.runner.backends.process import reaper
from kohakuriver.runner.backends.process.account import Account
from kohakuriver.runner.backends.process.tasks import ProcessBackend
from kohakuriver.runner.services.doors import Doors
from kohakuriver.runner.services.ssh_helper import SshHelper
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.runner.services.tunnel_helper import TunnelHelper

Run = Callable[[Coroutine[Any, Any, None]], None]

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ"
FOR_LONG = ["sh", "-c", "trap '' HUP; echo here; sleep 1000"]


def _nobody_listens(sock: socket.socket, container: str) -> Callable[[], None]:
    sock.close()
    return lambda: None


class OneTask:
    """A task of a real backend, which ends once `end` is called; `over` is set when that has been reported."""

    def __init__(self, directory: Path, **more: Any) -> None:
        state = State(directory)
        self.backend = ProcessBackend(
            state,
            TunnelHelper(state),
            SshHelper(state),
            self._report,
            Doors(state, _nobody_listens),
            lambda: "http://127.0.0.1:1",
            Limits(),
            Account(),
        )
        self._ends = directory / "ends"
        command = ["sh", "-c", f"until [ -e {self._ends} ]; do sleep 0.02; done"]
        self.task = TaskRecord(
            task_id=1, container="kohakuriver-proc-1", backend="process", name="web", command=command, **more
        )
        self.over = asyncio.Event()

    def _report(self, container: str, status: str, message: str | None = None, exit_code: int | None = None) -> None:
        if status != "running":
            self.over.set()

    async def end(self) -> None:
        self._ends.touch()
        await self.over.wait()

    def left(self, run: str) -> list[int]:
        """The processes of one start that still run."""
        return reaper.members(-2, run)


def name_of(pid: int) -> str:
    """Of a process that runs; empty where it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@asynccontextmanager
async def one_task(directory: Path, **more: Any) -> AsyncIterator[OneTask]:
    one = OneTask(directory, **more)
    await one.backend.open([], lambda task: None)
    try:
        yield one
    finally:
        await one.backend.close([one.task], stop_tasks=True)


@pytest.mark.parametrize("tty", [True, False])
def test_a_command_counts_as_started_once_it_runs_itself_and_inherits_nothing_of_that(
    run: Run, tmp_path: Path, tty: bool
) -> None:
    async def main() -> None:
        async with one_task(tmp_path) as one:
            await one.backend.start(one.task)
            session = await one.backend.exec(one.task, ExecRequest(command=["yes"], tty=tty))
            mark = one.backend._running[one.task.container].run
            names = {name: pid for pid in one.left(mark) if (name := name_of(pid))}
            assert "yes" in names  # a start that is still Python's would hold no place of its user's
            ours = {str(link.readlink()) for link in Path("/proc/self/fd").glob("*") if link.is_symlink()}
            inherited = {
                str(link.readlink()) for link in Path(f"/proc/{names['yes']}/fd").iterdir() if int(link.name) > 2
            }
            assert inherited <= ours  # by this process itself, which is not started as a runner is
            await session.close()
            await one.end()

    run(main())


def test_a_command_that_is_not_there_takes_no_place_from_the_next(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with one_task(tmp_path) as one:
            await one.backend.start(one.task)
            for _ in range(2):
                session = await one.backend.exec(one.task, ExecRequest(command=["no-such-program"]))
                await session.close()
            await one.end()

    run(main())


def test_a_command_that_is_started_in_a_task_which_ends_meanwhile_is_refused_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with one_task(tmp_path) as one:
            start = process_exec.start

            async def slowly(*arguments: Any) -> process_exec.ProcessExec:
                await one.end()
                return await start(*arguments)

            monkeypatch.setattr(process_exec, "start", slowly)
            await one.backend.start(one.task)
            mark = one.backend._running[one.task.container].run
            with pytest.raises(UnavailableError) as refused:
                await one.backend.exec(one.task, ExecRequest(command=FOR_LONG))
            assert refused.value.code == "task_not_running"
            assert one.left(mark) == []

    run(main())


def test_the_ssh_server_of_a_task_that_ends_while_it_is_started_ends_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with one_task(tmp_path, ssh_keys=[KEY]) as one:
            spawn = one.backend._spawn
            marks: list[str] = []

            async def slowly(task: TaskRecord, command: list[str], *more: Any) -> asyncio.subprocess.Process:
                if marks:
                    await one.end()
                marks.append(more[-1][reaper.MARK])
                return await spawn(task, command, *more)

            monkeypatch.setattr(one.backend, "_spawn", slowly)
            await one.backend.start(one.task)
            assert len(marks) == 2
            assert one.left(marks[0]) == []

    run(main())
