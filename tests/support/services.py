"""Small services that tests start inside tasks. Each prints the port that it got, and echoes what it gets.

They share their output with a tunnel client: a line is one write, which print() of an unbuffered Python is not.
"""

from __future__ import annotations

import sys

ECHO_SOURCE = """
import socket, sys, threading
server = socket.create_server((sys.argv[1], 0))
sys.stdout.write(f"port {server.getsockname()[1]}\\n")
sys.stdout.flush()
def serve(peer):
    with peer:
        while data := peer.recv(65536):
            peer.sendall(data)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


def echo(host: str = "127.0.0.1") -> list[str]:
    """The command of a service that echoes, on a free port of `host`, which it prints."""
    return [sys.executable, "-c", ECHO_SOURCE, host]


def port_in(log: str) -> int | None:
    """The port that a service printed last."""
    ports = [int(line.split()[1]) for line in log.splitlines() if line.startswith("port ")]
    return ports[-1] if ports else None
