"""SSH into containers: those whose image has an sshd, those that have nothing, and what outlives what."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.docker_images import (
    busybox_image,
    docker,
    make_image,
    require_engine,
    single_binary_image,
    unprivileged_image,
)
from tests.support.processes import a_cluster, eventually
from tests.support.ssh import Users, make_key, ours

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    require_engine()
    users = Users(tmp_path_factory.mktemp("ssh"), ours())
    try:
        yield users
    finally:
        for task in json.loads(users.succeed("vps", "list", "--json"))["tasks"]:
            users.succeed("vps", "rm", task["name"])
        users.close()


def in_container(users: Users, name: str, *command: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return users.ssh("-l", "root", f"{name}.kohakuriver", *command, **options)


def image_with_sshd() -> str:
    """This machine's own sshd and bash, with the libraries that they need."""
    programs = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("sshd", "bash", "env")]
    found = {str(Path(path)) for path in programs if path}
    if len(found) < 3:
        pytest.skip("there is no sshd")
    for path in list(found):
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        found.update(re.findall(r"(/\S+)", listed))
    files = {path.lstrip("/"): Path(path).read_bytes() for path in sorted(found)}
    files["usr/sbin/sshd"] = Path(shutil.which("sshd", path="/usr/sbin:/usr/bin") or "/usr/sbin/sshd").read_bytes()
    bash = Path(shutil.which("bash") or "/bin/bash").read_bytes()
    files |= {"bin/bash": bash, "bin/sh": bash}
    files["etc/passwd"] = b"root:x:0:0:root:/:/bin/bash\nsshd:x:100:65534::/run/sshd:/bin/false\n"
    files["etc/group"] = b"root:x:0:\nnogroup:x:65534:\n"
    files["etc/shadow"] = b"root:*:19000:0:99999:7:::\n"
    return make_image("sshd", files, "ENV GREETING=hello")


def test_an_image_with_nothing_in_it_gets_sftp_and_forwarding_and_says_that_it_has_no_shell(users: Users) -> None:
    users.vps("single", f"--image={single_binary_image()}")
    done = in_container(users, "single", "true")
    assert done.returncode == 127
    assert len(done.stderr.splitlines()) == 1
    listed = users.call(
        "sftp", "-q", "-F", str(users.config), "-b", "-", "root@single.kohakuriver", input=b"ls /only\n"
    )
    assert b"/only" in listed.stdout


@pytest.mark.parametrize("protocol", ["-O", "-s"])
def test_scp_copies_both_ways_where_the_image_has_nothing_in_it(users: Users, tmp_path: Path, protocol: str) -> None:
    name = f"copies{protocol.lower()}"
    users.vps(name, f"--image={single_binary_image()}")
    content = os.urandom(1 << 20)
    (tmp_path / "here").write_bytes(content)
    for source, target in ((tmp_path / "here", f"{name}.kohakuriver:/there"), (f"{name}.kohakuriver:/there", tmp_path)):
        done = users.call("scp", protocol, "-q", "-F", str(users.config), "-o", "User=root", str(source), str(target))
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "there").read_bytes() == content


def test_an_image_without_sshd_gets_ours_with_the_environment_of_the_container(users: Users) -> None:
    users.vps("box", f"--image={busybox_image()}", "-e", "GREETING=hello there")
    done = in_container(users, "box", "echo $GREETING; exit 5")
    assert (done.returncode, done.stdout) == (5, b"hello there\n"), done.stderr


def test_a_large_file_arrives_whole_in_a_container(users: Users, tmp_path: Path) -> None:
    users.vps("files", f"--image={busybox_image()}")
    (tmp_path / "here").write_bytes(os.urandom(1 << 20) * 32)
    for source, target in ((tmp_path / "here", "files.kohakuriver:/there"), ("files.kohakuriver:/there", tmp_path)):
        done = users.call("scp", "-q", "-F", str(users.config), "-o", "User=root", str(source), str(target))
        assert done.returncode == 0, done.stderr
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("here", "there")}
    assert len(digests) == 1


def test_an_image_with_an_sshd_of_its_own_uses_that_with_the_environment_of_the_container(users: Users) -> None:
    task = users.vps("own", f"--image={image_with_sshd()}", "-e", "TWO=a b")
    done = in_container(users, "own", "echo $GREETING $TWO")
    assert done.stdout == b"hello a b\n", done.stderr
    programs = docker("top", task["container"], "-eo", "pid,comm").split()
    assert ("sshd" in programs, "tunnel-sshd" in programs) == (True, False)


def test_an_image_for_an_unprivileged_user_lets_root_in(users: Users) -> None:
    users.vps("unprivileged", f"--image={unprivileged_image()}")
    done = in_container(users, "unprivileged", "echo hello")
    assert done.stdout == b"hello\n", done.stderr


