"""Agents of two hosts on one PostgreSQL: each host reaches what is connected to the other, and takes over from it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.agents import Agent
from tests.support.echoing import Traffic
from tests.support.hops import binary
from tests.support.postgres import Postgres
from tests.support.processes import eventually
from tests.support.services import echo
from tests.support.two_hosts import NAMES, TwoHosts, two_hosts

pytestmark = pytest.mark.timeout(240)


class Lab:
    """The hosts, and an agent that knows both; `at` is the one that it asks first."""

    def __init__(self, hosts: TwoHosts, at: str) -> None:
        self.hosts = hosts
        there = [hosts.urls[at], *(hosts.urls[name] for name in NAMES if name != at)]
        environment = {**hosts.environment, "KOHAKURIVER_HOST": ",".join(there)}
        command = [str(binary()), "agent", f"--name=at-{at}", "--", *echo()]
        self.agent = Agent(command, hosts.directory / f"agent-{at}", environment, hosts.directory)
        self.name, self.port = f"at-{at}", self.agent.port()

    def task(self, at: str) -> dict[str, Any]:
        """The task as a host shows it."""
        shown: dict[str, Any] = self.hosts.http[at].get(f"/api/tasks/{self.name}").json()
        return shown

    def connected(self, at: str, *, besides: str = "") -> str:
        """Wait until the agent is connected, as a host says, and not to the node `besides`; to which."""

        def node() -> str | None:
            task = self.task(at)
            return str(task["node"]) if task.get("tunnel") and task["node"] != besides else None

        return eventually(node)


@pytest.fixture
def hosts(postgres: Postgres, tmp_path: Path) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path, postgres.new_database(), "--drain=20") as hosts:
        yield hosts


def test_either_host_reaches_an_agent_and_when_its_own_dies_it_goes_on_at_the_other(hosts: TwoHosts) -> None:
    lab = Lab(hosts, "a")
    flows: list[Traffic] = []
    try:
        first = lab.connected("b")
        stranger = httpx.get(f"{hosts.urls['a']}/agents/api/node", trust_env=False)
        assert stranger.status_code == 401
        by_both = ",".join(hosts.urls[name] for name in ("b", "a"))
        with hosts.forward(lab.name, lab.port, host=by_both) as forward:
            flows = [Traffic(forward.local_port, size) for size in (64, 1 << 18)]
            assert all(flow.goes_on() for flow in flows)
            ports = hosts.http["b"].get(f"/api/tasks/{lab.name}/ports").json()["ports"]
            assert lab.port in [each["port"] for each in ports]
            hosts.hosts["a"].stop(signal.SIGKILL)
            second = lab.connected("b", besides=first)
            assert all(flow.goes_on() for flow in flows), [flow.broken for flow in flows]
            assert second != first
            hosts.start_host("a")
            eventually(lambda: hosts.http["a"].get("/health/ready").status_code == 200)
            hosts.hosts["b"].stop()  # in good order: its agents go before its sessions
            assert lab.connected("a", besides=second) == first  # were b back at once, it might be there again
            hosts.start_host("b")
            assert all(flow.goes_on() for flow in flows), [flow.broken for flow in flows]
            for flow in flows:
                flow.end()
        stopped = eventually(lambda: answer if (answer := _stop(hosts, "a", lab.name)).status_code == 200 else None)
        assert stopped.json()["status"] == "stopped"
        lab.agent.ended()
    finally:
        for flow in flows:
            flow.end()
        lab.agent.stop(signal.SIGKILL)


def _stop(hosts: TwoHosts, at: str, name: str) -> httpx.Response:
    return hosts.http[at].post(f"/api/tasks/{name}/stop")
