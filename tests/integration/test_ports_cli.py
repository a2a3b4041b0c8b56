"""`kohakuriver vps ports` and `forward --all`: a real cluster, and services that come and go."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import eventually
from tests.support.up import Cluster, Commands, connect, echoes

# Listens on each port of which there is a file, 0 being any, and echoes; writes into the file which port that is.
SERVICES = """
import pathlib, select, socket, sys, threading
directory = pathlib.Path(sys.argv[1])
open_now = {}
def echo(peer):
    with peer:
        while data := peer.recv(65536):
            peer.sendall(data)
def accept(server):
    while True:
        threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
while True:
    there = {path.name for path in directory.glob("*.service")}
    for name in there - open_now.keys():
        wanted = (directory / name).read_text()
        server = open_now[name] = socket.create_server(("127.0.0.1", int(wanted or 0)))
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        (directory / f"{name}.port").write_text(str(server.getsockname()[1]))
    for name in open_now.keys() - there:
        server = open_now.pop(name)
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        (directory / f"{name}.port").unlink()
    select.select([], [], [], 0.02)
"""


class Services:
    """A process task, and services in it that a test has come and go."""

    def __init__(self, commands: Commands, name: str, *options: str) -> None:
        self.name = name
        self.directory = commands.directory / f"services-{name}"
        self.directory.mkdir()
        command = [sys.executable, "-c", SERVICES, str(self.directory)]
        commands.succeed("vps", "create", "--name", name, "--backend", "process", *options, "--", *command)

    def begin(self, name: str, port: int = 0) -> int:
        """Have a service listen; its port."""
        unfinished = self.directory / f"{name}.new"
        unfinished.write_text(str(port))
        unfinished.rename(self.directory / f"{name}.service")
        told = self.directory / f"{name}.service.port"
        return int(eventually(lambda: told.read_text() or None if told.exists() else None))

    def end(self, name: str) -> None:
        """Have it listen no more."""
        (self.directory / f"{name}.service").unlink()
        told = self.directory / f"{name}.service.port"
        eventually(lambda: not told.exists())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("ports"), "--user-processes")
    try:
        yield cluster
    finally:
        cluster.run("forward", "--stop", "--all")
        cluster.close()


@pytest.fixture(scope="module")
def services(cluster: Cluster) -> Services:
    return Services(cluster, "lab")


def user(cluster: Cluster, name: str) -> str:
    """A new user's token."""
    cluster.succeed("user", "add", name)
    return str(json.loads(cluster.succeed("token", "create", "--user", name, "--json"))["token"])


