"""Attacks: what a peer may send that means no good, and a raw WebSocket to send it over.

Each attack is one peer with credentials of its own, or with none. `python -m tests.support.peers.hostile NAME TARGET`
runs one by itself (`TARGET` is a Target as JSON): it prints `under way` once all of it is with the other side, and then
holds what it opened until its stdin ends.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeAlias

from kohakuriver._frame import build_frame, mask
from kohakuriver.runner.services.state import State
from kohakuriver.tunnel.protocol import CONNECT, DATA, PING, TUNNEL_V2
from tests.support.hops import ROOT
from tests.support.processes import Cluster, eventually
from tests.support.services import echo, port_in

PATIENCE = 30.0
KEY = base64.b64encode(bytes(16)).decode()

CONTINUATION, TEXT, BINARY, CLOSE, WS_PING, WS_PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


@dataclass(frozen=True)
class Target:
    """Where an attack goes. The task and its container are the attacker's own, and so are the credentials."""

    host_port: int
    runner_port: int
    token: str
    task: str
    container: str
    tunnel_token: str
    service_port: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, reserved: int = 0, masked: bool = True, size: int = 0
) -> bytes:
    """A frame as wrong as it is asked for. `size`: how many bytes state its length (0, 2 or 8), at least."""
    length = len(payload)
    head = bytearray([(0x80 if fin else 0) | reserved << 4 | opcode])
    flag = 0x80 if masked else 0
    if length < 126 and not size:
        head.append(flag | length)
    elif length < 1 << 16 and size < 8:
        head += bytes([flag | 126]) + length.to_bytes(2, "big")
    else:
        head += bytes([flag | 127]) + length.to_bytes(8, "big")
    if not masked:
        return bytes(head) + payload
    key = 0x37FA213D
    body = bytearray(payload)
    mask(body, 0, length, key)
    return bytes(head) + key.to_bytes(4, "big") + bytes(body)


