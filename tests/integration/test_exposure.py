"""What is said when something is open to others, and what the host writes down: the programs as users run them."""

from __future__ import annotations

import json
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.up import Apart, Service, connect, echoes


class Logged(Apart):
    """A host that ends idle sessions, with its audit log in a place of its own."""

    def start_host(self) -> None:
        self.environment["KOHAKURIVER_IDLE_TIMEOUT"] = "1"
        self.log = self.directory / "who.jsonl"
        self.host = self.start(
            "host", "--json", "--bind=127.0.0.1", "--port=0", "--ssh-port=0", f"--audit-log={self.log}"
        )
        self.url = self.host.event("ready")["url"]
        self.environment["KOHAKURIVER_HOST"] = self.url

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    cluster = Logged(tmp_path_factory.mktemp("exposure"))
    cluster.runner.line("registered with the host", err=True)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def service(cluster: Logged) -> Service:
    return cluster.service()


def test_a_forward_for_other_machines_works_and_says_so_in_one_line(cluster: Logged, service: Service) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--local-host", "0.0.0.0", "--json")
    event = forward.event("listening")
    assert event["local_host"] == "0.0.0.0"
    with connect(event["local_port"]) as connection:
        assert echoes(connection)
    assert forward.stop() == 0
    assert [line for line in forward.rest(err=True) if line.startswith("Warning:")] == [
        "Warning: anybody who reaches this machine on 0.0.0.0 can use this forward."
    ]


def test_plain_http_to_another_machine_is_warned_of_once_and_never_on_stdout(cluster: Logged, service: Service) -> None:
    elsewhere = cluster.url.replace("127.0.0.1", "0.0.0.0")  # which leads here too, and is no loopback address
    warning = f"Warning: {elsewhere} is plain HTTP: others on the network can read what goes there. This is said once."
    for arguments, said in (
        (["vps", "list"], [warning]),
        (["vps", "restart", service.task], []),
        (["node", "list"], []),
    ):
        done = cluster.run(*arguments, "--json", KOHAKURIVER_HOST=elsewhere)
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
        assert done.stderr.splitlines() == said
    service.wait_started()
    assert cluster.run("vps", "list", "--json").stderr == ""


def test_a_forward_that_the_host_ends_because_nothing_passes_ends_with_4_and_says_why(
    cluster: Logged, service: Service
) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    forward.listening()
    assert forward.ended() == 4
    [error] = [line for line in forward.rest(err=True) if line.startswith("Error:")]
    assert "The host has ended this forward: nothing passed for 1 s" in error


def test_the_audit_log_has_a_line_at_the_beginning_and_one_at_the_end_of_a_session(
    cluster: Logged, service: Service
) -> None:
    before = len(cluster.lines())
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    with connect(forward.listening()) as connection:
        assert echoes(connection, bytes(1000))
    assert forward.stop() == 0
    opened, closed = cluster.lines()[before:]
    task = json.loads(cluster.succeed("vps", "status", service.task, "--json"))
    assert (opened["event"], closed["event"]) == ("session_opened", "session_closed")
    assert (opened["user"], opened["task"], opened["port"]) == ("admin", task["task_id"], service.port)
    assert opened["ports"] == [str(service.port)]
    assert opened["node"] == task["node"]
    assert isinstance(closed["bytes_to_user"], int)
    assert closed["bytes_to_user"] >= 1000
    assert stat.S_IMODE(cluster.log.stat().st_mode) == 0o600


def test_sighup_ends_no_program_that_has_no_terminal(cluster: Logged) -> None:
    for program in (cluster.host, cluster.runner):
        program.process.send_signal(signal.SIGHUP)
    assert json.loads(cluster.succeed("node", "list", "--json"))["nodes"]
    assert [program.process.poll() for program in (cluster.host, cluster.runner)] == [None, None]


def test_a_limit_that_makes_no_sense_keeps_a_program_from_starting(cluster: Logged, tmp_path: Path) -> None:
    runner = ["runner", "--host-url", cluster.url, "--node-token=x", "--port=0"]
    for program in (["host", "--port=0"], runner):
        done = cluster.run(*program, "--bind=127.0.0.1", f"--state-dir={tmp_path}", KOHAKURIVER_MAX_STREAMS="lots")
        assert done.returncode == 2
        assert "KOHAKURIVER_MAX_STREAMS" in done.stderr
