"""The straight path with real programs: what the host promises of a session holds of one that goes past it, too."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.cli.pki import Authority
from tests.support import forked
from tests.support.processes import PATIENCE, Cluster, a_cluster, eventually

MIB = 1 << 20
PATHS = ("direct", "host")
by_each_path = pytest.mark.parametrize("path", PATHS)

ECHO = """
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(1 << 18):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
with Server(("127.0.0.1", 0), Echo) as server:
    print("PORT", server.server_address[1], flush=True)
    server.serve_forever()
"""


@dataclass
class Lab:
    """A cluster with a task that echoes; `ann` has it, `bob` may use it while it is shared."""

    cluster: Cluster
    port: int
    tokens: dict[str, str]

    def environment(self, user: str, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "KOHAKURIVER_HOST": self.cluster.url,
            "KOHAKURIVER_TOKEN": self.tokens[user],
            "KOHAKURIVER_CONFIG_DIR": str(self.cluster.directory / "empty"),
            **more,
        }

    def audit(self, event: str) -> list[dict[str, Any]]:
        lines = (self.cluster.host_state / "audit.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event and line.get("user") == "bob"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with a_cluster(tmp_path_factory.mktemp("lab")) as cluster:
        cluster.start_runner("n1", "--backend", "process", "--user-processes", env={"KOHAKURIVER_LEASE": "2"})
        yield lab_of(cluster)


def lab_of(cluster: Cluster) -> Lab:
    tokens = {}
    for name in ("ann", "bob"):
        assert cluster.call("POST", "/api/users", {"name": name})[0] == 201
        tokens[name] = cluster.call("POST", "/api/tokens", {"user": name, "name": "t"})[1]["token"]
    body = {"name": "lab", "backend": "process", "command": [sys.executable, "-c", ECHO]}
    answer = cluster.http.post("/api/tasks", json=body, headers={"Authorization": f"Bearer {tokens['ann']}"})
    assert answer.status_code == 201, answer.text
    task = cluster.connected("lab")
    told = eventually(lambda: re.search(r"PORT (\d+)\n", cluster.log_of(task)), within=90)
    return Lab(cluster, int(told[1]), tokens)


class Forward:
    """Bob's `forward --json` by one path, and a connection through it."""

    def __init__(self, lab: Lab, path: str, *options: str) -> None:
        share(lab)
        arguments = ["forward", "lab", f"0:{lab.port}", "--json", "--path", path, *options]
        self.process = forked.start(arguments, env=lab.environment("bob"))
        self.events: list[dict[str, Any]] = []
        port = self.until(event="listening")["local_port"]
        if path == "direct" and not self.seen(path="direct"):
            self.until(path="direct")
        self.connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.echo(b"there")

    def seen(self, **wanted: Any) -> bool:
        return any(wanted.items() <= event.items() for event in self.events)

    def until(self, **wanted: Any) -> dict[str, Any]:
        """The next event that says this."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            event: dict[str, Any] = json.loads(line)
            self.events.append(event)
            if wanted.items() <= event.items():
                return event
        assert self.process.stderr is not None
        raise AssertionError(f"the forward has ended: {self.events[-3:]} {self.process.stderr.read()}")

    def echo(self, text: bytes) -> None:
        self.connection.sendall(text)
        back = b""
        while len(back) < len(text):
            data = self.connection.recv(MIB)
            assert data
            back += data
        assert back == text

    def ended(self) -> tuple[int, str]:
        """Exit code and stderr, at its end."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        with self.process:
            self.process.stdout.read()
            said = self.process.stderr.read()
            self.connection.close()
            return self.process.wait(PATIENCE), said

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.ended()[0] == 0


def share(lab: Lab) -> None:
    headers = {"Authorization": f"Bearer {lab.tokens['ann']}"}
    assert lab.cluster.http.post("/api/tasks/lab/shares", json={"user": "bob"}, headers=headers).status_code == 201


def unshare(lab: Lab) -> None:
    headers = {"Authorization": f"Bearer {lab.tokens['ann']}"}
    assert lab.cluster.http.delete("/api/tasks/lab/shares/bob", headers=headers).status_code == 200


def revoke(lab: Lab) -> None:
    tokens = lab.cluster.call("GET", "/api/tokens?user=bob")[1]
    for token in tokens:
        assert lab.cluster.call("DELETE", f"/api/tokens/{token['id']}")[0] == 200
    name = f"t{time.time_ns()}"
    lab.tokens["bob"] = lab.cluster.call("POST", "/api/tokens", {"user": "bob", "name": name})[1]["token"]


@pytest.mark.alone  # it says how long something takes
@by_each_path
@pytest.mark.parametrize("take", [unshare, revoke], ids=["share", "token"])
def test_a_right_that_is_taken_back_ends_a_forward_within_2_s_by_whichever_path(lab: Lab, path: str, take: Any) -> None:
    forward = Forward(lab, path)
    began = time.monotonic()
    take(lab)
    forward.connection.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionResetError):
        assert forward.connection.recv(1) == b""
    assert time.monotonic() - began < 2
    code, said = forward.ended()
    assert code == 5, said


