"""`kohakuriver up`, `vps`, `node` and `demo`, as real programs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.processes import eventually
from tests.support.up import TIMEOUT, Apart, Cluster, Commands, Program, Service, broken, connect, echoes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def programs_of(cluster: Cluster) -> list[psutil.Process]:
    """Everything that runs below `up`."""
    return psutil.Process(cluster.up.process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return psutil.wait_procs(processes, timeout=TIMEOUT)[1] == []


ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]


@pytest.mark.parametrize("number", ENDING)
def test_up_stops_cleanly_with_everything_it_started(own_cluster: Cluster, number: signal.Signals) -> None:
    own_cluster.service()
    processes = programs_of(own_cluster)
    assert len(processes) >= 4
    assert own_cluster.up.stop(number) == 0
    assert own_cluster.up.rest(err=True) == []
    assert gone(processes)
    assert not (own_cluster.directory / "cluster.json").exists()


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("role", ["host", "runner"])
def test_up_that_is_stopped_while_it_starts_ends_what_it_has_started(
    tmp_path: Path, role: str, number: signal.Signals
) -> None:
    cluster = Commands(tmp_path)
    up = cluster.start("up", "--json", "--host-port=0", "--runner-port=0", "--ssh-port=0")
    try:
        process = psutil.Process(up.process.pid)
        children = eventually(lambda: _with(role, process.children(recursive=True)))
        assert up.stop(number) == 0
        assert gone(children)
        assert up.rest(err=True) == []
        assert [line for line in up.rest() if "ready" in line] == []
        assert not (tmp_path / "cluster.json").exists()
    finally:
        cluster.close()


def _with(role: str, processes: list[psutil.Process]) -> list[psutil.Process] | None:
    """All of them, once the program of that role is among them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if any(each.cmdline()[3:4] == [role] for each in processes):
            return processes
    return None


def test_without_the_static_tunnel_client_processes_work_and_one_line_says_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHAKURIVER_TUNNEL_CLIENT", str(tmp_path / "missing"))
    cluster = Cluster(tmp_path)
    try:
        service = cluster.service()
        forward = cluster.start("forward", "--json", service.task, f"0:{service.port}")
        with connect(forward.event("listening")["local_port"]) as sock:
            assert echoes(sock, b"through the Python client")
        assert forward.stop() == 0
        assert cluster.up.stop(signal.SIGTERM) == 0
        assert len([line for line in cluster.up.rest(err=True) if "no static tunnel client" in line]) == 1
    finally:
        cluster.close()


def test_a_killed_up_leaves_no_process_behind(own_cluster: Cluster) -> None:
    own_cluster.service()
    processes = programs_of(own_cluster)
    own_cluster.up.stop(signal.SIGKILL)
    assert gone(processes)


@pytest.mark.parametrize("role", ["host", "runner"])
def test_up_says_which_of_its_programs_died_and_ends_with_1(own_cluster: Cluster, role: str) -> None:
    (child,) = [process for process in programs_of(own_cluster) if process.cmdline()[3:4] == [role]]
    child.kill()
    assert own_cluster.up.ended() == 1
    assert any(f"The {role} has ended" in line for line in own_cluster.up.rest(err=True))


def test_the_other_commands_find_the_cluster_with_nothing_set(cluster: Cluster) -> None:
    (node,) = json.loads(cluster.succeed("node", "list", "--json"))["nodes"]
    assert node["status"] == "online"
    assert node["url"] == cluster.ready["runner_url"]


def test_a_node_of_up_misses_nothing_that_it_could_not_offer(cluster: Cluster) -> None:
    assert "slurm" not in cluster.run("node", "list").stderr