def ports_of(commands: Commands, task: str, *options: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads(commands.succeed("vps", "ports", task, "--json", *options))["ports"]
    return told


def numbers(commands: Commands, task: str, *options: str) -> set[int]:
    return {port["port"] for port in ports_of(commands, task, *options)}


def listens(commands: Commands, task: str, port: int) -> bool:
    return port in numbers(commands, task)


def test_a_port_of_a_task_is_listed_while_it_listens(cluster: Cluster, services: Services) -> None:
    port = services.begin("web")
    eventually(lambda: port in numbers(cluster, "lab"))
    (found,) = [each for each in ports_of(cluster, "lab") if each["port"] == port]
    assert found["address"] == "127.0.0.1"
    assert found["proto"] == "tcp"
    assert found["program"].startswith("python")
    lines = cluster.succeed("vps", "ports", "lab").splitlines()
    assert lines[0].split() == ["PORT", "PROTOCOL", "ADDRESS", "PROGRAM"]
    assert [str(port), "tcp", "127.0.0.1", found["program"]] in [line.split() for line in lines]
    services.end("web")
    eventually(lambda: port not in numbers(cluster, "lab"))


def test_neither_of_two_users_sees_the_others_ports_nor_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    tokens = {name: user(cluster, name) for name in ("ann", "bob")}
    tasks, found = {}, {}
    for name, token in tokens.items():
        commands = Commands(tmp_path / name)
        commands.directory.mkdir()
        commands.environment |= {"KOHAKURIVER_HOST": cluster.ready["host_url"], "KOHAKURIVER_TOKEN": token}
        tasks[name] = Services(commands, f"of-{name}"), commands
        found[name] = tasks[name][0].begin("web")
    for name, (services, commands) in tasks.items():
        eventually(partial(listens, commands, services.name, found[name]))
        assert numbers(commands, services.name) == {found[name]}
    done = tasks["ann"][1].run("vps", "ports", "of-bob")
    assert done.returncode == 5
    cluster.succeed("vps", "share", "of-bob", "ann")
    assert numbers(tasks["ann"][1], "of-bob") == {found["bob"]}


def test_what_a_process_that_left_its_session_listens_on_is_the_tasks(cluster: Cluster, tmp_path: Path) -> None:
    told = tmp_path / "port"
    listens = (
        "import os, pathlib, socket, time\n"
        "if os.fork():\n    time.sleep(1000)\n"
        "os.setsid()\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        f"pathlib.Path({str(told)!r}).write_text(str(server.getsockname()[1]))\n"
        "time.sleep(1000)\n"
    )
    cluster.succeed("vps", "create", "--name", "daemon", "--backend", "process", "--", sys.executable, "-c", listens)
    port = int(eventually(lambda: told.read_text() or None if told.exists() else None))
    eventually(lambda: numbers(cluster, "daemon") == {port})


def test_the_ssh_server_that_we_gave_a_task_is_not_among_its_ports(cluster: Cluster, tmp_path: Path) -> None:
    key = tmp_path / "key.pub"
    key.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ\n")
    services = Services(cluster, "with-ssh", "--public-key-file", str(key))
    assert json.loads(cluster.succeed("vps", "status", "with-ssh", "--json"))["ssh_port"]
    port = services.begin("web")
    eventually(lambda: numbers(cluster, "with-ssh") == {port})


def test_where_it_can_not_be_known_what_listens_one_sentence_says_why(cluster: Cluster, services: Services) -> None:
    cluster.succeed("vps", "adopt", "--address", "127.0.0.1", "--name", "vm")
    cluster.succeed("vps", "create", "--name", "over", "--backend", "process")
    cluster.succeed("vps", "stop", "over")
    for task, code, sentence in (
        ("vm", 4, "no tunnel client runs that could look which ports listen"),
        ("over", 4, "Task over is stopped"),
        ("nobody", 3, "There is no task 'nobody'"),
    ):
        for words in (["vps", "ports", task], ["forward", task, "--all"]):
            done = cluster.run(*words)
            assert done.returncode == code
            (line,) = done.stderr.splitlines()
            assert sentence in line


def test_all_forwards_what_listens_and_follows_it_as_it_comes_and_goes(cluster: Cluster, services: Services) -> None:
    first = services.begin("first")
    forward = cluster.start("forward", "lab", "--all")
    # The task is a process of this machine: its ports are taken here.
    line = forward.line(f"-> lab:{first} (tcp), since {first} can't be had")
    with connect(int(line.split()[1].rpartition(":")[2])) as kept:
        assert echoes(kept)
        second = services.begin("second")
        line = forward.line(f"-> lab:{second} (tcp)")
        local = int(line.split()[1].rpartition(":")[2])
        with connect(local) as connection:
            assert echoes(connection)
        services.end("first")
        assert forward.line(f"-> lab:{first} (tcp)").startswith("No longer forwarding 127.0.0.1:")
        assert echoes(kept)  # its listener has gone, the connection has not
        services.end("second")
        forward.line(f"No longer forwarding 127.0.0.1:{local} -> lab:{second} (tcp)")
        with pytest.raises(ConnectionRefusedError):
            connect(local)
        services.begin("second", second)
        forward.line(f"Forwarding 127.0.0.1:{local} -> lab:{second} (tcp)")
    services.end("second")
    assert forward.stop() == 0


def test_all_tells_programs_of_ports_that_come_and_go_and_leaves_given_ports_as_they_are(
    cluster: Cluster, services: Services
) -> None:
    given = services.begin("given")
    eventually(lambda: numbers(cluster, "lab") == {given})
    forward = cluster.start("forward", "lab", f"0:{given}", "--all", "--json", "--local-host", "127.0.0.1")
    listening = forward.event("listening")
    assert listening["remote_port"] == given
    assert "instead_of" not in listening
    other = services.begin("other")
    came = forward.event("listening")
    assert came == {
        "event": "listening",
        "local_host": "127.0.0.1",
        "local_port": came["local_port"],
        "remote_port": other,
        "proto": "tcp",
        "instead_of": other,
    }
    services.end("given")
    services.end("other")
    gone = forward.event("gone")
    assert gone == {**{key: came[key] for key in came if key != "instead_of"}, "event": "gone"}
    assert forward.stop() == 0
    assert all(json.loads(line)["event"] in ("stats", "closed") for line in forward.rest())


def test_all_lets_go_of_the_ports_of_a_task_that_is_stopped_and_is_back_with_it(cluster: Cluster) -> None:
    services = Services(cluster, "stopped")
    services.begin("web")
    forward = cluster.start("forward", "stopped", "--all")
    forward.line("Forwarding")
    cluster.succeed("vps", "stop", "stopped")
    forward.line("No longer forwarding")
    (services.directory / "web.service.port").unlink()
    cluster.succeed("vps", "restart", "stopped")
    forward.line("Forwarding")
    cluster.succeed("vps", "rm", "stopped")
    assert forward.ended() == 3


def test_all_says_where_nothing_listens_yet(cluster: Cluster) -> None:
    Services(cluster, "empty")
    assert cluster.succeed("vps", "ports", "empty").split() == ["PORT", "PROTOCOL", "ADDRESS", "PROGRAM"]
    forward = cluster.start("forward", "empty", "--all")
    forward.line("Nothing listens in empty yet; its ports are forwarded as they come.", err=True)
    assert forward.stop() == 0


def test_all_goes_on_in_the_background_and_the_list_has_the_ports_that_there_are(cluster: Cluster) -> None:
    services = Services(cluster, "behind")
    first = services.begin("first")
    done = cluster.run("forward", "behind", "--all", "--detach", "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert first in {event.get("remote_port") for event in events if event["event"] == "listening"}
    second = services.begin("second")
    local = eventually(lambda: in_background(cluster, "behind").get(second))
    with connect(local) as connection:
        assert echoes(connection)
    services.end("first")
    eventually(lambda: set(in_background(cluster, "behind")) == {second})
    cluster.succeed("forward", "--stop", "behind")
    with pytest.raises(ConnectionRefusedError):
        connect(local)


def in_background(commands: Commands, task: str) -> dict[int, int]:
    """The local port of each port of a forward in the background."""
    (forward,) = [
        each for each in json.loads(commands.succeed("forward", "--list", "--json"))["forwards"] if each["task"] == task
    ]
    return {port["remote_port"]: port["local_port"] for port in forward["ports"]}


def test_a_command_on_connect_finds_the_ports_that_all_has_found(cluster: Cluster, tmp_path: Path) -> None:
    services = Services(cluster, "told")
    port = services.begin("web")
    told = tmp_path / "told"
    os.mkfifo(told)
    command = f"echo $KOHAKURIVER_PORT_{port} >{told}"
    forward = cluster.start("forward", "told", "--all", "--on-connect", command)
    local = int(told.read_text())
    with connect(local) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_a_project_may_have_all_ports_of_a_task_but_not_for_a_command(
    cluster: Cluster, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kohakuriver.toml").write_text('[[forward]]\ntask = "lab"\nall = true\n')
    port = services.begin("of-a-project")
    forward = cluster.start("forward")
    line = forward.line(f"-> lab:{port} (tcp)")
    with connect(int(line.split()[1].rpartition(":")[2])) as connection:
        assert echoes(connection)
    assert forward.stop() == 0
    services.end("of-a-project")
    done = cluster.run("forward", "--", "true")
    assert done.returncode == 2
    assert "--all and a command don't go together" in done.stderr


def test_all_goes_with_a_socks_port(cluster: Cluster) -> None:
    port = Services(cluster, "proxied").begin("web")
    forward = cluster.start("forward", "proxied", "--all", "--socks=0", "--json", "--local-host", "127.0.0.1")
    assert [forward.event("listening").get("remote_port") for _ in range(2)] == [None, port]
    assert forward.stop() == 0
