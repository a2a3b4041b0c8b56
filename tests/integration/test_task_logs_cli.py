"""`kohakuriver vps logs`: what real tasks print, read through a real host and runner."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import forked
from tests.support.processes import PATIENCE, Cluster, a_cluster, eventually

PROGRAM = str(Path(sys.executable).with_name("kohakuriver"))
STAY = "import time; time.sleep(1000)"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with a_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_runner("n1", "--backend", "process", "--backend", "address")
        yield cluster


def environment(cluster: Cluster, token: str | None = None) -> dict[str, str]:
    settings = {"KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": token or cluster.token}
    return {**os.environ, **settings, "KOHAKURIVER_CONFIG_DIR": str(cluster.directory / "config")}


def logs(cluster: Cluster, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    return forked.run(["vps", "logs", *arguments], env=environment(cluster, token), stdin="", timeout=PATIENCE)


def following(cluster: Cluster, task: dict[str, Any], *arguments: str) -> forked.Started:
    return forked.start(["vps", "logs", "--follow", str(task["task_id"]), *arguments], env=environment(cluster))


def printing(cluster: Cluster, code: str, **more: Any) -> dict[str, Any]:
    return cluster.create(sys.executable, "-c", code, **more)


def ended_with(cluster: Cluster, code: str, **more: Any) -> str:
    return str(cluster.ended(printing(cluster, code, **more)["task_id"])["task_id"])


def test_what_a_failed_task_printed_can_be_read_whole(cluster: Cluster) -> None:
    task = ended_with(cluster, "def f(): raise RuntimeError('the reason')\nprint('begun', flush=True)\nf()")
    got = logs(cluster, task)
    assert got.returncode == 0
    assert got.stdout.startswith("begun\nTraceback (most recent call last):\n")
    assert got.stdout.endswith("RuntimeError: the reason\n")
    assert "tunnel-client" not in got.stdout


def test_the_last_lines_alone_come_where_that_is_asked_for(cluster: Cluster) -> None:
    task = ended_with(cluster, "for i in range(100): print('line', i)")
    assert logs(cluster, task, "--tail", "2").stdout == "line 98\nline 99\n"
    assert logs(cluster, task, "--tail", "0").stdout == ""
    assert logs(cluster, task, "--tail", "1000").stdout.count("\n") == 100


def test_what_was_printed_before_a_moment_is_left_out(cluster: Cluster) -> None:
    task = ended_with(cluster, "import time; print('old', flush=True); time.sleep(1.5); print('new')")
    lines = [json.loads(line) for line in logs(cluster, task, "--json").stdout.splitlines()]
    assert [(line["text"], line["stream"]) for line in lines] == [("old\n", "stdout"), ("new\n", "stdout")]
    moment = lines[1]["time"]
    assert lines[0]["time"] < moment
    assert logs(cluster, task, "--since", moment.replace("Z", "000Z")[:-4] + "Z").stdout == "new\n"
    assert logs(cluster, task, "--since", "10m").stdout == "old\nnew\n"
    assert logs(cluster, task, "--since", "10m", "--timestamps", "--tail", "1").stdout == f"{moment} new\n"
    assert logs(cluster, task, "--since", "soon").returncode == 2


def test_following_ends_with_the_task_and_with_exit_code_0(cluster: Cluster) -> None:
    task = printing(cluster, f"print('up', flush=True); {STAY}")
    with following(cluster, task) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "up\n"
        assert cluster.call("POST", f"/api/tasks/{task['task_id']}/stop")[0] == 200
        assert reader.wait(PATIENCE) == 0


def test_ctrl_c_ends_following_with_exit_code_0_and_leaves_the_task(cluster: Cluster) -> None:
    task = printing(cluster, f"print('up', flush=True); {STAY}")
    with following(cluster, task) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "up\n"
        reader.send_signal(signal.SIGINT)
        assert reader.wait(PATIENCE) == 0
    assert cluster.task(task["task_id"])["status"] == "running"
    cluster.call("DELETE", f"/api/tasks/{task['task_id']}")


def test_output_outlives_the_runner_and_the_host(tmp_path: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        runner = cluster.start_runner("n1", "--backend", "process")
        task = ended_with(cluster, "print('hello')")
        runner.end()
        cluster.start_runner("n1", "--backend", "process")
        cluster.restart_host()
        assert eventually(lambda: (got := logs(cluster, task)).returncode == 0 and got.stdout) == "hello\n"


def test_a_line_of_ten_megabytes_comes_whole(cluster: Cluster) -> None:
    task = ended_with(cluster, "print('x' * 10_000_000); print('after')")
    got = logs(cluster, task)
    assert got.stdout == "x" * 10_000_000 + "\nafter\n"


def test_a_task_that_is_an_address_says_that_nothing_can_be_read(cluster: Cluster) -> None:
    status, task = cluster.call("POST", "/api/tasks/adopt", {"address": "127.0.0.1", "name": "machine"})
    assert status == 201, task
    got = logs(cluster, "machine")
    assert got.returncode == 4
    assert "Task machine is the address 127.0.0.1" in got.stderr


def test_only_who_may_look_at_a_task_reads_what_it_prints_and_no_longer_than_that(cluster: Cluster) -> None:
    tokens = {}
    for name in ("ann", "bob"):
        assert cluster.call("POST", "/api/users", {"name": name})[0] == 201
        tokens[name] = cluster.call("POST", "/api/tokens", {"name": f"{name}-1", "user": name})[1]["token"]
    task = str(printing(cluster, f"print('up', flush=True); {STAY}", name="mine")["task_id"])
    assert logs(cluster, task, token=tokens["ann"]).returncode == 5
    assert cluster.call("POST", f"/api/tasks/{task}/shares", {"user": "ann"})[0] == 201
    with subprocess.Popen(
        [PROGRAM, "vps", "logs", "-f", task],
        env=environment(cluster, tokens["ann"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as reader:  # fmt: skip
        assert reader.stdout is not None
        assert reader.stderr is not None
        assert reader.stdout.readline() == "up\n"
        assert logs(cluster, task, token=tokens["bob"]).returncode == 5
        assert cluster.call("DELETE", f"/api/tasks/{task}/shares/ann")[0] == 200
        assert reader.wait(PATIENCE) == 5
        assert "not shared" in reader.stderr.read()
    cluster.call("DELETE", f"/api/tasks/{task}")


def test_a_terminal_gets_a_tasks_colours_and_nothing_else_that_it_obeys(cluster: Cluster) -> None:
    task = ended_with(cluster, r"print('\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J end')")
    ours, theirs = pty.openpty()
    shown = subprocess.run(
        [PROGRAM, "vps", "logs", task], env=environment(cluster), stdout=theirs, timeout=PATIENCE, check=False
    )
    os.close(theirs)
    got = os.read(ours, 1000)
    os.close(ours)
    assert shown.returncode == 0
    assert got == b"\x1b[31mred\x1b[0m \\x1b]0;title\\x07 \\x1b[2J end\r\n"
    assert logs(cluster, task).stdout == "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J end\n"


def test_who_has_as_many_sessions_as_they_may_follows_no_more(tmp_path: Path) -> None:
    with a_cluster(tmp_path, env={"KOHAKURIVER_MAX_SESSIONS": "1"}) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        task = printing(cluster, f"print('up', flush=True); {STAY}")
        with following(cluster, task) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "up\n"
            refused = logs(cluster, str(task["task_id"]))
            assert refused.returncode == 4
            assert "'sessions' is 1" in refused.stderr
            reader.send_signal(signal.SIGINT)
            assert reader.wait(PATIENCE) == 0
        assert eventually(lambda: logs(cluster, str(task["task_id"])).stdout) == "up\n"


def test_a_reader_that_does_not_read_makes_neither_host_nor_runner_keep_the_output(cluster: Cluster) -> None:
    task = ended_with(cluster, "for i in range(40): print('x' * 1_000_000)")
    programs = [psutil.Process(cluster.host.pid), psutil.Process(cluster.runners["n1"].pid)]
    assert logs(cluster, task, "--tail", "1").returncode == 0
    before = [program.memory_info().rss for program in programs]
    with cluster.http.stream("GET", f"/api/tasks/{task}/logs") as answer:
        pieces = answer.iter_raw(1 << 16)
        assert next(pieces)
        used = [0, 0]
        for _ in range(5):  # for as long as they would need to take in all of it
            assert logs(cluster, task, "--tail", "1").returncode == 0
            grown = [program.memory_info().rss - b for program, b in zip(programs, before, strict=True)]
            used = [max(pair) for pair in zip(used, grown, strict=True)]
            if max(used) > 16 << 20:
                break
        assert max(used) < 16 << 20
        assert sum(map(len, pieces)) > 39_000_000
