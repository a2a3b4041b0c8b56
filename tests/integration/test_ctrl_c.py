"""Ctrl-C ends a command at once, whatever it waits for: here for what never answers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.apart import cluster, service
from tests.support.network.wall import Wall, wall
from tests.support.processes import eventually
from tests.support.ssh import USER, Users, ours
from tests.support.up import Apart, Commands, Program, Service, connect, echoes

__all__ = ["cluster", "service"]

AT_ONCE = 1.5
"""Seconds that a program may take to end, on a busy machine. What it waits for would take 3 seconds, or many more."""


@pytest.fixture
def before_host(cluster: Apart) -> Iterator[Wall]:
    """What stands before the cluster's host, for who goes by it."""
    with wall(int(cluster.url.rpartition(":")[2])) as made:
        yield made


def ends_at_once(program: Program, number: signal.Signals = signal.SIGINT) -> int:
    """End it; its exit code."""
    began = time.monotonic()
    code = program.stop(number)
    took = time.monotonic() - began
    assert took < AT_ONCE, f"it took {took:.1f} s"
    return code


def through(wall: Wall, scheme: str = "http") -> str:
    return f"--host={scheme}://127.0.0.1:{wall.port}"


COMMANDS = [
    ("forward", "lab", "0:80"),
    ("vps", "connect", "lab"),
    ("vps", "list"),
    ("vps", "status", "lab"),
    ("connect", "lab", "--", "true"),
    ("ssh-proxy", "lab"),
    ("ssh-config",),
]


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    made = Commands(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_command_ends_at_once_whose_host_takes_the_connection_and_says_nothing(
    commands: Commands, command: tuple[str, ...], scheme: str
) -> None:
    with wall() as silent:
        at, behind = (command[:-2], command[-2:]) if "--" in command else (command, ())
        waits = commands.start(*at, through(silent, scheme), *behind)
        assert silent.met.acquire(timeout=20)
        ends_at_once(waits)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_ends_at_once_whose_proxy_says_nothing(commands: Commands, command: tuple[str, ...]) -> None:
    with wall() as silent:
        waits = commands.start(
            *command,
            KOHAKURIVER_HOST="https://host.invalid",
            https_proxy=f"http://127.0.0.1:{silent.port}",
            KOHAKURIVER_SSH_PROXY="host.invalid:8002",
        )
        assert silent.met.acquire(timeout=20)
        ends_at_once(waits)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_ends_at_once_whose_connection_is_not_answered(commands: Commands, command: tuple[str, ...]) -> None:
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):  # they are all that its queue has room for: the next one is not answered
            first = stack.enter_context(socket.socket())
            first.setblocking(False)
            first.connect_ex(listener.getsockname())
        waits = commands.start(*command, KOHAKURIVER_HOST=f"http://127.0.0.1:{listener.getsockname()[1]}")
        eventually(
            lambda: any(
                each.status == psutil.CONN_SYN_SENT for each in psutil.Process(waits.process.pid).net_connections()
            )
        )
        ends_at_once(waits)


def test_a_forward_ends_at_once_whose_link_is_dead(cluster: Apart, service: Service, before_host: Wall) -> None:
    forward = cluster.start(
        "forward", service.task, f"0:{service.port}", "--json", "--path", "host", through(before_host)
    )
    with connect(forward.listening()) as connection:
        assert echoes(connection)
        before_host.stop()
        connection.sendall(b"nobody hears this")
        assert ends_at_once(forward) == 0


def test_a_forward_ends_at_once_whose_link_is_dead_while_it_sends(
    cluster: Apart, service: Service, before_host: Wall
) -> None:
    forward = cluster.start(
        "forward", service.task, f"0:{service.port}", "--json", "--path", "host", through(before_host)
    )
    with connect(forward.listening()) as connection:
        assert echoes(connection)
        before_host.stop()
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):  # long before that the link takes no more
            connection.sendall(bytes(1 << 28))
        assert ends_at_once(forward) == 0


