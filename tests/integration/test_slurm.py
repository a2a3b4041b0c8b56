"""Tasks that are jobs of a real Slurm, of two users on one node: real host, real runner, real tunnel client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import kohakuriver
from kohakuriver.cli.pki import Authority
from tests.support import forked
from tests.support.hops import binary
from tests.support.processes import PATIENCE, Cluster, a_cluster, ask, eventually
from tests.support.slurm import Slurm, SlurmUser, a_slurm

ECHO = """
import socket, sys
door = socket.create_server(('127.0.0.1', int(sys.argv[1])))
while True:
    came, _ = door.accept()
    came.sendall(sys.argv[2].encode() + came.recv(99))
    came.close()
"""


ASK = """
import socket, sys
sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
sock.sendall(b'?')
sys.stdout.buffer.write(sock.recv(99))
"""

AS_A_SERVICE = ("sh", "-c", 'umask 077; ulimit -Sn 4321; exec "$@"', "sh")
"""As the runner's systemd unit has it started."""


@dataclass
class Person:
    """A user of ours, who is a user of the cluster."""

    name: str
    token: str
    user: SlurmUser
    http: httpx.Client

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        answer = self.http.request(method, path, json=body)
        return answer.status_code, answer.json()

    def create(self, *command: str, **more: Any) -> dict[str, Any]:
        status, task = self.call("POST", "/api/tasks", {"backend": "slurm", "command": list(command), **more})
        assert status == 201, task
        return dict(task)


class Lab:
    """The Slurm, and a cluster of ours with a runner at it."""

    def __init__(self, slurm: Slurm, cluster: Cluster, authority: Authority) -> None:
        self.slurm = slurm
        self.authority = authority
        self.cluster = cluster
        self.mapping = slurm.directory / "users"
        self.ann, self.bob = (self._person(name, user) for name, user in zip(("ann", "bob"), slurm.users, strict=True))
        self.mapping.write_text(f"# who is who\nann {self.ann.user.name}\nbob {self.bob.user.name}\n")

    def _person(self, name: str, user: SlurmUser) -> Person:
        self.cluster.call("POST", "/api/users", {"name": name})
        status, made = self.cluster.call("POST", "/api/tokens", {"user": name})
        assert status == 201, made
        headers = {"Authorization": f"Bearer {made['token']}"}
        http = httpx.Client(base_url=self.cluster.url, headers=headers, timeout=60, trust_env=False)
        return Person(name, made["token"], user, http)

    def start_runner(self, name: str = "login", *more: str) -> None:
        options = ("--backend", "slurm", "--slurm-users", str(self.mapping), *more)
        self.cluster.start_runner(name, *options, env=self.slurm.environment, under=AS_A_SERVICE)

    def kohakuriver(self, who: Person, *words: str) -> subprocess.CompletedProcess[bytes]:
        """A command of a user."""
        environment = {**os.environ, "KOHAKURIVER_HOST": self.cluster.url, "KOHAKURIVER_TOKEN": who.token}
        return forked.run([*words], env=environment, stdin=b"", timeout=PATIENCE)

    def job_of(self, task: dict[str, Any]) -> str:
        """The number of the job that a task is, as its user is told."""
        found = re.search(r"Slurm job (\d+)", self.cluster.task(task["task_id"])["message"])
        assert found is not None
        return found[1]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with a_slurm(users=2) as slurm:
        directory = Path(tempfile.mkdtemp(prefix="kohakuriver-"))
        try:
            authority = Authority(directory / "ca")
            with a_cluster(directory, "--ca-file", str(authority.cert)) as cluster:
                lab = Lab(slurm, cluster, authority)
                lab.start_runner()
                yield lab
                lab.ann.http.close()
                lab.bob.http.close()
        finally:
            shutil.rmtree(directory)


def serving(port: int, word: str) -> str:
    """A script that answers at a port of loopback with a word and what it was asked."""
    return f"exec {shlex.join(['/usr/bin/python3', '-c', ECHO, str(port), word])}"


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    yield
    for task in lab.cluster.call("GET", "/api/tasks")[1]:
        lab.cluster.call("DELETE", f"/api/tasks/{task['task_id']}")
    lab.slurm.cancel_all()


