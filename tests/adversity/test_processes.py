"""Streams of two users that must not hurt each other, through real processes on real sockets."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.processes import eventually
from tests.support.up import Cluster, Program, connect, echoes

MIB = 1 << 20
PATIENCE = 60.0
NUMBERS = b"".join(number.to_bytes(8, "big") for number in range(MIB // 8))
BUDGET = 64 * MIB

# Does what a connection's first line says: numbers without end, or so many bytes and a hash of what came meanwhile.
SERVICE = """
import contextlib, hashlib, socket, sys, threading
MIB = 1 << 20
NUMBERS = b"".join(number.to_bytes(8, "big") for number in range(MIB // 8))

def send(connection, size):
    for _ in range(size // MIB):
        connection.sendall(NUMBERS)

def serve(connection):
    with connection, contextlib.suppress(OSError):
        word, size = connection.makefile("rb", buffering=0).readline().split()
        if word == b"numbers":
            send(connection, sys.maxsize)
        elif word == b"both":
            sending = threading.Thread(target=send, args=(connection, int(size)))
            sending.start()
            digest = hashlib.sha256()
            while data := connection.recv(MIB):
                digest.update(data)
            sending.join()
            connection.sendall(digest.digest())
        else:
            while data := connection.recv(65536):
                connection.sendall(data)

listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
with open(sys.argv[1], "w") as fifo:
    fifo.write(str(listener.getsockname()[1]))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def users(cluster: Cluster) -> list[Program]:
    """Two users' forwards to one task."""
    fifo = cluster.directory / "port"
    os.mkfifo(fifo)
    command = [sys.executable, "-c", SERVICE, str(fifo)]
    cluster.succeed("vps", "create", "--name", "numbers", "--backend", "process", "--", *command)
    port = fifo.read_text()
    return [cluster.start("forward", "numbers", f"0:{port}", "--json") for _ in range(2)]


@pytest.fixture(scope="module")
def ports(users: list[Program]) -> list[int]:
    return [user.listening() for user in users]


def asked(port: int, word: str, size: int = 0) -> socket.socket:
    sock = connect(port)
    sock.settimeout(PATIENCE)
    sock.sendall(f"{word} {size}\n".encode())
    return sock


def read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (more := sock.recv(min(MIB, size - len(data)))):
        data += more
    return bytes(data)


def hops(cluster: Cluster, users: list[Program]) -> list[psutil.Process]:
    """The processes between a user and the service."""
    found = [psutil.Process(user.process.pid) for user in users]
    for process in psutil.Process(cluster.up.process.pid).children(recursive=True):
        line = process.cmdline()
        if line[1:3] == ["-m", "kohakuriver"] or Path(line[0]).name == "tunnel-client":
            found.append(process)
    return found


def test_readers_that_stop_stop_nobody_else_cost_no_more_than_their_windows_and_go_on(
    cluster: Cluster, users: list[Program], ports: list[int]
) -> None:
    processes = hops(cluster, users)
    assert len(processes) >= 5
    before = {process: process.memory_info().rss for process in processes}
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(asked(ports[0], "numbers")) for _ in range(20)]
        begun = [read(sock, 8) for sock in stalled]
        goes_on = stack.enter_context(asked(ports[0], "numbers"))
        beside = [stack.enter_context(asked(port, "echo")) for port in ports]
        for _ in range(100):
            assert read(goes_on, MIB) == NUMBERS
            assert all(echoes(sock) for sock in beside)
        grown = {process: process.memory_info().rss - before[process] for process in processes}
        assert max(grown.values()) < BUDGET, grown
        for sock, first in zip(stalled, begun, strict=True):
            assert first + read(sock, 8 * MIB - 8) == NUMBERS * 8
            assert all(echoes(other) for other in beside)
            sock.close()
        assert read(goes_on, MIB) == NUMBERS


@pytest.mark.parametrize("streams", [1, 100])
def test_a_gigabyte_each_way_at_once_arrives_whole(ports: list[int], streams: int) -> None:
    each = (1000 * MIB) // streams

    def one(_: int) -> bool:
        sent, got, left = hashlib.sha256(), hashlib.sha256(), each
        with asked(ports[0], "both", each) as sock:

            def send() -> None:
                for _ in range(each // MIB):
                    sent.update(NUMBERS)
                    sock.sendall(NUMBERS)
                sock.shutdown(socket.SHUT_WR)

            sending = threading.Thread(target=send)
            sending.start()
            while left and (data := sock.recv(min(MIB, left))):
                got.update(data)
                left -= len(data)
            sending.join()
            return left == 0 and got.digest() == sent.digest() == read(sock, 33)

    with ThreadPoolExecutor(streams) as together:
        assert all(together.map(one, range(streams)))


def test_everything_is_given_back(cluster: Cluster, users: list[Program], ports: list[int]) -> None:
    processes = hops(cluster, users)
    with asked(ports[0], "echo") as sock:
        assert echoes(sock)
    before = {process: process.num_fds() for process in processes}
    with contextlib.ExitStack() as stack:
        for number in range(200):
            sock = stack.enter_context(asked(ports[number % 2], "echo" if number % 4 else "numbers"))
            assert number % 4 == 0 or echoes(sock)
    eventually(lambda: all(process.num_fds() <= before[process] for process in processes))
