"""The straight path in a network of its own: a laptop, a host and a node, whose wires are blocked and unblocked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.network.triangle import Triangle, missing, triangle
from tests.support.processes import PATIENCE, Program, eventually

LEASE = 3
AWAY = 2.0
STREAMS = 30

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}")

ECHO = """
import asyncio
async def serve(reader, writer):
    while data := await reader.read(1 << 18):
        writer.write(data)
        await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@dataclass
class Net:
    """A cluster in the three namespaces, with a task that echoes."""

    wires: Triangle
    directory: Path
    port: int
    environment: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        return [*self.wires.under("laptop"), sys.executable, "-m", "kohakuriver", *arguments]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    directory = tmp_path_factory.mktemp("net")
    with triangle() as wires:
        host = Program(
            directory / "host.log",
            *("host", "--state-dir", str(directory / "host"), "--bind", wires.host, "--port", "0", "--ssh-port", "0"),
            under=wires.under("host"),
        )
        runner = None
        try:
            url = host.ready["url"]
            token = (directory / "host" / "admin-token").read_text().strip()
            environment = {**os.environ, "KOHAKURIVER_HOST": url, "KOHAKURIVER_TOKEN": token}
            environment["KOHAKURIVER_CONFIG_DIR"] = str(directory / "config")
            runner = Program(
                directory / "runner.log",
                *("runner", "--name", "n1", "--host-url", url, "--bind", wires.node, "--port", "0", "--direct"),
                *("--state-dir", str(directory / "runner"), "--backend", "process"),
                *("--node-token-file", str(directory / "host" / "node-token")),
                env={"KOHAKURIVER_LEASE": str(LEASE)},
                under=wires.under("node"),
            )
            assert runner.next_event()["event"] == "registered"
            made = Net(wires, directory, 0, environment)
            told(made, "vps", "create", "--name", "lab", "--backend", "process", "--", sys.executable, "-c", ECHO)
            made.port = eventually(lambda: printed(directory / "runner" / "tasks"))
            yield made
        finally:
            for program in (runner, host):
                if program is not None:
                    program.end()


def printed(tasks: Path) -> int | None:
    """The number that the only task has printed."""
    lines = [line for log in tasks.glob("*/log") for line in log.read_text().splitlines() if line.isdecimal()]
    return int(lines[0]) if lines else None


def told(net: Net, *arguments: str) -> str:
    done = subprocess.run(
        net.command(*arguments), env=net.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Forward:
    """`kohakuriver forward` on the laptop, its events with the time of each, and the load that it carries."""

    def __init__(self, net: Net) -> None:
        command = net.command("forward", "lab", f"0:{net.port}", "--json")
        self._log = (net.directory / "forward.log").open("w+")
        self.process = subprocess.Popen(
            command, env=net.environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.events: list[dict[str, Any]] = []
        port = self.until(event="listening")["local_port"]
        self.until(path="direct")
        self.load = subprocess.Popen(
            [*net.wires.under("laptop"), sys.executable, "-m", "tests.support.network.load", str(port), str(STREAMS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.load.stdout is not None
        assert self.load.stdout.readline() == "moving\n"

    def until(self, **wanted: Any) -> dict[str, Any]:
        """The next event that says this."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            event: dict[str, Any] = json.loads(line)
            self.events.append(event)
            if wanted.items() <= event.items():
                return event
        raise AssertionError(f"the forward has ended: {self.events[-3:]}")

    def end(self) -> dict[str, Any]:
        """What became of the load."""
        try:
            told, _ = self.load.communicate(timeout=PATIENCE)
            return dict(json.loads(told))
        finally:
            for process in (self.load, self.process):
                process.terminate()
                process.wait(PATIENCE)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self._log.close()


def test_a_blocked_straight_path_loses_no_byte_and_no_stream_and_is_left_within_2_s(net: Net) -> None:
    forward = Forward(net)
    for _ in range(3):
        began = time.monotonic()
        with net.wires.blocked("laptop"):
            back = forward.until(path="host", reason="its node does not answer")
            assert time.monotonic() - began < AWAY
            assert back["connections"] >= STREAMS
        forward.until(path="direct")
    with net.wires.blocked("laptop"):
        forward.until(path="host")
        time.sleep(4 * AWAY)  # while it is tried in vain
    began = time.monotonic()
    forward.until(path="direct")
    assert time.monotonic() - began < AWAY
    eventually(lambda: "direct, 1 of 1 session" in told(net, "vps", "status", "lab"))
    result = forward.end()
    assert result["errors"] == []
    assert result["echoes"] > 10 * STREAMS
    assert result["bulk"] > 1 << 20
    assert result["longest"] < AWAY + 1
    assert not [event for event in forward.events if event["event"] == "stream_error"]
    paths = [event["path"] for event in forward.events if event["event"] == "path"]
    assert [each for each, before in zip(paths, ["", *paths], strict=False) if each != before] == [
        "direct", *["host", "direct"] * 4,
    ]  # fmt: skip


def test_a_runner_that_is_cut_off_from_its_host_ends_straight_paths_within_the_lease_and_all_wait_for_the_host(
    net: Net,
) -> None:
    forward = Forward(net)
    began = time.monotonic()
    with net.wires.blocked("host"):
        ended = forward.until(event="path", path="host")
        assert LEASE / 2 < time.monotonic() - began < 2 * LEASE
        assert "has not heard from the host" in ended["reason"]
    forward.until(path="direct")
    result = forward.end()
    assert result["errors"] == []
    assert result["bulk"] > 1 << 20
