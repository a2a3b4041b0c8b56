"""The process that holds the forwards in the background: one for all that can be held together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import psutil

from kohakuriver.unix_sockets import address_of
from tests.support.detached import cluster, detach, gone, left_of, listed, service, user, works
from tests.support.forked import PROGRAM
from tests.support.network.wall import wall
from tests.support.processes import eventually
from tests.support.up import TIMEOUT, Apart, Commands, Service, connect, echoes

__all__ = ["cluster", "service", "user"]


def processes(user: Commands) -> set[int]:
    """Those that hold this user's forwards."""
    return {each["pid"] for each in listed(user)}


def holds(user: Commands) -> list[Path]:
    """The sockets on which forwards are taken over."""
    return list((user.directory / "forwards").glob("*.hold"))


def test_all_forwards_of_a_user_are_held_by_one_process_which_ends_with_the_last(
    user: Commands, service: Service
) -> None:
    ports = dict(detach(user, service) for _ in range(3))
    (process,) = processes(user)
    assert [path.stat().st_mode & 0o777 for path in holds(user)] == [0o600]
    assert Path(f"/proc/{process}/cwd").readlink() == Path("/")
    while ports:
        assert all(map(works, ports.values()))
        assert {each["id"] for each in listed(user)} == set(ports)
        name, port = ports.popitem()
        assert user.run("forward", "--stop", name).returncode == 0
        with socket.create_server(("127.0.0.1", port)):
            pass
    eventually(lambda: gone(process))
    assert all(each.endswith(".log") for each in left_of(user))


def test_one_more_takes_a_fraction_of_the_memory_of_a_process(user: Commands, service: Service) -> None:
    detach(user, service)
    (process,) = processes(user)
    first = psutil.Process(process).memory_full_info().uss
    for _ in range(10):
        detach(user, service)
    assert processes(user) == {process}
    assert psutil.Process(process).memory_full_info().uss - first < first / 2


def test_one_that_ends_by_itself_ends_no_other_and_each_has_its_own_log(
    cluster: Apart, user: Commands, service: Service
) -> None:
    other = cluster.service()
    going, _ = detach(user, other)
    staying, port = detach(user, service)
    with connect(port) as connection:
        assert echoes(connection)
        cluster.succeed("vps", "rm", other.task)
        eventually(lambda: [each["id"] for each in listed(user)] == [staying])
        assert echoes(connection)
    logs = {name: (user.directory / "forwards" / f"{name}.log").read_text() for name in (going, staying)}
    assert f"The forward has ended: There is no task {other.task!r}" in logs[going]
    assert other.task not in logs[staying]


def test_each_has_the_host_and_the_token_of_its_own_command(cluster: Apart, user: Commands, service: Service) -> None:
    token = json.loads(cluster.succeed("user", "add", "somebody", "--json"))["token"]
    detach(user, service)
    done = user.run("forward", service.task, f"0:{service.port}", "--detach", KOHAKURIVER_TOKEN=token)
    assert (done.returncode, done.stdout) == (5, "")
    cluster.succeed("vps", "share", service.task, "somebody")
    with wall(int(cluster.url.rpartition(":")[2])) as before_host:
        host = f"http://127.0.0.1:{before_host.port}"
        name, port = detach(user, service, "--path=host", KOHAKURIVER_TOKEN=token, KOHAKURIVER_HOST=host)
        assert len(processes(user)) == 1
        with connect(port) as connection:
            assert echoes(connection)
            before_host.close()
            states = {"connected", "reconnecting"}
            eventually(lambda: {each["state"] for each in listed(user)} == states)
            assert {each["state"] for each in listed(user) if each["id"] == name} == {"reconnecting"}
    cluster.succeed("vps", "unshare", service.task, "somebody")