@pytest.fixture
def port() -> int:
    return free_port()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ports(who: Person, task: str) -> list[int]:
    status, told = who.call("GET", f"/api/tasks/{task}/ports")
    assert status == 200, told
    return [each["port"] for each in told["ports"]]


def first_ports(who: Person, task: str) -> list[int]:
    """Those that a task has once it has any."""
    return eventually(lambda: ports(who, task) or None)


def answer(lab: Lab, who: Person, task: str, port: int) -> bytes:
    """What a service answers through a forward of that user, once it listens."""
    eventually(lambda: port in ports(who, task))
    with kohakuriver.forward_sync(task, port, host=lab.cluster.url, token=who.token) as forward:
        return ask(forward.local_port, b"?")


def test_a_job_is_of_its_owners_user_on_the_cluster_and_has_what_was_asked_for(lab: Lab, port: int) -> None:
    script = f"id -un; pwd; echo $WORD; echo gpu $CUDA_VISIBLE_DEVICES; umask; ulimit -Sn; {serving(port, 'ann')}"
    asked = {"gpus": "1", "cpus": 2, "memory": 1 << 30, "time_limit": 4 * 3600, "partition": "gpu"}
    task = lab.ann.create("sh", "-c", script, name="one", env={"WORD": "it's $HOME"}, **asked)
    lab.cluster.connected("one")
    shown = eventually(lambda: seen if (seen := lab.cluster.task("one"))["ends_at"] else None)
    job = lab.job_of(task)
    assert shown["message"] == f"Slurm job {job} on {lab.slurm.node}"
    fields = ("UserName", "Partition", "TimeLimit", "cpus-per-task", "MinMemory", "tres-per-job")
    assert lab.slurm.about(job, *fields).split() == [lab.ann.user.name, "gpu", "4:00:00", "2", "1G", "gres:gpu:1"]
    assert first_ports(lab.ann, "one") == [port]
    assert answer(lab, lab.ann, "one", port) == b"ann?"
    said = lab.kohakuriver(lab.ann, "vps", "logs", "one").stdout.decode().splitlines()
    assert said[:-1] == [lab.ann.user.name, str(lab.ann.user.home), "it's $HOME", "gpu 0", "0022"]
    assert said[-1] != "4321", "the limits are those of Slurm and its node, as is the umask none of a service"
    status = lab.kohakuriver(lab.ann, "vps", "status", "one").stdout.decode()
    assert re.search(r"ends: +in (4 h|3 h 59 min): time limit in Slurm", status), status
    assert re.search(r"gets: +1 GiB of memory, 2 CPUs, 1 GPU\n", status), status
    assert re.search(r"scheduled: +partition gpu, time limit 4 h\n", status), status
    assert lab.kohakuriver(lab.ann, "connect", "one", "--", "id", "-un").stdout.decode() == f"{lab.ann.user.name}\n"
    lab.ann.call("DELETE", "/api/tasks/one")
    eventually(lambda: lab.slurm.state_of(job) == "CANCELLED")


def test_a_jobs_token_is_on_no_command_line_and_in_no_file_that_others_can_read(lab: Lab) -> None:
    task = lab.ann.create("sleep", "1000", name="secret")
    lab.cluster.connected("secret")
    tasks = json.loads((lab.cluster.state_of("login") / "tasks.json").read_text())
    token = next(each["tunnel_token"] for each in tasks if each["container"] == task["container"])
    assert len(token) == 64
    for process in psutil.process_iter(["cmdline"]):
        assert token not in " ".join(process.info["cmdline"] or [])
    assert named(task) == []
    command = of_user(lab.ann.user)[task["container"]].children()[0]
    held = [str(each.readlink()) for each in Path(f"/proc/{command.pid}/fd").iterdir()]
    assert [each for each in held if "deleted" in each] == [], "the command has neither client nor token open"


def named(task: dict[str, Any]) -> list[Path]:
    """What has a name for a task where its job runs."""
    return list(Path("/tmp").glob(f"{task['container']}-*"))


