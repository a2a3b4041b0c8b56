"""Process tasks of a runner that is root run as another user: real host, real runner, real tunnel client."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import forked
from tests.support.doors import door_of
from tests.support.forked import PROGRAM
from tests.support.processes import Cluster, a_cluster, eventually

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root can run tasks as another user"
)

NOBODY = "nobody"
LOOKS = """
id -u; id -G; echo "home $HOME $USER $LOGNAME"; env | grep -c SECRET; pwd
echo mine > made; cat "$PWD/made"
cat ../../../tasks.json ../log || echo "kept out"
echo through > /dev/stdout
echo all
exec sleep 1000
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster whose directory others may enter; those that pytest makes are root's alone."""
    directory = Path(tempfile.mkdtemp(prefix="kohakuriver-"))
    directory.chmod(0o711)
    try:
        with a_cluster(directory) as cluster:
            options = ("--backend", "process", "--process-user", NOBODY, "--user-processes")
            cluster.start_runner("n1", *options, env={"SECRET": "root's"})
            yield cluster
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def task(cluster: Cluster) -> dict[str, Any]:
    return cluster.create("sh", "-c", LOOKS, name="who")


def processes_of(cluster: Cluster, task: dict[str, Any]) -> list[psutil.Process]:
    """All that runs for a task, its tunnel client included."""
    runner = psutil.Process(cluster.runners["n1"].pid)
    return [each for each in runner.children(recursive=True) if task["container"] in str(each.environ())]


def commands(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}
    return forked.run([*words], env=environment, stdin=b"", timeout=60)


def test_a_task_of_a_runner_that_is_root_runs_as_the_user_that_was_named(
    cluster: Cluster, task: dict[str, Any]
) -> None:
    nobody = pwd.getpwnam(NOBODY)
    log = eventually(lambda: text if "all\n" in (text := cluster.log_of(task)) else None).splitlines()
    said = [line for line in log if not line.startswith(("tunnel-client", "cat: "))]
    groups = " ".join(map(str, os.getgrouplist(NOBODY, nobody.pw_gid)))
    work = cluster.state_of("n1") / "tasks" / task["container"] / "work"
    home = f"home {nobody.pw_dir} {NOBODY} {NOBODY}"
    assert said == [str(nobody.pw_uid), groups, home, "0", str(work), "mine", "kept out", "through", "all"]
    assert (work / "made").stat().st_uid == nobody.pw_uid


def test_no_process_of_it_has_a_right_of_the_runners_and_the_tunnel_client_is_one(
    cluster: Cluster, task: dict[str, Any]
) -> None:
    assert cluster.connected("who")["status"] == "running"
    uid = pwd.getpwnam(NOBODY).pw_uid
    found = processes_of(cluster, task)
    assert {name for each in found for name in each.cmdline()[-2:]} >= {"sleep", "1000"}
    assert len(found) >= 2
    assert {(each.uids(), each.gids()) for each in found} == {((uid,) * 3, (pwd.getpwnam(NOBODY).pw_gid,) * 3)}


def test_its_tunnel_clients_token_is_taken_away_also_one_that_is_renewed(
    cluster: Cluster, task: dict[str, Any]
) -> None:
    cluster.connected("who")
    own = cluster.state_of("n1") / "tasks" / task["container"] / "own"
    eventually(lambda: not list(own.iterdir()))
    assert cluster.call("POST", "/api/users", {"name": "ann"})[0] == 201
    assert cluster.call("POST", "/api/tasks/who/shares", {"user": "ann"})[0] == 201
    assert cluster.call("DELETE", "/api/tasks/who/shares/ann")[0] == 200
    eventually(lambda: not list(own.iterdir()))
    assert cluster.task("who")["message"] is None


def test_its_socket_of_the_runner_is_that_users_alone(cluster: Cluster, task: dict[str, Any]) -> None:
    cluster.connected("who")
    door = door_of(cluster, task["container"])
    found = [(each.stat().st_uid, stat.S_IMODE(each.stat().st_mode)) for each in (door.parent, door)]
    assert found == [(0, 0o710), (pwd.getpwnam(NOBODY).pw_uid, 0o600)]


@pytest.mark.parametrize("tty", [False, True])
def test_a_command_beside_it_runs_as_that_user_and_has_its_terminal(cluster: Cluster, tty: bool) -> None:
    name = "terminal" if tty else "pipes"
    cluster.connected(cluster.create(name=name)["task_id"])
    line = "id -u; echo again > /dev/stdout; test -w $(tty) && echo own terminal; cat /root/x"
    command = ["connect", name, "--", "sh", "-c", line]
    if tty:
        command = ["script", "-qec", " ".join([*PROGRAM, *command[:-1], f"'{line}'"]), "/dev/null"]
        environment = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}
        done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    else:
        done = commands(cluster, *command)
    said = done.stdout.decode().replace("^@", "").split("\r\n" if tty else "\n")  # `script` echoes the end of its stdin
    assert said[:2] == [str(pwd.getpwnam(NOBODY).pw_uid), "again"], done
    assert ("own terminal" in said) == tty
    assert b"ermission denied" in done.stdout + done.stderr


