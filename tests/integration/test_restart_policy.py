"""Tasks that run again by themselves: real processes and real containers, over restarts of their runner."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import docker_images
from tests.support.docker_images import docker
from tests.support.processes import Cluster, a_cluster, eventually

THRICE = "echo >>here; [ $(wc -l <here) -gt 3 ] || { echo oh no >&2; exit 3; }; exec sleep 1000"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with a_cluster(tmp_path) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        yield cluster


def test_a_process_that_fails_runs_again_and_says_so_meanwhile(cluster: Cluster) -> None:
    cluster.create("sh", "-c", THRICE, name="shaky", restart="on-failure:3")
    said = eventually(lambda: message if "oh no" in (message := cluster.task("shaky")["message"] or "") else None)
    assert re.fullmatch("it ended with exit code 3: oh no; it runs again in [124] s", said)
    task = cluster.connected("shaky")
    assert (task["status"], task["message"], task["restart"]) == ("running", None, "on-failure:3")
    assert cluster.call("POST", "/api/tasks/shaky/stop")[1]["status"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_tasks_are_back_with_their_node_as_their_policies_say(cluster: Cluster, number: signal.Signals) -> None:
    for name, policy in {"stays": "no", "back": "unless-stopped", "halted": "unless-stopped"}.items():
        cluster.create("sleep", "1000", name=name, restart=policy)
        cluster.connected(name)
    cluster.call("POST", "/api/tasks/halted/stop")
    cluster.runners["n1"].end(number)
    cluster.start_runner("n1", "--backend", "process")
    assert eventually(lambda: cluster.task("back")["tunnel"])
    assert [cluster.task(name)["status"] for name in ("stays", "halted")] == ["stopped", "stopped"]


@pytest.mark.docker
def test_a_container_that_is_killed_runs_again_and_one_that_was_stopped_does_not(tmp_path: Path) -> None:
    docker_images.require_engine()
    image = docker_images.busybox_image()
    with a_cluster(tmp_path) as cluster, ExitStack() as stack:
        cluster.start_runner("n1", "--backend", "docker")
        task = cluster.create("/bin/busybox", "sleep", "1000", image=image, name="back", restart="always")
        stack.callback(cluster.call, "DELETE", "/api/tasks/back")
        cluster.connected("back")
        begun = docker("inspect", "-f", "{{.State.StartedAt}}", task["container"])
        docker("kill", task["container"])
        eventually(lambda: docker("inspect", "-f", "{{.State.StartedAt}}", task["container"]) != begun)
        cluster.connected("back")
        assert cluster.call("POST", "/api/tasks/back/stop")[1]["status"] == "stopped"
        cluster.runners["n1"].end(signal.SIGKILL)
        cluster.start_runner("n1", "--backend", "docker")
        cluster.create("/bin/busybox", "sleep", "1000", image=image, name="other")
        stack.callback(cluster.call, "DELETE", "/api/tasks/other")
        cluster.connected("other")
        assert cluster.task("back")["status"] == "stopped"
