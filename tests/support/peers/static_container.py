"""The real static tunnel client in the place of a test's container: its link is a socket that the test cuts."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import random
import re
import socket
import struct
import subprocess
from collections.abc import Iterator

from kohakuriver.tunnel.protocol import TUNNEL_V2
from tests.support.hops import CONTAINER, binary
from tests.support.peers.fake_transport import FakeTransport
from tests.support.peers.relayed import Pipe, World

PATIENCE = 30.0
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3


class SocketLink(FakeTransport):
    """The runner's end of the tunnel's TCP connection, as a world takes bytes from it and feeds it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._out = bytearray()

    def take(self, size: int) -> bytes:
        """What has come from the tunnel client, at most so many bytes."""
        with contextlib.suppress(BlockingIOError):
            return self._sock.recv(size)
        return b""

    def feed(self, data: bytes) -> int:
        """Send these bytes to it."""
        self._out += data
        with contextlib.suppress(BlockingIOError, ConnectionError):
            del self._out[: self._sock.send(self._out)]
        return len(data)

    def fail(self, exc: Exception | None) -> None:
        """Cut the connection, wherever it is: by an end or by a reset."""
        if random.random() < 0.5:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


class StaticWorld(World):
    """Users' ends in Python, a runner that renumbers, and the static tunnel client over real sockets."""

    def __init__(self, listener: socket.socket, users: int = 2) -> None:
        super().__init__(users)
        self._listener = listener

    def connect_tunnel(self) -> None:
        """Wait until the tunnel client is back."""
        if self.tunnel is None:
            sock, _ = self._listener.accept()
            _answer(sock)
            sock.setblocking(False)
            self.tunnel, self._pipe, self._ids = SocketLink(sock), Pipe(masked=True), itertools.count(1)


def _answer(sock: socket.socket) -> None:
    sock.settimeout(PATIENCE)
    request = b""
    while b"\r\n\r\n" not in request:
        request += sock.recv(4096)
    match = re.search(rb"(?i)sec-websocket-key: (\S+)", request)
    assert match is not None
    accept = base64.b64encode(hashlib.sha1(match[1] + _GUID).digest()).decode()
    lines = (
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept}",
        f"Sec-WebSocket-Protocol: {TUNNEL_V2}",
    )
    sock.sendall("\r\n".join((*lines, "", "")).encode())


@contextlib.contextmanager
def static_world(users: int = 2) -> Iterator[StaticWorld]:
    """A world with a tunnel client of its own, which is ended with it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        arguments = ("--runner-url", url, "--container-id", CONTAINER, "--reconnect-delay", "0.01")
        with subprocess.Popen([str(binary()), *arguments, "--log-level", "error"]) as client:
            world = StaticWorld(listener, users)
            try:
                yield world
            finally:
                client.kill()
                if world.tunnel is not None:
                    world.tunnel.fail(None)
