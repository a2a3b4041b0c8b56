"""GPUs of a node in real containers. The GPUs are fake: null devices, which this machine makes for the test."""

from __future__ import annotations

import os
import stat
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import docker_images
from tests.support.docker_images import docker
from tests.support.processes import a_cluster

pytestmark = pytest.mark.docker


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_a_container_has_the_gpus_that_it_asked_for_and_no_others(tmp_path: Path) -> None:
    docker_images.require_engine()
    fakes = [tmp_path / f"gpu{number}" for number in range(2)]
    for fake in fakes:
        os.mknod(fake, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with a_cluster(tmp_path) as cluster, ExitStack() as stack:
        cluster.start_runner("n1", "--backend", "docker", *(f"--gpu={fake}" for fake in fakes))
        look = ("/bin/sh", "-c", f"echo $(/bin/busybox ls {tmp_path}); exec /bin/busybox sleep 1000")
        for name, gpu in (("one", 0), ("other", 1)):
            task = cluster.create(*look, image=docker_images.busybox_image(), name=name, gpus="1")
            stack.callback(subprocess.run, ["docker", "rm", "-f", task["container"]], capture_output=True, check=False)
            assert cluster.connected(name)["gpu_ids"] == [str(gpu)]
            assert docker("logs", task["container"]).splitlines()[-1] == f"gpu{gpu}"
        status, answer = cluster.call("POST", "/api/tasks", {"image": "x", "gpus": "1"})
        assert (status, answer["error"]) == (409, "gpus_taken")
        node = cluster.node("n1")
        assert node is not None
        assert (node["gpus"], node["gpus_free"]) == (["0", "1"], [])
