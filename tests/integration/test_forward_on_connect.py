"""`kohakuriver forward --on-connect CMD`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.apart import service
from tests.support.network.wall import wall
from tests.support.processes import eventually
from tests.support.up import Apart, Service, connect, echoes

__all__ = ["service"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    cluster = Apart(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.run("forward", "--stop", "--all")
    cluster.close()


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Path]:
    """Where a command tells, and waits until the test has read it."""
    path = tmp_path / "told"
    os.mkfifo(path)
    yield path
    with contextlib.suppress(OSError):  # nobody is to wait on
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


def _gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_is_run_with_the_task_and_the_local_ports_when_the_forward_is_connected(
    cluster: Apart, service: Service, told: Path
) -> None:
    say = f"echo $KOHAKURIVER_TASK $KOHAKURIVER_PORT_{service.port} $KOHAKURIVER_PORT_{service.port}_TCP >{told}"
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json", "--on-connect", say)
    task, port, tcp = told.read_text().split()
    assert task == service.task
    assert int(port) == int(tcp) == forward.listening()
    with connect(int(port)) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_it_is_run_again_after_each_reconnect_and_the_one_before_is_ended(
    cluster: Apart, service: Service, told: Path
) -> None:
    with wall(int(cluster.url.rpartition(":")[2])) as before_host:
        at = f"--host=http://127.0.0.1:{before_host.port}"
        forward = cluster.start(
            "forward",
            service.task,
            f"0:{service.port}",
            "--json",
            at,
            "--on-connect",
            f"echo $$ >{told}; exec sleep 600",
        )
        first = int(told.read_text())
        assert not _gone(first)
        before_host.cut()
        before_host.open()
        second = int(told.read_text())
        assert second != first
        assert _gone(first)
        assert not _gone(second)
        assert forward.stop() == 0
        assert _gone(second)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_that_it_started_ends_with_the_forward_even_what_ignores_to_be_told(
    cluster: Apart, service: Service, told: Path, number: signal.Signals
) -> None:
    command = f"trap '' TERM INT; sleep 600 & echo $$ $! >{told}; wait"
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--on-connect", command)
    pids = [int(word) for word in told.read_text().split()]
    assert forward.stop(number) == 0
    eventually(lambda: all(map(_gone, pids)))


def test_what_the_shell_started_has_time_to_clean_up_though_the_shell_itself_has_ended(
    cluster: Apart, service: Service, told: Path, tmp_path: Path
) -> None:
    cleaned = tmp_path / "cleaned"
    inner = f"trap 'sleep 0.3; touch {cleaned}; exit' TERM; echo ready >{told}; while :; do sleep 0.05; done"
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--on-connect", f'sh -c "{inner}"; true')
    assert told.read_text() == "ready\n"
    assert forward.stop() == 0
    assert cleaned.exists()


def test_its_failure_is_told_and_ends_nothing(cluster: Apart, service: Service) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--on-connect", "exit 3")
    port = int(forward.line("Forwarding").split()[1].rpartition(":")[2])
    assert "The command of --on-connect ended with 3: exit 3" in forward.line("--on-connect", err=True)
    with connect(port) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_what_it_prints_is_not_mixed_with_json(cluster: Apart, service: Service) -> None:
    command = "echo printed; kill -9 $$"
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json", "--on-connect", command)
    failed = forward.event("on_connect_failed")
    assert (failed["code"], failed["message"]) == (-9, f"The command of --on-connect was ended by SIGKILL: {command}")
    assert forward.line("printed", err=True) == "printed"
    assert forward.stop() == 0
    assert all(json.loads(line) for line in forward.rest())


def test_beside_a_forward_in_the_background_it_holds_no_pipe_and_its_failure_is_in_the_log(
    cluster: Apart, service: Service, told: Path
) -> None:
    command = f"echo $$ >{told}; sleep 600"
    done = cluster.run("forward", service.task, f"0:{service.port}", "-d", "--json", "--on-connect", command)
    pid = int(told.read_text())
    detached = json.loads(done.stdout.splitlines()[-1])
    os.kill(pid, signal.SIGKILL)
    log = Path(detached["log"])
    eventually(lambda: "The command of --on-connect was ended by SIGKILL" in log.read_text())
    cluster.succeed("forward", "--stop", detached["id"])
