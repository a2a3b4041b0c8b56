"""Tasks that are processes on the node: real host, real runner, real tunnel client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kohakuriver.runner.backends.process import reaper as guard
from tests.support.processes import Cluster, a_cluster, ask, eventually
from tests.support.services import echo, port_in

NO_SESSION = 2**22 + 1
"""Above every process id that Linux gives."""

FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
child = subprocess.Popen(sleep)
daemon = subprocess.Popen(sleep, start_new_session=True)
sys.stdout.write(f"family {os.getpid()} {child.pid} {daemon.pid}\\n")
sys.stdout.flush()
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for the tests that leave host and runner as they are."""
    with a_cluster(tmp_path_factory.mktemp("shared")) as cluster:
        cluster.start_runner("n1", "--backend", "process", env={"KOHAKURIVER_SECRET": "of-the-runner-alone"})
        yield cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster for one test."""
    with a_cluster(tmp_path) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        yield cluster


def echo_port(cluster: Cluster, task: dict[str, Any]) -> int:
    return eventually(lambda: port_in(cluster.log_of(task)))


def second_port(cluster: Cluster, task: dict[str, Any]) -> int:
    """The port of an echo service that was started twice; it may be the same one."""
    log = eventually(lambda: text if (text := cluster.log_of(task)).count("port ") == 2 else None)
    port = port_in(log)
    assert port is not None
    return port


def family(cluster: Cluster, task: dict[str, Any]) -> list[psutil.Process]:
    """The processes of a task that runs FAMILY."""

    def look() -> list[psutil.Process] | None:
        lines = [line.split() for line in cluster.log_of(task).splitlines() if line.startswith("family ")]
        return [psutil.Process(int(pid)) for pid in lines[-1][1:]] if lines else None

    return eventually(look)


def all_gone(processes: list[psutil.Process]) -> bool:
    return all(is_gone(process) for process in processes)


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it went between the two looks
        return True


def test_a_forward_reaches_what_the_command_serves(shared: Cluster) -> None:
    task = shared.create(*echo(), name="web")
    assert shared.connected("web")["status"] == "running"
    with shared.forward("web", echo_port(shared, task)) as forward:
        assert ask(forward.local_port, b"hello") == b"hello"


def test_the_command_gets_its_own_environment_and_none_of_the_runners_secrets(shared: Cluster) -> None:
    shows = "import os, sys; sys.stdout.write(''.join(f'{k} {v}\\n' for k, v in os.environ.items()) + 'all\\n')"
    task = shared.create(sys.executable, "-c", shows, env={"GREETING": "hello there"})
    # The tunnel client may have a line of its own behind it.
    log = eventually(lambda: text if "all\n" in (text := shared.log_of(task)).splitlines(keepends=True) else None)
    assert "GREETING hello there\n" in log
    assert f"KOHAKURIVER_CONTAINER_ID {task['container']}\n" in log
    assert "of-the-runner-alone" not in log
    assert shared.token not in log


def test_where_users_may_run_processes_it_is_said_to_whoever_lets_one_in(tmp_path: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        env = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}

        def said(*words: str) -> str:
            command = [sys.executable, "-m", "kohakuriver", *words]
            return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr

        cluster.start_runner("n1", "--backend", "process")
        assert "processes" not in said("user", "add", "ann")
        cluster.runners["n1"].end()
        cluster.start_runner("n1", "--backend", "process", "--user-processes")
        assert "EVERY USER OF THIS CLUSTER IS " in cluster.runners["n1"].log.read_text()
        for words in (("user", "add", "bob"), ("token", "create", "--user", "ann")):
            assert "users may run processes on n1 (--user-processes)" in said(*words)
        assert "processes" not in said("user", "add", "eve", "--role", "admin")


def test_a_task_that_prints_without_end_fills_no_disk_and_its_last_words_are_kept(tmp_path: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.start_runner("n1", "--backend", "process", env={"KOHAKURIVER_TASK_LOG": str(1 << 20)})
        flood = "head -c 8000000 /dev/zero | tr '\\0' x | fold; echo; echo out of paper >&2; exit 3"
        task = cluster.create("sh", "-c", flood, name="flood", backend="process")
        assert cluster.ended("flood")["message"] == "it ended with exit code 3: out of paper"
        kept = list((cluster.state_of("n1") / "tasks" / task["container"]).glob("log*"))
        assert 0 < sum(file.stat().st_size for file in kept) <= 1 << 20


def test_a_command_that_fails_leaves_its_exit_code_and_its_last_words(shared: Cluster) -> None:
    shared.create(sys.executable, "-c", "import sys; sys.exit('no more cheese')", name="shop")
    task = shared.ended("shop")
    assert task["status"] == "failed"
    assert "exit code 1" in task["message"]
    assert task["exit_code"] == 1
    assert "no more cheese" in task["message"]
    status, answer = shared.call("GET", "/api/tasks/shop/wait")
    assert (status, answer["error"]) == (409, "task_not_running")
    assert "no more cheese" in answer["message"]


def test_a_command_that_ends_well_is_stopped(shared: Cluster) -> None:
    shared.create("true", name="short")
    task = shared.ended("short")
    assert (task["status"], task["tunnel"], task["exit_code"]) == ("stopped", False, 0)
    assert "exit code 0" in task["message"]


def test_a_command_that_does_not_exist_is_named(shared: Cluster) -> None:
    shared.create("no-such-program", name="typo")
    task = shared.ended("typo")
    assert task["status"] == "failed"
    assert "no-such-program" in task["message"]


def test_a_command_killed_by_a_signal_says_which(shared: Cluster) -> None:
    shared.create(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)", name="victim")
    victim = shared.ended("victim")
    assert victim["exit_code"] == 128 + signal.SIGKILL
    assert f"SIGKILL (exit code {128 + signal.SIGKILL})" in victim["message"]


def test_a_task_without_a_command_stays_up(shared: Cluster) -> None:
    shared.create(name="idle")
    assert shared.connected("idle")["status"] == "running"


def test_stop_ends_the_whole_family_also_those_who_left_home(shared: Cluster) -> None:
    task = shared.create(sys.executable, "-c", FAMILY, name="clan")
    processes = family(shared, task)
    status, stopped = shared.call("POST", "/api/tasks/clan/stop")
    assert (status, stopped["status"], stopped["message"]) == (200, "stopped", None)
    assert all_gone(processes)
    assert shared.call("POST", "/api/tasks/clan/stop")[0] == 200


def test_what_a_command_leaves_behind_ends_with_it(shared: Cluster, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    os.mkfifo(go_on)
    ends_when_told = FAMILY.rpartition("time.sleep")[0] + f"open({str(go_on)!r}).read()"
    task = shared.create(sys.executable, "-c", ends_when_told, name="left")
    processes = family(shared, task)
    go_on.write_text("now")
    assert shared.ended("left")["status"] == "stopped"
    assert all_gone(processes)


def test_a_task_can_be_reached_again_after_a_restart(shared: Cluster) -> None:
    task = shared.create(*echo(), name="web0")
    echo_port(shared, task)
    status, restarted = shared.call("POST", "/api/tasks/web0/restart")
    assert (status, restarted["status"]) == (200, "running")
    shared.connected("web0")
    fresh = second_port(shared, task)
    with shared.forward("web0", fresh) as forward:
        assert ask(forward.local_port, b"after") == b"after"


def test_a_removed_task_leaves_no_process_and_no_file(shared: Cluster) -> None:
    task = shared.create(sys.executable, "-c", FAMILY, name="clan1")
    processes = family(shared, task)
    directory = shared.state_of("n1") / "tasks" / task["container"]
    assert directory.exists()
    assert shared.call("DELETE", "/api/tasks/clan1")[0] == 200
    assert all_gone(processes)
    assert not directory.exists(), list(directory.rglob("*"))
    assert shared.call("GET", "/api/tasks/clan1")[0] == 404


def test_a_killed_runner_leaves_no_process_of_its_tasks(cluster: Cluster) -> None:
    tasks = [cluster.create(sys.executable, "-c", FAMILY, name=name) for name in ("one", "two")]
    processes = [process for task in tasks for process in family(cluster, task)]
    cluster.runners["n1"].end(signal.SIGKILL)
    eventually(lambda: all_gone(processes))


def test_a_runner_that_is_told_to_end_ends_its_tasks_and_says_goodbye(cluster: Cluster) -> None:
    task = cluster.create(sys.executable, "-c", FAMILY, name="clan")
    processes = family(cluster, task)
    assert cluster.runners["n1"].end() == 0
    assert all_gone(processes)
    node = cluster.node("n1")
    assert node is not None
    assert node["status"] == "offline"
    assert cluster.task("clan")["status"] == "stopped"


def test_a_runner_started_again_knows_its_tasks_and_starts_them_on_demand(cluster: Cluster) -> None:
    task = cluster.create(*echo(), name="web")
    echo_port(cluster, task)
    cluster.runners["n1"].end(signal.SIGKILL)
    cluster.start_runner("n1", "--backend", "process")
    stopped = cluster.ended("web")
    assert (stopped["task_id"], stopped["status"]) == (task["task_id"], "stopped")
    assert "runner" in stopped["message"]
    assert cluster.call("POST", "/api/tasks/web/restart")[0] == 200
    cluster.connected("web")
    fresh = second_port(cluster, task)
    with cluster.forward("web", fresh) as forward:
        assert ask(forward.local_port, b"again") == b"again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_host_started_again_finds_its_nodes_and_their_tasks(cluster: Cluster, number: signal.Signals) -> None:
    task = cluster.create(*echo(), name="web")
    cluster.connected("web")
    cluster.restart_host(number)
    assert cluster.connected("web")["task_id"] == task["task_id"]
    with cluster.forward("web", echo_port(cluster, task)) as forward:
        assert ask(forward.local_port, b"still there") == b"still there"


def test_a_host_that_lost_its_database_is_registered_with_again(cluster: Cluster) -> None:
    cluster.host.end()
    for file in cluster.host_state.glob("host.db*"):
        file.unlink()
    cluster.start_host(int(cluster.url.rpartition(":")[2]))
    eventually(lambda: (node := cluster.node("n1")) and node["status"] == "online")
    cluster.create(name="fresh")
    cluster.connected("fresh")


def test_a_task_removed_while_the_runner_is_away_ends_when_it_is_back(cluster: Cluster) -> None:
    task = cluster.create(name="web")
    cluster.runners["n1"].end()
    assert cluster.call("DELETE", "/api/tasks/web")[0] == 200
    assert (cluster.state_of("n1") / "tasks" / task["container"]).exists()
    cluster.start_runner("n1", "--backend", "process")
    eventually(lambda: not (cluster.state_of("n1") / "tasks" / task["container"]).exists())


def test_a_runner_with_a_wrong_node_token_is_not_taken_in_and_says_why(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("not-the-token")
    runner = cluster.start_program("n2", "--node-token-file", str(tmp_path / "wrong"))
    eventually(lambda: "does not know this node token" in runner.log.read_text())
    assert cluster.node("n2") is None


def test_the_guard_finds_a_tasks_processes_and_nobody_elses() -> None:
    env = {**os.environ, guard.MARK: "run-1"}
    with subprocess.Popen(["sleep", "1000"], start_new_session=True, env=env) as ours:
        try:
            for session, run in ((ours.pid, "run-2"), (NO_SESSION, "run-1")):
                assert guard.members(session, run) == [ours.pid]
            for stranger in ("run", "run-11", "n-1", ""):
                assert ours.pid not in guard.members(NO_SESSION, stranger)
        finally:
            ours.kill()


def test_what_does_not_listen_to_term_is_killed() -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    deaf = f"import signal, time; {ignore}; print('deaf', flush=True); time.sleep(1000)"
    env = {**os.environ, guard.MARK: "run-3"}
    command = [sys.executable, "-c", deaf]
    with subprocess.Popen(command, start_new_session=True, env=env, stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        ours.stdout.readline()
        guard.end(ours.pid, "run-3", grace=0.05)
        assert ours.wait() == -signal.SIGKILL
