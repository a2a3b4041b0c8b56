"""What users are shown of traffic: streams, bytes, rates, dropped datagrams, waits for a window."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import eventually
from tests.support.up import Cluster, Program, connect, echoes

SIZE = 1 << 20

# Takes one connection, sends a lot, and reads nothing; a second connection is a signal to go on and read.
STALLING = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
with open(sys.argv[1], "w") as fifo:
    fifo.write(str(listener.getsockname()[1]))
first, _ = listener.accept()
listener.accept()
while first.recv(1 << 20):
    pass
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


def status(cluster: Cluster, task: str) -> dict[str, Any]:
    traffic: dict[str, Any] = json.loads(cluster.succeed("vps", "status", task, "--json"))["traffic"]
    return traffic


def unused_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def stats_until(forward: Program, name: str, least: int) -> dict[str, Any]:
    """The first `stats` event with so much of one number."""
    while True:
        event = forward.event("stats")
        if event[name] >= least:
            return event


def test_a_task_and_its_node_show_the_streams_and_bytes_of_a_forward(cluster: Cluster) -> None:
    service = cluster.service()
    # By one path: what goes over to another while it is on its way is sent again, and counts again.
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--path", "host", "--json")
    with connect(forward.listening()) as connection:
        assert echoes(connection, bytes(SIZE))

        def alone() -> dict[str, Any] | None:
            """Each look has a session for a moment, in which it asks for ports, and the runner may tell of that."""
            seen = status(cluster, service.task)
            return seen if seen["bytes_to_user"] >= SIZE and (seen["streams"], seen["sessions"]) == (1, 1) else None

        seen = eventually(alone)
        assert seen["version"] == 2
        for way in ("bytes_to_container", "bytes_to_user"):
            assert SIZE <= seen[way] < 1.01 * SIZE, "and a few bytes of windows"
    eventually(lambda: status(cluster, service.task)["streams"] == 0)
    assert forward.stop() == 0
    eventually(lambda: status(cluster, service.task)["sessions"] == 0)
    assert status(cluster, service.task)["bytes_to_user"] >= SIZE, "what is over still counts"
    nodes = json.loads(cluster.succeed("node", "list", "--json"))["nodes"]
    assert nodes[0]["traffic"]["bytes_to_user"] >= SIZE


def test_the_statistics_of_a_forward_show_bytes_rates_and_streams(cluster: Cluster) -> None:
    service = cluster.service()
    forward = cluster.start("forward", service.task, f"0:{service.port}", "--path", "host", "--json")  # as above
    with connect(forward.listening()) as connection:
        assert echoes(connection, bytes(SIZE))
        events = [forward.event("stats")]
        while events[-1]["bytes_received"] < SIZE:
            events.append(forward.event("stats"))
        assert (events[-1]["streams"], events[-1]["bytes_sent"]) == (1, SIZE)
        for rate in ("sent_per_second", "received_per_second"):
            assert any(event[rate] > 0 for event in events)


def test_a_stream_that_waits_for_a_window_is_counted_for_the_forward_and_for_the_task(
    cluster: Cluster, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "port")
    create = ("vps", "create", "--json", "--backend=process", "--", sys.executable, "-c", STALLING)
    task = json.loads(cluster.succeed(*create, str(tmp_path / "port")))["name"]
    port = int((tmp_path / "port").read_text())
    forward = cluster.start("forward", task, f"0:{port}", "--json")
    local = forward.listening()
    with connect(local) as connection:
        connection.setblocking(False)
        blocked = False

        def fill() -> bool:
            nonlocal blocked
            try:
                while True:
                    connection.send(bytes(1 << 16))
            except BlockingIOError:
                blocked = True
            return bool(status(cluster, task)["stalls"])

        eventually(fill)
        assert blocked
        assert stats_until(forward, "stalls", 1)["streams"] == 1


def test_datagrams_that_no_service_takes_are_counted_as_dropped(cluster: Cluster) -> None:
    service = cluster.service()
    forward = cluster.start("forward", service.task, f"0:{unused_udp_port()}/udp", "--json")
    local = forward.listening()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", local))

        def dropped() -> bool:
            client.send(b"is anybody there?")
            return bool(status(cluster, service.task)["udp_dropped"])

        eventually(dropped)
