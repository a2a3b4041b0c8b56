"""Agents: a task is whatever dials in, with the rights, limits and commands of every task."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

import kohakuriver
from tests.support.agents import WEB, Lab, environment_of, lab_at
from tests.support.processes import eventually
from tests.support.ssh import make_key
from tests.support.up import connect as connected
from tests.support.up import echoes, refused

NOBODY = 61234  # as no process of this machine is
MANIFEST = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "agent.yaml"
SLEEP = ["sleep", "1000"]
V2 = Subprotocol("kohakuriver.tunnel.v2")


def through(port: int, data: bytes = b"hello") -> bool:
    """Whether what goes through a forward comes back."""
    with connected(port) as connection:
        return echoes(connection, data)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab_at(tmp_path_factory.mktemp("agents"), "127.0.0.1", "--metrics", "0") as lab:
        yield lab


def test_a_task_is_there_as_long_as_its_agent_and_ends_with_its_commands_exit_code(lab: Lab) -> None:
    agent = lab.agent("--name=job", command=["sh", "-c", "read line < fifo; exit 3"])
    os.mkfifo(lab.directory / "fifo")
    task = lab.connected("job")
    assert (task["status"], task["backend"], task["owner"]) == ("running", "agent", "ann")
    assert task["message"] == f"its agent runs on {os.uname().nodename}"
    (lab.directory / "fifo").write_text("go\n")
    assert agent.ended() == 3
    ended = lab.is_("job", "failed")
    assert (ended["exit_code"], ended["tunnel"]) == (3, False)
    assert "exit code 3" in ended["message"]
    made = [line for line in lab.audit("task_created") if line["name"] == "job"]
    assert [line["user"] for line in made] == ["ann"]


def measured(lab: Lab, name: str, **labels: str) -> float:
    """A sample of the host's measures."""
    families = text_string_to_metric_families(httpx.get(str(lab.metrics), trust_env=False).text)
    samples = (sample for family in families for sample in family.samples)
    return sum(each.value for each in samples if each.name == f"kohakuriver_{name}" and each.labels == labels)


def test_an_agent_is_measured_and_written_down_as_it_comes_and_goes(lab: Lab) -> None:
    def here(state: str) -> float:
        return measured(lab, "agents", state=state)

    def passed() -> float:
        return measured(lab, "agent_bytes_total", direction="to_container")

    before, so_far, connected_before = here("away"), passed(), here("connected")
    agent, port = lab.echoing("seen", "--ports", "all")
    assert here("connected") == connected_before + 1
    with kohakuriver.forward_sync("seen", port, host=lab.url, token=lab.tokens["ann"]) as forward:
        with connected(forward.local_port) as connection:
            assert echoes(connection, bytes(1000))
            assert measured(lab, "streams") == 1
    assert passed() >= so_far + 1000
    agent.stop(signal.SIGKILL)
    eventually(lambda: here("away") == before + 1)
    again, _ = lab.echoing("seen")
    assert here("away") == before
    again.stop()
    ended = lab.is_("seen", "failed")
    lines = [line for event in ("agent_connected", "agent_left") for line in lab.audit(event)]
    lines = [line for line in lines if line["name"] == "seen"]
    came, left = ([line for line in lines if line["event"] == f"agent_{what}"] for what in ("connected", "left"))
    assert [line["machine"] for line in came] == [os.uname().nodename] * 2
    assert [(line["user"], line["owner"], line["task"]) for line in lines] == [("ann", "ann", ended["task_id"])] * 4
    assert [line["code"] for line in left] == [1006, 1000]
    assert ["exit_code" in line for line in left] == [False, True]
    assert left[1]["exit_code"] == ended["exit_code"]
    assert all(line["seconds"] > 0 and line["from"].startswith("127.0.0.1:") for line in left)
    assert [line["from"] for line in came] == [line["from"] for line in left]


def test_forward_terminal_and_copies_work_over_one_connection_out(lab: Lab, tmp_path: Path) -> None:
    _, port = lab.echoing("all", "--ports", "all")
    of_ann = lab.of("ann")
    with kohakuriver.forward_sync("all", port, host=lab.url, token=lab.tokens["ann"]) as forward:
        assert through(forward.local_port, os.urandom(1 << 20))
    shown = json.loads(lab.run("vps", "ports", "--json", "all", **of_ann).stdout)
    assert port in [each["port"] for each in shown["ports"]]
    done = lab.run("connect", "all", "--", "sh", "-c", "cat; exit 7", stdin="piped", **of_ann)
    assert (done.returncode, done.stdout) == (7, "piped")
    content = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(content)
    assert lab.run("cp", str(tmp_path / "file"), f"all:{tmp_path}/copy", **of_ann).returncode == 0
    assert (tmp_path / "copy").read_bytes() == content


