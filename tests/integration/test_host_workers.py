"""`host --workers`: several processes on one port, which come and go together, and none of which is missed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

import kohakuriver
from tests.support.echoing import Traffic
from tests.support.hops import binary
from tests.support.postgres import Postgres
from tests.support.processes import PATIENCE, eventually
from tests.support.services import echo, port_in
from tests.support.up import Commands

FORWARDS = 8


class Lab(Commands):
    """A host of two workers, and a runner with a task that echoes."""

    def __init__(self, directory: Path, database: str) -> None:
        super().__init__(directory)
        self.environment["KOHAKURIVER_TUNNEL_CLIENT"] = str(binary())
        self.host = self.start(
            *("host", "--json", "--workers=2", "--bind=127.0.0.1", "--port=0", "--ssh-port=0"),
            *(f"--state-dir={directory / 'host'}", f"--database={database}", "--metrics=127.0.0.1:0"),
        )
        self.ready = self.host.event("ready")
        self.ports: dict[str, int] = {}
        self.url = self.ready["url"]
        self.token = (directory / "host" / "admin-token").read_text().strip()
        self.environment |= {"KOHAKURIVER_HOST": self.url, "KOHAKURIVER_TOKEN": self.token}
        self.runner = self.start(
            *("runner", "--json", "--name=n1", "--bind=127.0.0.1", "--port=0", f"--state-dir={directory / 'runner'}"),
            *("--backend=process", f"--host-url={self.url}", f"--node-token-file={directory / 'host' / 'node-token'}"),
        )
        self.runner.event("ready")

    def ask(self, method: str, path: str, token: str = "", **more: object) -> httpx.Response:
        """One request, by a connection of its own, so that either worker may get it."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return httpx.request(
            method, self.url + path, headers=headers, timeout=PATIENCE, trust_env=False, json=more or None
        )

    def start_task(self) -> None:
        eventually(lambda: any(node["status"] == "online" for node in self.ask("GET", "/api/nodes").json()))
        made = self.ask("POST", "/api/tasks", backend="process", name="lab", command=echo())
        assert made.status_code == 201, made.text
        self.ports["lab"] = eventually(lambda: port_in(self._printed()))

    def _printed(self) -> str:
        lines = self.ask("GET", "/api/tasks/lab/logs").text.splitlines()
        return "\n".join(str(json.loads(line).get("text")) for line in lines)

    def has_replaced(self, worker: int) -> bool:
        return len(self.workers) == 2 and worker not in self.workers

    @property
    def workers(self) -> list[int]:
        return children(self.host.process.pid)


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def connections(pid: int) -> int:
    """How many sockets a process has."""
    fds = Path(f"/proc/{pid}/fd").iterdir()
    return sum(str(each.readlink()).startswith("socket:") for each in fds if each.is_symlink())


@pytest.fixture
def ending(postgres: Postgres, tmp_path: Path) -> Iterator[Lab]:
    """For tests that end it."""
    lab = Lab(tmp_path, postgres.new_database())
    try:
        yield lab
    finally:
        lab.close()


