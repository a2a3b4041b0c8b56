"""Doors: each task's own Unix socket, on which its tunnel client comes in, and nobody else can.

A door is in a directory of its own, which a container gets as a read-only mount: the socket is made anew in it by each
start of the runner, and is there for a container that has been running all the while. Who may connect is said by the
modes of socket and directory; the state directory, above them, is closed to other users of the node.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from kohakuriver.errors import UsageError
from kohakuriver.runner.services.state import State
from kohakuriver.unix_sockets import address_of

__all__ = ["SOCKET", "Doors"]

log = structlog.get_logger("kohakuriver.runner")

SOCKET = "tunnel.sock"
"""The socket's name in its directory."""


class Doors:
    """The doors of a runner's tasks, by their containers' ids.

    Args:
        listen: serves tunnel clients of that container on a socket that is bound; what it returns ends that.
    """

    def __init__(self, state: State, listen: Callable[[socket.socket, str], Callable[[], None]]) -> None:
        self._state = state
        self._listen = listen
        self._open: dict[str, Callable[[], None]] = {}
        self._said = False

    def folder(self, container: str) -> Path:
        """Where the door of a task is: a directory with nothing else in it."""
        return self._state.task_path(container) / "door"

    def open(self, container: str, admit: Callable[[Path, Path], None]) -> Path | None:
        """See that somebody listens at a task's door; its socket, None where there can be none, which is said once.

        Args:
            admit: gives the task its rights to the directory and the socket, which are the runner's user's alone.
        """
        path = self.folder(container) / SOCKET
        if container in self._open:
            return path
        try:
            self._open[container] = self._made(container, path, admit)
        except (OSError, UsageError) as error:
            if not self._said:
                log.info("tunnels of this node's own tasks go over TCP: it has no Unix sockets", reason=str(error))
            self._said = True
            return None
        return path

    def _made(self, container: str, path: Path, admit: Callable[[Path, Path], None]) -> Callable[[], None]:
        if not hasattr(socket, "AF_UNIX"):
            raise OSError("this system has none")
        self._state.task_dir(container)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        sock = socket.socket(socket.AF_UNIX)
        try:
            with address_of(path) as address:
                path.unlink(missing_ok=True)  # of the runner before
                sock.bind(address)
            path.chmod(0o600)
            admit(path.parent, path)
            return self._listen(sock, container)
        except BaseException:
            sock.close()
            raise

    @contextlib.contextmanager
    def unless_it_fails(self, container: str) -> Iterator[None]:
        """Where what is done meanwhile fails, a door that was opened in it is closed again."""
        before = container in self._open
        try:
            yield
        except BaseException:
            if not before:
                self.close(container)
            raise

    def close(self, container: str) -> None:
        """Nobody comes in any more, and the directory is gone: the task is."""
        if (end := self._open.pop(container, None)) is not None:
            end()
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder(container))
