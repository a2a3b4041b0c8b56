"""`kohakuriver connect` to a host that speaks version 1 alone: a peer of a few lines, docs/protocol.md §6 in hand."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pytest
from websockets.sync.server import ServerConnection, serve

from tests.support.forked import PROGRAM
from tests.support.up import TIMEOUT, Commands


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@contextmanager
def old_host(handler: Callable[[ServerConnection], None]) -> Iterator[str]:
    """Its URL. It takes no subprotocol, and looks at no query."""
    with serve(handler, "127.0.0.1", 0) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            serving.join()


def said(socket: ServerConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(TIMEOUT))
    return message


def tell(socket: ServerConnection, kind: str, data: str) -> None:
    socket.send(json.dumps({"type": kind, "data": data}))


def spawn(commands: Commands, url: str) -> pexpect.spawn[bytes]:
    child = pexpect.spawn(
        PROGRAM[0], [*PROGRAM[1:], "connect", "7", "--host", url], env=commands.environment, dimensions=(33, 111),
        timeout=TIMEOUT,
    )  # fmt: skip
    child.delaybeforesend = None
    return child


def test_a_shell_has_our_size_and_every_character_both_ways(commands: Commands) -> None:
    def shell(socket: ServerConnection) -> None:
        assert socket.request is not None
        assert socket.request.path.startswith("/ws/task/7/terminal")
        assert said(socket) == {"type": "resize", "rows": 33, "cols": 111}
        tell(socket, "output", "welcome ")
        typed = ""
        while "\r" not in typed:
            message = said(socket)
            assert message["type"] == "input"
            typed += message["data"]
        tell(socket, "output", f"<{typed.strip()}>")

    with old_host(shell) as url:
        child = spawn(commands, url)
        child.expect(b"welcome ")
        child.send("gr\u00fc\u00dfe \u20ac\r".encode())
        child.expect("<gr\u00fc\u00dfe \u20ac>".encode())
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0


def test_why_there_is_no_terminal_is_said_and_gives_4(commands: Commands) -> None:
    def refuse(socket: ServerConnection) -> None:
        tell(socket, "error", "Task 7 is not running.")
        socket.close(1008)

    with old_host(refuse) as url:
        child = spawn(commands, url)
        child.expect(b"Task 7 is not running")
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 4


def test_a_command_is_refused_with_a_sentence_since_such_a_host_would_not_run_it(commands: Commands) -> None:
    with old_host(lambda socket: None) as url:
        done: subprocess.CompletedProcess[str] = commands.run("connect", "7", "--host", url, "--", "ls")
    assert done.returncode == 4
    assert "version 1" in done.stderr
