"""A service that takes or gives bytes as fast as it can, for `bench.ssh_proxy`: `python -m bench.bulk --listen A:PORT`.

The first byte of a connection says which: `u`, and what comes is taken until the end and its number of bytes told; `d`,
and bytes are given until nobody takes them. It stands where a task has its SSH server; other options mean nothing here.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading

PIECE = 1 << 20


def take(connection: socket.socket) -> int:
    """Read to the end; how many bytes that were."""
    space = memoryview(bytearray(PIECE))
    total = 0
    while count := connection.recv_into(space):
        total += count
    return total


def serve(connection: socket.socket) -> None:
    with connection, contextlib.suppress(ConnectionError):
        if connection.recv(1) == b"u":
            connection.sendall(take(connection).to_bytes(8, "big"))
            return
        block = bytes(PIECE)
        while True:
            connection.sendall(block)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:0")
    address, _, port = parser.parse_known_args()[0].listen.rpartition(":")
    with socket.create_server((address, int(port))) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection = listener.accept()[0]
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