@pytest.fixture(scope="module")
def lab(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"), postgres.new_database())
    try:
        lab.start_task()
        yield lab
        workers = lab.workers
        assert lab.host.stop(signal.SIGTERM) == 0
        assert not any(Path(f"/proc/{each}").exists() for each in workers)
    finally:
        lab.close()


@contextlib.contextmanager
def traffic(lab: Lab, token: str) -> Iterator[list[Traffic]]:
    """A busy connection in each of several forwards to the task."""
    port = lab.ports["lab"]
    with contextlib.ExitStack() as stack:
        forwards = [
            stack.enter_context(kohakuriver.forward_sync("lab", port, host=lab.url, token=token))
            for _ in range(FORWARDS)
        ]
        flows = [Traffic(forward.local_port, 64) for forward in forwards]
        try:
            assert all(flow.goes_on() for flow in flows)
            yield flows
        finally:
            for flow in flows:
                flow.end()


def test_a_worker_that_is_killed_is_missed_by_nobody_and_comes_back(lab: Lab) -> None:
    assert lab.ready["workers"] == 2
    assert len(lab.ready["metrics"]) == 2
    idle = {worker: connections(worker) for worker in lab.workers}
    with traffic(lab, lab.token) as flows:
        assert all(connections(worker) > before for worker, before in idle.items()), "each has a part of the sessions"
        for killed in list(idle):
            os.kill(killed, signal.SIGKILL)
            eventually(partial(lab.has_replaced, killed))
            assert all(flow.goes_on() for flow in flows), [flow.broken for flow in flows]


def test_a_right_that_ends_at_one_worker_ends_sessions_at_both(lab: Lab) -> None:
    assert lab.ask("POST", "/api/users", name="ann").status_code == 201
    token = lab.ask("POST", "/api/tokens", user="ann").json()["token"]
    assert lab.ask("POST", "/api/tasks/lab/shares", user="ann").is_success
    with contextlib.ExitStack() as stack:
        flows = []
        for _ in range(FORWARDS):
            opened = kohakuriver.forward_sync("lab", lab.ports["lab"], host=lab.url, token=token)
            port = stack.enter_context(opened).local_port
            flows.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)))
            flows[-1].sendall(b"x")
            assert flows[-1].recv(1) == b"x"
        assert lab.ask("DELETE", "/api/tasks/lab/shares/ann").is_success
        for flow in flows:
            with contextlib.suppress(ConnectionResetError):
                assert flow.recv(1) == b""


def test_workers_write_one_audit_log_that_each_of_them_shows(lab: Lab) -> None:
    for number in range(FORWARDS):
        assert lab.ask("POST", "/api/users", name=f"u{number}").status_code == 201
    eventually(lambda: all(f'"u{number}"' in lab.ask("GET", "/api/audit").text for number in range(FORWARDS)))
    for _ in range(FORWARDS):
        assert f'"u{FORWARDS - 1}"' in lab.ask("GET", "/api/audit").text


def test_an_agent_is_reached_by_whichever_worker_is_asked(lab: Lab, tmp_path: Path) -> None:
    agent = lab.start("agent", "--name=bee", "--", *echo())
    port = port_in(agent.line("port "))
    assert port is not None
    with contextlib.ExitStack() as stack:
        for _ in range(FORWARDS):
            opened = stack.enter_context(kohakuriver.forward_sync("bee", port, host=lab.url, token=lab.token))
            said = stack.enter_context(socket.create_connection(("127.0.0.1", opened.local_port), PATIENCE))
            said.sendall(b"x")
            assert said.recv(1) == b"x"
    agent.stop()


def test_ctrl_c_ends_the_workers_with_the_host(ending: Lab) -> None:
    workers = ending.workers
    assert ending.host.stop(signal.SIGINT) == 0
    assert not any(Path(f"/proc/{each}").exists() for each in workers)


def test_workers_end_when_the_host_is_killed(ending: Lab) -> None:
    workers = ending.workers
    ending.host.stop(signal.SIGKILL)
    eventually(lambda: not any(Path(f"/proc/{each}/exe").exists() for each in workers))


def test_a_database_that_can_not_be_shared_is_refused_with_a_sentence(tmp_path: Path) -> None:
    refused = Commands(tmp_path).run("host", "--workers=2", "--port=0", "--ssh-port=0", f"--state-dir={tmp_path / 'h'}")
    assert refused.returncode == 2
    assert "--workers needs a database that several processes can share" in refused.stderr


def test_workers_that_can_not_begin_end_with_their_own_sentence(tmp_path: Path) -> None:
    nobody = "postgresql://nobody@127.0.0.1:1/none"
    refused = Commands(tmp_path).run(
        *("host", "--workers=2", "--port=0", "--ssh-port=0", f"--state-dir={tmp_path / 'h'}", f"--database={nobody}")
    )
    assert refused.returncode not in (0, None)
    assert refused.stderr.count("Error: ") == 1
