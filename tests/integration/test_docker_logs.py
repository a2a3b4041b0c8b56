"""What containers print, read from a real engine."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from kohakuriver.client.host import HostClient, LogLine
from kohakuriver.config import load_settings
from tests.support import docker_images
from tests.support.docker_images import docker
from tests.support.processes import Cluster, a_cluster

pytestmark = pytest.mark.docker

Run = Callable[[Awaitable[Any]], Any]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    docker_images.require_engine()
    with a_cluster(tmp_path_factory.mktemp("docker")) as cluster:
        cluster.start_runner("n1", "--backend", "docker")
        try:
            yield cluster
        finally:
            for task in cluster.call("GET", "/api/tasks")[1]:
                cluster.call("DELETE", f"/api/tasks/{task['task_id']}")
                subprocess.run(["docker", "rm", "-f", task["container"]], capture_output=True, check=False)


def shell(cluster: Cluster, script: str) -> dict[str, Any]:
    image = docker_images.busybox_image()
    return cluster.create("/bin/busybox", "sh", "-c", script, image=image)


def client(cluster: Cluster) -> HostClient:
    return HostClient(load_settings(host=cluster.url, token=cluster.token))


async def gathered(lines: AsyncIterator[LogLine]) -> list[LogLine]:
    return [line async for line in lines]


def test_stdout_and_stderr_of_a_failed_container_are_told_apart(run: Run, cluster: Cluster) -> None:
    task = str(shell(cluster, "echo one; sleep 0.2; echo two >&2; exit 3")["task_id"])
    cluster.ended(task)

    async def main() -> None:
        async with client(cluster) as host:
            lines = await gathered(host.logs(task))
            assert {(line.text, line.stream) for line in lines} == {("one\n", "stdout"), ("two\n", "stderr")}
            times = {line.text: line.time for line in lines}
            assert times["one\n"] is not None
            assert times["two\n"] is not None
            assert times["two\n"] > times["one\n"]
            assert [line.text for line in await gathered(host.logs(task, tail=1))] == ["two\n"]

    run(main())


def test_following_a_container_ends_with_it_and_loses_nothing(run: Run, cluster: Cluster) -> None:
    image = docker_images.busybox_image()
    script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"
    task = cluster.create("/bin/busybox", "sh", "-c", script, image=image)

    async def main() -> None:
        async with client(cluster) as host:
            lines = await gathered(host.logs(str(task["task_id"]), follow=True))
            assert "".join(line.text for line in lines) == "".join(f"line {n}\n" for n in range(20000))

    run(main())


def test_a_line_of_ten_megabytes_of_a_container_comes_whole(run: Run, cluster: Cluster) -> None:
    yes = "/bin/busybox yes xxxxxxxxx | /bin/busybox head -n 1000000 | /bin/busybox tr -d '\\n'"
    task = shell(cluster, f"{yes}; echo; echo after")
    cluster.ended(task["task_id"])

    async def main() -> None:
        async with client(cluster) as host:
            lines = await gathered(host.logs(str(task["task_id"])))
            assert max(len(line.text) for line in lines) <= 1 << 15
            assert "".join(line.text for line in lines) == "x" * 9_000_000 + "\nafter\n"

    run(main())


def test_what_an_adopted_container_with_a_terminal_printed_can_be_read(run: Run, cluster: Cluster) -> None:
    name = f"tty-{uuid.uuid4().hex[:8]}"
    command = ("/bin/busybox", "sh", "-c", "echo hello; exec /bin/busybox sleep 1000")
    docker("run", "-d", "-t", "--name", name, docker_images.busybox_image(), *command)
    try:
        status, task = cluster.call("POST", "/api/tasks/adopt", {"container": name})
        assert status == 201, task

        async def main() -> None:
            async with client(cluster) as host:
                lines = await gathered(host.logs(str(task["task_id"])))
                assert "".join(line.text for line in lines) == "hello\r\n"

        run(main())
    finally:
        docker("rm", "-f", name)
