"""Real programs, driven from outside: `kohakuriver up`, its commands, and tasks whose services tests talk to."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tests.support import forked

TIMEOUT = 90.0

# Echoes TCP on one port and UDP on the same, tells where through a FIFO, and keeps the port over a restart.
SERVICE = """
import os, pathlib, socket, sys, threading
directory = pathlib.Path(sys.argv[1])
kept = directory / "port"
def bound(port):
    while True:
        listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            datagrams.bind(listener.getsockname())
            return listener, datagrams
        except OSError:  # for UDP somebody has the port that nobody has for TCP
            listener.close(), datagrams.close()
            if port:
                raise

listener, datagrams = bound(int(kept.read_text()) if kept.exists() else 0)
port = listener.getsockname()[1]
kept.write_text(str(port))

def echo_datagrams():
    while True:
        data, address = datagrams.recvfrom(65536)
        datagrams.sendto(data, address)

def echo(connection):
    with connection:
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            pass

threading.Thread(target=echo_datagrams, daemon=True).start()
with open(directory / "started", "w") as fifo:
    fifo.write(f"{port} {os.getppid()}\\n")
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
"""


class Program:
    """One running `kohakuriver` command, whose output can be waited for line by line."""

    def __init__(self, *arguments: str, environment: dict[str, str]) -> None:
        self.process = forked.start(arguments, env=environment)
        self.out: queue.Queue[str | None] = queue.Queue()
        self.err: queue.Queue[str | None] = queue.Queue()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._readers = [
            threading.Thread(target=_read, args=(self.process.stdout, self.out)),
            threading.Thread(target=_read, args=(self.process.stderr, self.err)),
        ]
        for reader in self._readers:
            reader.start()

    def line(self, containing: str, *, err: bool = False) -> str:
        """The next line of stdout (or stderr) that contains a text."""
        while True:
            line = (self.err if err else self.out).get(timeout=TIMEOUT)
            if line is None:
                said = [] if err else self.rest(err=True)
                raise AssertionError(f"it ended ({self.process.wait()}) before it said {containing!r}: {said}")
            if containing in line:
                return line

    def event(self, name: str) -> dict[str, Any]:
        """The next event of this name; every line until there must be one JSON object."""
        while True:
            event: dict[str, Any] = json.loads(self.line(""))
            if event["event"] == name:
                return event

    def listening(self) -> int:
        """The local port of the next `listening` event."""
        port: int = self.event("listening")["local_port"]
        return port

    def rest(self, *, err: bool = False) -> list[str]:
        """All lines that are left, to the end of the program's output."""
        lines = []
        while (line := (self.err if err else self.out).get(timeout=TIMEOUT)) is not None:
            lines.append(line)
        return lines

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(TIMEOUT)
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()


def _read(stream: IO[str], into: queue.Queue[str | None]) -> None:
    for line in stream:
        into.put(line.rstrip("\n"))
    into.put(None)


class Service:
    """A task that echoes on `port`. `tunnel_client` is the process id of the tunnel client that started it."""

    def __init__(self, task: str, directory: Path) -> None:
        self.task = task
        self._directory = directory
        self.port = 0
        self.tunnel_client = 0

    def wait_started(self) -> None:
        """Wait until the service has been started once more since the last time."""
        with (self._directory / "started").open() as fifo:
            self.port, self.tunnel_client = map(int, fifo.readline().split())


class Commands:
    """The commands of one user, with settings in a directory of their own, and whatever a test starts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        kept = ("KOHAKURIVER_LOOP", "KOHAKURIVER_TUNNEL_CLIENT")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("KOHAKURIVER_") or k in kept}
        self.environment = {**inherited, "KOHAKURIVER_CONFIG_DIR": str(directory)}
        self._programs: list[Program] = []
        self._services = 0

    def start(self, *arguments: str, **environment: str) -> Program:
        """Start a command; it is ended with the others, if not before."""
        program = Program(*arguments, environment={**self.environment, **environment})
        self._programs.append(program)
        return program

    def run(self, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return forked.run(arguments, env={**self.environment, **environment}, stdin=stdin, timeout=TIMEOUT)

    def succeed(self, *arguments: str) -> str:
        """Run a command that must succeed; its stdout."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def service(self) -> Service:
        """A new task that echoes, started."""
        self._services += 1
        directory = self.directory / f"service{self._services}"
        directory.mkdir()
        os.mkfifo(directory / "started")
        command = [sys.executable, "-c", SERVICE, str(directory)]
        created = self.succeed("vps", "create", "--json", "--backend", "process", "--", *command)
        service = Service(json.loads(created)["name"], directory)
        service.wait_started()
        return service

    def close(self) -> None:
        """End everything; what was started first goes last."""
        for program in reversed(self._programs):
            program.stop()


class Cluster(Commands):
    """A host and a runner by `kohakuriver up`."""

    def __init__(self, directory: Path, *options: str, **environment: str) -> None:
        """`environment` is that of the host and the runner alone."""
        super().__init__(directory)
        ports = ("--host-port=0", "--runner-port=0", "--ssh-port=0")
        self.up = self.start("up", "--json", *ports, *options, **environment)
        try:
            self.ready = self.up.event("ready")
        except BaseException:
            self.close()
            raise


class Apart(Commands):
    """A host and a runner started one by one, so that each of them can be killed and started again.

    The runner runs processes, unless `runner_options` say otherwise.
    """

    def __init__(
        self,
        directory: Path,
        *host_options: str,
        runner_options: Sequence[str] = ("--backend=process", "--user-processes"),
        **host_environment: str,
    ) -> None:
        super().__init__(directory)
        self._host_environment = host_environment
        self._host_port = 0
        self._host_options = host_options
        self._runner_options = runner_options
        try:
            self.start_host()
            self.environment["KOHAKURIVER_TOKEN"] = (directory / "host" / "admin-token").read_text().strip()
            self.start_runner()
        except BaseException:
            self.close()
            raise

    def start_host(self) -> None:
        """Start the host; the second time on the port that it had."""
        self.host = self.start("host", "--json", "--bind=127.0.0.1", f"--port={self._host_port}", "--ssh-port=0",
                               *self._host_options, **self._host_environment)  # fmt: skip
        ready = self.host.event("ready")
        self.url: str = ready["url"]
        self._host_port = int(self.url.rpartition(":")[2])
        self.environment |= {"KOHAKURIVER_HOST": self.url, "KOHAKURIVER_SSH_PROXY": ready["ssh_proxy"]}

    def start_runner(self) -> None:
        """Start the runner; the second time on the port that it had, and with the tasks that live on."""
        node_token = f"--node-token-file={self.directory / 'host' / 'node-token'}"
        self.runner = self.start("runner", "--json", "--bind=127.0.0.1", "--port=0", f"--host-url={self.url}",
                                 node_token, *self._runner_options)  # fmt: skip
        self.runner.event("registered")  # it listens before that, and a task can be made only then


def connect(port: int) -> socket.socket:
    """A connection to a local port that fails rather than hangs."""
    return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)


def echoes(connection: socket.socket, data: bytes = b"hello") -> bool:
    """Whether what is sent comes back."""
    connection.sendall(data)
    got = b""
    while len(got) < len(data) and (more := connection.recv(65536)):
        got += more
    return got == data


def refused(port: int) -> bool:
    """Whether a connection to this port is reset; the reset may come before `connect` has returned."""
    try:
        with connect(port) as connection:
            return broken(connection)
    except ConnectionResetError:
        return True


def broken(connection: socket.socket) -> bool:
    """Wait for the end of a connection; whether it ended by a reset, not in good order."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    return False
