"""`kohakuriver forward --detach`: in the background, found again, and stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pexpect
import psutil
import pytest

from tests.support.detached import cluster, detach, gone, left_of, listed, service, user, works
from tests.support.forked import PROGRAM
from tests.support.network.wall import wall
from tests.support.processes import eventually
from tests.support.up import TIMEOUT, Apart, Commands, Service, connect, echoes

__all__ = ["cluster", "service", "user"]


def test_it_says_what_one_in_the_foreground_says_and_how_to_stop_it_and_gives_up_its_pipes(
    user: Commands, service: Service
) -> None:
    command = [*PROGRAM, "forward", service.task, f"0:{service.port}", "--detach"]
    done = subprocess.run(command, env=user.environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0
    found = re.fullmatch(rf"Forwarding 127\.0\.0\.1:(\d+) -> {service.task}:{service.port} \(tcp\)\n", done.stdout)
    assert found, done.stdout
    (forward,) = listed(user)
    assert f"`kohakuriver forward --stop {forward['id']}` ends it" in done.stderr
    assert works(int(found[1]))


def test_it_keeps_no_descriptor_that_the_command_was_started_with(user: Commands, service: Service) -> None:
    reading, writing = os.pipe()
    command = [*PROGRAM, "forward", service.task, f"0:{service.port}", "--detach"]
    subprocess.run(command, env=user.environment, pass_fds=[writing], check=True, timeout=TIMEOUT)
    os.close(writing)
    os.set_blocking(reading, False)
    assert os.read(reading, 1) == b""  # where another process had it open, this would be a BlockingIOError
    os.close(reading)
    (forward,) = listed(user)
    files = [Path(f"/proc/{forward['pid']}/fd/{number}").readlink() for number in range(3)]
    assert files == [Path(os.devnull)] * 3


def test_it_outlives_the_terminal_that_it_was_started_on(user: Commands, service: Service) -> None:
    environment = {**user.environment, "TERM": "xterm", "PS1": "$ "}
    shell = pexpect.spawn("bash", ["--norc", "--noprofile", "-i"], env=environment, timeout=TIMEOUT, encoding="utf-8")
    shell.sendline(f"{' '.join(PROGRAM)} forward {service.task} 0:{service.port} --detach; echo co$((1))de:$?")
    shell.expect(r"Forwarding 127\.0\.0\.1:(\d+) ")
    port = int(shell.match.group(1))
    shell.expect("co1de:0")
    shell.close(force=True)
    assert works(port)
    (forward,) = listed(user)
    process = psutil.Process(forward["pid"])
    assert process.terminal() is None
    assert os.getsid(process.pid) == process.pid


def test_the_list_tells_of_each_its_task_ports_process_age_connections_and_state(
    user: Commands, service: Service
) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    name, port = detach(user, service)
    with connect(port) as connection:
        assert echoes(connection)
        (forward,) = listed(user)
        assert before <= datetime.fromisoformat(forward.pop("since")) <= datetime.now(timezone.utc)
        assert psutil.pid_exists(forward.pop("pid"))
        ports = [{"local_host": host, "local_port": port, "remote_port": service.port, "proto": "tcp"}
                 for host in ("127.0.0.1", "::1")]  # fmt: skip
        log = str(user.directory / "forwards" / f"{name}.log")
        assert forward == {
            "id": name, "task": service.task, "ports": ports, "reversed": [], "connections": 1, "state": "connected",
            "log": log,
        }  # fmt: skip
    shown = user.succeed("forward", "--list").splitlines()
    assert shown[0].split() == ["ID", "TASK", "PORTS", "PROCESS", "SINCE", "CONNECTIONS", "STATE"]
    assert shown[1].split()[:3] == [name, service.task, f"{port}:{service.port}/tcp"]


def test_one_whose_host_is_away_is_listed_as_reconnecting(user: Commands, cluster: Apart, service: Service) -> None:
    with wall(int(cluster.url.rpartition(":")[2])) as before_host:
        name, port = detach(
            user, service, KOHAKURIVER_HOST=f"http://127.0.0.1:{before_host.port}", KOHAKURIVER_PATH="host"
        )
        with connect(port) as connection:
            assert echoes(connection)
            before_host.close()
            eventually(lambda: [each["state"] for each in listed(user)] == ["reconnecting"])
        assert "Connection to the host lost" in (user.directory / "forwards" / f"{name}.log").read_text()


@pytest.mark.parametrize("by", ["id", "task", "all"])
def test_it_is_stopped_by_its_id_or_its_task_or_with_all_and_its_port_is_free_then(
    user: Commands, service: Service, by: str
) -> None:
    name, port = detach(user, service)
    with connect(port) as connection:
        assert echoes(connection)
        (forward,) = listed(user)
        done = user.run("forward", "--stop", {"id": name, "task": service.task, "all": "--all"}[by])
        assert (done.returncode, done.stdout) == (0, f"Stopped {name} ({service.task}).\n")
    with socket.create_server(("127.0.0.1", port)):
        pass
    eventually(lambda: gone(forward["pid"]))
    assert listed(user) == []
    assert left_of(user) == [f"{name}.log"]


def test_all_are_stopped_that_lead_to_a_task_and_no_others(cluster: Apart, user: Commands, service: Service) -> None:
    other = cluster.service()
    to_one = {detach(user, service)[0] for _ in range(2)}
    to_other, _ = detach(user, other)
    stopped = user.succeed("forward", "--stop", service.task, "--json").splitlines()
    assert {json.loads(line)["id"] for line in stopped} == to_one
    assert [each["id"] for each in listed(user)] == [to_other]


def test_what_is_not_there_to_be_stopped_is_3_and_the_others_are_stopped(user: Commands, service: Service) -> None:
    name, _ = detach(user, service)
    done = user.run("forward", "--stop", "nobody", name)
    assert done.returncode == 3
    assert "'nobody'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert listed(user) == []


def test_a_port_that_one_in_the_background_has_is_6_and_names_that_one(user: Commands, service: Service) -> None:
    name, port = detach(user, service)
    for more in ([], ["--detach"]):
        done = user.run("forward", service.task, f"{port}:{service.port}", *more)
        assert (done.returncode, done.stdout) == (6, "")
        assert f"forward {name} to {service.task}" in done.stderr
        assert f"--stop {name}" in done.stderr
        assert done.stderr.count("\n") == 1
    assert [each["id"] for each in listed(user)] == [name]
    assert [each for each in left_of(user) if not each.endswith(".hold")] == [f"{name}.log", f"{name}.sock"]


def test_one_that_was_killed_is_forgotten_and_leaves_its_log(user: Commands, service: Service) -> None:
    name, _ = detach(user, service)
    (forward,) = listed(user)
    os.kill(forward["pid"], signal.SIGKILL)
    eventually(lambda: gone(forward["pid"]))
    assert user.run("forward", "--stop", name).returncode == 3
    assert left_of(user) == [f"{name}.log"]
    again, _ = detach(user, service)
    assert [each["id"] for each in listed(user)] == [again]


def test_a_start_that_fails_ends_with_its_code_and_leaves_nothing(user: Commands) -> None:
    done = user.run("forward", "nobody", "0:80", "--detach")
    assert (done.returncode, done.stdout) == (3, "")
    assert "nobody" in done.stderr
    assert done.stderr.count("\n") == 1
    eventually(lambda: left_of(user) == [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_whatever_ends_the_command_during_the_start_ends_all_of_it(user: Commands, number: signal.Signals) -> None:
    with wall() as silent:
        front = user.start("forward", "lab", "0:80", "--detach", f"--host=http://127.0.0.1:{silent.port}")
        assert silent.met.acquire(timeout=TIMEOUT)
        (behind,) = psutil.Process(front.process.pid).children()
        front.process.send_signal(number)
        assert front.ended() == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        eventually(lambda: gone(behind.pid))
        eventually(lambda: left_of(user) == [])


def test_ctrl_c_on_a_terminal_during_the_start_ends_all_of_it(user: Commands) -> None:
    with wall() as silent:
        command = [*PROGRAM[1:], "forward", "lab", "0:80", "-d", f"--host=http://127.0.0.1:{silent.port}"]
        front = pexpect.spawn(PROGRAM[0], command, env=user.environment, timeout=TIMEOUT, encoding="utf-8")
        assert silent.met.acquire(timeout=TIMEOUT)
        (behind,) = psutil.Process(front.pid).children()
        front.sendintr()
        front.expect(pexpect.EOF)
        front.close()
        assert front.exitstatus == 0
        eventually(lambda: gone(behind.pid))
        assert left_of(user) == []


def test_one_that_ends_by_itself_says_why_in_its_log(cluster: Apart, user: Commands) -> None:
    service = cluster.service()
    name, _ = detach(user, service)
    cluster.succeed("vps", "rm", service.task)
    eventually(lambda: listed(user) == [])
    log = (user.directory / "forwards" / f"{name}.log").read_text()
    assert f"The forward has ended: There is no task {service.task!r}" in log


def test_it_is_found_however_long_the_path_of_its_directory_is(user: Commands, service: Service) -> None:
    user.directory = user.directory / ("long" * 30)
    user.environment["KOHAKURIVER_CONFIG_DIR"] = str(user.directory)
    name, port = detach(user, service)
    assert [each["id"] for each in listed(user)] == [name]
    assert works(port)
    assert user.run("forward", "--stop", name).returncode == 0


def test_nobody_else_can_get_at_those_in_the_background(user: Commands, service: Service) -> None:
    directory = user.directory / "forwards"
    directory.mkdir()
    directory.chmod(0o777)
    detach(user, service)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())