def shown_of(process: int) -> bytes:
    """What others of its user can read of how a process was started, and of what it has open."""
    about = Path(f"/proc/{process}")
    opened = [each.read_bytes() for each in about.glob("fd/*") if "token" in str(each.readlink())]
    return b"".join([(about / "environ").read_bytes(), (about / "cmdline").read_bytes(), *opened])


def test_the_command_line_starts_an_agent_with_an_ssh_server(lab: Lab) -> None:
    agent = lab.launch(
        [sys.executable, "-m", "kohakuriver", "agent", "--name", "with-ssh", "--ssh", "--", *SLEEP], **lab.of("ann")
    )
    lab.connected("with-ssh")
    done = lab.run("vps", "connect", "with-ssh", "-i", str(lab.key), "echo over ssh; exit 5", **lab.of("ann"))
    assert (done.returncode, done.stdout) == (5, "over ssh\n"), done.stderr
    servers = subprocess.run(["pgrep", "-P", str(agent.process.pid)], capture_output=True, text=True, check=True)
    pids = [int(pid) for pid in servers.stdout.split()]
    assert [pid for pid in (agent.process.pid, *pids) if lab.tokens["ann"].encode() in shown_of(pid)] == []
    agent.stop()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_each_agent_with_an_ssh_server_lets_in_whom_it_was_told_to_whatever_others_are_told(
    lab: Lab, tmp_path: Path
) -> None:
    program = [sys.executable, "-m", "kohakuriver", "agent", "--public-key-file"]
    keys = [tmp_path / "first", tmp_path / "second"]
    for key in keys:
        make_key(key)
    agents = [lab.launch([*program, f"{key}.pub", "--", "true"], **lab.of("ann")) for key in keys]
    assert [agent.ended() for agent in agents] == [0, 0]
    files = list(lab.directory.rglob("any/run-*/authorized_keys"))
    blobs = [Path(f"{key}.pub").read_text().split()[1] for key in keys]
    told = sorted([blob in path.read_text() for blob in blobs] for path in files)
    assert told == [[False, True], [True, False]]
    for path in files:
        os.utime(path.parent, (0, 0))
    assert lab.launch([*program, f"{keys[0]}.pub", "--", "true"], **lab.of("ann")).ended() == 0
    assert not any(path.exists() for path in files)  # their servers have ended


def test_what_can_be_no_name_is_refused_before_anything_is_written(lab: Lab) -> None:
    done = lab.run("agent", "--ssh", "--name", "../../../../.ssh", **lab.of("ann"))
    assert done.returncode == 2
    assert "can't be a task's name" in done.stderr


def test_only_what_the_users_own_processes_listen_on_is_offered(lab: Lab) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be two users")
    # Two processes of one machine: the agent is nobody's, the service is not.
    _, port = lab.echoing("mine", "--ports", "all")
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    lab.directory.chmod(0o755)
    program = [*nobody, os.environ.get("KOHAKURIVER_TUNNEL_CLIENT") or lab.environment["KOHAKURIVER_TUNNEL_CLIENT"]]
    lab.launch([*program, "agent", "--name=shared", "--", *SLEEP], **lab.of("ann"))
    lab.connected("shared")
    assert lab.ask("GET", "/api/tasks/shared/ports", user="ann")["ports"] == []
    with kohakuriver.forward_sync("shared", port, host=lab.url, token=lab.tokens["ann"]) as forward:
        assert refused(forward.local_port)
    lab.launch([*program, "agent", "--name=named", f"--ports={port}", "--", *SLEEP], **lab.of("ann"))
    lab.connected("named")
    with kohakuriver.forward_sync("named", port, host=lab.url, token=lab.tokens["ann"]) as forward:
        assert through(forward.local_port)


