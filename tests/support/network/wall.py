"""What stands before a host and can swallow everything, as a network that is gone does: for programs, on threads."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

__all__ = ["Wall", "wall"]


class Wall:
    """A TCP relay that can stop: then what comes is accepted, and not a byte goes on."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.met = threading.Semaphore(0)
        """One for each connection that has said something while nothing goes on."""
        self._flows = threading.Event()
        self._flows.set()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._open.append(near)
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if not self._flows.is_set():
                near.recv(1, socket.MSG_PEEK)
                self.met.release()
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self._open.append(far)
            threading.Thread(target=self._pass, args=(far, near), daemon=True).start()
            self._pass(near, far)

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and self._flows.is_set():
                sink.sendall(data)
        if self._flows.is_set():
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Nothing goes on from now on."""
        self._flows.clear()

    def open(self) -> None:
        """New connections go on."""
        self._flows.set()

    def cut(self) -> None:
        """End all connections, and answer none from now on."""
        self.stop()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextlib.contextmanager
def wall(target: int = 0) -> Iterator[Wall]:
    """A wall before a port of 127.0.0.1; without one it lets nothing through."""
    made = Wall(target)
    if not target:
        made.stop()
    try:
        yield made
    finally:
        made.close()
