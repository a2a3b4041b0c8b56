"""What the host and its jump host's process say to one another: JSON messages, and sockets with them.

The host speaks first of every connection. Each message is a JSON object in one packet of a Unix socket.

| from | message | means |
|---|---|---|
| host | ``{"peer": N}`` and a socket | connection N: be its SSH server |
| host | ``{"drop": N}`` | end connection N |
| process | ``{"of": N, "ask": I, "password": …}`` | whether this token lets in |
| process | ``{"of": N, "ask": I, "key": …}`` | whether the holder of this public key is let in |
| process | ``{"of": N, "in": true}`` | what was asked about last is proven |
| process | ``{"of": N, "ask": I, "task": …, "port": …}`` | a connection to a port of a task, null for its SSH server |
| process | ``{"of": N, "over": true}`` | connection N has ended |
| host | ``{"answer": I, "error": …}`` and perhaps a socket | to the question I; `error` is null where it is granted |
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["LONGEST", "Control", "Message", "pair"]

Message: TypeAlias = dict[str, Any]

LONGEST = 64 * 1024
"""Bytes of a message."""
MOST_WAITING = 4096
"""Messages that the other side has not taken; one more, and it counts as gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a control connection."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Control:
    """One end of a control connection.

    Args:
        sock: one of `pair`.
        received: is called with each message, and the socket that came with it, which it has to close.
        lost: is called once when the other end is gone.
    """

    def __init__(
        self,
        sock: socket.socket,
        received: Callable[[Message, socket.socket | None], None],
        lost: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._received = received
        self._lost = lost
        self._waiting: deque[tuple[bytes, socket.socket | None]] = deque()
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, message: Message, sock: socket.socket | None = None) -> None:
        """Send a message, and `sock` with it, which is closed here. It is lost if the other end is."""
        if self.closed or len(self._waiting) >= MOST_WAITING:
            if sock is not None:
                sock.close()
            self._end()
            return
        self._waiting.append((json.dumps(message).encode(), sock))
        if len(self._waiting) == 1:
            self._writable()

    def _writable(self) -> None:
        while self._waiting:
            data, sock = self._waiting[0]
            try:
                socket.send_fds(self._sock, [data], [] if sock is None else [sock.fileno()])
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._writable)
                return
            except OSError:
                self._end()
                return
            self._waiting.popleft()
            if sock is not None:
                sock.close()
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data, files, _, _ = socket.recv_fds(self._sock, LONGEST, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, files = b"", []
        sock = socket.socket(fileno=files[0]) if files else None
        if data:
            self._received(json.loads(data), sock)
        else:
            self._end()

    def _end(self) -> None:
        if not self.closed:
            self.close()
            self._lost()

    def close(self) -> None:
        """End the connection; `lost` is not called."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, sock in self._waiting:
            if sock is not None:
                sock.close()
        self._waiting.clear()