def test_a_second_up_on_the_same_state_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    state = json.loads((cluster.directory / "cluster.json").read_text())["lock"].removesuffix("/up.lock")
    more = ["--host-port=0", "--runner-port=0", f"--state-dir={state}"]
    done = cluster.run("up", *more, KOHAKURIVER_CONFIG_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "another --state-dir" in done.stderr


def test_a_second_up_takes_no_commands_from_the_first(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run("up", "--host-port=0", "--runner-port=0", "--ssh-port=0", f"--state-dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert cluster.ready["host_url"] in done.stderr
    assert "KOHAKURIVER_CONFIG_DIR" in done.stderr
    assert not list(tmp_path.iterdir())
    cluster.succeed("vps", "list")


def test_up_on_a_taken_port_is_6(cluster: Cluster, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        more = [f"--host-port={port}", "--runner-port=0", f"--state-dir={tmp_path}"]
        done = cluster.run("up", *more, KOHAKURIVER_CONFIG_DIR=str(tmp_path))
    assert done.returncode == 6
    assert str(port) in done.stderr


@pytest.mark.parametrize("program", ["up", "host", "runner"])
def test_a_limit_that_makes_no_sense_is_refused_in_one_line(cluster: Cluster, tmp_path: Path, program: str) -> None:
    options = {
        "up": ["--host-port=0", "--runner-port=0", "--ssh-port=0", f"--state-dir={tmp_path}"],
        "host": ["--port=0", "--ssh-port=0", f"--state-dir={tmp_path}"],
        "runner": ["--port=0", "--host-url=http://127.0.0.1:1", "--node-token=x"],
    }[program]
    done = cluster.run(program, *options, KOHAKURIVER_MAX_RATE="fast", KOHAKURIVER_CONFIG_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "KOHAKURIVER_MAX_RATE" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_task_goes_through_its_life(cluster: Cluster) -> None:
    created = json.loads(
        cluster.succeed("vps", "create", "--json", "--name", "life", "--backend", "process", "--", "sleep", "1000")
    )
    assert created["name"] == "life"
    assert created["status"] == "running"
    assert created["tunnel"] is True
    shown = json.loads(cluster.succeed("vps", "status", str(created["task_id"]), "--json"))
    assert shown == {**created, "sessions": [], "connected": []}
    assert created in json.loads(cluster.succeed("vps", "list", "--json"))["tasks"]
    assert json.loads(cluster.succeed("vps", "stop", "life", "--json"))["status"] == "stopped"
    assert json.loads(cluster.succeed("vps", "restart", "life", "--json"))["tunnel"] is True
    cluster.succeed("vps", "rm", "life")
    assert cluster.run("vps", "status", "life").returncode == 3


def test_status_shows_what_was_asked_for_and_how_it_ended_and_jargon_only_on_demand(cluster: Cluster) -> None:
    code = "import os\nos._exit(3)"
    options = ["--name=asked", "--backend=process", "--env", "GREETING=hello", "--env=SECRET=hidden", "--no-wait"]
    cluster.succeed("vps", "create", *options, "--", sys.executable, "-c", code)
    eventually(lambda: json.loads(cluster.succeed("vps", "status", "--json", "asked"))["status"] == "failed")
    shown = {line.partition(":")[0]: line.partition(":")[2].strip() for line in _status(cluster, "asked")}
    assert shown["exit code"] == "3"
    assert shown["command"] == f"{sys.executable} -c 'import os\\nos._exit(3)'"
    assert shown["variables"] == "GREETING, SECRET"
    assert not {"waits", "dropped", "container"} & set(shown)
    assert "hidden" not in cluster.succeed("vps", "status", "asked", "--json")
    more = _status(cluster, "asked", "-v")
    assert [line for line in more if line.startswith(("waits:", "dropped:", "container:"))]


def _status(cluster: Cluster, *arguments: str) -> list[str]:
    return cluster.succeed("vps", "status", *arguments).splitlines()


def test_what_ended_with_up_is_started_again_by_one_command(tmp_path: Path) -> None:
    first = Cluster(tmp_path)
    names = {"one", "two"}
    try:
        for name in names:
            first.succeed("vps", "create", "--backend=process", f"--name={name}")
        first.succeed("vps", "adopt", "--address=127.0.0.9", "--name=box")
        assert first.up.stop() == 0
        again = Cluster(tmp_path)
        try:
            lines = again.succeed("vps", "restart", "--all").splitlines()
            assert {line.partition("(")[2].rstrip(").") for line in lines} == names
            tasks = json.loads(again.succeed("vps", "list", "--json"))["tasks"]
            assert {task["name"] for task in tasks if task["status"] == "running" and task["tunnel"]} == names | {"box"}
            assert again.run("vps", "restart", "--all").stderr == "All of your tasks run.\n"
        finally:
            again.close()
    finally:
        first.close()


def test_create_prints_the_id_alone_for_scripts(cluster: Cluster) -> None:
    printed = cluster.succeed("vps", "create", "--backend", "process", "--name", "idle").strip()
    assert printed.isdigit()
    assert ["id:", printed] in [line.split() for line in cluster.succeed("vps", "status", "idle").splitlines()]
    assert "idle" in cluster.succeed("vps", "list")


def test_create_waits_for_a_port_of_the_task_where_that_is_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    with socket.socket() as taken:  # by nobody but the task, which may have it beside this
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        _wait_for_port(cluster, taken.getsockname()[1], tmp_path / "go")


def _wait_for_port(cluster: Cluster, port: int, go: Path) -> None:
    listens = "from socket import *; s = socket(); s.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1)"
    code = f"open({str(go)!r}); {listens}; s.bind(('127.0.0.1', {port})); s.listen(); s.accept()"
    options = ["--name=late", "--backend=process", f"--wait-port={port}"]
    create = cluster.start("vps", "create", *options, "--", sys.executable, "-c", code)
    eventually(
        lambda: any(
            task["tunnel"]
            for task in json.loads(cluster.succeed("vps", "list", "--json"))["tasks"]
            if task["name"] == "late"
        )
    )
    assert create.process.poll() is None
    go.write_text("")
    assert create.ended() == 0
    assert str(port) in cluster.succeed("vps", "ports", "late")
    cluster.succeed("vps", "rm", "late")


@pytest.mark.parametrize(
    ("command", "said"),
    [("sleep 1000", "Nothing listens on port 9 of waits; `kohakuriver vps logs waits`"), ("exit 3", "exit code 3")],
)
def test_create_that_waits_for_a_port_in_vain_ends_with_4_and_why(cluster: Cluster, command: str, said: str) -> None:
    options = ["--name=waits", "--backend=process", "--wait-port=9", "--timeout=2"]
    done = cluster.run("vps", "create", *options, "--", "sh", "-c", command)
    cluster.succeed("vps", "rm", "waits")
    assert (done.returncode, done.stdout) == (4, "")
    assert said in done.stderr


def test_status_says_who_is_connected(cluster: Cluster) -> None:
    service = cluster.service()
    forward = cluster.start("forward", service.task, f"0:{service.port}")
    forward.line("Forwarding")
    assert f"admin (port {service.port}, " in cluster.succeed("vps", "status", service.task)
    (told,) = json.loads(cluster.succeed("vps", "status", service.task, "--json"))["connected"]
    assert (told["user"], told["proto"], told["port"]) == ("admin", "tcp", service.port)
    assert forward.stop() == 0
    eventually(lambda: "connected:" not in cluster.succeed("vps", "status", service.task))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("vps share {task} --list", "There are no links to {task}; `kohakuriver vps share {task} --link PORT`"),
        ("audit --user nobody-of-that-name", "Nothing of that was done"),
    ],
)
def test_a_list_of_nothing_says_so_on_stderr(cluster: Cluster, command: str, said: str) -> None:
    task = cluster.service().task
    done = cluster.run(*command.format(task=task).split())
    assert done.returncode == 0
    assert said.format(task=task) in done.stderr


def test_a_task_gets_its_environment(cluster: Cluster, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "said")
    say = f'echo "$GREETING" > {tmp_path / "said"}; exec sleep 1000'
    cluster.succeed("vps", "create", "--backend=process", "--env", "GREETING=a=b c", "--", "sh", "-c", say)
    assert (tmp_path / "said").read_text() == "a=b c\n"


def test_a_command_that_can_not_run_fails_the_task_with_a_reason(cluster: Cluster) -> None:
    done = cluster.run("vps", "create", "--backend=process", "--name=broken", "--", "/no/such/program")
    assert done.returncode == 4
    assert "Error: " in done.stderr
    assert json.loads(cluster.succeed("vps", "status", "broken", "--json"))["status"] == "failed"


@pytest.mark.parametrize("command", ["vps list", "vps rm t", "forward t 0:80", "auth login", "vps connect t"])
def test_a_path_that_the_host_does_not_have_is_no_missing_task(cluster: Cluster, command: str) -> None:
    url = json.loads(cluster.succeed("auth", "status", "--json"))["host"] + "/elsewhere"
    done = cluster.run(*command.split()[:2], "--host", url, "--token", "x", *command.split()[2:])
    assert done.returncode == 7, done
    assert "/elsewhere" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["vps", "status", "nobody"], 3),
        (["vps", "rm", "nobody"], 3),
        (["vps", "create", "--backend", "process", "--node", "nowhere"], 3),
        (["vps", "create", "--backend", "process", "--name", "Not A Name"], 2),
        (["vps", "adopt", "--address", "not-an-ip", "--node", "n"], 2),
    ],
)
def test_what_the_host_refuses_ends_with_the_fitting_code(cluster: Cluster, arguments: list[str], code: int) -> None:
    done = cluster.run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("Error: ")


