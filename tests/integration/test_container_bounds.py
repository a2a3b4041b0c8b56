"""What a container can take of its node: memory, processors, processes, shared memory, the disk of its log."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import docker_images
from tests.support.docker_images import docker
from tests.support.processes import Cluster, a_cluster, eventually

pytestmark = pytest.mark.docker

MIB = 1 << 20
NET_RAW = 1 << 13
BUSYBOX = "/bin/busybox"


@pytest.fixture(scope="module")
def image() -> str:
    docker_images.require_engine()
    return docker_images.busybox_image()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, image: str) -> Iterator[Cluster]:
    node = {"KOHAKURIVER_TASK_MEMORY": str(256 * MIB), "KOHAKURIVER_TASK_LOG": str(64 << 10)}
    with a_cluster(tmp_path_factory.mktemp("bounds")) as cluster, ExitStack() as stack:
        stack.callback(remove_all, cluster)
        cluster.start_runner("n1", "--backend", "docker", env=node)
        yield cluster


def remove_all(cluster: Cluster) -> None:
    for task in cluster.call("GET", "/api/tasks")[1]:
        cluster.call("DELETE", f"/api/tasks/{task['task_id']}")
        subprocess.run(["docker", "rm", "-f", task["container"]], capture_output=True, check=False)


def host_config(task: dict[str, Any]) -> dict[str, Any]:
    """How the engine says that it runs the task's container."""
    return dict(json.loads(docker("inspect", task["container"]))[0]["HostConfig"])


def test_a_container_that_asks_for_nothing_is_bounded_all_the_same(cluster: Cluster, image: str) -> None:
    task = cluster.create(BUSYBOX, "sleep", "100000", image=image, name="plain")
    shown = host_config(task)
    assert (shown["Memory"], shown["MemorySwap"]) == (256 * MIB, 256 * MIB)
    assert (shown["PidsLimit"], shown["ShmSize"], shown["OomScoreAdj"]) == (4096, 64 * MIB, 500)
    assert shown["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "16384", "max-file": "4"}}
    assert (shown["SecurityOpt"], shown["CapDrop"]) == (["no-new-privileges"], ["NET_RAW"])
    cluster.connected("plain")
    status = docker("exec", task["container"], BUSYBOX, "cat", "/proc/1/status").splitlines()
    facts = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    assert facts["NoNewPrivs"] == "1"
    assert int(facts["CapBnd"], 16) & NET_RAW == 0


def test_a_container_gets_what_was_asked_for(cluster: Cluster, image: str) -> None:
    asked = {"memory": 512 * MIB, "cpus": 0.5, "pids": 100, "shm_size": 96 * MIB}
    task = cluster.create(BUSYBOX, "sleep", "100000", image=image, name="asked", **asked)
    assert {name: cluster.task("asked")[name] for name in asked} == asked
    shown = host_config(task)
    found = (shown["Memory"], shown["MemorySwap"], shown["NanoCpus"], shown["PidsLimit"], shown["ShmSize"])
    assert found == (512 * MIB, 512 * MIB, 500_000_000, 100, 96 * MIB)
    shm = docker("exec", task["container"], BUSYBOX, "df", "-k", "/dev/shm").splitlines()[-1].split()
    assert int(shm[1]) == 96 << 10


def test_a_container_that_takes_more_memory_than_it_has_is_ended_and_its_user_learns_why(
    cluster: Cluster, image: str
) -> None:
    cluster.create(BUSYBOX, "tail", "-c", "400m", "/dev/zero", image=image, name="greedy")
    task = cluster.ended("greedy")
    assert task["status"] == "failed"
    assert task["message"] == "it ran out of memory, of which it had 256 MiB; --memory gives a task more"


def test_a_container_that_starts_processes_without_end_gets_no_more_than_it_may(cluster: Cluster, image: str) -> None:
    forks = f"while {BUSYBOX} true; do {BUSYBOX} sleep 1000 & done"
    task = cluster.create("/bin/sh", "-c", forks, image=image, name="forks", pids=64)

    def refused() -> bool:
        return "can't fork" in docker("logs", task["container"]) or cluster.task("forks")["status"] == "failed"

    assert eventually(refused)


def test_what_a_container_prints_takes_no_more_of_the_disk_than_its_log_may(cluster: Cluster, image: str) -> None:
    prints = f"{BUSYBOX} yes 0123456789 | {BUSYBOX} head -c 88000; echo last"
    task = cluster.create("/bin/sh", "-c", prints, image=image, name="prints")
    # Not before it has printed all: who reads an engine's log all the time keeps it from going on to its next file.
    assert docker("wait", task["container"]) == "0"
    assert docker("logs", "--tail", "1", task["container"]) == "last"
    kept = docker("logs", task["container"])
    assert len(kept) <= 64 << 10
    log = Path(json.loads(docker("inspect", task["container"]))[0]["LogPath"])
    if os.access(log, os.R_OK):  # the engine is on this machine
        sizes = [path.stat().st_size for path in log.parent.glob(f"{log.name}*")]
        assert len(sizes) == 4
        assert sum(sizes) <= 65 << 10


def test_the_containers_of_a_user_have_no_more_together_than_the_user_may(cluster: Cluster, image: str) -> None:
    limits = {"memory": 512 * MIB}
    assert cluster.call("POST", "/api/users", {"name": "ann", "limits": limits})[0] == 201
    secret = cluster.call("POST", "/api/tokens", {"user": "ann"})[1]["token"]

    def create(**more: Any) -> tuple[int, dict[str, Any]]:
        body = {"image": image, **more}
        answer = cluster.http.post("/api/tasks", json=body, headers={"Authorization": f"Bearer {secret}"})
        return answer.status_code, answer.json()

    status, task = create(name="default")
    assert (status, host_config(task)["Memory"]) == (201, 64 * MIB)  # an eighth
    assert create(memory=384 * MIB)[0] == 201
    status, body = create(memory=128 * MIB)
    assert (status, body["error"]) == (429, "over_limit")
    assert cluster.call("DELETE", "/api/tasks/default")[0] == 200
    assert create(memory=128 * MIB)[0] == 201
