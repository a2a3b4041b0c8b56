"""Tasks from Python, as a script and a notebook make, watch and end them."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

import kohakuriver
from tests.support.up import Cluster

Run = Callable[[Coroutine[Any, Any, Any]], Any]
STAY = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(autouse=True)
def settings(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KOHAKURIVER_HOST", raising=False)
    monkeypatch.delenv("KOHAKURIVER_TOKEN", raising=False)
    monkeypatch.setenv("KOHAKURIVER_CONFIG_DIR", str(cluster.directory))


def test_a_task_is_made_followed_stopped_and_removed(run: Run) -> None:
    async def main() -> None:
        task = await kohakuriver.create(command=STAY, backend="process", name="py")
        assert task.status == "running"
        assert task.name == "py"
        assert task.id in [each.id for each in await kohakuriver.tasks()]
        text = ""
        async for line in task.logs(follow=True):
            text += line.text
            if text == "up\n":
                assert (await kohakuriver.stop("py")).status == "stopped"
        assert text == "up\n"
        await task.refresh()
        assert repr(task).startswith(f"<task py ({task.id}) on {task.node}, stopped")
        await task.restart()
        assert (await task.wait()).status == "running"
        await task.remove()
        with pytest.raises(kohakuriver.NotFoundError):
            await task.refresh()

    run(main())


def test_run_waits_for_the_end_and_tells_the_exit_code_and_the_output(run: Run) -> None:
    async def main() -> None:
        task = await kohakuriver.run(command=[sys.executable, "-c", "print('no'); exit(3)"], backend="process")
        assert task.exit_code == 3
        assert task.status == "failed"
        assert "".join([line.text async for line in kohakuriver.logs(task.id, tail=1)]) == "no\n"
        with pytest.raises(TimeoutError):
            await kohakuriver.run(command=STAY, backend="process", name="long", timeout=0.2)
        await (await kohakuriver.status("long")).remove()

    run(main())


def test_the_sync_twins_work_without_a_loop_and_beside_one_and_leave_no_thread(run: Run) -> None:
    def script() -> None:
        threads = threading.active_count()
        task = kohakuriver.create_sync(command=STAY, backend="process", name="sync")
        assert kohakuriver.status_sync("sync").status == "running"
        assert "sync" in [each.name for each in kohakuriver.tasks_sync()]
        lines = task.logs(follow=True)
        assert next(lines).text.startswith("up")
        lines.close()  # type: ignore[attr-defined]
        assert kohakuriver.stop_sync("sync").status == "stopped"
        assert "".join(line.text for line in kohakuriver.logs_sync("sync")) == "up\n"
        task.remove()
        assert threading.active_count() == threads

    async def beside_a_loop() -> None:
        script()

    script()
    run(beside_a_loop())


LISTEN = "import socket, sys, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); "


def test_the_ports_that_listen_in_a_task_are_told(run: Run) -> None:
    async def main() -> None:
        command = [sys.executable, "-c", f"{LISTEN}time.sleep(1000)"]
        task = await kohakuriver.create(command=command, backend="process", name="listens")
        lines = kohakuriver.logs("listens", follow=True)
        port = int((await anext(lines)).text)
        await lines.aclose()  # type: ignore[attr-defined]
        (found,) = await kohakuriver.ports("listens")
        assert (found.port, found.proto, found.address) == (port, "tcp", "127.0.0.1")
        assert await task.ports() == [found]
        await task.remove()
        with pytest.raises(kohakuriver.NotFoundError):
            await task.ports()

    run(main())
    task = kohakuriver.create_sync(command=STAY, backend="process", name="quiet")
    assert task.ports() == kohakuriver.ports_sync("quiet") == []
    task.remove()


def test_what_goes_wrong_is_an_error_of_ours(run: Run) -> None:
    with pytest.raises(kohakuriver.NotFoundError):
        kohakuriver.status_sync("nobody")
    with pytest.raises(kohakuriver.NotFoundError):
        next(kohakuriver.logs_sync("nobody"))
    with pytest.raises(kohakuriver.UsageError, match="container image"):
        kohakuriver.create_sync(command=STAY)
    with pytest.raises(kohakuriver.UsageError, match="list of words"):
        kohakuriver.run_sync(command="echo hi", backend="process")
    with pytest.raises(kohakuriver.HostUnreachableError):
        kohakuriver.tasks_sync(host="http://127.0.0.1:9")


def test_each_function_and_its_twin_are_listed_and_have_the_same_parameters() -> None:
    for name in ("create", "run", "status", "stop", "logs", "ports", "tasks"):
        made, twin = getattr(kohakuriver, name), getattr(kohakuriver, f"{name}_sync")
        assert {name, f"{name}_sync"} <= set(dir(kohakuriver))
        assert list(inspect.signature(made).parameters) == list(inspect.signature(twin).parameters)
        assert (inspect.getdoc(made) or "none") in (inspect.getdoc(twin) or "")
