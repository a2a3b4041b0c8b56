"""Services to measure with, in a process of their own: `python -m bench.echo` prints their ports, in this order.

echo    every byte comes back
take    for each BLOCK bytes one byte comes back
give    for each byte BLOCK bytes come back
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

BLOCK = 32 * 1024


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def take(connection: socket.socket) -> None:
    left = BLOCK
    while size := len(connection.recv(left)):
        left -= size
        if not left:
            connection.sendall(b"x")
            left = BLOCK


def give(connection: socket.socket) -> None:
    block = b"x" * BLOCK
    while data := connection.recv(16):
        for _ in data:
            connection.sendall(block)


def serve(service: Callable[[socket.socket], None], connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        service(connection)


def accept(service: Callable[[socket.socket], None], listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(service, connection), daemon=True).start()


def main() -> None:
    services = (echo, take, give)
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=512) for _ in services]
    threads = [threading.Thread(target=accept, args=pair) for pair in zip(services, listeners, strict=True)]
    for thread in threads:
        thread.start()
    print(*(listener.getsockname()[1] for listener in listeners), flush=True)


if __name__ == "__main__":
    main()
