"""Images with programs of their own, in real containers: what runs, how it ends, what reaches it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support import docker_images
from tests.support.docker_images import docker
from tests.support.processes import Cluster, a_cluster, ask, eventually

pytestmark = pytest.mark.docker

PORT = 7


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    docker_images.require_engine()
    with a_cluster(tmp_path_factory.mktemp("images")) as cluster, ExitStack() as stack:
        stack.callback(remove_all, cluster)
        cluster.start_runner("n1", "--backend", "docker")
        yield cluster


def remove_all(cluster: Cluster) -> None:
    for task in cluster.call("GET", "/api/tasks")[1]:
        cluster.call("DELETE", f"/api/tasks/{task['task_id']}")
        subprocess.run(["docker", "rm", "-f", task["container"]], capture_output=True, check=False)


def image_of(*changes: str, script: str = "") -> str:
    """busybox with `/start`, a shell script, and what a Dockerfile says of the image."""
    files = {**docker_images.busybox_files(), "start": f"#!/bin/sh\n{script}\n".encode()}
    return docker_images.make_image("program", files, *changes)


def printed(cluster: Cluster, name: str) -> list[str]:
    """What a task's program has printed."""
    return docker("logs", cluster.task(name)["container"]).splitlines()


def test_without_a_command_the_images_own_entrypoint_and_cmd_serve(cluster: Cluster) -> None:
    image = image_of('ENTRYPOINT ["/bin/busybox", "nc", "-ll"]', f'CMD ["-p", "{PORT}", "-e", "/bin/busybox", "cat"]')
    cluster.create(image=image, name="server")
    cluster.connected("server")
    with cluster.forward("server", PORT) as forward:

        def asked() -> bytes | None:
            try:
                return ask(forward.local_port, b"hello") or None
            except OSError:  # it may not listen yet
                return None

        assert eventually(asked) == b"hello"


def test_what_is_given_takes_the_place_of_what_the_image_says_as_with_docker(cluster: Cluster) -> None:
    image = image_of('ENTRYPOINT ["/bin/busybox", "echo", "entry"]', 'CMD ["own"]')
    cases = {
        "own": ({}, ["entry own"]),
        "given": ({"command": ["given", "words"]}, ["entry given words"]),
        "other": ({"entrypoint": ["/bin/busybox"], "command": ["echo", "other"]}, ["other"]),
        "none": ({"entrypoint": [], "command": ["/bin/busybox", "echo", "none"]}, ["none"]),
    }
    for name, (asked, expected) in cases.items():
        cluster.create(image=image, name=name, **asked)
        task = cluster.ended(name)
        assert (task["status"], task["exit_code"]) == ("stopped", 0), task
        assert printed(cluster, name)[-1:] == expected


def test_an_image_that_runs_no_more_than_a_shell_stays_up_also_behind_a_script(cluster: Cluster) -> None:
    for name, image in {
        "shell": image_of('CMD ["/bin/sh"]'),
        "prepared": image_of('ENTRYPOINT ["/start"]', script='echo prepared; exec "${@:-/bin/sh}"'),
    }.items():
        task = cluster.create(image=image, name=name)
        assert cluster.connected(name)["status"] == "running"
        processes = docker("exec", task["container"], "/bin/busybox", "ps").splitlines()
        assert any(line.split()[-1].endswith("sh") for line in processes if "ps" not in line), processes
    assert "prepared" in printed(cluster, "prepared")


def test_an_image_whose_program_is_not_wanted_stays_up_without_it(cluster: Cluster) -> None:
    image = image_of('CMD ["/bin/busybox", "false"]')
    cluster.create(image=image, name="unwanted", entrypoint=[])
    assert cluster.connected("unwanted")["status"] == "running"


def test_a_program_gets_its_images_own_stop_signal_user_directory_and_variables(cluster: Cluster) -> None:
    script = (
        'trap "echo interrupted; exit 0" INT; echo "$(/bin/busybox id -u) $PWD $WORD"; /bin/busybox sleep 1000 & wait'
    )
    image = image_of(
        *('ENTRYPOINT ["/start"]', "USER 123:456", "WORKDIR /somewhere", "ENV WORD=word"),
        script=script,
    )
    cluster.create(image=docker_images.built(image, "STOPSIGNAL SIGINT"), name="polite")
    cluster.connected("polite")
    eventually(lambda: "123 /somewhere word" in printed(cluster, "polite"))
    assert cluster.call("POST", "/api/tasks/polite/stop")[1]["status"] == "stopped"
    assert printed(cluster, "polite")[-1] == "interrupted"


def test_a_program_that_ends_is_told_with_its_exit_code_and_last_words_and_a_restart_runs_it_again(
    cluster: Cluster,
) -> None:
    image = image_of('ENTRYPOINT ["/start"]', script="echo no password given >&2; exit 3")
    cluster.create(image=image, name="needy")
    task = cluster.ended("needy")
    assert (task["status"], task["exit_code"]) == ("failed", 3)
    assert task["message"] == "it ended with exit code 3: no password given"
    cluster.call("POST", "/api/tasks/needy/restart")
    words = "no password given"
    eventually(lambda: _errors(task["container"]).count(words) == 2)


def _errors(container: str) -> str:
    return subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=True).stderr


def test_a_program_runs_where_and_as_whom_it_was_asked_for(cluster: Cluster) -> None:
    image = image_of('ENTRYPOINT ["/start"]', script='echo "$(/bin/busybox id -u):$(/bin/busybox id -g) $PWD"')
    cluster.create(image=image, name="there", workdir="/made/for/it", run_as="12:34")
    assert cluster.ended("there")["status"] == "stopped"
    assert printed(cluster, "there")[-1] == "12:34 /made/for/it"


def test_a_device_of_the_node_is_in_the_container_with_its_rights_and_so_are_labels(cluster: Cluster) -> None:
    image = image_of('ENTRYPOINT ["/start"]', script="test -c /dev/bin && echo x > /dev/bin")
    labels = ["team=vision", "empty="]
    cluster.create(image=image, name="device", devices=["/dev/null:/dev/bin:w"], run_as="0", labels=labels)
    task = cluster.ended("device")
    assert task["status"] == "stopped", printed(cluster, "device")
    given = docker("inspect", "-f", "{{json .HostConfig.Devices}}", task["container"])
    assert '"CgroupPermissions":"w"' in given
    asked = '{{index .Config.Labels "team"}} {{index .Config.Labels "kohakuriver.name"}}'
    assert docker("inspect", "-f", asked, task["container"]) == "vision device"
