"""A long link: a program that passes TCP on, later and no faster than a rate, as a distant network would.

Every byte arrives ``--delay`` seconds after it left; each direction of each connection carries at most ``--rate``
bytes a second, and holds its sender back once a few milliseconds' worth wait at the near end, as a router does.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

PIECE = 256 * 1024
# Seconds' worth of bytes that may wait at the near end.
NEAR_QUEUE = 0.02


class Direction:
    """One direction of one connection, on two threads: one reads and dates, one delivers when the time has come."""

    def __init__(self, source: socket.socket, target: socket.socket, delay: float, rate: float) -> None:
        self._source = source
        self._target = target
        self._delay = delay
        self._rate = rate
        self._travelling: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def start(self) -> None:
        """Pass on until the source ends."""
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._deliver, daemon=True).start()

    def _read(self) -> None:
        left = time.monotonic()  # when the last byte has left the near end
        data = b"-"
        while data:
            try:
                data = self._source.recv(PIECE)
            except OSError:
                data = b""
            now = time.monotonic()
            left = max(left, now) + len(data) / self._rate
            self._travelling.put((left + self._delay, data))
            if left - now > NEAR_QUEUE:
                time.sleep(left - now - NEAR_QUEUE)

    def _deliver(self) -> None:
        while True:
            due, data = self._travelling.get()
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            try:
                if not data:
                    self._target.shutdown(socket.SHUT_WR)
                    return
                self._target.sendall(data)
            except OSError:
                with contextlib.suppress(OSError):
                    self._source.shutdown(socket.SHUT_RDWR)
                return


def serve(target: int, delay: float, rate: float) -> None:
    """Listen on a free port, say which, and pass every connection on to the loopback port ``target``."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", target))
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Direction(near, far, delay, rate).start()
        Direction(far, near, delay, rate).start()


@contextlib.contextmanager
def long_link(target: int, *, delay: float, rate: float) -> Iterator[int]:
    """A long link to a loopback port, in a process of its own: the port of its near end.

    Args:
        delay: seconds one way.
        rate: bytes a second that each direction of a connection carries at most.
    """
    command = [sys.executable, __file__, str(target), f"--delay={delay}", f"--rate={rate}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description="Passes TCP on to a loopback port as a distant network would.")
    parser.add_argument("target", type=int)
    parser.add_argument("--delay", type=float, required=True, help="seconds one way")
    parser.add_argument("--rate", type=float, required=True, help="bytes a second, each direction of a connection")
    arguments = parser.parse_args()
    serve(arguments.target, arguments.delay, arguments.rate)


if __name__ == "__main__":
    main()