def test_a_command_beside_it_starts_in_no_directory_that_is_closed_to_that_user(cluster: Cluster) -> None:
    cluster.connected(cluster.create(name="closed")["task_id"])
    closed = commands(cluster, "connect", "closed", "--workdir", str(cluster.host_state), "--", "true")
    missing = commands(cluster, "connect", "closed", "--workdir", "/nowhere", "--", "true")
    assert b"There is no directory" in closed.stderr
    assert (closed.returncode, closed.stderr.replace(str(cluster.host_state).encode(), b"/nowhere")) == (
        missing.returncode,
        missing.stderr,
    )


def test_its_ssh_server_runs_as_that_user(cluster: Cluster, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    task = cluster.create(name="dev", ssh_keys=[key.with_suffix(".pub").read_text().strip()])
    task = cluster.connected(task["task_id"])
    assert task["message"] is None, task["message"]
    runner = psutil.Process(cluster.runners["n1"].pid)
    servers = [each for each in runner.children() if "sshd" in each.exe() and each.uids().real]
    assert [each.username() for each in servers] == [NOBODY]


def test_its_ports_are_those_of_that_users_processes_which_are_of_this_task(cluster: Cluster) -> None:
    def port_of(name: str) -> int | None:
        """The one port that its task has, by the task's own busybox."""
        status, told = cluster.call("GET", f"/api/tasks/{name}/ports")
        assert status == 200, told
        assert {each["program"] for each in told["ports"]} <= {"busybox"}
        return told["ports"][0]["port"] if len(told["ports"]) == 1 else None

    for name in ("one", "two"):
        cluster.create("/bin/busybox", "nc", "-ll", "-e", "/bin/busybox", "cat", name=name)
        cluster.connected(name)
    assert eventually(lambda: port_of("one")) != eventually(lambda: port_of("two"))


def test_a_task_of_another_time_keeps_its_files(cluster: Cluster) -> None:
    task = cluster.create("sh", "-c", "echo more >> notes/kept && exec sleep 1000", name="moved")
    cluster.ended("moved")
    notes = cluster.state_of("n1") / "tasks" / task["container"] / "work" / "notes"
    notes.mkdir()
    (notes / "kept").write_text("root's\n")
    (notes / "link").symlink_to(cluster.host_state / "admin-token")
    os.chown(notes.parent, 0, 0)
    assert cluster.call("POST", "/api/tasks/moved/restart")[0] == 200
    cluster.connected("moved")
    assert eventually(lambda: (notes / "kept").read_text().count("\n") == 2)
    assert (cluster.host_state / "admin-token").stat().st_uid == 0


def test_it_is_said_when_the_runner_starts_whom_everybody_can_be(cluster: Cluster, task: dict[str, Any]) -> None:
    assert "EVERY USER OF THIS CLUSTER IS THE USER NOBODY" in cluster.runners["n1"].log.read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--backend", "process", "--process-user", "no-such-user"], "this machine has no user 'no-such-user'"),
        (["--process-user", NOBODY], "--process-user is about --backend process"),
        (["--backend", "process", "--process-user", NOBODY], "nobody may not enter"),
    ],
)
def test_a_user_that_tasks_cant_run_as_keeps_the_runner_from_starting(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    state = ["--state-dir", str(tmp_path / "closed" / "state"), "--port", "0", "--bind", "127.0.0.1"]
    done = forked.run(
        ["runner", "--host-url", "http://127.0.0.1:9", "--node-token", "x", *state, *options],
        env=dict(os.environ),
        stdin=b"",
        timeout=60,
    )
    assert done.returncode == 2
    assert sentence in done.stderr.decode()


def test_a_runner_that_is_not_root_has_no_tasks_of_others() -> None:
    line = (
        "import os, sys; from pathlib import Path; from kohakuriver.errors import UsageError\n"
        "from kohakuriver.runner.backends.process.account import account_named\n"
        f"os.setuid({pwd.getpwnam(NOBODY).pw_uid})\n"
        f"print(account_named({NOBODY!r}, Path('/tmp')).whose)\n"
        "try: account_named('root', Path('/tmp'))\n"
        "except UsageError as error: print(error.message)"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "the runner's own user",
        "--process-user takes a runner that is root; start it as root, or leave the option out.",
    ]