def handshake(path: str, token: str | None, *, v2: bool = True, more: str = "") -> bytes:
    """The request that opens a WebSocket."""
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Upgrade: websocket", "Connection: Upgrade"]
    lines += [f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    lines += [f"Sec-WebSocket-Protocol: {TUNNEL_V2}"] if v2 else []
    return ("\r\n".join(lines) + "\r\n" + more + "\r\n").encode()


Frame: TypeAlias = tuple[int, bytes]
"""The first byte (FIN, RSV, opcode) and the payload."""


class Wire:
    """A WebSocket of which every byte is ours to choose. `status` is that of the answer to its handshake."""

    def __init__(self, port: int, path: str, token: str | None, *, v2: bool = True, more: str = "") -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        self.sock.sendall(handshake(path, token, v2=v2, more=more))
        while b"\r\n\r\n" not in self._received:
            self._more()
        self.head, _, self._received = self._received.partition(b"\r\n\r\n")
        self.status = int(self.head.split()[1])

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _more(self) -> None:
        data = self.sock.recv(1 << 16)
        if not data:
            raise EOFError("the other side has closed")
        self._received += data

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            self._more()
        data, self._received = self._received[:size], self._received[size:]
        return data

    def send(self, *data: bytes) -> None:
        self.sock.sendall(b"".join(data))

    def receive(self) -> Frame:
        """The next frame of the server. EOFError at the end of the connection."""
        first, second = self._take(2)
        assert not second & 0x80, "a server does not mask"
        length = second & 0x7F
        if length >= 126:
            length = int.from_bytes(self._take(2 if length == 126 else 8), "big")
        return first, self._take(length)

    def close_code(self) -> int:
        """The code of the close frame that comes, after whatever else does; 1005 for an empty one, 1006 for none."""
        try:
            while True:
                first, payload = self.receive()
                if first & 0x0F == CLOSE:
                    return int.from_bytes(payload[:2], "big") if payload else 1005
        except (EOFError, ConnectionError):
            return 1006

    def ended(self) -> bool:
        """Wait for the end of the TCP connection; what still comes must be nothing."""
        with contextlib.suppress(ConnectionError):
            return not self._received and self.sock.recv(1) == b""
        return True

    def drain(self) -> None:
        """Read and forget what comes, on a thread of its own, until the end."""

        def run() -> None:
            with contextlib.suppress(OSError):
                while self.sock.recv(1 << 20):
                    pass

        self.sock.settimeout(None)
        threading.Thread(target=run, daemon=True).start()


def session(target: Target, *, v2: bool = True) -> Wire:
    """A forward session of the attacker, through the host, past its greeting."""
    wire = Wire(target.host_port, f"/ws/forward/{target.task}/{target.service_port}", target.token, v2=v2)
    assert wire.status == 101, wire.head
    assert wire.receive() == (0x81, b"CONNECTED")
    return wire


def tunnel(target: Target) -> Wire:
    """The attacker's container's tunnel, in place of the one that its tunnel client had."""
    wire = Wire(target.runner_port, f"/ws/tunnel/{target.container}", target.tunnel_token)
    assert wire.status == 101, wire.head
    return wire


# ---- attacks: each yields once, when all of it is under way ----------------------------------------------------------


def raise_file_limit() -> int:
    """Let this process, and those that it starts, open as many files as they may; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


Attack: TypeAlias = Callable[[Target], Iterator[None]]


def slowloris(target: Target) -> Iterator[None]:
    """500 handshakes at host and runner each, of which a few bytes come now and then, and never the end."""
    with contextlib.ExitStack() as stack:
        request = handshake(f"/ws/forward/{target.task}/1", None)
        socks = []
        for port in (target.host_port, target.runner_port):
            socks += [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(500)]
        for start in range(0, len(request) - 4, 40):
            for sock in socks:
                with contextlib.suppress(OSError):  # the server may have had enough of it
                    sock.sendall(request[start : start + 40][: len(request) - 4 - start])
        yield


def half_open(target: Target, count: int = 10_000) -> Iterator[None]:
    """Connections to the host that say nothing: 10,000, or as many as this system lets a process have."""
    count = min(count, raise_file_limit() - 1000)
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(("127.0.0.1", target.host_port), PATIENCE))
        yield


def _flood(wire: Wire, messages: Iterator[bytes]) -> Iterator[None]:
    """Send them as fast as they are taken."""
    with wire:
        while piece := b"".join(itertools.islice(messages, 20_000)):
            wire.sock.sendall(piece)
        yield


def tiny_frames(target: Target) -> Iterator[None]:
    """1,000,000 empty messages for a stream that does not exist."""
    wire = session(target)
    wire.drain()
    message = build_frame(DATA, 0, 77, 0, b"", 0x01020304)
    yield from _flood(wire, itertools.repeat(message, 1_000_000))


def tiny_fragments(target: Target) -> Iterator[None]:
    """A message in 1,000,000 fragments, all of them empty but the first."""
    wire = session(target)
    wire.drain()
    first = frame(BINARY, bytes([DATA, 0, 0, 0, 0, 77, 0, 0]), fin=False)
    middle = frame(CONTINUATION, fin=False)
    yield from _flood(wire, itertools.chain([first], itertools.repeat(middle, 1_000_000)))


def random_ids(target: Target) -> Iterator[None]:
    """300,000 messages of all types for ids at random, those that open streams among them."""
    wire = session(target)
    wire.drain()
    yield from _flood(wire, _random_messages(1))


def _random_messages(seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(300_000):
        yield build_frame(rng.randrange(16), rng.randrange(2), rng.randrange(1 << 32), 1, b"", 0x01020304)


def ping_flood(target: Target) -> Iterator[None]:
    """1,000,000 WebSocket pings, whose answers are read."""
    wire = session(target)
    wire.drain()
    yield from _flood(wire, itertools.repeat(frame(WS_PING), 1_000_000))


def message_ping_flood(target: Target) -> Iterator[None]:
    """500,000 PING messages of the session, whose answers are read."""
    wire = session(target)
    wire.drain()
    yield from _flood(wire, itertools.repeat(build_frame(PING, 0, 0, 0, b"", 0x01020304), 500_000))


def unread_answers(target: Target) -> Iterator[None]:
    """PING messages and pings with long payloads until the server has enough of it, whose answers are never read."""
    messages = build_frame(PING, 0, 0, 0, bytes(60_000), 0x01020304) + frame(WS_PING, bytes(125)) * 500
    with session(target) as wire, contextlib.suppress(ConnectionError, TimeoutError):
        wire.sock.settimeout(5)
        for _ in range(2000):
            wire.sock.sendall(messages)
    yield


def container_ping_flood(target: Target) -> Iterator[None]:
    """The same from inside a container: 500,000 pings and as many PING messages."""
    wire = tunnel(target)
    wire.drain()
    piece = frame(WS_PING) + build_frame(PING, 0, 0, 0, b"", 0x01020304)
    yield from _flood(wire, itertools.repeat(piece, 500_000))


def container_random_ids(target: Target) -> Iterator[None]:
    """300,000 messages of all types for ids at random, from inside a container."""
    wire = tunnel(target)
    wire.drain()
    yield from _flood(wire, _random_messages(2))


def connect_flood(target: Target) -> Iterator[None]:
    """30,000 streams to the attacker's own service, opened at once and never closed."""
    wire = session(target)
    wire.drain()
    window = (65_536).to_bytes(8, "big")
    yield from _flood(wire, (build_frame(CONNECT, 0, i, 0, window, 0x01020304) for i in range(1, 30_001)))


def _refused(target: Target, wrong: bytes) -> Iterator[None]:
    for _ in range(100):
        for opened in (session(target), tunnel(target)):
            with opened as wire:
                wire.send(wrong)
                code = wire.close_code()
                assert code == 1002, code
    yield


def compressed(target: Target) -> Iterator[None]:
    """Compression is offered and not taken; compressed frames (RSV1) come all the same, 100 times at each."""
    path = f"/ws/forward/{target.task}/{target.service_port}"
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
    with Wire(target.host_port, path, target.token, more=offer) as wire:
        assert wire.status == 101
        assert b"extensions" not in wire.head.lower()
    yield from _refused(target, frame(BINARY, bytes(8) + b"\xca\x48\x05\x00", reserved=4))


def fragmented_control(target: Target) -> Iterator[None]:
    """Pings in fragments, 100 times at host and runner."""
    yield from _refused(target, frame(WS_PING, b"half", fin=False) + frame(CONTINUATION, b"rest"))


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        slowloris,
        half_open,
        tiny_frames,
        tiny_fragments,
        random_ids,
        ping_flood,
        message_ping_flood,
        unread_answers,
        container_ping_flood,
        container_random_ids,
        connect_flood,
        compressed,
        fragmented_control,
    )
}


