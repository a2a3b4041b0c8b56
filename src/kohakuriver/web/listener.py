"""A listener that knows how many peers are at their TLS handshake; `asyncio.Server` does not tell.

It accepts a few at a time, so that a rush of connections leaves everything else its turns.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable

from kohakuriver.asking import origin_of
from kohakuriver.runtime import cancel_all, until_readable
from kohakuriver.web.handshakes import HandshakeQueue
from kohakuriver.web.waiting_room import WaitingRoom

__all__ = ["ACCEPTED_AT_ONCE", "Acceptor"]

BACKLOG = 2048
"""Connections that may wait to be accepted; a burst of 500 simultaneous connects must fit."""

ACCEPTED_AT_ONCE = 16
"""Connections that are accepted before others get their turn: some 3 ms of work."""

RETRY_SECONDS = 1.0
"""How long nothing is accepted when the process or the system has no descriptors or memory left."""

_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Acceptor:
    """A listener, with what of `asyncio.Server` uvicorn uses.

    Args:
        sock: bound, and from now on this listener's.
        new_protocol: makes the protocol of a connection.
        tls: what connections begin with; None for plain ones.
        handshake_timeout: seconds that a peer has for its TLS handshake.
        room: where it waits for that.
        exhausted: called when none can be accepted for want of descriptors or memory.
    """

    def __init__(
        self,
        sock: socket.socket,
        new_protocol: Callable[[], asyncio.BaseProtocol],
        *,
        tls: ssl.SSLContext | None,
        handshake_timeout: float,
        room: WaitingRoom,
        exhausted: Callable[[], None] = lambda: None,
    ) -> None:
        self.sock = sock
        self._new_protocol = new_protocol
        self._tls = tls
        self._handshake_timeout = handshake_timeout
        self._handshakes = HandshakeQueue()
        self._room = room
        self._exhausted = exhausted
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._beginning: set[asyncio.Task[None]] = set()
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._loop.add_reader(sock.fileno(), self._accept)

    def close(self) -> None:
        """Accept nothing more; connections that are set up stay."""
        if self.sock.fileno() >= 0:
            if self._retry is not None:
                self._retry.cancel()
            self._loop.remove_reader(self.sock.fileno())
            self.sock.close()

    async def wait_closed(self) -> None:
        """End the TLS handshakes that are still under way."""
        await cancel_all(self._beginning)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, address = self.sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:  # it has gone already
                continue
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._loop.remove_reader(self.sock.fileno())
                self._retry = self._loop.call_later(RETRY_SECONDS, self._resume)
                self._exhausted()
                return
            beginning = self._loop.create_task(self._begin(connection, address[0] if address else ""))
            self._beginning.add(beginning)
            if self._tls is not None:
                self._room.enter(beginning, beginning.cancel)
            beginning.add_done_callback(self._begun)

    def _begun(self, beginning: asyncio.Task[None]) -> None:
        self._beginning.discard(beginning)
        self._room.leave(beginning)

    def _resume(self) -> None:
        self._loop.add_reader(self.sock.fileno(), self._accept)

    async def _begin(self, connection: socket.socket, address: str) -> None:
        try:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is None:
                await self._loop.connect_accepted_socket(self._new_protocol, connection)
            else:
                await self._shake_hands(connection, origin_of(address), self._tls)
        except (OSError, asyncio.TimeoutError):
            connection.close()  # a failed handshake of a stranger is not worth a log line
        except BaseException:
            connection.close()
            raise

    async def _shake_hands(self, connection: socket.socket, source: str, tls: ssl.SSLContext) -> None:
        """Begin with TLS, once the peer has and it is its turn. All of that has the time of a handshake."""
        until = self._loop.time() + self._handshake_timeout
        await asyncio.wait_for(self._turn(connection, source), self._handshake_timeout)
        await self._loop.connect_accepted_socket(
            self._new_protocol, connection, ssl=tls, ssl_handshake_timeout=max(until - self._loop.time(), 0.001)
        )

    async def _turn(self, connection: socket.socket, source: str) -> None:
        await until_readable(connection)  # until then it costs its descriptor alone
        await self._handshakes.turn(source)