def test_a_forward_ends_at_once_while_its_host_does_not_answer_the_next_session(
    cluster: Apart, service: Service, before_host: Wall
) -> None:
    forward = cluster.start(
        "forward", service.task, f"0:{service.port}", "--json", "--path", "host", through(before_host)
    )
    with connect(forward.listening()) as connection:
        assert echoes(connection)
        before_host.cut()
        assert forward.event("reconnecting")["waiting"] == 1
        assert before_host.met.acquire(timeout=20)
        assert ends_at_once(forward) == 0


def test_a_forward_ends_at_once_between_two_tries(cluster: Apart, service: Service, before_host: Wall) -> None:
    forward = cluster.start(
        "forward", service.task, f"0:{service.port}", "--json", "--path", "host", through(before_host)
    )
    with connect(forward.listening()) as connection:
        assert echoes(connection)
        before_host.close()
        for _ in range(6):
            assert forward.event("reconnecting")["waiting"] == 1
        assert ends_at_once(forward) == 0


def test_a_forward_ends_at_once_that_waits_for_a_service(cluster: Apart, service: Service, before_host: Wall) -> None:
    def sessions() -> int:
        nodes = json.loads(cluster.succeed("node", "list", "--json"))["nodes"]
        return int(nodes[0]["traffic"]["sessions"])

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        waits = cluster.start("forward", service.task, f"0:{sock.getsockname()[1]}", "--wait", through(before_host))
        eventually(lambda: sessions() == 1)
        before_host.stop()
        assert ends_at_once(waits) == 0


# Runs a command in a network of its own whose name server says nothing, and prints for how long it outlives Ctrl-C.
SILENT_NAME_SERVER = """
import os, signal, socket, subprocess, sys, time
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["mount", "--bind", sys.argv[1], "/etc/resolv.conf"], check=True)
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
command = subprocess.Popen([sys.executable, "-m", "kohakuriver", *sys.argv[2:]])
server.recv(512)
began = time.monotonic()
command.send_signal(signal.SIGINT)
command.wait()
print(time.monotonic() - began)
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_ends_at_once_whose_name_server_says_nothing(
    commands: Commands, tmp_path: Path, command: tuple[str, ...]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a network of its own is root's to make")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    begin = ["unshare", "--net", "--mount", sys.executable, "-c", SILENT_NAME_SERVER, str(tmp_path / "resolv.conf")]
    environment = {**commands.environment, "KOHAKURIVER_HOST": "http://host.example:8000"}
    done = subprocess.run([*begin, *command], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout.split()[-1]) < AT_ONCE, done


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    users = Users(tmp_path_factory.mktemp("ssh"), ours())
    try:
        users.vps("web")
        yield users
    finally:
        users.close()


@pytest.mark.parametrize("how", ["ssh", "vps connect"])
def test_ssh_ends_at_once_whose_network_is_dead_and_so_does_what_kept_its_connection(users: Users, how: str) -> None:
    with wall(int(users.ready["host_url"].rpartition(":")[2])) as before_host:
        at = f"http://127.0.0.1:{before_host.port}"
        command = ["ssh", "-F", str(users.config), "web"]
        if how == "vps connect":
            options = ["-F", "/dev/null", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
            ours = [sys.executable, "-m", "kohakuriver", "vps", "connect"]
            command = [*ours, f"--user={USER}", f"--key={users.key}", "web", *options]
        session = subprocess.Popen(
            [*command, "echo there; cat"],
            env={**users.environment, "KOHAKURIVER_HOST": at, "KOHAKURIVER_TOKEN": users.token},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        with session:
            assert session.stdout is not None
            assert session.stdout.readline() == b"there\n"
            behind = [each for each in psutil.process_iter() if _goes_to(each, at) and each.pid != session.pid]
            assert behind
            before_host.stop()
            began = time.monotonic()
            os.killpg(session.pid, signal.SIGINT)
            session.wait(20)
            assert time.monotonic() - began < AT_ONCE
            _, left = psutil.wait_procs(behind, timeout=20)
            assert not left


def _goes_to(process: psutil.Process, at: str) -> bool:
    try:
        return process.environ().get("KOHAKURIVER_HOST") == at
    except psutil.Error:
        return False