def test_what_a_forward_goes_by_and_can_not_be_handed_over_has_a_process_of_its_own(
    user: Commands, service: Service, tmp_path: Path
) -> None:
    detach(user, service)
    assert len(processes(user)) == 1
    detach(user, service, KOHAKURIVER_PROXY="none")
    assert len(processes(user)) == 2
    detach(user, service, KOHAKURIVER_PROXY="none", TERM="other", KOHAKURIVER_LOG_FORMAT="json")
    assert len(processes(user)) == 2
    hard = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[1]
    limited = f'ulimit -n {hard - 1}; exec "$@"'
    command = ["sh", "-c", limited, "sh", *PROGRAM, "forward", service.task, f"0:{service.port}", "--detach"]
    subprocess.run(command, env=user.environment, check=True, capture_output=True, timeout=TIMEOUT)
    assert len(processes(user)) == 3
    assert len(holds(user)) == 3
    other = Commands(tmp_path / "other")
    other.environment = {**user.environment, "KOHAKURIVER_CONFIG_DIR": str(other.directory)}
    detach(other, service)
    assert not processes(other) & processes(user)
    other.succeed("forward", "--stop", "--all")


def test_one_with_a_command_is_alone_with_the_directory_and_the_variables_of_its_own(
    user: Commands, service: Service, tmp_path: Path
) -> None:
    detach(user, service)
    os.mkfifo(tmp_path / "told")
    run_here(user, tmp_path, service, f"0:{service.port}", "--on-connect", 'echo "$MINE" >told', MINE="this")
    assert (tmp_path / "told").read_text() == "this\n"
    assert len(processes(user)) == 2
    assert len(holds(user)) == 1


def test_a_relative_path_is_that_of_its_own_command(user: Commands, service: Service, tmp_path: Path) -> None:
    detach(user, service)
    (tmp_path / "here").mkdir()
    said = run_here(user, tmp_path / "here", service, f"unix:s.sock:{service.port}")
    assert said == f"Forwarding unix:{tmp_path}/here/s.sock -> {service.task}:{service.port} (tcp)\n"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "here" / "s.sock"))
        assert echoes(connection)
    assert len(processes(user)) == 1


def run_here(user: Commands, directory: Path, service: Service, *more: str, **environment: str) -> str:
    """What `forward --detach` says on stdout in a directory."""
    command = [*PROGRAM, "forward", service.task, "--detach", *more]
    environment = {**user.environment, **environment}
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_when_the_process_is_killed_its_forwards_are_forgotten_and_another_takes_its_place(
    user: Commands, service: Service
) -> None:
    names = [detach(user, service)[0] for _ in range(3)]
    (process,) = processes(user)
    os.kill(process, signal.SIGKILL)
    logs = sorted(f"{name}.log" for name in names)
    eventually(lambda: (listed(user), left_of(user)) == ([], logs))
    _, port = detach(user, service)
    assert works(port)


def test_a_signal_that_ends_the_process_ends_all_of_its_forwards_and_says_so(user: Commands, service: Service) -> None:
    names = [detach(user, service)[0] for _ in range(2)]
    (process,) = processes(user)
    os.kill(process, signal.SIGTERM)
    eventually(lambda: gone(process))
    assert left_of(user) == sorted(f"{name}.log" for name in names)
    logs = [(user.directory / "forwards" / f"{name}.log").read_text() for name in names]
    assert all("The forward has ended: stopped" in log for log in logs)


def test_commands_at_the_same_moment_start_one_process(user: Commands, service: Service) -> None:
    starting = [user.start("forward", service.task, f"0:{service.port}", "--detach") for _ in range(6)]
    assert [each.ended() for each in starting] == [0] * 6
    assert len(listed(user)) == 6
    assert len(processes(user)) == len(holds(user)) == 1


def test_a_forward_that_comes_while_the_process_is_about_to_end_is_held(user: Commands, service: Service) -> None:
    name, _ = detach(user, service)
    for _ in range(6):
        stopping = user.start("forward", "--stop", name)
        name, port = detach(user, service)
        assert stopping.ended() == 0
        assert works(port)
        assert [each["id"] for each in listed(user)] == [name]
        assert len(holds(user)) == 1


