"""`kohakuriver forward TASK unix:PATH:PORT`: a Unix socket in the place of a local port."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import eventually
from tests.support.up import TIMEOUT, Cluster, Program, Service, broken, echoes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.run("forward", "--stop", "--all")
    cluster.close()


@pytest.fixture(scope="module")
def service(cluster: Cluster) -> Service:
    return cluster.service()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.sock"


def opened(cluster: Cluster, service: Service, path: Path) -> Program:
    forward = cluster.start("forward", service.task, f"unix:{path}:{service.port}", "--json")
    assert forward.event("listening") == {
        "event": "listening", "local_path": str(path), "remote_port": service.port, "proto": "tcp",
    }  # fmt: skip
    return forward


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT)
    sock.connect(str(path))
    return sock


def test_it_leads_to_the_task_for_its_user_alone_and_is_gone_at_the_end(
    cluster: Cluster, service: Service, path: Path
) -> None:
    forward = opened(cluster, service, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    data = os.urandom(1 << 20)
    with connect(path) as one, connect(path) as other:
        for _ in range(8):
            assert echoes(one, data)
            assert echoes(other, data[:1000])
        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""
        assert forward.stop() == 0
        broken(other)
    assert not path.exists()


def test_the_line_says_its_path_and_a_command_finds_it_in_its_environment(
    cluster: Cluster, service: Service, path: Path
) -> None:
    code = (
        "import os, socket; s = socket.socket(socket.AF_UNIX)\n"
        f"s.connect(os.environ['KOHAKURIVER_SOCKET_{service.port}']); s.sendall(b'through'); print(s.recv(9).decode())"
    )
    local = f"unix:{path}:{service.port}"
    done = cluster.run("forward", service.task, local, "--wait", "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "through\n")
    assert f"Forwarding unix:{path} -> {service.task}:{service.port} (tcp)" in done.stderr


def test_one_that_a_killed_forward_left_is_replaced(cluster: Cluster, service: Service, path: Path) -> None:
    killed = opened(cluster, service, path)
    assert killed.stop(signal.SIGKILL) == -signal.SIGKILL
    assert path.is_socket()
    forward = opened(cluster, service, path)
    with connect(path) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_one_that_is_in_use_is_6_and_goes_on(cluster: Cluster, service: Service, path: Path) -> None:
    forward = opened(cluster, service, path)
    done = cluster.run("forward", service.task, f"unix:{path}:{service.port}")
    assert (done.returncode, done.stdout) == (6, "")
    assert f"{path} is already in use" in done.stderr
    with connect(path) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_what_is_no_socket_is_6_and_stays(cluster: Cluster, service: Service, path: Path) -> None:
    path.write_text("somebody's")
    done = cluster.run("forward", service.task, f"unix:{path}:{service.port}")
    assert done.returncode == 6
    assert "is no socket" in done.stderr
    assert path.read_text() == "somebody's"


def test_one_that_another_user_left_is_6_and_stays(cluster: Cluster, service: Service, path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a socket another user's")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    os.chown(path, 12345, -1)
    done = cluster.run("forward", service.task, f"unix:{path}:{service.port}")
    assert done.returncode == 6
    assert "another user's" in done.stderr
    assert path.stat().st_uid == 12345


def test_what_has_taken_its_place_meanwhile_is_not_removed_at_the_end(
    cluster: Cluster, service: Service, path: Path
) -> None:
    forward = opened(cluster, service, path)
    path.unlink()
    path.write_text("somebody's")
    assert forward.stop() == 0
    assert path.read_text() == "somebody's"


def test_a_directory_that_is_not_there_is_6(cluster: Cluster, service: Service, path: Path) -> None:
    done = cluster.run("forward", service.task, f"unix:{path.parent}/none/x.sock:{service.port}")
    assert done.returncode == 6
    assert "can't be made: No such file or directory" in done.stderr


def test_its_path_may_be_long_and_relative(
    cluster: Cluster, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / ("long" * 30)
    directory.mkdir()
    monkeypatch.chdir(directory)
    forward = cluster.start("forward", service.task, f"unix:x.sock:{service.port}", "--wait", "--json")
    assert forward.event("listening")["local_path"] == str(directory / "x.sock")
    with connect(Path("x.sock")) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_in_the_background_it_is_listed_and_what_has_it_is_named(
    cluster: Cluster, service: Service, path: Path
) -> None:
    local = f"unix:{path}:{service.port}"
    detached = json.loads(cluster.succeed("forward", service.task, local, "-d", "--json").splitlines()[-1])
    (forward,) = json.loads(cluster.succeed("forward", "--list", "--json"))["forwards"]
    assert forward["ports"] == [{"local_path": str(path), "remote_port": service.port, "proto": "tcp"}]
    assert f"{path}:{service.port}/tcp" in cluster.succeed("forward", "--list")
    assert f"forward {detached['id']} to" in cluster.run("forward", service.task, local).stderr
    cluster.succeed("forward", "--stop", detached["id"])
    eventually(lambda: not path.exists())
