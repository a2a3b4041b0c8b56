"""Knocking at a task's own Unix socket of its runner, as a tunnel client does."""

from __future__ import annotations

import socket
from pathlib import Path

from kohakuriver.unix_sockets import address_of
from tests.support.processes import PATIENCE, Cluster


def door_of(cluster: Cluster, container: str, node: str = "n1") -> Path:
    """The socket of a task of that node."""
    return cluster.state_of(node) / "tasks" / container / "door" / "tunnel.sock"


def request(path: str, token: str | None, client: str = "somebody-else") -> bytes:
    """A handshake for a WebSocket at that path."""
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Upgrade: websocket", "Connection: Upgrade"]
    lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
    lines += ["Sec-WebSocket-Protocol: kohakuriver.tunnel.v2", f"KohakuRiver-Client: {client}"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    return "\r\n".join([*lines, "", ""]).encode()


def knock(door: Path, container: str, token: str | None) -> int:
    """The status that a tunnel client of `container` with that token gets at a door."""
    return answer(door, request(f"/ws/tunnel/{container}", token))


def answer(door: Path, asked: bytes) -> int:
    """The status that a request gets there."""
    with socket.socket(socket.AF_UNIX) as sock, address_of(door) as address:
        sock.settimeout(PATIENCE)
        sock.connect(address)
        sock.sendall(asked)
        return int(sock.recv(4096).split()[1])
