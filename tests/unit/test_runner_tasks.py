"""The runner's tasks, with a backend that does as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import structlog

from kohakuriver.errors import KohakuRiverError, NotAllowedError, NotFoundError, UnavailableError
from kohakuriver.runner.backends.base import Backend, ExecRequest, ExecSession, Surroundings
from kohakuriver.runner.backends.printed import LogRequest, Printed
from kohakuriver.runner.services import task_book, tasks
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.runner.services.task_book import TaskBook
from kohakuriver.runner.services.tasks import TaskManager
from kohakuriver.runner.services.tunnel_guard import TunnelGuard
from kohakuriver.runner.services.tunnel_helper import new_token
from kohakuriver.tunnel.accept import Peer
from tests.support.hops import until

Run = Callable[[Coroutine[Any, Any, None]], None]


class Obedient(Backend):
    """Starts whatever it is told to, unless `failure` is set; `gate` holds it up."""

    name = "process"

    def __init__(self, manager: TaskManager) -> None:
        self.manager = manager
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.did: list[str] = []
        self.running: set[str] = set()

    @classmethod
    def made(cls, around: Surroundings) -> Obedient:
        raise AssertionError("a test makes it itself")

    async def open(self, tasks: list[TaskRecord], found: Callable[[TaskRecord], None]) -> None:
        self.did.append(f"open {len(tasks)}")

    async def start(self, task: TaskRecord) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.did.append("start")
        self.running.add(task.container)
        self.manager.book.report(task.container, "running")

    async def adopt(self, task: TaskRecord) -> TaskRecord:
        await self.start(task)
        return task

    async def stop(self, task: TaskRecord) -> None:
        self.did.append("stop")
        self.running.discard(task.container)

    async def start_again(self, task: TaskRecord) -> None:
        assert task.container not in self.running, "started twice"
        await self.start(task)

    async def remove(self, task: TaskRecord) -> None:
        self.did.append("remove")
        self.running.discard(task.container)

    async def discard(self, task: TaskRecord) -> None:
        self.did.append("discard")

    async def give_token(self, task: TaskRecord) -> None:
        self.did.append("give_token")

    async def logs(self, task: TaskRecord, request: LogRequest) -> Printed:
        raise AssertionError

    async def exec(self, task: TaskRecord, request: ExecRequest) -> ExecSession:
        raise UnavailableError(f"There is nothing to run in {task.name}.")

    async def close(self, tasks: list[TaskRecord], *, stop_tasks: bool) -> None:
        self.did.append("close")


class Bench:
    """A manager with its backend, and what others would hear of it."""

    def __init__(self, directory: Path) -> None:
        self._change = asyncio.Event()
        self.dropped: list[tuple[str, str, bool]] = []
        self.state = State(directory)
        self.manager = TaskManager(TaskBook(self.state, self._changed))
        self.manager.book.drop = self._drop
        self.backend = Obedient(self.manager)

    def _changed(self) -> None:
        self._change.set()

    async def until(self, seen: Callable[[], bool]) -> None:
        """Wait for changes, until one makes `seen` true."""
        while not seen():
            self._change.clear()
            await self._change.wait()

    def _drop(self, container: str, reason: str, *, gone: bool = False) -> None:
        self.dropped.append((container, reason, gone))

    async def open(self) -> TaskManager:
        await self.manager.open({"process": self.backend})
        return self.manager


def a_task(number: int = 1, **more: Any) -> TaskRecord:
    return TaskRecord(task_id=number, container=f"c{number}", backend="process", name=f"web{number}", **more)


def test_the_same_start_asked_for_twice_is_one_start(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        first = await manager.create(a_task())
        assert await manager.create(a_task()) is first
        assert bench.backend.did == ["open 0", "start"]

    run(check())


def test_a_start_that_fails_leaves_nothing(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        bench.backend.failure = NotFoundError("No such image.")
        with pytest.raises(NotFoundError, match="No such image"):
            await manager.create(a_task())
        assert manager.book.all() == []
        assert bench.backend.did == ["open 0", "discard"]

    run(check())


def test_an_unexpected_failure_of_a_start_is_a_sentence_too(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        bench.backend.failure = ZeroDivisionError()
        with pytest.raises(KohakuRiverError, match="log says why"):
            await manager.create(a_task())
        assert manager.book.all() == []

    run(check())


def test_a_start_that_takes_long_goes_on_in_the_background(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "START_SECONDS", 0.01)

    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        bench.backend.gate.clear()
        task = await manager.create(a_task())
        assert task.status == "starting"
        bench.backend.gate.set()
        await bench.until(lambda: task.status != "starting")
        assert task.status == "running"

    run(check())


def test_a_long_start_that_fails_in_the_end_says_why(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "START_SECONDS", 0.01)

    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        bench.backend.gate.clear()
        task = await manager.create(a_task())
        bench.backend.failure = KohakuRiverError("The pull broke.")
        bench.backend.gate.set()
        await bench.until(lambda: task.status != "starting")
        assert (task.status, task.message) == ("failed", "The pull broke")

    run(check())


def test_a_task_that_is_still_starting_can_be_removed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "START_SECONDS", 0.01)

    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        bench.backend.gate.clear()
        await manager.create(a_task())
        await manager.remove("c1")
        assert manager.book.all() == []
        assert "start" not in bench.backend.did

    run(check())


def test_a_task_that_fails_while_its_stop_waits_has_failed(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        task = await manager.create(a_task())
        async with manager._locks[task.container]:
            stopping = asyncio.ensure_future(manager.stop(task.container))
            await asyncio.sleep(0)
            manager.book.report(task.container, "failed", "oh no", 3)
        await stopping
        assert (task.status, task.message, task.exit_code) == ("failed", "oh no", 3)

    run(check())


def test_streams_end_with_the_reason_as_soon_as_a_task_does(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        task = await manager.create(a_task())
        manager.book.tunnel_changed("c1", True)
        manager.book.report("c1", "failed", "it ended with exit code 3")
        assert bench.dropped == [("c1", "task web1 failed: it ended with exit code 3", False)]
        assert not task.tunnel
        manager.book.report("c1", "failed", "it ended with exit code 3")
        assert len(bench.dropped) == 1
        await manager.remove("c1")
        assert bench.dropped[-1] == ("c1", "task web1 was removed", True)

    run(check())


def test_a_tasks_last_words_are_text_that_every_database_and_terminal_takes(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        manager = await Bench(tmp_path).open()
        task = await manager.create(a_task())
        for _ in range(2):
            manager.book.report("c1", "failed", "it ended with exit code 3: \0\x1b[2Jbye")
            assert task.message == "it ended with exit code 3: \\x00\\x1b[2Jbye"
        revision = task.revision
        manager.book.report("c1", "failed", "it ended with exit code 3: \0\x1b[2Jbye")
        assert task.revision == revision
        manager.book.report("c1", "failed", "\0" * 10_000)
        assert len(task.message or "") == task_book.LONGEST_MESSAGE

    run(check())


def test_the_old_tunnel_never_passes_for_the_new_one_after_a_restart(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        task = await manager.create(a_task())
        manager.book.tunnel_changed("c1", True)
        bench.manager.book.drop = lambda container, reason, gone=False: manager.book.tunnel_changed(container, False)
        await manager.restart("c1")
        assert bench.backend.did == ["open 0", "start", "stop", "start"]
        assert (task.status, task.tunnel) == ("running", False)

    run(check())


def test_every_change_has_a_greater_revision_also_after_a_restart(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        task = await manager.create(a_task())
        seen = [task.revision]
        manager.book.tunnel_changed("c1", True)
        seen.append(task.revision)
        await manager.stop("c1")
        seen.append(task.revision)
        await manager.close(stop_tasks=False)
        again = Bench(tmp_path)
        manager = await again.open()
        manager.book.report("c1", "running")
        seen.append(manager.book.get("c1").revision)
        assert seen == sorted(set(seen))

    run(check())


def test_tasks_are_known_after_a_restart_and_their_tunnels_are_not(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        await manager.create(a_task(command=["serve"], env={"A": "b"}))
        manager.book.tunnel_changed("c1", True)
        await manager.close(stop_tasks=False)
        again = Bench(tmp_path)
        manager = await again.open()
        task = manager.book.get("c1")
        assert (task.command, task.env, task.status, task.tunnel) == (["serve"], {"A": "b"}, "running", False)
        assert again.backend.did == ["open 1"]

    run(check())


def test_a_runner_that_is_ending_takes_no_new_task(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        manager = await Bench(tmp_path).open()
        await manager.close(stop_tasks=False)
        with pytest.raises(UnavailableError) as caught:
            await manager.create(a_task())
        assert caught.value.code == "node_offline"

    run(check())


class Guarded:
    """A manager with two tasks that run, the guard of their tunnels, and what it told; peers are where `here` says."""

    def __init__(self, bench: Bench, *, backend: str = "process") -> None:
        self.here = True
        self.told: list[tuple[str, str, str]] = []
        self.book = bench.manager.book
        self.guard = TunnelGuard(self.book, self._comes_from, lambda *told: self.told.append(told))
        for number in (1, 2):
            self.book.add(TaskRecord(task_id=number, container=f"c{number}", backend=backend, status="running"))
            new_token(self.book.get(f"c{number}"))

    async def _comes_from(self, task: TaskRecord, peer: Peer) -> bool:
        return self.here

    def token(self, container: str = "c1") -> str:
        return self.book.get(container).tunnel_token

    async def lets_in(self, token: str, client: str = "one", container: str = "c1") -> bool:
        try:
            return bool(await self.guard.check(container, token, client, Peer("192.0.2.9")))
        except NotAllowedError:
            return False


def test_a_tunnel_token_is_good_for_its_own_container_and_while_there_is_such_a_task(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        await bench.open()
        here = Guarded(bench)
        token = here.token()
        assert await here.lets_in(token)
        for wrong in (here.token("c2"), "", "ü", token[:-1]):
            assert not await here.lets_in(wrong)
        assert not here.told  # who has no good token is nobody's trouble
        await bench.manager.remove("c1")
        assert not await here.lets_in(token)
        assert not await here.lets_in("", container="c3")

    run(check())


def test_a_tunnel_token_belongs_to_the_client_that_showed_it_first_and_the_owner_hears_of_another(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        await bench.open()
        here = Guarded(bench)
        token = here.token()
        assert await here.lets_in(token, "one")
        assert await here.lets_in(token, "one")  # whose link broke
        assert not await here.lets_in(token, "two")
        assert not await here.lets_in(token, "")
        (container, sentence, address) = here.told[0]
        assert (container, address) == ("c1", "192.0.2.9")
        assert sentence.startswith("a second tunnel client came from 192.0.2.9 with its token, and was refused")
        bench.manager.book.write_down()
        later = Bench(tmp_path)
        await later.open()
        again = TunnelGuard(later.manager.book, here._comes_from, lambda *_: None)
        assert await again.check("c1", token, "one", Peer("?"))  # a runner that was started again knows it
        with pytest.raises(NotAllowedError):
            await again.check("c1", token, "two", Peer("?"))

    run(check())


def test_a_tunnel_token_is_worth_nothing_where_its_task_does_not_run_and_the_owner_hears_of_it(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        await bench.open()
        here = Guarded(bench)
        here.here = False
        assert not await here.lets_in(here.token())
        assert "from 192.0.2.9, where it does not run" in here.told[0][1]
        here.here = True
        assert await here.lets_in(here.token())  # the thief did not use it up

    run(check())


def test_a_machines_token_outlives_the_client_that_showed_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        await bench.open()
        here = Guarded(bench, backend="address")
        assert await here.lets_in(here.token(), "before its machine was started again")
        assert await here.lets_in(here.token(), "after")

    run(check())


def test_a_renewed_token_makes_the_old_one_worthless_and_is_laid_down_for_the_client(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        here = Guarded(bench)
        before = here.token()
        assert await here.lets_in(before)
        await manager.renew_token("c1")
        assert bench.backend.did[-1] == "give_token"
        assert not await here.lets_in(before)
        assert await here.lets_in(here.token(), "two")
        assert json.loads((tmp_path / "tasks.json").read_text())[0]["tunnel_token"] == here.token()

    run(check())


def test_the_state_directory_is_for_its_owner_alone(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path / "state")
        manager = await bench.open()
        await manager.create(a_task(env={"PASSWORD": "secret"}))
        await manager.close(stop_tasks=False)
        bench.state.ticket_key = b"key"
        assert (tmp_path / "state").stat().st_mode & 0o077 == 0
        for name in ("tasks.json", "ticket-key"):
            assert (tmp_path / "state" / name).stat().st_mode & 0o077 == 0

    run(check())


def test_a_command_runs_only_in_a_task_that_is_there_and_runs(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        bench = Bench(tmp_path)
        manager = await bench.open()
        with pytest.raises(NotFoundError):
            await manager.exec(1, ExecRequest())
        await manager.create(a_task())
        with pytest.raises(UnavailableError, match="nothing to run in web1"):  # as the backend says
            await manager.exec(1, ExecRequest())
        await manager.stop("c1")
        with pytest.raises(UnavailableError, match="vps restart web1"):
            await manager.exec(1, ExecRequest())

    run(check())


def test_a_full_disk_is_said_once_leaves_no_file_behind_and_is_tried_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    monkeypatch.setattr(task_book, "SAVE_AGAIN_SECONDS", 0.01)
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True)

    async def check() -> None:
        bench = Bench(disk)
        await bench.manager.open({"process": bench.backend})
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        before = sorted(path.name for path in disk.iterdir())
        with structlog.testing.capture_logs() as logs:
            await bench.manager.create(TaskRecord(task_id=1, container="c1", backend="process"))
            await asyncio.sleep(0)
            await until(lambda: any("can't be written down" in line["event"] for line in logs))
            assert sorted(path.name for path in disk.iterdir()) == before
            filler.unlink()
            await until(lambda: any("written down again" in line["event"] for line in logs))
        assert sum("can't be written down" in line["event"] for line in logs) == 1
        assert [task.container for task in State(disk).load_tasks()] == ["c1"]

    try:
        run(check())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_relative_state_directory_is_one_that_engines_and_tasks_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert State(Path("state")).directory == tmp_path / "state"
