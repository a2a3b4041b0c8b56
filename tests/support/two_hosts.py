"""Two hosts on one PostgreSQL, runners that know both, a balancer before them, and traffic that notices everything."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

import kohakuriver
from kohakuriver.client.api import ForwardSync
from tests.support.hops import binary
from tests.support.processes import PATIENCE, eventually
from tests.support.services import echo, port_in
from tests.support.up import Commands, Program

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("a", "b")


class TwoHosts(Commands):
    """Hosts `a` and `b`; commands know both, `a` first."""

    def __init__(self, directory: Path, database: str, *options: str) -> None:
        super().__init__(directory)
        self.environment["KOHAKURIVER_TUNNEL_CLIENT"] = str(binary())
        self._database = database
        self.database_name = database.rpartition("/")[2]
        self._options = options
        self.hosts: dict[str, Program] = {}
        self.urls: dict[str, str] = {}
        self.ssh: dict[str, str] = {}
        self.runners: dict[str, Program] = {}
        self.ports: dict[str, int] = {}  # of services, as a test likes to call them
        self._runner_options: dict[str, Sequence[str]] = {}
        self._stack = contextlib.ExitStack()
        try:
            for name in NAMES:
                self.start_host(name)
        except BaseException:
            self.close()
            raise
        self.token = (directory / "host-a" / "admin-token").read_text().strip()
        self.environment |= {"KOHAKURIVER_HOST": ",".join(self.urls.values()), "KOHAKURIVER_TOKEN": self.token}
        self.http = {name: self.client(url) for name, url in self.urls.items()}

    def client(self, url: str, token: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token or self.token}"}
        made = httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE, verify=False)
        return self._stack.enter_context(made)

    def start_host(self, name: str) -> None:
        """Start a host; the second time on the ports that it had."""
        port, ssh = (where.get(name, ":0").rpartition(":")[2] for where in (self.urls, self.ssh))
        self.hosts[name] = self.start(
            *("host", "--json", "--bind=127.0.0.1", f"--port={port}", f"--ssh-port={ssh}"),
            *(f"--state-dir={self.directory / f'host-{name}'}", f"--database={self._database}"),
            *self._options,
        )
        ready = self.hosts[name].event("ready")
        self.urls[name], self.ssh[name] = ready["url"], ready["ssh_proxy"]

    def restart_host(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        self.hosts[name].stop(number)
        self.start_host(name)

    def start_runner(self, name: str, *options: str) -> None:
        """Start a runner; the second time as it was started first."""
        given = self._runner_options.setdefault(name, options)
        state = self.directory / f"runner-{name}"
        self.runners[name] = self.start(
            *("runner", "--json", f"--name={name}", "--bind=127.0.0.1", "--port=0", f"--state-dir={state}"),
            f"--host-url={','.join(self.urls.values())}",
            *(f"--node-token-file={self.directory / 'host-a' / 'node-token'}", *given),
        )
        self.runners[name].event("ready")

    def restart_runner(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        self.runners[name].stop(number)
        self.start_runner(name)

    def online(self, name: str, at: str = "a") -> bool:
        """Whether a host takes a node for online."""
        nodes = self.http[at].get("/api/nodes").json()
        return any(node["name"] == name and node["status"] == "online" for node in nodes)

    def forward(self, task: str, port: int, *, host: str, token: str | None = None) -> ForwardSync:
        """A forward by a host's URL, or by several with commas between."""
        return kohakuriver.forward_sync(task, port, host=host, token=token or self.token)

    def echo_task(self, name: str, **more: Any) -> int:
        """Start a task that echoes; its port."""
        order = {"backend": "process", "name": name, "command": echo(), **more}
        made = self.http["a"].post("/api/tasks", json=order)
        assert made.status_code == 201, made.text
        return eventually(lambda: port_in(self._printed(name)))

    def _printed(self, name: str) -> str:
        lines = self.http["b"].get(f"/api/tasks/{name}/logs").text.splitlines()
        return "\n".join(str(json.loads(line).get("text")) for line in lines)

    def new_user(self, name: str, **limits: float) -> str:
        """A new user's token."""
        at = self.http["a"]
        assert at.post("/api/users", json={"name": name, "limits": limits}).status_code == 201
        made = at.post("/api/tokens", json={"user": name})
        assert made.status_code == 201, made.text
        return str(made.json()["token"])

    def close(self) -> None:
        self._stack.close()
        super().close()


@contextlib.contextmanager
def two_hosts(directory: Path, database: str, *options: str) -> Iterator[TwoHosts]:
    hosts = TwoHosts(directory, database, *options)
    try:
        yield hosts
    finally:
        hosts.close()


@contextlib.contextmanager
def balancer(hosts: TwoHosts) -> Iterator[str]:
    """The URL of an HAProxy that sends everything to a host that says that it is ready."""
    servers = {name: url.partition("://")[2] for name, url in hosts.urls.items()}
    with haproxy(guide_config(), servers, hosts.directory) as url:
        yield url


@contextlib.contextmanager
def haproxy(config: str, servers: dict[str, str], directory: Path) -> Iterator[str]:
    """The URL of an HAProxy with this configuration, in which `host-NAME:8000` become the `servers`."""
    program = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin")
    assert program, "HAProxy is not installed: run scripts/system-packages test"
    for name, at in servers.items():
        config = config.replace(f"host-{name}:8000", at)
    config = config.replace("inter 1s", "inter 200ms")  # looks more often
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        port = listener.getsockname()[1]
        config = config.replace("bind :8000", f"bind fd@{listener.fileno()}")
        config = config.replace("bind :8002", f"bind unix@{directory / 'ssh.sock'}")
        file = directory / "haproxy.cfg"
        file.write_text(config)
        with subprocess.Popen([program, "-db", "-f", str(file)], pass_fds=[listener.fileno()]) as process:
            try:
                listener.close()
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


def guide_config() -> str:
    """What docs/guide/cluster.md shows."""
    text = (ROOT / "docs/guide/cluster.md").read_text("utf-8")
    return "\n".join(block for block in text.split("```")[1::2] if "\nbackend hosts" in block)


def compose_config() -> str:
    """What deploy/compose has."""
    return (ROOT / "deploy/compose/haproxy.cfg").read_text("utf-8")


class Asking(threading.Thread):
    """Requests to the API, one after the other, each on a connection of its own; `failed` are those that went wrong."""

    def __init__(self, url: str, token: str) -> None:
        super().__init__(daemon=True)
        self._url, self._headers = url, {"Authorization": f"Bearer {token}"}
        self.asked = 0
        self.failed: list[Any] = []
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.02):
            self.asked += 1
            try:
                answer = httpx.get(f"{self._url}/api/tasks", headers=self._headers, trust_env=False, timeout=PATIENCE)
                if answer.status_code != 200:
                    self.failed.append(answer.text)
            except httpx.HTTPError as error:
                self.failed.append(repr(error))

    def end(self) -> None:
        self._over.set()
        self.join()
