"""`kohakuriver forward` in a directory whose `kohakuriver.toml` names what is to be opened."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.up import Cluster, Service, connect, echoes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.run("forward", "--stop", "--all")
    cluster.close()


@pytest.fixture(scope="module")
def services(cluster: Cluster) -> list[Service]:
    return [cluster.service() for _ in range(2)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a repository in which the commands run, in a directory below."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    return tmp_path / "kohakuriver.toml"


def entry(service: Service, *more: str) -> str:
    return "\n".join(["[[forward]]", f'task = "{service.task}"', f'ports = ["0:{service.port}"]', *more, ""])


def works(port: int) -> bool:
    with connect(port) as connection:
        return echoes(connection)


def test_all_that_the_file_names_is_opened_by_one_command(
    cluster: Cluster, services: list[Service], project: Path
) -> None:
    project.write_text("".join(map(entry, services)))
    forward = cluster.start("forward", "--json", "--local-host", "127.0.0.1")
    opened = [forward.event("listening") for _ in services]
    assert [(each["task"], each["remote_port"]) for each in opened] == [(each.task, each.port) for each in services]
    assert all(works(each["local_port"]) for each in opened)
    assert forward.stop() == 0
    closed = [json.loads(line) for line in forward.rest()]
    assert {each["task"] for each in closed if each["event"] == "closed"} == {each.task for each in services}


def test_a_command_has_the_ports_of_all_for_as_long_as_it_runs(
    cluster: Cluster, services: list[Service], project: Path
) -> None:
    project.write_text("".join(entry(each, "detach = true") for each in services))
    names = [f"KOHAKURIVER_PORT_{each.port}" for each in services]
    code = (
        "import os, socket\n"
        f"for name in {names}:\n"
        "    s = socket.create_connection(('127.0.0.1', int(os.environ[name])))\n"
        "    s.sendall(b'through'); print(s.recv(100).decode())"
    )
    done = cluster.run("forward", "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "through\nthrough\n")
    assert json.loads(cluster.succeed("forward", "--list", "--json")) == {"forwards": []}


def test_a_profile_is_one_part_of_it_and_may_go_on_in_the_background(
    cluster: Cluster, services: list[Service], project: Path
) -> None:
    project.write_text(entry(services[0]) + entry(services[1], 'name = "db"', "detach = true"))
    done = cluster.run("forward", "--profile", "db")
    assert done.returncode == 0, done.stderr
    (forward,) = json.loads(cluster.succeed("forward", "--list", "--json"))["forwards"]
    assert forward["task"] == services[1].task
    assert works(forward["ports"][0]["local_port"])
    cluster.succeed("forward", "--stop", forward["id"])


@pytest.mark.parametrize("behind", [False, True], ids=["in front", "behind"])
def test_where_one_can_not_be_opened_none_stays_open(
    cluster: Cluster, services: list[Service], project: Path, behind: bool
) -> None:
    nobody = '[[forward]]\ntask = "nobody"\nports = ["0:80"]\n' + ("detach = true\n" if behind else "")
    project.write_text(entry(services[0], "detach = true") + nobody)
    done = cluster.run("forward")
    assert done.returncode == 3
    assert "'nobody'" in done.stderr
    assert json.loads(cluster.succeed("forward", "--list", "--json")) == {"forwards": []}


def test_one_that_can_not_go_on_is_told_and_the_others_do(
    cluster: Cluster, services: list[Service], project: Path
) -> None:
    going = [cluster.service() for _ in range(2)]
    project.write_text("".join(map(entry, [going[0], services[0], going[1]])))
    forward = cluster.start("forward")
    lines = [forward.line("Forwarding") for _ in range(3)]
    port = int(lines[1].split()[1].rpartition(":")[2])
    cluster.succeed("vps", "rm", going[0].task)
    assert f"The forward to {going[0].task} has ended: " in forward.line("has ended", err=True)
    assert works(port)
    cluster.succeed("vps", "rm", going[1].task)
    forward.line(f"The forward to {going[1].task} has ended", err=True)
    assert works(port)
    assert forward.stop() == 0


def test_the_command_ends_with_the_code_of_the_last_that_could_not_go_on(cluster: Cluster, project: Path) -> None:
    going = [cluster.service() for _ in range(2)]
    project.write_text("".join(map(entry, going)))
    forward = cluster.start("forward")
    for _ in going:
        forward.line("Forwarding")
    for each in going:
        cluster.succeed("vps", "rm", each.task)
    assert forward.ended() == 3
    assert sum(f"{each.task!r}" in line for line in forward.rest(err=True) for each in going) == 2


def test_options_of_the_command_line_go_before_the_file(
    cluster: Cluster, services: list[Service], project: Path
) -> None:
    project.write_text(entry(services[0], "detach = false", "wait = 30"))
    done = cluster.run("forward", "--detach", "--json", "--local-host", "127.0.0.1")
    assert done.returncode == 0
    *_, listening, detached = map(json.loads, done.stdout.splitlines())
    assert listening["local_host"] == "127.0.0.1"
    cluster.succeed("forward", "--stop", detached["id"])


def test_a_file_that_names_a_host_sends_nothing_there(cluster: Cluster, services: list[Service], project: Path) -> None:
    project.write_text(f'host = "http://127.0.0.1:1"\n{entry(services[0])}')
    done = cluster.run("forward")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{project} may not have 'host'" in done.stderr
    assert done.stderr.count("\n") == 1