# ---- who is attacked, by whom ----------------------------------------------------------------------------------------

# A task that does nothing, and prints the process id of its tunnel client where others print their port.
QUIET = "import os, signal; print('port', os.getppid(), flush=True); signal.pause()"


def process_task(cluster: Cluster, *command: str) -> tuple[str, str, int]:
    """A process task that is connected: its id, its container, and the port that it printed."""
    task = cluster.create(*command, backend="process")
    cluster.connected(task["task_id"])
    return str(task["task_id"]), task["container"], eventually(lambda: port_in(cluster.log_of(task)))


@contextlib.contextmanager
def attackers_own(cluster: Cluster, node: str) -> Iterator[Target]:
    """What the attacker has: a task with a service, and a container whose tunnel it can speak on."""
    task, _, port = process_task(cluster, *echo())
    _, container, tunnel_client = process_task(cluster, sys.executable, "-c", QUIET)
    os.kill(tunnel_client, signal.SIGSTOP)  # so that it does not come back when the attacker takes its place
    yield Target(
        host_port=int(cluster.url.rpartition(":")[2]),
        runner_port=int(cluster.runners[node].ready["url"].rpartition(":")[2]),
        token=cluster.token,
        task=task,
        container=container,
        tunnel_token=State(cluster.state_of(node)).tunnel_token(container),
        service_port=port,
    )
    os.kill(tunnel_client, signal.SIGCONT)


def main() -> None:
    name, target = sys.argv[1:]
    for _ in ATTACKS[name](Target(**json.loads(target))):
        print("under way", flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def attacked(name: str, target: Target) -> Iterator[None]:
    """Run an attack in a process of its own; inside the `with` it is under way, and all it sent has been taken."""
    argv = [sys.executable, "-m", "tests.support.peers.hostile", name, target.to_json()]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == "under way\n", f"{name} ended early: {process.wait()}"
            yield
            process.stdin.close()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


if __name__ == "__main__":
    main()
