"""A host and runners as the programs that they are, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import httpx

import kohakuriver
from kohakuriver.client.api import ForwardSync
from tests.support import forked
from tests.support.hops import binary

T = TypeVar("T")

PATIENCE = 40.0
"""Seconds after which what was waited for is taken not to happen."""


def eventually(look: Callable[[], T | None], *, within: float = PATIENCE) -> T:
    """What `look` returns, once that is not None or False.

    Between two looks is as much time as the last one took: most that take long start a program, which keeps the
    machine from what is waited for.
    """
    deadline = time.monotonic() + within
    while True:
        began = time.monotonic()
        seen = look()
        if seen is not None and seen is not False:
            return seen
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(max(0.01, time.monotonic() - began))


class Program:
    """`kohakuriver host` or `kohakuriver runner`, ready."""

    def __init__(
        self, log: Path, *arguments: str, env: dict[str, str] | None = None, under: Sequence[str] = ()
    ) -> None:
        """`under` is a command that starts it, as `nohup` does."""
        self.log = log
        environment = {**os.environ, "KOHAKURIVER_TUNNEL_CLIENT": str(binary()), **(env or {})}
        with log.open("ab") as errors:
            self.process: forked.Started = (
                _start_under(under, arguments, environment, errors)
                if under
                else forked.start([*arguments, "--json"], env=environment, stderr=errors)
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{arguments[0]} did not start: {log.read_text()}"
        self.ready: dict[str, Any] = json.loads(line)

    def next_event(self) -> dict[str, Any]:
        """What it prints next; waits for that."""
        assert self.process.stdout is not None
        event: dict[str, Any] = json.loads(self.process.stdout.readline())
        return event

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; the exit code. Whatever becomes of that, it has ended afterwards."""
        self.process.send_signal(number)
        with self.process:
            try:
                return self.process.wait(PATIENCE)
            finally:
                self.process.kill()


def _start_under(
    under: Sequence[str], arguments: Sequence[str], environment: dict[str, str], errors: IO[bytes]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*under, *forked.PROGRAM, *arguments, "--json"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True,
    )  # fmt: skip


class Cluster:
    """One host and its runners, with state in `directory`. Names of nodes are the names of runners here."""

    def __init__(self, directory: Path, *host_arguments: str, env: dict[str, str] | None = None) -> None:
        """`host_arguments` and `env` are for the host, at every start of it."""
        self.directory = directory
        self.host_arguments = host_arguments
        self.host_env = env
        self.host_state = directory / "host"
        self.runners: dict[str, Program] = {}
        self.host = self.start_host()
        self.url: str = self.host.ready["url"]
        self.token = (self.host_state / "admin-token").read_text().strip()
        headers = {"Authorization": f"Bearer {self.token}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, verify=False)

    def start_host(self, port: int = 0) -> Program:
        self.host = Program(
            self.directory / "host.log",
            *("host", "--state-dir", str(self.host_state), "--bind", "127.0.0.1"),
            *("--port", str(port), "--ssh-port", "0"),
            *self.host_arguments,
            env=self.host_env,
        )
        return self.host

    def restart_host(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the host and start it again on the same port."""
        self.host.end(number)
        self.start_host(int(self.url.rpartition(":")[2]))

    def start_runner(
        self, name: str, *arguments: str, env: dict[str, str] | None = None, under: Sequence[str] = ()
    ) -> Program:
        """Start a runner; back when the host has taken it in."""
        before = _registrations(self.directory / f"{name}.log")
        runner = self.start_program(name, *arguments, env=env, under=under)
        eventually(lambda: _registrations(runner.log) > before)
        return runner

    def start_program(
        self, name: str, *arguments: str, env: dict[str, str] | None = None, under: Sequence[str] = ()
    ) -> Program:
        """Start a runner; back when it serves, whatever the host thinks of it."""
        runner = self.runners[name] = Program(
            self.directory / f"{name}.log",
            *("runner", "--name", name, "--host-url", self.url, "--bind", "127.0.0.1", "--port", "0"),
            *("--state-dir", str(self.state_of(name)), "--node-token-file", str(self.host_state / "node-token")),
            *arguments,
            env=env,
            under=under,
        )
        return runner

    def state_of(self, name: str) -> Path:
        return self.directory / f"runner-{name}"

    def log_of(self, task: dict[str, Any]) -> str:
        """What a process task has printed."""
        path = self.state_of(task["node"]) / "tasks" / task["container"] / "log"
        return path.read_text() if path.exists() else ""

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer of the host."""
        answer = self.http.request(method, path, json=body)
        return answer.status_code, answer.json()

    def node(self, name: str) -> dict[str, Any] | None:
        nodes: list[dict[str, Any]] = self.call("GET", "/api/nodes")[1]
        return next((node for node in nodes if node["name"] == name), None)

    def task(self, reference: str | int) -> dict[str, Any]:
        status, task = self.call("GET", f"/api/tasks/{reference}")
        assert status == 200, task
        return dict(task)

    def create(self, *command: str, **more: Any) -> dict[str, Any]:
        """A new task, a process where no image is given."""
        how = {} if "image" in more else {"backend": "process"}
        status, task = self.call("POST", "/api/tasks", {"command": list(command), **how, **more})
        assert status == 201, task
        return dict(task)

    def connected(self, reference: str | int) -> dict[str, Any]:
        """The task, once its tunnel is connected."""
        status, task = self.call("GET", f"/api/tasks/{reference}/wait?timeout={PATIENCE}")
        assert status == 200, task
        return dict(task)

    def ended(self, reference: str | int) -> dict[str, Any]:
        """The task, once it runs no more."""
        return eventually(
            lambda: task if (task := self.task(reference))["status"] not in ("starting", "running") else None
        )

    def forward(self, reference: str | int, port: int, *, proto: str = "tcp") -> ForwardSync:
        """A forward to a port of the task, for `with`."""
        return kohakuriver.forward_sync(str(reference), port, proto=proto, host=self.url, token=self.token)

    def close(self) -> None:
        self.http.close()
        with contextlib.ExitStack() as ends:
            for program in [self.host, *self.runners.values()]:
                ends.enter_context(program.process)
                if program.process.poll() is None:
                    ends.callback(program.end)


def _registrations(log: Path) -> int:
    return log.read_text().count("registered with the host") if log.exists() else 0


@contextlib.contextmanager
def a_cluster(directory: Path, *host_arguments: str, env: dict[str, str] | None = None) -> Iterator[Cluster]:
    cluster = Cluster(directory, *host_arguments, env=env)
    try:
        yield cluster
    finally:
        cluster.close()


def ask(port: int, question: bytes) -> bytes:
    """What an echoing service behind a local port answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        sock.sendall(question)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))
