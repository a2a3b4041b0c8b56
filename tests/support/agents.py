"""A host alone, its users, and agents that dial in to it: real programs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.support.hops import binary
from tests.support.processes import PATIENCE, eventually
from tests.support.services import echo, port_in
from tests.support.ssh import make_key, ours
from tests.support.up import Commands, Program

__all__ = ["Agent", "Lab", "lab_at"]

PRINTS_PORT = """
import http.server, sys
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
print("port", server.server_address[1], flush=True)
server.serve_forever()
"""

WEB = [sys.executable, "-c", PRINTS_PORT]


class Agent:
    """A running agent; what it and its command print is in a file."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str], cwd: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=cwd
            )

    @property
    def printed(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def port(self) -> int:
        """That of its service, which prints it."""
        return eventually(lambda: port_in(self.printed))

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(PATIENCE)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()


class Lab(Commands):
    """A host at an address, users by name, and agents.

    `under` is what agents' command lines begin with, `seen_from_agents` the host's URL there, "" where it is its own.
    """

    def __init__(self, directory: Path, address: str = "127.0.0.1", *options: str, under: Sequence[str] = ()) -> None:
        super().__init__(directory)
        self._stack = contextlib.ExitStack()
        self._address, self._options, self.under = address, options, under
        self._port = "0"
        self.agents: list[Agent] = []
        self.seen_from_agents = ""
        self.tokens: dict[str, str] = {}
        self.home = directory / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        self.key = self.home / ".ssh" / "id_ed25519"
        make_key(self.key)
        programs = {"KOHAKURIVER_TUNNEL_CLIENT": str(binary()), "KOHAKURIVER_TUNNEL_SSHD": ours()}
        self.environment |= {"HOME": str(self.home), **programs}
        self.environment.pop("SSH_AUTH_SOCK", None)
        try:
            self.start_host()
        except BaseException:
            self.close()
            raise
        self.admin = (directory / "host" / "admin-token").read_text().strip()
        for name in ("ann", "bob"):
            self.ask("POST", "/api/users", {"name": name})
            self.tokens[name] = self.ask("POST", "/api/tokens", {"user": name})["token"]

    def start_host(self) -> None:
        """Start the host; the second time on the port that it had."""
        self.host: Program = self.start(
            *("host", "--json", f"--bind={self._address}", f"--port={self._port}", "--ssh-port=0", *self._options),
            f"--state-dir={self.directory / 'host'}",
        )
        ready = self.host.event("ready")
        self.url: str = ready["url"]
        self.metrics: str | None = ready.get("metrics")
        self._port = self.url.rpartition(":")[2]
        self.environment |= {"KOHAKURIVER_HOST": self.url, "KOHAKURIVER_SSH_PROXY": ready["ssh_proxy"]}

    def of(self, user: str) -> dict[str, str]:
        """What makes a command a user's."""
        return {"KOHAKURIVER_TOKEN": self.tokens[user]}

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None, user: str = "") -> Any:
        """The host's answer to a user, or to the admin."""
        token = self.tokens[user] if user else self.admin
        with httpx.Client(base_url=self.url, trust_env=False, timeout=PATIENCE, verify=False) as http:
            answer = http.request(method, path, json=body, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code < 400, answer.text
        return answer.json()

    def task(self, name: str) -> dict[str, Any]:
        """A task, {} where there is none."""
        return next((task for task in self.ask("GET", "/api/tasks") if task["name"] == name), {})

    def is_(self, name: str, status: str) -> dict[str, Any]:
        """Wait until a task is in that state; the task."""
        return eventually(lambda: task if (task := self.task(name)).get("status") == status else None)

    def connected(self, name: str) -> dict[str, Any]:
        """Wait until a task's agent is connected; the task."""
        return eventually(lambda: task if (task := self.task(name)).get("tunnel") else None)

    def agent(self, *words: str, command: Sequence[str] = (), token: str | None = None, **environment: str) -> Agent:
        """Start an agent of ann's, by the tunnel client alone; `words` are its options."""
        program = [str(binary()), "agent", *words, *(["--", *command] if command else [])]
        return self.launch(program, KOHAKURIVER_TOKEN=token or self.tokens["ann"], **environment)

    def launch(self, program: Sequence[str], **environment: str) -> Agent:
        """Start whatever is an agent."""
        log = self.directory / f"agent{len(self.agents)}"
        seen = {"KOHAKURIVER_HOST": self.seen_from_agents} if self.seen_from_agents else {}
        given = {**self.environment, **seen, **environment}
        made = Agent([*self.under, *program], log, given, self.directory)
        self.agents.append(made)
        return made

    def echoing(self, name: str, *words: str, **how: Any) -> tuple[Agent, int]:
        """An agent with a service that echoes, connected, and its port."""
        made = self.agent("--name", name, *words, command=echo(), **how)
        port = made.port()
        self.connected(name)
        return made, port

    def audit(self, event: str) -> list[dict[str, Any]]:
        """What was written down of this kind."""
        lines = (self.directory / "host" / "audit.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def close(self) -> None:
        for each in self.agents:
            each.stop(signal.SIGKILL)
        self._stack.close()
        super().close()


@contextlib.contextmanager
def lab_at(directory: Path, *where: str, under: Sequence[str] = ()) -> Iterator[Lab]:
    lab = Lab(directory, *where, under=under)
    try:
        yield lab
    finally:
        lab.close()


def environment_of(process: int) -> dict[str, str]:
    """The variables that a process was started with."""
    content = Path(f"/proc/{process}/environ").read_bytes()
    return dict(line.split("=", 1) for line in os.fsdecode(content).split("\0") if "=" in line)
