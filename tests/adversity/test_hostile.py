"""One peer attacks, with credentials of its own or with none: another user's echo goes on, in bounded memory.

Host, runner, tunnel clients and attacker are processes of their own. How late the echo is meanwhile is measured by
`python -m bench.hostile`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.peers.attackers import attacked, attackers_own, process_task
from tests.support.peers.hostile import ATTACKS
from tests.support.peers.wire import Target, raise_file_limit
from tests.support.processes import Cluster, Program, a_cluster
from tests.support.services import echo

MIB = 1 << 20
# What one attacker may make the host or the runner hold, beside what each of its connections costs.
MOST_HELD = {"half_open": 96 * MIB}
MOST_HELD_ELSE = 32 * MIB


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    raise_file_limit()
    with a_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        yield cluster


@pytest.fixture(scope="module")
def attackers(cluster: Cluster) -> Iterator[Target]:
    with attackers_own(cluster, "n1") as target:
        yield target


@pytest.fixture(scope="module")
def victims_port(cluster: Cluster) -> Iterator[int]:
    """A local port that leads to the echo of somebody else's task."""
    task, _, port = process_task(cluster, *echo())
    with cluster.forward(task, port) as forward:
        yield forward.local_port


class Victim:
    """A user who sends and gets back, all the time, on one connection."""

    def __init__(self, port: int) -> None:
        self.echoes = 0
        self.trouble: BaseException | None = None
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ending:
                data = os.urandom(300)
                self._sock.sendall(data)
                got = b""
                while len(got) < len(data):
                    piece = self._sock.recv(1000)
                    assert piece, "the connection was closed"
                    got += piece
                assert got == data
                with self._changed:
                    self.echoes += 1
                    self._changed.notify()
        except BaseException as trouble:
            with self._changed:
                self.trouble = trouble
                self._changed.notify()

    def goes_on(self, more: int = 20) -> None:
        """Wait for so many more echoes."""
        with self._changed:
            enough = self.echoes + more
            self._changed.wait_for(lambda: self.echoes >= enough or self.trouble is not None)
        if self.trouble is not None:
            raise self.trouble

    def end(self) -> None:
        self._ending = True
        self._thread.join()
        self._sock.close()


@contextlib.contextmanager
def victim(port: int) -> Iterator[Victim]:
    one = Victim(port)
    try:
        yield one
    finally:
        one.end()


def peak(program: Program) -> int:
    """The most memory that it ever held since `forget_peak`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{program.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak(program: Program) -> None:
    Path(f"/proc/{program.pid}/clear_refs").write_text("5")


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_harms_nobody_else(cluster: Cluster, attackers: Target, victims_port: int, name: str) -> None:
    programs = [cluster.host, cluster.runners["n1"]]
    for program in programs:
        forget_peak(program)
    before = [peak(program) for program in programs]
    with victim(victims_port) as user:
        user.goes_on()
        with attacked(name, attackers):
            user.goes_on()
        user.goes_on()
    grown = [peak(program) - at_first for program, at_first in zip(programs, before, strict=True)]
    assert max(grown) < MOST_HELD.get(name, MOST_HELD_ELSE)


@pytest.mark.parametrize("credential", ["", "Authorization: Bearer kr_wrong\r\n"], ids=["none", "a wrong one"])
def test_bodies_of_strangers_are_refused_before_they_come_and_cost_no_memory(cluster: Cluster, credential: str) -> None:
    address = ("127.0.0.1", int(cluster.url.rpartition(":")[2]))
    head = f"POST /api/tasks HTTP/1.1\r\nHost: localhost\r\n{credential}Content-Length: {MIB}\r\n\r\n".encode()
    forget_peak(cluster.host)
    before = peak(cluster.host)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(300)]
        for stranger in strangers:
            stranger.sendall(head)
        for stranger in strangers:
            assert stranger.recv(100).startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 429 "))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it doesn't wait for ever for the rest
                stranger.sendall(bytes(MIB - 1))
        assert cluster.http.get("/api/tasks").status_code == 200
    assert peak(cluster.host) - before < 16 * MIB
