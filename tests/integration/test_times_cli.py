"""Tasks that are stopped by themselves, on a real host and runner, and what people see of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest

from kohakuriver import forward_sync
from tests.support import forked
from tests.support.processes import PATIENCE, Cluster, a_cluster, eventually


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with a_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        yield cluster


def command(cluster: Cluster, *arguments: str, code: int = 0) -> str:
    """What a command said: its stdout, or where it is to fail with `code` its stderr."""
    settings = {"KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}
    environment = {**os.environ, **settings, "KOHAKURIVER_CONFIG_DIR": str(cluster.directory / "config")}
    done = forked.run(arguments, env=environment, stdin="", timeout=PATIENCE)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_a_task_lives_for_as_long_as_it_was_given_and_is_extended(cluster: Cluster) -> None:
    command(cluster, "vps", "create", "--backend", "process", "--name", "lab", "--ttl", "8h", "--idle-stop", "30m")
    shown = command(cluster, "vps", "status", "lab")
    assert re.search(r"in (8 h|7 h 59 min): time to live", shown)
    assert "when nobody was connected for 30 min" in shown
    listed = command(cluster, "vps", "list", "-v")
    assert re.search(r" (8 h|7 h 59 min) ", listed)
    assert "30 min" in listed
    assert re.fullmatch(r"Task lab ends in (12 h|11 h 59 min)\.\n", command(cluster, "vps", "extend", "lab", "4h"))
    told = json.loads(command(cluster, "vps", "status", "lab", "--json"))
    assert (told["ttl"], told["idle_stop"]) == (8 * 3600, 1800)
    assert told["ends_at"] is not None
    command(cluster, "vps", "stop", "lab")
    assert "is not running" in command(cluster, "vps", "extend", "lab", "4h", code=4)
    assert "8 h after its start" in command(cluster, "vps", "status", "lab")
    command(cluster, "vps", "create", "--backend", "process", "--name", "free")
    assert "no time to live" in command(cluster, "vps", "extend", "free", "4h", code=2)
    assert "--ttl takes a time like 12h" in command(
        cluster, "vps", "create", "--backend", "process", "--ttl", "8", code=2
    )


def test_a_limit_of_a_user_is_what_a_task_gets_and_the_most_that_it_can_ask_for(cluster: Cluster) -> None:
    command(cluster, "user", "add", "ann", "--ttl", "24h")
    assert "1 d" in command(cluster, "user", "limit", "ann", "--idle-stop", "2h")
    limits = json.loads(command(cluster, "user", "limit", "ann", "--json"))["limits"]
    assert (limits["ttl"]["limit"], limits["idle_stop"]["limit"]) == (86_400, 7200)
    assert "--idle-stop takes a number such as 12h" in command(
        cluster, "user", "limit", "ann", "--idle-stop", "2", code=2
    )


def test_a_task_whose_time_is_over_is_stopped_and_not_removed_and_says_why(cluster: Cluster) -> None:
    cluster.create(name="short", ttl=1)
    assert cluster.ended("short")["message"] == "its time to live of 1 s is over"
    assert "Task short is stopped: its time to live of 1 s is over; " in command(
        cluster, "connect", "short", "--", "true", code=4
    )
    cluster.create(name="idle", idle_stop=1)
    assert cluster.ended("idle")["message"] == "idle for 1 s"
    assert "idle for 1 s" in command(cluster, "vps", "status", "idle")


def test_a_forward_keeps_a_task_from_being_idle_and_is_told_of_its_end(cluster: Cluster) -> None:
    task = cluster.create(name="used", ttl=12, idle_stop=5)
    cluster.connected("used")
    said: list[str] = []
    with forward_sync(
        "used", 80, local_port=0, host=cluster.url, token=cluster.token,
        on_event=lambda event: said.append(event.to_json().get("message", "")),
    ):  # fmt: skip
        ended = cluster.ended(task["task_id"])["message"]
        assert ended == "its time to live of 12 s is over", "it was idle"
        eventually(lambda: [line for line in said if "with `kohakuriver vps extend used 1h`" in line])


def test_a_time_to_live_that_ends_while_no_host_is_there_is_kept(cluster: Cluster) -> None:
    task = cluster.create(name="alone", ttl=1)
    cluster.restart_host()
    assert cluster.ended(task["task_id"])["message"] == "its time to live of 1 s is over"