def of_user(user: SlurmUser) -> dict[str, psutil.Process]:
    """A user's tunnel clients by their tasks' containers, and all else that runs as that user."""
    found = {}
    for process in psutil.process_iter(["name", "uids"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.info["uids"].real == user.uid and process.status() != psutil.STATUS_ZOMBIE:
                client = process.info["name"] == "tunnel-client"
                found[process.environ()["KOHAKURIVER_CONTAINER_ID"] if client else str(process.pid)] = process
    return found


def test_nothing_of_a_job_is_left_where_it_ran_however_it_ends(lab: Lab) -> None:
    tasks = {name: lab.ann.create("sleep", "1000", name=name) for name in ("removed", "limit", "kill", "own")}
    for name in ("beside-removed", "beside-job", "beside-client"):
        job = lab.slurm.submit(lab.ann.user, "sleep 1000")
        status, tasks[name] = lab.ann.call("POST", "/api/tasks/adopt", {"job": job, "name": name})
        assert status == 201, tasks[name]
    for name in tasks:
        lab.cluster.connected(name)
    jobs = {name: lab.job_of(task) for name, task in tasks.items()}
    assert [path for task in tasks.values() for path in named(task)] == [], "nor is anything while it runs"
    clients = of_user(lab.ann.user)
    for name in ("removed", "beside-removed"):
        assert lab.ann.call("DELETE", f"/api/tasks/{name}")[0] == 200
    lab.cluster.runners["login"].end()  # nobody is there to look after the rest
    lab.slurm.run("scancel", jobs["limit"])  # SIGTERM, and KillWait later SIGKILL, as at the time limit
    lab.slurm.run("scancel", "--full", "--signal=KILL", jobs["kill"])
    above = clients[tasks["own"]["container"]].parent()
    assert above is not None
    assert above.name() == "slurmstepd"
    for name in ("own", "beside-client"):
        clients[tasks[name]["container"]].kill()
    eventually(lambda: not lab.slurm.steps_of(jobs["beside-client"]))
    lab.slurm.cancel_all()
    eventually(lambda: not of_user(lab.ann.user))
    assert [path for task in tasks.values() for path in named(task)] == []
    lab.start_runner()
    for name in ("limit", "kill", "own", "beside-job", "beside-client"):
        assert lab.cluster.ended(name)["status"] in ("stopped", "failed")


def test_of_two_users_on_a_node_neither_is_offered_nor_reaches_the_others_ports(lab: Lab) -> None:
    people = {"ann": (lab.ann, free_port()), "bob": (lab.bob, free_port())}
    for name, (who, port) in people.items():
        who.create("sh", "-c", serving(port, name), name=f"of-{name}")
    for name, (who, port) in people.items():
        lab.cluster.connected(f"of-{name}")
        assert first_ports(who, f"of-{name}") == [port]
        assert answer(lab, who, f"of-{name}", port) == f"{name}?".encode()
    for name, (who, _) in people.items():
        _, other = people["bob" if name == "ann" else "ann"]
        failed = lab.kohakuriver(who, "forward", f"of-{name}", f"0:{other}", "--", "sh", "-c", asking(other))
        refused = f"what listens on port {other} is another user's on this shared node, so it is not offered"
        assert refused in failed.stderr.decode(), failed
        assert failed.stdout == b""
    named = {"KOHAKURIVER_OFFER": f"own,{people['bob'][1]}"}
    lab.ann.create("sleep", "1000", name="named", env=named)
    lab.cluster.connected("named")
    assert answer(lab, lab.ann, "named", people["bob"][1]) == b"bob?", (
        "a port that is named is another user's on purpose"
    )


def test_a_job_that_fails_says_so_with_its_exit_code_and_last_words_and_a_restart_is_a_new_job(lab: Lab) -> None:
    task = lab.ann.create("sh", "-c", "echo no such model >&2; exit 7", name="failing")
    ended = lab.cluster.ended("failing")
    first = lab.job_of(task)
    words = f"it ended with exit code 7 (Slurm job {first} on {lab.slurm.node}): no such model"
    assert (ended["status"], ended["exit_code"], ended["message"]) == ("failed", 7, words)
    status, again = lab.ann.call("POST", "/api/tasks/failing/restart")
    assert (status, again["status"]) == (200, "starting")
    assert lab.job_of(task) != first
    assert lab.cluster.ended("failing")["exit_code"] == 7


def test_a_job_that_waits_says_for_what_and_stop_cancels_it(lab: Lab) -> None:
    lab.ann.create("sleep", "1000", name="first", gpus="1")
    lab.cluster.connected("first")
    task = lab.bob.create("sleep", "1000", name="second", gpus="2")
    job = lab.job_of(task)
    waits = f"PENDING (Resources), Slurm job {job}"
    eventually(lambda: lab.cluster.task("second")["message"] == waits)
    told = lab.kohakuriver(lab.bob, "vps", "restart", "second", "--timeout", "0").stderr.decode()
    assert "Task second did not start within 0 s: PENDING" in told
    job = lab.job_of(task)
    assert lab.bob.call("POST", "/api/tasks/second/stop")[1]["status"] == "stopped"
    eventually(lambda: lab.slurm.state_of(job) == "CANCELLED")


def test_what_somebody_else_ends_in_slurm_has_ended_as_slurm_says(lab: Lab) -> None:
    task = lab.ann.create("sleep", "1000", name="cancelled")
    lab.cluster.connected("cancelled")
    job = lab.job_of(task)
    lab.slurm.run("scancel", job)
    ended = lab.cluster.ended("cancelled")
    words = f"it was cancelled in Slurm (Slurm job {job} on {lab.slurm.node})"
    assert (ended["status"], ended["message"]) == ("stopped", words)


def test_what_slurm_refuses_is_told_and_leaves_no_task(lab: Lab) -> None:
    asked = {"backend": "slurm", "command": ["true"], "name": "refused"}
    for more, words in (
        ({"partition": "no-such"}, "Slurm does not take the job: Invalid partition name specified."),
        ({"gpus": "7"}, "Slurm does not take the job: Requested node configuration is not available."),
        ({"gpus": "all"}, "Slurm chooses the GPUs of a job; say with --gpus how many it needs."),
        ({"env": {"a b": "c"}}, "'a b' can't be the name of a variable in a job; use letters, digits and _."),
    ):
        status, told = lab.ann.call("POST", "/api/tasks", {**asked, **more})
        assert (status >= 400, told["message"]) == (True, words)
    assert lab.ann.call("GET", "/api/tasks/refused")[0] == 404


def test_whom_the_administrator_has_not_named_gets_no_job_and_keeps_none_that_could_not_be_ended(lab: Lab) -> None:
    asked = {"backend": "slurm", "command": ["sleep", "1000"], "name": "nobodys"}
    status, told = lab.cluster.call("POST", "/api/tasks", asked)
    assert (status, told["error"]) == (409, "no_slurm_user")
    assert told["message"] == (
        "admin has no user of the Slurm cluster; the cluster's administrator names one in the runner's --slurm-users "
        "file."
    )
    lines = lab.mapping.read_text()
    lab.mapping.write_text(f"{lines}admin root\n")
    assert lab.cluster.call("POST", "/api/tasks", asked)[1]["message"].startswith("admin would be the system's own")
    lab.mapping.write_text(f"{lines}admin {lab.bob.user.name}\n")
    status, task = lab.cluster.call("POST", "/api/tasks", asked)
    assert status == 201
    assert lab.slurm.about(lab.job_of(task), "UserName") == lab.bob.user.name
    lab.mapping.write_text(lines)
    job = lab.job_of(task)
    assert lab.cluster.call("DELETE", "/api/tasks/nobodys")[0] == 200, "it ends, whoever is who by now"
    eventually(lambda: lab.slurm.state_of(job) == "CANCELLED")


def asking(port: int) -> str:
    """A command that says what the service answers to which a forward of that port leads."""
    return f"/usr/bin/python3 -c {shlex.quote(ASK)} $KOHAKURIVER_PORT_{port}"


def test_a_job_that_was_started_without_us_is_forwarded_by_its_number(lab: Lab, port: int) -> None:
    job = lab.slurm.submit(lab.ann.user, serving(port, "plain"))
    for _ in range(2):
        words = ("forward", "--slurm", job, f"0:{port}", "--wait", "--", "sh", "-c", asking(port))
        done = lab.kohakuriver(lab.ann, *words)
        assert (done.returncode, done.stdout) == (0, b"plain?"), done.stderr
    mine = [task for task in lab.ann.call("GET", "/api/tasks")[1] if task["backend"] == "slurm"]
    assert [(task["name"], task["owner"]) for task in mine] == [(f"slurm-{job}", "ann")]
    assert mine[0]["message"] == f"Slurm job {job} on {lab.slurm.node}"
    refused = lab.kohakuriver(lab.bob, "forward", "--slurm", job, f"0:{port}", "--", "true")
    assert f"Job {job} is not one of {lab.bob.user.name}, who you are in Slurm." in refused.stderr.decode()
    assert lab.bob.call("GET", "/api/tasks")[1] == []
    told = lab.kohakuriver(lab.ann, "vps", "stop", f"slurm-{job}").stderr.decode()
    assert f"to cancel the job use `kohakuriver vps stop --container slurm-{job}`" in told
    assert lab.slurm.steps_of(job) == [mine[0]["container"]]
    lab.ann.call("DELETE", f"/api/tasks/slurm-{job}")
    eventually(lambda: lab.slurm.steps_of(job) == [])
    assert lab.slurm.state_of(job) == "RUNNING"


def test_a_job_of_two_users_who_are_one_on_the_cluster_is_a_task_of_each(lab: Lab, port: int) -> None:
    lines = lab.mapping.read_text()
    lab.mapping.write_text(f"ann {lab.ann.user.name}\nbob {lab.ann.user.name}\n")
    try:
        job = lab.slurm.submit(lab.ann.user, serving(port, "both"))
        tasks = {who.name: who.call("POST", "/api/tasks/adopt", {"job": job})[1] for who in (lab.ann, lab.bob)}
        assert tasks["ann"]["task_id"] != tasks["bob"]["task_id"]
        for who in (lab.ann, lab.bob):
            assert answer(lab, who, str(tasks[who.name]["task_id"]), port) == b"both?"
        assert sorted(lab.slurm.steps_of(job)) == sorted(task["container"] for task in tasks.values())
        lab.slurm.run("scancel", "--full", job)
        for task in tasks.values():
            assert lab.cluster.ended(task["task_id"])["message"] == (
                f"it was cancelled in Slurm (Slurm job {job} on {lab.slurm.node})"
            )
    finally:
        lab.mapping.write_text(lines)


def test_an_element_of_an_array_is_reached_and_cancelled_by_its_index_and_no_other_with_it(lab: Lab, port: int) -> None:
    other = free_port()
    text = f"if [ $SLURM_ARRAY_TASK_ID = 1 ]; then {serving(port, 'one')}; fi; {serving(other, 'two')}"
    array = lab.slurm.run(
        *("sbatch", "--parsable", f"--chdir={lab.ann.user.home}", "--array=1-2"),
        user=lab.ann.user,
        text=f"#!/bin/sh\n{text}\n",
    )
    both = {f"{array}_1", f"{array}_2"}
    eventually(lambda: lab.slurm.about(array, "State").split() == ["RUNNING", "RUNNING"])
    told = lab.ann.call("POST", "/api/tasks/adopt", {"job": array})
    assert told[0] == 400
    assert re.fullmatch(
        rf"Job {array} is an array; name one of its elements that run: (\S+), (\S+)\.", told[1]["message"]
    )
    assert all(each in told[1]["message"] for each in both)
    for element, its, word in ((f"{array}_1", port, b"one?"), (f"{array}_2", other, b"two?")):
        done = lab.kohakuriver(
            lab.ann, "forward", "--slurm", element, f"0:{its}", "--wait", "--", "sh", "-c", asking(its)
        )
        assert (done.returncode, done.stdout) == (0, word), done.stderr
    numbers = {each: lab.slurm.about(each, "JobID") for each in both}
    same = next(each for each in both if numbers[each] == array)  # its raw number is the whole array's
    rest = (both - {same}).pop()
    stopped = lab.kohakuriver(lab.ann, "vps", "stop", "--container", f"slurm-{same.replace('_', '-')}")
    assert stopped.returncode == 0, stopped.stderr
    eventually(lambda: lab.slurm.state_of(same) == "CANCELLED")
    assert lab.slurm.state_of(rest) == "RUNNING"
    assert lab.ann.call("DELETE", f"/api/tasks/slurm-{rest.replace('_', '-')}")[0] == 200
    eventually(lambda: lab.slurm.steps_of(rest) == [])
    assert lab.slurm.state_of(rest) == "RUNNING"


def test_what_a_job_prints_is_followed_until_it_ends(lab: Lab) -> None:
    go = lab.ann.user.home / "go"
    lab.ann.create("sh", "-c", f"echo one; until [ -e {go} ]; do sleep 0.1; done; printf two", name="printing")
    lab.cluster.connected("printing")
    with lab.ann.http.stream("GET", "/api/tasks/printing/logs?follow=true") as printed:
        lines = (json.loads(line)["text"] for line in printed.iter_lines() if line)
        assert next(lines) == "one\n"
        go.touch()
        assert list(lines) == ["two"]
    assert lab.cluster.ended("printing")["exit_code"] == 0
    assert lab.kohakuriver(lab.ann, "vps", "logs", "printing", "--tail", "1").stdout == b"two"


def test_jobs_of_a_runner_that_serves_tls_come_to_it_over_tls_and_to_no_other(lab: Lab, port: int) -> None:
    """They know it by the authority that `init tls` made for all."""
    made = lab.authority.issue(["127.0.0.1"], 1)
    client = lab.slurm.directory / "client"
    shutil.copyfile(binary(), client)
    client.chmod(0o755)
    files = ("--tls-cert", str(made.cert), "--tls-key", str(made.key), "--ca-file", str(lab.authority.cert))
    lab.start_runner("safe", *files, "--slurm-client", str(client))
    url = lab.cluster.runners["safe"].ready["url"]
    try:
        lab.ann.create("sh", "-c", f"env; {serving(port, 'safe')}", name="safe", node="safe")
        lab.cluster.connected("safe")
        assert answer(lab, lab.ann, "safe", port) == b"safe?"
        printed = lab.kohakuriver(lab.ann, "vps", "logs", "safe").stdout.decode()
        assert f"KOHAKURIVER_TUNNEL_URL={url}\n" in printed
        assert "CERTIFICATE" not in printed
        assert lab.ann.call("DELETE", "/api/tasks/safe")[0] == 200
        strange = Authority(lab.cluster.directory / "strange")
        told = subprocess.run(
            [client, "--runner-url", url, "--container-id=kohakuriver-job-1", "--max-reconnect=1"],
            env={"KOHAKURIVER_TUNNEL_CA": strange.cert.read_text()}, capture_output=True, timeout=PATIENCE,
        )  # fmt: skip
        assert b"UnknownIssuer" in told.stderr
    finally:
        lab.cluster.runners.pop("safe").end()


def test_a_job_goes_on_and_is_reached_again_when_its_runner_was_restarted(lab: Lab, port: int) -> None:
    plain = lab.slurm.submit(lab.ann.user, serving(port, "plain"))
    lab.ann.call("POST", "/api/tasks/adopt", {"job": plain, "name": "plain"})
    other = free_port()
    task = lab.ann.create("sh", "-c", serving(other, "ours"), name="ours")
    lab.cluster.connected("ours")
    job = lab.job_of(task)
    lab.ann.call("POST", "/api/tasks/ours/shares", {"user": "bob"})
    assert lab.ann.call("DELETE", "/api/tasks/ours/shares/bob")[0] == 200, "the job's client gets a new token"
    eventually(lambda: not named(task))
    lab.cluster.runners["login"].end()
    lab.start_runner()
    for name, its, word in (("plain", port, "plain?"), ("ours", other, "ours?")):
        lab.cluster.connected(name)
        assert answer(lab, lab.ann, name, its) == word.encode()
    assert lab.slurm.state_of(job) == "RUNNING"


def test_a_job_that_does_not_run_or_is_not_there_can_not_be_forwarded(lab: Lab) -> None:
    held = lab.slurm.run("sbatch", "--parsable", "--hold", "--wrap=true", user=lab.ann.user)
    for job, words in (
        (held, f"Only a job that runs can be reached, and this one does not: PENDING (JobHeldUser), Slurm job {held}."),
        ("999999", "Slurm knows no job 999999; `squeue --me` shows yours."),
    ):
        told = lab.ann.call("POST", "/api/tasks/adopt", {"job": job})[1]
        assert told["message"] == words
    assert lab.ann.call("POST", "/api/tasks/adopt", {"job": "1; id"})[0] == 400
    assert lab.ann.call("POST", "/api/tasks/adopt", {"container": "other"})[0] == 403
