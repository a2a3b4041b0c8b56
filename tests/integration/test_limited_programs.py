"""Limits and the audit log as users of real programs meet them: with terminals and SSH, not only forwards."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from kohakuriver.limits import LEAST_RATE
from tests.support.forked import PROGRAM
from tests.support.ssh import Users, ours
from tests.support.up import TIMEOUT

SIZE = 3 * LEAST_RATE
DATA = random.Random(6).randbytes(SIZE)
# Less time than this would be more bytes than the rate lets through, however fast the machine is.
LEAST_SECONDS = SIZE / LEAST_RATE - 1
IDLE_SENTENCE = "nothing passed for 0.5 s, which is as long as this host waits"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    """A cluster with a rate, and the least message that can be set, whose task `web` has an SSH server."""
    limits = {"KOHAKURIVER_MAX_RATE": str(LEAST_RATE), "KOHAKURIVER_MAX_MESSAGE": str(1 << 20)}
    users = Users(tmp_path_factory.mktemp("slow"), ours(), **limits)
    users.vps("web")
    yield users
    users.close()


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    """A cluster that ends sessions in which nothing passes."""
    users = Users(tmp_path_factory.mktemp("impatient"), ours(), KOHAKURIVER_IDLE_TIMEOUT="0.5")
    users.vps("web")
    yield users
    users.close()


@pytest.mark.parametrize("way", ["there", "back"])
def test_scp_keeps_to_the_rate_of_a_session(slow: Users, tmp_path: Path, way: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(DATA)
    paths = (str(source), f"web:{target}") if way == "there" else (f"web:{source}", str(target))
    began = time.monotonic()
    done = slow.call("scp", "-q", "-F", str(slow.config), *paths)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began >= LEAST_SECONDS
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_command_with_pipes_keeps_to_the_rate_of_a_session(slow: Users, tmp_path: Path, way: str) -> None:
    path = tmp_path / "file"
    began = time.monotonic()
    if way == "there":
        done = slow.call(*PROGRAM, "connect", "web", "--", "dd", f"of={path}", "status=none", input=DATA)
        got = path.read_bytes()
    else:
        path.write_bytes(DATA)
        done = slow.call(*PROGRAM, "connect", "web", "--", "cat", str(path))
        got = done.stdout
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began >= LEAST_SECONDS
    assert got == DATA


def test_a_message_of_a_terminal_above_the_limit_ends_it_with_1009(slow: Users) -> None:
    url = str(slow.ready["host_url"]).replace("http", "ws") + "/ws/task/web/terminal"
    headers = {"Authorization": f"Bearer {slow.token}"}
    offered = [Subprotocol("kohakuriver.terminal.v2")]
    with connect(url, additional_headers=headers, subprotocols=offered, proxy=None) as socket:
        socket.send(bytes((1 << 20) + 1))
        with contextlib.suppress(ConnectionClosed):
            while True:
                socket.recv(TIMEOUT)
        assert socket.close_code == 1009


@pytest.mark.parametrize("command", [["forward", "web", "0:22"], ["connect", "web", "--", "sleep", "1000"]])
def test_a_command_whose_session_was_idle_for_too_long_ends_with_4_and_says_so(
    impatient: Users, command: list[str]
) -> None:
    done = impatient.run(*command)
    assert done.returncode == 4, done.stderr
    assert IDLE_SENTENCE in done.stderr


def test_an_ssh_connection_that_is_idle_for_too_long_is_ended(impatient: Users) -> None:
    assert impatient.ssh("web", "sleep", "1000").returncode == 255
    written = impatient.run("audit", "--json").stdout
    assert '"proto": "ssh"' in written
    assert f'"ended_by": "host", "code": 4001, "reason": "{IDLE_SENTENCE}"' in written


def test_a_host_that_is_stopped_writes_down_the_end_of_every_session(tmp_path: Path) -> None:
    users = Users(tmp_path, ours())
    users.vps("web")
    users.start("forward", "web", "0:22", "--json").event("listening")
    terminal = users.start("connect", "web", "--", "sh", "-c", "echo here; exec sleep 1000")
    terminal.line("here")
    try:
        with socket.create_connection(("127.0.0.1", users.port), TIMEOUT) as relay, relay.makefile("rb") as lines:
            relay.sendall(f"REQUEST_TUNNEL web {users.token}\n".encode())
            assert lines.readline() == b"SUCCESS\n"
            assert users.up.stop() == 0
    finally:
        users.close()
    written = [json.loads(line) for line in (tmp_path / "state" / "audit.jsonl").read_text().splitlines()]
    opened = {line["session"]: line["proto"] for line in written if line["event"] == "session_opened"}
    closed = {line["session"]: line["proto"] for line in written if line["event"] == "session_closed"}
    assert sorted(opened.values()) == ["ssh", "tcp", "terminal"]
    assert closed == opened
