"""Programs whose stdin, stdout or stderr is closed, full, or broken when they start."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.addresses import free_port
from tests.support.forked import PROGRAM
from tests.support.processes import eventually
from tests.support.up import TIMEOUT, Cluster, Commands, Service, connect, echoes

SUBSETS = [subset for count in (1, 2, 3) for subset in itertools.combinations((0, 1, 2), count)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def service(cluster: Cluster) -> Service:
    return cluster.service()


def without(closed: Sequence[int], command: Sequence[str]) -> list[str]:
    """`command` with these descriptors closed."""
    closing = " ".join(f"{descriptor}{'<' if descriptor == 0 else '>'}&-" for descriptor in closed)
    return ["/bin/sh", "-c", f'exec "$@" {closing}', "sh", *command]


def _code(command: Sequence[str], environment: dict[str, str], **streams: int) -> tuple[int, bytes]:
    """The exit code, and what was said on stderr."""
    where = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **streams}
    done = subprocess.run(command, env=environment, timeout=TIMEOUT, **where)  # type: ignore[call-overload]
    return done.returncode, done.stderr


def test_a_closed_descriptor_changes_no_commands_outcome(cluster: Cluster, service: Service) -> None:
    port = f"0:{service.port}"
    commands = [
        (["vps", "list"], 0),
        (["forward", service.task, port, "--", "sh", "-c", "exit 9"], 9),
        (["connect", service.task, "--", "sh", "-c", "exit 7"], 7),
        (["ssh-proxy", "nobody"], 3),
        (["vps", "create", "--backend", "process", "--", "sleep", "1000"], 0),
    ]
    cases = list(itertools.product(commands, SUBSETS))

    def outcome(case: tuple[tuple[list[str], int], tuple[int, ...]]) -> tuple[int, bytes]:
        (command, _), closed = case
        return _code(without(closed, [*PROGRAM, *command]), cluster.environment)

    with ThreadPoolExecutor(4) as pool:
        for ((command, expected), closed), (code, said) in zip(cases, pool.map(outcome, cases), strict=True):
            assert code == expected, (command, closed, said)
            assert b"Traceback" not in said, (command, closed, said)


@pytest.mark.parametrize("closed", SUBSETS)
def test_programs_beside_the_command_line_have_all_descriptors_too(tmp_path: Path, closed: tuple[int, ...]) -> None:
    nowhere = {"KOHAKURIVER_HOST": "http://127.0.0.1:1", "KOHAKURIVER_SSH_PROXY": "127.0.0.1:1"}
    environment = {**os.environ, "KOHAKURIVER_CONFIG_DIR": str(tmp_path), **nowhere}
    programs = [
        (["kohakuriver.cli.ssh_dial", "nobody"], 7),
        (["kohakuriver.tunnel.client", "--runner-url=http://127.0.0.1:1", "--container-id=x", "run", "--", "true"], 0),
        (["kohakuriver.cli.demo_service", "--check", "127.0.0.1:1"], 1),
    ]
    for arguments, expected in programs:
        code, said = _code(without(closed, [sys.executable, "-m", *arguments]), environment)
        assert code == expected, (arguments, said)
        assert b"Assertion" not in said


def _ends_in_order(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM by now."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return bool(int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


def _ends_well(process: subprocess.Popen[bytes], serves: Callable[[], bool]) -> None:
    """Once it serves, it ends with 0 when it is told to end."""
    with process:
        try:
            eventually(lambda: process.poll() is not None or serves())
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("role", ["up", "host"])
def test_a_program_that_serves_does_so_without_any_descriptor(tmp_path: Path, role: str) -> None:
    ports = {
        "up": ["--host-port=0", "--runner-port=0", "--ssh-port=0"],
        "host": ["--bind=127.0.0.1", "--port=0", "--ssh-port=0"],
    }
    environment = {**os.environ, "KOHAKURIVER_CONFIG_DIR": str(tmp_path)}
    process = subprocess.Popen(without((0, 1, 2), [*PROGRAM, role, *ports[role]]), env=environment)
    _ends_well(process, (tmp_path / "cluster.json").exists if role == "up" else lambda: _ends_in_order(process.pid))


def test_a_program_that_was_started_with_signals_blocked_hears_them(tmp_path: Path) -> None:
    blocked = f"import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)); os.execvp({PROGRAM[0]!r}, "
    ports = ["--host-port=0", "--runner-port=0", "--ssh-port=0"]
    environment = {**os.environ, "KOHAKURIVER_CONFIG_DIR": str(tmp_path)}
    command = [sys.executable, "-c", f"{blocked}{[*PROGRAM, 'up', *ports]})"]
    _ends_well(subprocess.Popen(command, env=environment), (tmp_path / "cluster.json").exists)


@pytest.mark.parametrize("command", [["vps", "list"], ["--version"], ["--help"], ["vps", "list", "--json"]])
def test_a_full_disk_under_stdout_is_one_sentence(cluster: Cluster, command: list[str]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        code, said = _code([*PROGRAM, *command], cluster.environment, stdout=full)
        assert code == 1
        assert said.decode().splitlines() == ["Error: No space left on device."]
        assert _code([*PROGRAM, *command], cluster.environment, stdout=full, stderr=full)[0] == 1
    finally:
        os.close(full)


def test_a_forward_goes_on_whatever_becomes_of_its_output(cluster: Cluster, service: Service) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    command = ["forward", service.task, f"0:{service.port}", "--", "sh", "-c", "exit 9"]
    try:
        assert _code([*PROGRAM, *command], cluster.environment, stdout=full, stderr=full)[0] == 9
    finally:
        os.close(full)


def test_a_forward_serves_though_nobody_can_be_told_its_events(cluster: Cluster, service: Service) -> None:
    port = free_port()
    command = [*PROGRAM, "forward", service.task, f"{port}:{service.port}", "--json"]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, env=cluster.environment, stdout=full, stderr=subprocess.DEVNULL)

    def serves() -> bool:
        for _ in range(2):  # each connection may have an event
            with eventually(lambda: _connected(port)) as connection:
                assert echoes(connection)
        return True

    _ends_well(process, serves)


def _connected(port: int) -> socket.socket | None:
    try:
        return connect(port)
    except ConnectionRefusedError:
        return None


@pytest.mark.parametrize("role", ["host", "runner", "up"])
@pytest.mark.parametrize("full", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
def test_a_program_that_serves_goes_on_whatever_becomes_of_its_output(
    tmp_path: Path, role: str, full: tuple[str, ...]
) -> None:
    (tmp_path / "token").write_text("token")
    command = {
        "host": ["host", "--bind=127.0.0.1", "--port=0", "--ssh-port=0"],
        "runner": [
            *("runner", "--bind=127.0.0.1", "--port=0", "--backend=process"),
            f"--node-token-file={tmp_path / 'token'}",
        ],
        "up": ["up", "--host-port=0", "--runner-port=0", "--ssh-port=0"],
    }
    nowhere = {"KOHAKURIVER_HOST": "http://127.0.0.1:1", "KOHAKURIVER_CONFIG_DIR": str(tmp_path)}
    with Path("/dev/full").open("w") as no_room:
        streams = {name: no_room if name in full else subprocess.DEVNULL for name in ("stdout", "stderr")}
        process = subprocess.Popen([*PROGRAM, *command[role]], env={**os.environ, **nowhere}, **streams)  # type: ignore[call-overload]
    _ends_well(process, (tmp_path / "cluster.json").exists if role == "up" else lambda: _ends_in_order(process.pid))


def test_ssh_is_told_in_a_sentence_where_no_host_key_can_be_written_down(cluster: Cluster, service: Service) -> None:
    where = json.loads((Path(cluster.environment["KOHAKURIVER_CONFIG_DIR"]) / "cluster.json").read_text())
    settings = {"HOST": where["host_url"], "SSH_PROXY": where["ssh_proxy"], "TOKEN": where["token"]}
    named = {f"KOHAKURIVER_{name}": value for name, value in settings.items()}
    environment = {**cluster.environment, **named, "KOHAKURIVER_CONFIG_DIR": "/proc/nowhere"}
    code, said = _code([sys.executable, "-m", "kohakuriver.cli.ssh_dial", service.task], environment)
    assert (code, said) == (1, b"Error: /proc/nowhere: No such file or directory.\n")


def test_an_error_that_nobody_can_be_told_keeps_its_exit_code(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        commands = Commands(tmp_path)
        code, _ = _code([*PROGRAM, "forward", "x", "70000"], commands.environment, stdout=writing, stderr=writing)
        assert code == 2
    finally:
        os.close(writing)