@by_each_path
def test_one_line_of_the_audit_log_has_the_session_with_all_its_bytes_by_whichever_path(lab: Lab, path: str) -> None:
    before = len(lab.audit("session_closed")), len(lab.audit("session_opened"))
    forward = Forward(lab, path)
    for _ in range(8):
        forward.echo(os.urandom(MIB))
    forward.stop()
    eventually(lambda: len(lab.audit("session_closed")) > before[0])
    assert len(lab.audit("session_opened")) == before[1] + 1
    [line] = lab.audit("session_closed")[before[0] :]
    for way in ("bytes_to_container", "bytes_to_user"):
        assert 8 * MIB <= line[way] < 8.5 * MIB, line
    assert (line["ended_by"], line["code"]) == ("user", 1000)


@by_each_path
def test_a_users_sessions_are_counted_by_whichever_path(lab: Lab, path: str) -> None:
    assert lab.cluster.call("PATCH", "/api/users/bob/limits", {"sessions": 1})[0] == 200
    try:
        forward = Forward(lab, path)
        second = forked.start(["forward", "lab", f"0:{lab.port}"], env=lab.environment("bob"))
        with second:
            assert second.stderr is not None
            assert "has 1 session open" in second.stderr.read()
            assert second.wait(PATIENCE) == 4
        forward.echo(b"not disturbed")
        forward.stop()
        Forward(lab, path).stop()  # and not any more when it has ended
    finally:
        assert lab.cluster.call("PATCH", "/api/users/bob/limits", {"sessions": None})[0] == 200


def test_a_host_that_is_killed_stops_nothing_that_goes_straight_and_is_found_again(lab: Lab) -> None:
    forward = Forward(lab, "direct")
    lab.cluster.host.process.kill()
    lab.cluster.host.process.wait(PATIENCE)
    forward.connection.settimeout(1)  # nobody waits for the host
    forward.echo(b"a" * MIB)
    lab.cluster.host.end()
    lab.cluster.start_host(int(lab.cluster.url.rpartition(":")[2]))
    forward.connection.settimeout(PATIENCE)
    forward.until(event="resumed")
    forward.echo(b"b" * MIB)
    forward.until(path="direct")
    forward.echo(b"c" * MIB)
    assert not forward.seen(event="stream_error")
    forward.stop()


def test_status_and_events_say_which_path_and_why_not_the_direct_one(tmp_path: Path) -> None:
    with a_cluster(tmp_path) as cluster:
        cluster.start_runner("n1", "--backend", "process", "--user-processes", "--no-direct")
        lab = lab_of(cluster)
        share(lab)
        refused = forked.start(["forward", "lab", f"0:{lab.port}", "--path", "direct"], env=lab.environment("bob"))
        with refused:
            assert refused.stderr is not None
            assert "--no-direct" in refused.stderr.read()
            assert refused.wait(PATIENCE) == 4
        forward = Forward(lab, "auto")
        if not forward.seen(event="path"):
            forward.until(event="path")
        [said] = [event for event in forward.events if event["event"] == "path"]
        assert said["path"] == "host"
        assert "--no-direct" in said["reason"]
        status = forked.start(["vps", "status", "lab"], env=lab.environment("bob"))
        with status:
            assert status.stdout is not None
            assert "through the host: its node takes no connections of users" in " ".join(status.stdout.read().split())
        forward.stop()


@pytest.mark.parametrize("runner_tls", [True, False], ids=["tls", "plain"])
def test_after_a_login_by_tls_a_node_is_gone_to_by_tls_or_not_at_all(tmp_path: Path, runner_tls: bool) -> None:
    made = Authority(tmp_path / "pki").issue(["127.0.0.1"], 1)
    tls = ("--tls-cert", str(made.cert), "--tls-key", str(made.key))
    ca = str(tmp_path / "pki" / "ca.pem")
    with a_cluster(tmp_path, *tls, "--ca-file", ca) as cluster:
        served = tls if runner_tls else ("--direct",)
        cluster.start_runner("n1", "--backend", "process", "--user-processes", "--ca-file", ca, *served)
        lab = lab_of(cluster)
        os.environ["KOHAKURIVER_CA_FILE"] = ca
        try:
            forward = Forward(lab, "auto")
        finally:
            del os.environ["KOHAKURIVER_CA_FILE"]
        if not forward.seen(event="path"):
            forward.until(event="path")
        [said] = [event for event in forward.events if event["event"] == "path"]
        if runner_tls:
            assert said["path"] == "direct"
        else:
            assert said["path"] == "host"
            assert "does not serve TLS" in said["reason"]
        forward.echo(b"x" * MIB)
        forward.stop()


def test_a_copy_and_a_command_go_straight_too_and_what_is_started_is_written_down(lab: Lab, tmp_path: Path) -> None:
    share(lab)
    (tmp_path / "data").write_bytes(os.urandom(4 * MIB))
    target = str(tmp_path / "copied")
    run(lab, "cp", str(tmp_path / "data"), f"lab:{target}")
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "data").read_bytes()
    script = "head -c 3000000 /dev/zero; exec cat"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-m", "kohakuriver", "connect", "lab", "--", "sh", "-c", script]
    with subprocess.Popen(command, env=lab.environment("bob", KOHAKURIVER_PATH="direct"), **pipes) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.read(3_000_000) == bytes(3_000_000)
        eventually(lambda: lab.cluster.task("lab")["traffic"]["straight"] == 1)
        process.stdin.write(bytes(3_000_000))
        process.stdin.close()
        assert process.stdout.read() == bytes(3_000_000)
        assert process.wait(PATIENCE) == 0
    assert any(script in line["command"] for line in lab.audit("session_command"))


def run(lab: Lab, *arguments: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "kohakuriver", *arguments],
        env=lab.environment("bob"), capture_output=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
