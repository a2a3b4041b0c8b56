"""A host that is drained: what goes through it moves to the host that takes its place. Real programs."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import eventually
from tests.support.up import Apart, Service, connect, echoes

STALL = 2.0
"""Seconds that an echo may take while the host is replaced, on a busy machine; to start another one takes longer."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Apart]:
    cluster = Apart(tmp_path, "--drain=60")
    yield cluster
    cluster.close()


@pytest.fixture
def service(cluster: Apart) -> Service:
    eventually(lambda: json.loads(cluster.run("node", "list", "--json").stdout)["nodes"])
    return cluster.service()


class Echo(threading.Thread):
    """Messages to and fro on one connection, until it is to end; `slowest` is what one of them took, in seconds."""

    def __init__(self, port: int, size: int) -> None:
        super().__init__()
        self.slowest = 0.0
        self.rounds = 0
        self.broken: Exception | None = None
        self._connection = connect(port)
        self._said = bytes(range(256)) * (size // 256)
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with self._connection as connection:
                while not self._over.is_set():
                    began = time.monotonic()
                    self._once(connection)
                    self.slowest = max(self.slowest, time.monotonic() - began)
                    self.rounds += 1
        except Exception as error:
            self.broken = error

    def _once(self, connection: socket.socket) -> None:
        writing = threading.Thread(target=connection.sendall, args=(self._said,))
        writing.start()
        back = bytearray()
        while len(back) < len(self._said) and (data := connection.recv(1 << 20)):
            back += data
        writing.join()
        assert back == self._said

    def more(self) -> bool:
        """Whether two rounds have been done since now."""
        rounds = self.rounds
        return eventually(lambda: self.rounds >= rounds + 2 or self.broken is not None) and self.broken is None

    def end(self) -> None:
        self._over.set()
        self.join()


def replace_host(cluster: Apart) -> None:
    """Ask the host to end, and start another in its place once it does not listen any more."""
    old = cluster.host
    old.process.send_signal(signal.SIGTERM)
    eventually(lambda: not listens(int(cluster.url.rpartition(":")[2])))
    cluster.start_host()
    assert old.ended() == 0


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def test_connections_move_to_the_host_that_takes_the_place_of_a_drained_one(cluster: Apart, service: Service) -> None:
    told = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    shown = cluster.start("forward", service.task, f"0:{service.port}")
    ports = told.listening(), int(shown.line("Forwarding").split()[1].rpartition(":")[2])
    small = [Echo(ports[0], 256) for _ in range(20)] + [Echo(ports[1], 256)]
    bulk = Echo(ports[0], 16 << 20)
    try:
        assert all(each.more() for each in small)
        replace_host(cluster)
        assert all(each.more() for each in [*small, bulk])
    finally:
        for each in [*small, bulk]:
            each.end()
    assert max(each.slowest for each in small) < STALL
    assert told.stop() == shown.stop() == 0
    events = [json.loads(line) for line in told.rest()]
    assert [each for each in events if each["event"] in ("moved", "reconnecting", "resumed", "stream_error")] == [
        {"event": "moved", "task": service.task, "version": 2, "reason": "the host is going", "connections": 21}
    ]
    (said,) = shown.rest(err=True)
    assert said.endswith("Connection to the host renewed, since the host is going: 1 connection goes on.")


def test_a_forward_whose_host_is_drained_ends_at_once_while_it_looks_for_the_next(
    cluster: Apart, service: Service
) -> None:
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--json")
    with connect(forward.listening()) as connection:
        assert echoes(connection)
        cluster.host.process.send_signal(signal.SIGTERM)
        eventually(lambda: not listens(int(cluster.url.rpartition(":")[2])))
        assert echoes(connection)
        began = time.monotonic()
        assert forward.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < STALL
    assert cluster.host.ended() == 0
