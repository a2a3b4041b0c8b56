"""A connection that is busy all the time: what it sends comes back, and is compared."""

from __future__ import annotations

import os
import socket
import threading
import time

from tests.support.processes import PATIENCE, eventually

__all__ = ["Traffic"]


class Traffic(threading.Thread):
    """Random bytes to an echo and back on one connection, compared, until it is to end.

    `slowest` is the longest that a round took, in seconds; `moved` counts bytes, one way.
    """

    def __init__(self, port: int, size: int) -> None:
        super().__init__(daemon=True)
        self.slowest = 0.0
        self.moved = 0
        self.broken: BaseException | None = None
        self._connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._size = size
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with self._connection as connection:
                while not self._over.is_set():
                    said, began = os.urandom(self._size), time.monotonic()
                    writing = threading.Thread(target=connection.sendall, args=(said,))
                    writing.start()
                    assert self._read(connection) == said
                    writing.join()
                    self.slowest = max(self.slowest, time.monotonic() - began)
                    self.moved += self._size
        except BaseException as error:
            self.broken = error

    def _read(self, connection: socket.socket) -> bytes:
        back = bytearray()
        while len(back) < self._size and (data := connection.recv(1 << 20)):
            back += data
        return bytes(back)

    def goes_on(self) -> bool:
        """Whether two more rounds are done from now on."""
        enough = self.moved + 2 * self._size
        return eventually(lambda: self.moved >= enough or self.broken is not None) and self.broken is None

    def end(self) -> None:
        self._over.set()
        self.join()