def test_those_whose_process_does_not_answer_are_listed_and_can_not_be_stopped_and_a_new_one_has_its_own(
    user: Commands, service: Service
) -> None:
    old = {detach(user, service)[0] for _ in range(2)}
    (process,) = processes(user)
    os.kill(process, signal.SIGSTOP)
    try:
        name, port = detach(user, service)
        assert works(port)
        there = listed(user)
        states = {each["id"]: each["state"] for each in there}
        assert states == {name: "connected", **dict.fromkeys(old, "not answering")}
        assert {each["pid"] for each in there if each["id"] in old} == {process}
        done = user.run("forward", "--stop", *old)
        assert done.returncode == 4
        assert done.stderr.count(f"`kill -9 {process}` ends it by force, and all others in its process.") == 2
    finally:
        os.kill(process, signal.SIGCONT)
    assert all(each["state"] == "connected" for each in listed(user))


def test_a_command_that_goes_during_the_start_ends_its_own_forward_alone(user: Commands, service: Service) -> None:
    name, port = detach(user, service)
    with wall() as silent:
        front = user.start("forward", "lab", "0:80", "--detach", f"--host=http://127.0.0.1:{silent.port}")
        assert silent.met.acquire(timeout=TIMEOUT)
        assert len(list((user.directory / "forwards").glob("*.new"))) == 1
        assert front.stop(signal.SIGINT) == 0
    eventually(
        lambda: [each for each in left_of(user) if not each.endswith(".hold")] == [f"{name}.log", f"{name}.sock"]
    )
    assert works(port)


def test_nothing_can_be_run_and_nothing_broken_by_what_is_sent_to_the_process(
    user: Commands, service: Service, tmp_path: Path
) -> None:
    _, port = detach(user, service)
    (path,) = holds(user)
    settings = {"host": "http://127.0.0.1:1", "other_hosts": []}
    wanted = {"task": "lab", "ports": [], "addresses": [], "backs": [], "local_host": "localhost", "every": True,
              "settings": settings, "on_connect": f"touch {tmp_path}/ran"}  # fmt: skip
    orders = [b"no JSON\n", b"[]\n", b"{}\n", b"", json.dumps({"wanted": wanted, "request_id": ""}).encode() + b"\n"]
    for order in orders:
        with socket.socket(socket.AF_UNIX) as sock, address_of(path) as address:
            sock.settimeout(TIMEOUT)
            sock.connect(address)
            sock.sendall(order)
            sock.shutdown(socket.SHUT_WR)
            told = b"".join(iter(lambda sock=sock: sock.recv(65536), b""))  # type: ignore[misc]
            assert (b"failed" in told) == bool(order)
    assert b"runs nothing" in told
    assert not (tmp_path / "ran").exists()
    assert works(port)


def test_a_process_that_dies_during_a_start_is_told_in_a_sentence(user: Commands) -> None:
    with wall() as silent:
        front = user.start("forward", "lab", "0:80", "--detach", f"--host=http://127.0.0.1:{silent.port}")
        assert silent.met.acquire(timeout=TIMEOUT)
        (process,) = psutil.Process(front.process.pid).children()
        process.kill()
        assert front.rest(err=True) == [
            "Error: The process that was to hold the forward in the background has ended; try again."
        ]
        assert front.ended() == 1
    assert listed(user) == []


def test_the_host_knows_each_by_the_id_of_its_own_command(cluster: Apart, user: Commands, service: Service) -> None:
    def opened() -> list[str]:
        lines = (cluster.directory / "host" / "audit.jsonl").read_text().splitlines()
        return [told["request_id"] for told in map(json.loads, lines) if told["event"] == "session_opened"]

    before = len(opened())
    for _ in range(3):
        detach(user, service)
    assert len(processes(user)) == 1
    eventually(lambda: len(set(opened()[before:])) == 3)
