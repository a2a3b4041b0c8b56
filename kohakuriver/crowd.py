"""Those who have connected and not yet said what they want: only so many of them are kept, the oldest goes first.

Each costs a file and some memory, with TLS some 60 KiB, and shows nothing for it. Without a bound a few thousand silent
connections would keep everybody else out for as long as their time lasts. Source: docs/guide/limits.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Hashable

import structlog

from kohakuriver.loops import cancel_all

__all__ = ["Crowd", "TlsListener", "raise_file_limit"]

log = structlog.get_logger("kohakuriver")

MOST = 2000
NO_FILES_SECONDS = 0.2


class Crowd:
    """Who waits, oldest first: at most `most`, or a quarter of the files that this process may open."""

    def __init__(self, most: int | None = None) -> None:
        self.most = min(MOST if most is None else most, _file_limit() // 4)
        self._waiting: dict[Hashable, Callable[[], object]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, who: Hashable, leave: Callable[[], object]) -> None:
        """`leave` is called, once, if it must go because too many came after it."""
        self._waiting[who] = leave
        if len(self._waiting) > self.most:
            oldest = next(iter(self._waiting))
            self._waiting.pop(oldest)()

    def leave(self, who: Hashable) -> None:
        """It waits no more."""
        self._waiting.pop(who, None)


class TlsListener:
    """A bound socket on which TLS is served: like the loop's own server, but its handshakes are a crowd.

    Args:
        make: makes a connection's protocol, once its handshake is through.
        seconds: how long a handshake may take.
    """

    def __init__(
        self, sock: socket.socket, make: Callable[[], asyncio.Protocol], context: ssl.SSLContext, seconds: float
    ) -> None:
        self.crowd = Crowd()
        self._sock = sock
        self._make = make
        self._context = context
        self._seconds = seconds
        self._shaking: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def start(self, backlog: int) -> None:
        """Begin to accept connections."""
        self._sock.setblocking(False)
        self._sock.listen(backlog)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    def close(self) -> None:
        """Accept nothing more and let go of the handshakes under way; connections whose is through go on."""
        for task in self._tasks():
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until that is done."""
        await cancel_all(self._tasks())

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [*([self._accepting] if self._accepting else []), *self._shaking]

    async def _accept(self) -> None:
        try:
            while True:
                await self._accept_one()
        finally:
            self._sock.close()

    async def _accept_one(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            peer, _ = await loop.sock_accept(self._sock)
        except OSError as error:  # out of file descriptors, most likely: some will be free again
            log.warning("a connection can't be accepted", reason=str(error))
            await asyncio.sleep(NO_FILES_SECONDS)
            return
        task = loop.create_task(self._shake_hands(peer))
        self._shaking.add(task)
        task.add_done_callback(self._shaking.discard)

    async def _shake_hands(self, peer: socket.socket) -> None:
        self.crowd.enter(peer, lambda: _hang_up(peer))
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make, peer, ssl=self._context, ssl_handshake_timeout=self._seconds
            )
        except OSError:
            pass  # no TLS, not in time, or gone
        finally:
            self.crowd.leave(peer)


def _hang_up(peer: socket.socket) -> None:
    """End a handshake as its peer would; whoever has the socket closes it then."""
    with contextlib.suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)


def raise_file_limit() -> None:
    """Let this process open as many files as it may have."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere is there such a thing
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _file_limit() -> int:
    try:
        import resource
    except ImportError:
        return 4 * MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft > 0 else 4 * MOST  # "infinity" is below
