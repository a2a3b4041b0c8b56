"""A raw WebSocket of which every byte is ours to choose, and what those who attack have."""

from __future__ import annotations

import base64
import contextlib
import json
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeAlias

from kohakuriver._frame import mask
from kohakuriver.tunnel.protocol import CLIENT_HEADER, TUNNEL_V2

PATIENCE = 60.0
KEY = base64.b64encode(bytes(16)).decode()

CONTINUATION, TEXT, BINARY, CLOSE, WS_PING, WS_PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


@dataclass(frozen=True)
class Target:
    """Where an attack goes. Both tasks are the attacker's own, and so are the credentials.

    `task` has a service; of `own_task` the attacker speaks on the `container`'s tunnel. The tunnel of `silent_task`
    never comes. `terminal_tasks` are two in which it may have terminals. `victims_token` is what the tunnel client of
    the container `victim`, somebody else's, has shown.
    """

    host_port: int
    ssh_port: int
    runner_port: int
    token: str
    task: str
    service_port: int
    own_task: str
    container: str
    tunnel_token: str
    silent_task: str
    terminal_tasks: tuple[str, str]
    victim: str
    victims_token: str

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


SAME_CLIENT = f"{CLIENT_HEADER}: always the same\r\n"
"""What lets one tunnel of this attacker take the place of another."""

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


def session(target: Target, task: str = "", *, v2: bool = True) -> Wire:
    """A forward session of the attacker, through the host, past its greeting; to `target.task` unless told."""
    path = f"/ws/forward/{task or target.task}/{target.service_port}"
    wire = Wire(target.host_port, path, target.token, v2=v2)
    assert wire.status == 101, wire.head
    assert wire.receive() == (0x81, b"CONNECTED")
    return wire


def tunnel(target: Target) -> Wire:
    """The attacker's container's tunnel, in place of the one that its tunnel client had."""
    wire = Wire(target.runner_port, f"/ws/tunnel/{target.container}", target.tunnel_token, more=SAME_CLIENT)
    assert wire.status == 101, wire.head
    return wire


def raise_file_limit() -> int:
    """Let this process, and those that it starts, open as many files as they may; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


Counts: TypeAlias = dict[str, int]
"""What an attack has done, as it saw that itself."""

Attack: TypeAlias = Callable[[Target], Iterator[Counts | None]]