def test_stop_ends_the_agent_and_its_command_and_rm_forgets_the_task(lab: Lab) -> None:
    agent = lab.agent("--name=stopped", command=["sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.05; done"])
    lab.connected("stopped")
    again = lab.run("vps", "restart", "stopped", **lab.of("ann"))
    assert again.returncode == 4
    assert "kohakuriver agent --name stopped" in again.stderr
    assert lab.run("vps", "stop", "stopped", **lab.of("ann")).returncode == 0
    assert agent.ended() == 9
    stopped = lab.task("stopped")
    assert (stopped["status"], stopped["exit_code"], stopped["message"]) == ("stopped", 9, "it was stopped")
    assert lab.run("vps", "rm", "stopped", **lab.of("ann")).returncode == 0
    assert lab.task("stopped") == {}
    removed = lab.agent("--name=removed")
    lab.connected("removed")
    lab.ask("DELETE", "/api/tasks/removed", user="ann")
    assert removed.ended() == 0


def test_a_signal_is_the_commands_and_its_token_is_not(lab: Lab) -> None:
    script = "echo token=$KOHAKURIVER_TOKEN.; trap 'echo got USR1; exit 4' USR1; while :; do sleep 0.05; done"
    agent = lab.agent("--name=signals", command=["sh", "-c", script])
    eventually(lambda: "token=.\n" in agent.printed)
    words = Path(f"/proc/{agent.process.pid}/cmdline").read_text()
    assert lab.tokens["ann"] not in words
    [child] = subprocess.run(
        ["pgrep", "-P", str(agent.process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()[:1]
    assert "KOHAKURIVER_TOKEN" not in environment_of(int(child))
    assert environment_of(agent.process.pid)["HOME"] == str(lab.home)
    assert lab.tokens["ann"].encode() not in shown_of(agent.process.pid)
    assert agent.stop(signal.SIGUSR1) == 4
    assert "got USR1" in agent.printed


def test_an_agent_that_is_gone_without_a_word_is_lost_and_one_of_its_name_is_the_task_again(lab: Lab) -> None:
    agent, _ = lab.echoing("desk")
    before = lab.task("desk")["task_id"]
    lab.ask("POST", "/api/tasks/desk/shares", {"user": "bob"}, user="ann")
    agent.stop(signal.SIGKILL)
    away = eventually(lambda: task if not (task := lab.task("desk"))["tunnel"] else None)
    assert away["message"] == "its agent is not connected at the moment"
    done = lab.run("connect", "desk", "--", "id", **lab.of("ann"))
    assert done.returncode == 4
    assert "tunnel is not connected" in done.stderr
    done = lab.run("vps", "agent-command", "desk", **lab.of("ann"))
    assert "has its agent" in done.stderr
    _, port = lab.echoing("desk")
    now = lab.connected("desk")
    assert (now["task_id"], now["status"], now["shared_with"]) == (before, "running", ["bob"])
    with kohakuriver.forward_sync("desk", port, host=lab.url, token=lab.tokens["bob"]) as forward:
        assert through(forward.local_port)


def test_a_task_that_has_ended_is_one_again_with_all_that_it_can(lab: Lab) -> None:
    first = lab.agent("--name=again", command=["true"])
    assert first.ended() == 0
    before = lab.is_("again", "stopped")["task_id"]
    agent, port = lab.echoing("again")
    with kohakuriver.forward_sync("again", port, host=lab.url, token=lab.tokens["ann"]) as forward:
        assert through(forward.local_port)
    assert lab.connected("again")["task_id"] == before
    second = lab.agent("--name=again", command=["true"])
    assert second.ended() == 4  # while the other one answers
    assert lab.ask("POST", "/api/tasks/again/stop", user="ann")["exit_code"] == 128 + signal.SIGTERM
    assert agent.ended() == 128 + signal.SIGTERM


def test_a_name_that_is_anothers_and_a_limit_refuse_an_agent_before_its_command_runs(lab: Lab, tmp_path: Path) -> None:
    lab.agent("--name=taken")
    lab.connected("taken")
    mark = tmp_path / "ran"
    for who in ("ann", "bob"):
        second = lab.agent("--name=taken", command=["touch", str(mark)], token=lab.tokens[who])
        assert second.ended() == 4
        assert "end one of the two" in second.printed or "There is a task named 'taken'" in second.printed
    lab.ask("PATCH", "/api/users/bob/limits", {"tasks": 0.0})
    lab.ask("PATCH", "/api/users/bob/limits", {"tasks": 1})
    lab.agent("--name=first-of-bob", token=lab.tokens["bob"])
    lab.connected("first-of-bob")
    more = lab.agent(command=["touch", str(mark)], token=lab.tokens["bob"])
    assert more.ended() == 4
    assert "the limit 'tasks' of bob is 1" in more.printed
    assert not mark.exists()


def test_whom_a_task_is_not_shared_with_is_refused(lab: Lab) -> None:
    _, port = lab.echoing("private")
    for words in (["forward", "private", f"0:{port}"], ["connect", "private", "--", "id"], ["vps", "stop", "private"]):
        done = lab.run(*words, **lab.of("bob"))
        assert done.returncode == 5, done.stderr
        assert "not yours" in done.stderr


def test_a_token_for_an_agent_makes_one_task_and_does_nothing_else(lab: Lab, tmp_path: Path) -> None:
    made = lab.run("token", "create", "--agent", "--json", "once", **lab.of("ann"))
    shown = json.loads(made.stdout)
    assert (shown["kind"], shown["expires_at"] is not None) == ("agent", True)
    token = shown["token"]
    assert lab.run("vps", "list", KOHAKURIVER_TOKEN=token).returncode == 5
    file = tmp_path / "token"
    file.write_text(token)
    agent = lab.agent("--name=once", f"--token-file={file}", command=SLEEP, token="no such token")
    lab.connected("once")
    second = lab.agent("--name=twice", token=token)
    assert second.ended() == 5
    assert "has made its task" in second.printed
    assert lab.run("token", "revoke", "once", **lab.of("ann")).returncode == 0
    task = eventually(lambda: task if not (task := lab.task("once"))["tunnel"] else None)
    assert "its agent may not come in: this token was revoked" in task["message"]
    assert agent.process.poll() is None  # what runs there is its user's, and goes on
    assert lab.agent("--name=late", token=token).ended() == 5


def test_a_token_that_has_expired_makes_no_task(lab: Lab) -> None:
    made = lab.ask("POST", "/api/tokens", {"agent": True, "expires_in": 0.001}, user="ann")
    time.sleep(0.01)
    late = lab.agent("--name=expired", token=made["token"])
    assert late.ended() == 5
    assert "has expired" in late.printed


@pytest.mark.parametrize(
    ("query", "client", "status"),
    [
        ("name=garbage", "", 400),
        ("name=garbage", "zz" * 16, 400),
        ("name=Not%20A%20Name", "0" * 32, 400),
        ("task=12x", "0" * 32, 400),
        ("ssh_port=99999", "0" * 32, 400),
        ("ssh_host_key=rubbish", "0" * 32, 400),
    ],
)
def test_what_no_agent_says_is_refused_in_a_sentence(lab: Lab, query: str, client: str, status: int) -> None:
    async def main() -> None:
        headers = {"Authorization": f"Bearer {lab.tokens['ann']}", "KohakuRiver-Client": client}
        url = f"ws{lab.url.removeprefix('http')}/ws/agent?{query}"
        with pytest.raises(InvalidStatus) as refusal:
            await connect(url, subprotocols=[V2], additional_headers=headers)
        answer = refusal.value.response
        assert answer.status_code == status
        assert json.loads(answer.body)["message"].endswith(".")

    asyncio.run(main())
    assert lab.task("garbage") == {}


def test_bytes_that_are_no_protocol_end_the_link_and_nothing_else(lab: Lab) -> None:
    async def main() -> None:
        headers = {"Authorization": f"Bearer {lab.tokens['ann']}", "KohakuRiver-Client": "ab" * 16}
        url = f"ws{lab.url.removeprefix('http')}/ws/agent?name=rubbish"
        async with connect(url, subprotocols=[V2], additional_headers=headers) as socket:
            assert socket.response is not None
            assert socket.response.headers["KohakuRiver-Task"].endswith(" rubbish")
            for message in (b"", b"\xff" * 64, b"\x03\0\0\0\0\x09\0\0unknown", b"\x11\0\0\0\0\0\0\0\xff\xff"):
                await socket.send(message)
            await socket.send(b"\x01" * 7)  # shorter than a header
            await socket.wait_closed()

    asyncio.run(main())
    lab.echoing("after-rubbish")


def test_the_agent_of_the_kubernetes_manifest_is_a_task_from_an_image_with_nothing_else(
    lab: Lab, tmp_path: Path
) -> None:
    """Its arguments, as its user, in a root directory that has the program and its token alone."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for a root directory of its own")
    manifest = MANIFEST.read_text("utf-8")
    [arguments] = re.findall(r"^ +args: \[(agent, .*)\]$", manifest, re.MULTILINE)
    [user] = re.findall(r"^ +runAsUser: (\d+)$", manifest, re.MULTILINE)
    root = tmp_path / "root"
    (root / "run" / "kohakuriver").mkdir(parents=True)
    shutil.copy(lab.environment["KOHAKURIVER_TUNNEL_CLIENT"], root / "tunnel-client")
    made = lab.ask("POST", "/api/tokens", {"agent": True}, user="ann")
    (root / "run" / "kohakuriver" / "token").write_text(made["token"])
    pod = lab.launch(["chroot", f"--userspec={user}:{user}", str(root), "/tunnel-client", *arguments.split(", ")])
    _, port = lab.echoing("in-the-pod")
    lab.connected("notebook")
    with kohakuriver.forward_sync("notebook", port, host=lab.url, token=lab.tokens["ann"]) as forward:
        assert through(forward.local_port)
    assert pod.stop() == 0
    assert lab.is_("notebook", "stopped")["exit_code"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_an_agent_whose_host_does_not_answer_without_its_command(
    lab: Lab, tmp_path: Path, number: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        agent = lab.agent(command=["touch", str(tmp_path / "begun")], KOHAKURIVER_HOST=host)
        with silent.accept()[0] as connection:
            assert connection.recv(1)
            assert agent.stop(number) == 128 + number
    assert not (tmp_path / "begun").exists()


def test_an_agent_that_was_away_is_told_that_its_task_was_stopped_or_removed(tmp_path: Path) -> None:
    script = ["sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done"]
    with lab_at(tmp_path) as lab:
        agents = {name: lab.agent(f"--name={name}", command=script) for name in ("asleep", "removed", "unknown")}
        for name, agent in agents.items():
            lab.connected(name)
            eventually(lambda agent=agent: "ready" in agent.printed)  # type: ignore[misc]
        lab.host.stop()
        for agent in agents.values():
            agent.process.send_signal(signal.SIGSTOP)
        lab.start_host()
        assert lab.ask("POST", "/api/tasks/asleep/stop", user="ann")["status"] == "stopped"
        assert lab.ask("DELETE", "/api/tasks/removed", user="ann")["pending_removal"] is True
        assert lab.task("removed") == {}
        for agent in agents.values():
            agent.process.send_signal(signal.SIGCONT)
        assert [agents[name].ended() for name in ("asleep", "removed")] == [9, 9]
        # What a host knows nothing of, as after a backup was restored, it does not end.
        before = lab.connected("unknown")["task_id"]
        lab.host.stop()
        database = sqlite3.connect(lab.directory / "host" / "host.db")
        with contextlib.closing(database), database:
            database.execute("DELETE FROM tasks")
        lab.start_host()
        assert lab.connected("unknown")["task_id"] != before
        assert agents["unknown"].process.poll() is None


def test_a_command_that_ends_while_the_host_is_restarted_is_not_lost(tmp_path: Path) -> None:
    with lab_at(tmp_path) as lab:
        os.mkfifo(tmp_path / "fifo")
        agent = lab.agent("--name=late", command=["sh", "-c", "read line < fifo; exit 6"])
        lab.connected("late")
        lab.host.stop()
        (tmp_path / "fifo").write_text("go\n")
        lab.start_host()
        assert agent.ended() == 6
        assert lab.is_("late", "failed")["exit_code"] == 6


def test_an_agent_over_tls_trusts_whom_it_is_told_to(tmp_path: Path) -> None:
    from kohakuriver.cli.pki import Authority

    made = Authority(tmp_path / "ca").issue(["127.0.0.1"], 1)
    options = (f"--tls-cert={made.cert}", f"--tls-key={made.key}")
    with lab_at(tmp_path, "127.0.0.1", *options) as lab:
        trusting = {"KOHAKURIVER_CA_FILE": str(tmp_path / "ca" / "ca.pem")}
        _, port = lab.echoing("secure", **trusting)
        lab.environment |= trusting
        ca_file, token = trusting["KOHAKURIVER_CA_FILE"], lab.tokens["ann"]
        with kohakuriver.forward_sync("secure", port, host=lab.url, token=token, ca_file=ca_file) as forward:
            assert through(forward.local_port, os.urandom(8 << 20))
        quick = lab.agent("--name=quick", command=["true"])
        assert quick.ended() == 0
        assert lab.is_("quick", "stopped")["exit_code"] == 0  # its last word came through
        stranger = lab.agent("--name=stranger", command=WEB, KOHAKURIVER_CA_FILE=str(made.cert))
        eventually(lambda: "certificate" in stranger.printed)
        assert lab.task("stranger") == {}