def test_a_restarted_container_has_its_ssh_server_again_with_the_same_key(users: Users) -> None:
    task = users.vps("again", f"--image={busybox_image()}")
    users.succeed("vps", "restart", "again")
    assert json.loads(users.succeed("vps", "status", "--json", "again"))["ssh_host_key"] == task["ssh_host_key"]
    assert in_container(users, "again", "echo hello").stdout == b"hello\n"
    docker("restart", "-t", "0", task["container"])  # behind our back
    assert eventually(lambda: in_container(users, "again", "echo hello").stdout == b"hello\n")


def test_no_port_of_the_node_is_published_for_ssh(users: Users) -> None:
    task = users.vps("closed", f"--image={busybox_image()}")
    assert docker("port", task["container"]) == ""


def test_the_ssh_server_of_a_container_outlives_a_restart_of_the_runner(tmp_path: Path) -> None:
    require_engine()
    make_key(tmp_path / "key")
    environment = {"KOHAKURIVER_TUNNEL_SSHD": ours()}
    with a_cluster(tmp_path) as cluster:
        runner = cluster.start_runner("n1", env=environment)
        keys = [(tmp_path / "key.pub").read_text()]
        task = cluster.create(image=busybox_image(), ssh_keys=keys)
        try:
            before = servers(task)
            assert len(before) == 1
            runner.end()
            cluster.start_runner("n1", env=environment)
            cluster.connected(task["task_id"])
            assert servers(task) == before
            assert cluster.task(task["task_id"])["ssh_host_key"] == task["ssh_host_key"]
            host, _, port = cluster.host.ready["ssh_proxy"].rpartition(":")
            with socket.create_connection((host, int(port)), 20) as sock, sock.makefile("rb") as answers:
                sock.sendall(f"REQUEST_TUNNEL {task['task_id']} {cluster.token}\n".encode())
                assert answers.readline() == b"SUCCESS\n"
                assert answers.readline().startswith(b"SSH-2.0-")
        finally:
            cluster.call("DELETE", f"/api/tasks/{task['task_id']}")


def servers(task: dict[str, Any]) -> list[str]:
    """The SSH servers that run in a container, as the node numbers their processes."""
    lines = docker("top", task["container"], "-eo", "pid,comm").splitlines()
    return [line.split()[0] for line in lines if "tunnel-sshd" in line]


@contextlib.contextmanager
def container_with_sshd(keys: Path) -> Iterator[str]:
    """A container that nobody of ours made, whose sshd has the keys in that directory."""
    make_key(keys / "host")
    options = ["HostKey=/keys/host", "AuthorizedKeysFile=/keys/authorized", "StrictModes=no", "PidFile=none"]
    container = docker(
        *("run", "--detach", "--tmpfs", "/run/sshd:mode=755", "--volume", f"{keys}:/keys", image_with_sshd()),
        *("/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-p", "22", "-o", "PermitRootLogin=yes"),
        *(part for option in options for part in ("-o", option)),
    )
    try:
        eventually(lambda: starts_of_sshd(container) == 1)
        yield container
    finally:
        docker("rm", "--force", "--volumes", container)


def starts_of_sshd(container: str) -> int:
    done = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=True)
    return done.stderr.count("Server listening on 0.0.0.0 port 22")


def log_in(users: Users, task: str) -> subprocess.CompletedProcess[bytes]:
    options = ["--key", str(users.key), "-F", "/dev/null", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
    return users.call(sys.executable, "-m", "kohakuriver", "vps", "connect", task, *options, "echo $0")


@pytest.mark.parametrize("kind", ["address", "container"])
def test_the_host_key_of_a_server_that_is_not_ours_is_remembered_and_a_changed_one_is_refused(
    users: Users, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "authorized").write_bytes(users.key.with_suffix(".pub").read_bytes())
    # The user's configuration directory is as fresh as after a first log-in.
    shutil.rmtree(users.directory / "ssh", ignore_errors=True)
    with container_with_sshd(tmp_path) as container:
        what = [container[:12]]
        if kind == "address":
            ip = docker("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)
            what = ["--address", ip]
        users.succeed("vps", "adopt", *what, "--name", f"their-{kind}")
        try:
            done = log_in(users, f"their-{kind}")
            assert (done.returncode, done.stdout) == (0, b"bash\n"), done.stderr
            kept = (users.directory / "ssh" / "known_hosts").read_text()
            assert (tmp_path / "host.pub").read_text().split()[1] in kept

            (tmp_path / "host").unlink()
            make_key(tmp_path / "host")
            docker("kill", "--signal", "HUP", container)  # it reads its keys again
            eventually(lambda: starts_of_sshd(container) == 2)
            done = log_in(users, f"their-{kind}")
            assert (done.returncode, done.stdout) == (255, b"")
            assert b"HOST IDENTIFICATION HAS CHANGED" in done.stderr
            assert (users.directory / "ssh" / "known_hosts").read_text() == kept
        finally:
            users.succeed("vps", "rm", f"their-{kind}")