def test_a_machine_that_the_runner_reaches_can_be_adopted(cluster: Cluster) -> None:
    service = cluster.service()
    (node,) = json.loads(cluster.succeed("node", "list", "--json"))["nodes"]
    cluster.succeed("vps", "adopt", "--address", "127.0.0.1", "--node", node["name"], "--name", "machine")
    forward = cluster.start("forward", "machine", f"0:{service.port}", "--json")
    with connect(forward.listening()) as connection:
        assert echoes(connection)
    assert forward.stop() == 0


def test_completion_offers_the_names_of_tasks(cluster: Cluster) -> None:
    cluster.succeed("vps", "create", "--backend", "process", "--name", "complete-me")
    words = {"_KOHAKURIVER_COMPLETE": "complete_bash", "COMP_WORDS": "kohakuriver forward compl", "COMP_CWORD": "2"}
    assert cluster.run(**words).stdout.split() == ["complete-me"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_offers_nodes_and_the_ports_that_listen_in_the_task(cluster: Cluster, shell: str) -> None:
    service = cluster.service()
    (node,) = json.loads(cluster.succeed("node", "list", "--json"))["nodes"]
    port = str(service.port)

    def offered(*line: str) -> str:
        words = " ".join(("kohakuriver", *line))
        environment = {"_KOHAKURIVER_COMPLETE": f"complete_{shell}"}
        if shell == "bash":
            environment |= {"COMP_WORDS": words, "COMP_CWORD": str(len(line))}
        else:
            environment |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        return cluster.run(**environment).stdout

    assert node["name"] in offered("node", "drain", node["name"][:1])
    assert node["name"] in offered("vps", "create", "--node", node["name"][:1])
    assert port in offered("forward", service.task, port[:2])
    assert f"0:{port}" in offered("forward", service.task, f"0:{port[:2]}").replace("\\", "")
    assert offered("forward", service.task, "unix:x").strip() in ("", "_files")
    assert port not in offered("forward", "no-such-task", port[:2])


def test_json_output_is_one_object_on_stdout(cluster: Cluster) -> None:
    for arguments in (["vps", "list"], ["node", "list"]):
        out = cluster.succeed(*arguments, "--json")
        assert isinstance(json.loads(out), dict)
        assert out.count("\n") == 1


def test_the_demo_checks_real_bytes_and_ends_with_0(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    demo = Program("demo", "--once", "--size", "8", "--json", environment=environment)
    down, up = demo.event("transfer"), demo.event("transfer")
    assert [down["direction"], up["direction"]] == ["down", "up"]
    assert down["intact"]
    assert up["intact"]
    assert down["bytes"] == up["bytes"] == 8 << 20
    assert demo.event("open")["url"].startswith("http://127.0.0.1:")
    assert demo.ended() == 0
    assert list(tmp_path.iterdir()) == []


def test_the_demo_stays_until_it_is_stopped_and_leaves_nothing_behind(tmp_path: Path) -> None:
    demo = Program("demo", "--size", "1", "--json", environment={**os.environ, "TMPDIR": str(tmp_path)})
    url = demo.event("open")["url"]
    assert re.fullmatch(r"http://kr-[a-z2-7]{26}\.localhost:\d+/login\?code=\S+", demo.event("login")["url"])
    with connect(int(url.rstrip("/").rpartition(":")[2])) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\nHost: here\r\n\r\n")
        assert b"200 OK" in connection.recv(4096)
    processes = psutil.Process(demo.process.pid).children(recursive=True)
    assert demo.stop(signal.SIGINT) == 0
    assert gone(processes)
    assert list(tmp_path.iterdir()) == []


def test_a_forward_and_its_connections_come_back_after_the_host_was_killed_and_started_again(tmp_path: Path) -> None:
    cluster = Apart(tmp_path)
    try:
        service = cluster.service()
        forward = cluster.start("forward", service.task, f"0:{service.port}", "--json", "--path", "host")
        plain = cluster.start("forward", service.task, f"0:{service.port}", "--json", "--no-resume")
        with connect(forward.listening()) as connection, connect(plain.listening()) as reset:
            assert echoes(connection)
            assert echoes(reset)
            cluster.host.stop(signal.SIGKILL)
            broken(reset)
            assert forward.event("reconnecting")["waiting"] == 1
            assert plain.event("reconnecting")["waiting"] == 0
            cluster.start_host()
            assert forward.event("resumed")["waiting"] == 1
            plain.event("resumed")
            assert echoes(connection)
        for each in (forward, plain):
            assert each.stop() == 0
    finally:
        cluster.close()


def test_two_clusters_side_by_side_do_not_meet(cluster: Cluster, own_cluster: Cluster) -> None:
    own = json.loads(own_cluster.succeed("vps", "create", "--json", "--name", "twin", "--backend", "process"))
    assert cluster.run("vps", "status", str(own["task_id"])).returncode == 3
    done = cluster.run("vps", "list", KOHAKURIVER_HOST=own_cluster.ready["host_url"])
    assert done.returncode == 5


def test_what_only_a_runner_that_is_down_could_do_ends_with_4_and_names_node_or_task(tmp_path: Path) -> None:
    apart = Apart(tmp_path)
    try:
        _without_a_runner(apart)
    finally:
        apart.close()


def _without_a_runner(apart: Apart) -> None:
    service = apart.service()
    node = json.loads(apart.succeed("node", "list", "--json"))["nodes"][0]
    assert apart.runner.stop(signal.SIGKILL) == -signal.SIGKILL
    for command in (
        ["connect", service.task, "true"],
        ["forward", service.task, f"0:{service.port}"],
        ["vps", "connect", service.task],
        ["vps", "create", "--backend=process"],
        ["vps", "restart", service.task],
        ["vps", "stop", service.task],
    ):
        done = apart.run(*command)
        assert done.returncode == 4, (command, done)
        assert done.stderr.count("\n") == 1
        assert node["name"] in done.stderr or service.task in done.stderr
        assert node["url"] not in done.stderr or command[0] == "vps"  # where an admin has to see to it
    assert re.search(rf" {service.task} .* running +unreachable ", eventually(lambda: _unreachable(apart, service)))
    assert "tunnel:        unreachable" in apart.succeed("vps", "status", service.task)


def _unreachable(apart: Apart, service: Service) -> str:
    """The list of tasks, once it says that a node can't be reached."""
    listed = apart.succeed("vps", "list")
    return listed if "unreachable" in listed else ""


def test_up_hands_its_mount_roots_to_the_runner_whose_words_it_ends_with(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    done = commands.run("up", "--host-port=0", "--runner-port=0", "--ssh-port=0", "--mount-root=data")
    assert done.returncode == 1
    assert "'data' is no directory that users could mount" in done.stderr
