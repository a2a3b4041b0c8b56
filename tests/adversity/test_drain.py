"""A host that is drained: what goes through it moves to the host that takes its place. Real programs."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.echoing import Traffic
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
    small = [Traffic(ports[0], 256) for _ in range(20)] + [Traffic(ports[1], 256)]
    bulk = Traffic(ports[0], 16 << 20)
    try:
        assert all(each.goes_on() for each in small)
        replace_host(cluster)
        assert all(each.goes_on() for each in [*small, bulk])
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
