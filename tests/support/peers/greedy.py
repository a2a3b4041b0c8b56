"""Attacks on what users share: what one ordinary user may take from everybody else, and what a stranger may.

Each is a function as in hostile.py beside this, and runs in the same way. Nothing here breaks the protocol: each peer
only asks for far more than its part.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import asyncssh

from kohakuriver._frame import build_frame
from kohakuriver.tunnel.protocol import CONNECT, CONNECTED, DATA
from tests.support.peers.wire import PATIENCE, Attack, Target, Wire, raise_file_limit, session, tunnel

SECONDS = 6.0
"""How long an attack that has no end of its own goes on."""
WINDOW = 90 << 20
KEY = 0x01020304


def unread_sessions(target: Target) -> Iterator[None]:
    """12 sessions with a window of 90 MiB each, which a service fills at once and their user never reads."""
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(tunnel(target))
        piece = bytes(1 << 16)
        for _ in range(12):
            wire = stack.enter_context(session(target, target.own_task))
            wire.send(build_frame(CONNECT, 0, 1, 0, WINDOW.to_bytes(8, "big"), KEY))
            first, payload = inside.receive()
            while first != 0x82 or payload[0] != CONNECT:
                first, payload = inside.receive()
            stream = int.from_bytes(payload[2:6], "big")
            inside.send(build_frame(CONNECTED, 0, stream, 0, (1 << 20).to_bytes(8, "big"), KEY))
            data = build_frame(DATA, 0, stream, 0, piece, KEY)
            for _ in range(WINDOW // len(piece)):
                inside.send(data)
        yield


def costly_handshakes(target: Target) -> Iterator[None]:
    """25 strangers a second at the SSH port, each of whom asks for the dearest key exchange that it offers."""
    dear = ["rsa2048-sha256", "diffie-hellman-group18-sha512", "ecdh-sha2-nistp521", "curve25519-sha256"]

    async def one() -> None:
        with contextlib.suppress(OSError, asyncssh.Error, asyncio.TimeoutError):
            await asyncio.wait_for(
                asyncssh.connect(
                    "127.0.0.1", target.ssh_port, username="x", known_hosts=None, client_keys=None, kex_algs=dear
                ),
                PATIENCE,
            )

    async def flood() -> None:
        loop = asyncio.get_running_loop()
        start, under_way = loop.time(), set()
        for i in range(int(25 * SECONDS)):
            under_way.add(asyncio.ensure_future(one()))
            await asyncio.sleep(max(0.0, start + i / 25 - loop.time()))
        await asyncio.gather(*under_way)

    asyncio.run(flood())
    yield


def waits(target: Target) -> Iterator[None]:
    """4,000 requests that wait for a task which never is ready."""
    tunnel(target).sock.close()  # whose tunnel client stands still, so nothing takes its place
    count = min(4000, raise_file_limit() - 1000)
    head = f"GET /api/tasks/{target.own_task}/wait?timeout=20 HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    request = f"{head}Authorization: Bearer {target.token}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection(("127.0.0.1", target.host_port), PATIENCE)).sendall(
                    request
                )
        time.sleep(SECONDS)
        yield


def refused_paths(target: Target) -> Iterator[None]:
    """Eight strangers who ask for as long a name as a request may have, as often as they can."""
    path = f"/ws/forward/{'A' * 7900}/1"
    ends = time.monotonic() + SECONDS

    def ask() -> None:
        while time.monotonic() < ends:
            with contextlib.suppress(OSError, EOFError):
                Wire(target.host_port, path, None).sock.close()

    _together(ask, 8)
    yield


def wide_sessions(target: Target) -> Iterator[None]:
    """Sessions that name as many ports as a request has room for, opened and closed as often as they can be."""
    path = f"/ws/forward/{target.task}/10000?ports=" + ",".join(str(port) for port in range(10_001, 11_801, 2))
    ends = time.monotonic() + SECONDS

    def open_and_close() -> None:
        while time.monotonic() < ends:
            with contextlib.suppress(OSError, EOFError), Wire(target.host_port, path, target.token) as wire:
                wire.receive()

    _together(open_and_close, 4)
    yield


def connects(target: Target) -> Iterator[None]:
    """20 sessions that each open 5,000 streams a second to a port where nothing listens."""
    ends = time.monotonic() + SECONDS

    def flood() -> None:
        with contextlib.suppress(OSError, EOFError), session(target) as wire:
            wire.drain()
            ids = itertools.count(1)
            while time.monotonic() < ends:
                window = (65_536).to_bytes(8, "big")
                wire.send(*(build_frame(CONNECT, 0, next(ids), 9, window, KEY) for _ in range(500)))
                time.sleep(0.1)

    _together(flood, 20)
    yield


def unfinished_bodies(target: Target) -> Iterator[None]:
    """300 strangers with a request of 1 MiB, of which the last byte never comes."""
    head = b"POST /api/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: 1048576\r\n\r\n" + b" " * 1_048_575
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection(("127.0.0.1", target.host_port), PATIENCE)).sendall(
                    request
                )
        yield


def _asked(port: int, request: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    sock.sendall(request)
    return sock


def _together(run: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


GREEDY: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        unread_sessions,
        costly_handshakes,
        waits,
        refused_paths,
        wide_sessions,
        connects,
        unfinished_bodies,
    )
}
