"""Writing to a local socket: at once where the kernel has room, from a queue where it has not."""

from __future__ import annotations

import asyncio
import enum
import socket
import struct
from collections import deque
from collections.abc import Sequence

from kohakuriver.tunnel.link import soon
from kohakuriver.tunnel.sockets import DirectSocket, tune_socket

__all__ = ["LocalWriter"]

WRITE_PIECE = 256 * 1024
_ABORT = struct.pack("ii", 1, 0)  # struct linger: the kernel answers with RST


class _Owed(enum.Enum):
    """What follows the last byte that is queued."""

    NOTHING = enum.auto()
    SHUT = enum.auto()
    CLOSE = enum.auto()


_NOTHING, _SHUT, _CLOSE = _Owed.NOTHING, _Owed.SHUT, _Owed.CLOSE  # to find one in its class takes as long as a call


class LocalWriter(asyncio.BufferedProtocol):
    """The write side of a local socket, which may not be connected yet: what comes before is queued.

    A subclass is told by `taken` how many bytes the socket took, and by `failed` that it could not be shut down.
    """

    __slots__ = ("_blocked", "_direct", "_in_transport", "_owed", "_queue", "_transport")

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._direct: DirectSocket  # from when there is a transport
        self._queue: deque[memoryview] | None = None
        self._in_transport = 0
        self._blocked = False
        self._owed = _NOTHING

    def taken(self, size: int) -> None:
        """The socket took ``size`` bytes of those that it was given."""
        raise NotImplementedError

    def failed(self, exc: BaseException) -> None:
        """The socket broke, or could not be connected."""
        raise NotImplementedError

    def use(self, transport: asyncio.Transport) -> None:
        """Write to ``transport`` from now on."""
        self._transport = transport
        # TLS transports pause at the mark itself, plain ones above it: a mark of 0 would pause those for ever.
        transport.set_write_buffer_limits(high=0 if transport.get_extra_info("sslcontext") is None else 1)
        self.tune(transport)
        self._direct = DirectSocket(transport)

    def tune(self, transport: asyncio.Transport) -> None:
        """See to the options of its socket."""
        tune_socket(transport)

    def write(self, views: Sequence[memoryview], size: int) -> None:
        """Take ``size`` bytes, which are only valid during the call."""
        if self._transport is None or self._queue or self._blocked:
            self._hold(views)
            return
        direct = self._direct
        sent = direct.write(views[0]) if len(views) == 1 else direct.writev(views)
        if sent < size:
            self._hold(views, skip=sent)
            self.pump()
        if sent:
            self.taken(sent)

    def _hold(self, views: Sequence[memoryview], skip: int = 0) -> None:
        if self._queue is None:
            self._queue = deque()
        # What came together is written together: TLS takes no ranges, each would be a write of its own. Credit goes
        # back a piece at a time, so pieces are not too large.
        # Of one alone mostly half has been taken: no more is copied than is left.
        alone = len(views) == 1
        rest = memoryview(bytes(views[0][skip:])) if alone else memoryview(b"".join(views))[skip:]
        self._queue.extend(rest[i : i + WRITE_PIECE] for i in range(0, len(rest), WRITE_PIECE))

    @property
    def owes(self) -> bool:
        """Whether there is anything for `pump` to do."""
        return self._queue is not None or self._owed is not _NOTHING

    def pump(self) -> None:
        """Write what is queued, as far as the socket takes it, and then do what is owed."""
        transport = self._transport
        while self._queue and not self._blocked and transport is not None:
            piece = self._queue.popleft()
            self._in_transport = len(piece)
            transport.write(piece)
            if not self._blocked:
                self._transport_drained()
        self._settle()

    def _transport_drained(self) -> None:
        size, self._in_transport = self._in_transport, 0
        if size:
            self.taken(size)

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._transport_drained()
        self.pump()

    def shut(self) -> None:
        """Shut down the write side once everything is written."""
        self._owed = _SHUT
        self._settle()

    def close(self) -> None:
        """Close the socket once everything is written."""
        self._owed = _CLOSE
        self._settle()

    def _settle(self) -> None:
        transport = self._transport
        if transport is None or self._queue or self._blocked:
            return
        self._queue = None
        owed, self._owed = self._owed, _NOTHING
        if owed is _CLOSE:
            soon(transport.close)
        elif owed is _SHUT:
            soon(self._shut_down)  # asyncio would do it twice, were it asked to in resume_writing

    def _shut_down(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if not self._transport.can_write_eof():  # TLS has no half of a connection
            self._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError as exc:  # ENOTCONN: it was reset
            self.failed(exc)

    def reset(self) -> bool:
        """Reset the connection, so that the application sees a failure. False if there is none."""
        transport = self._transport
        if transport is None:
            return False
        sock = transport.get_extra_info("socket")
        if sock is not None and not transport.is_closing():
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            except OSError:
                pass  # gone already, which is what we want
        transport.abort()
        return True

    def drop(self) -> None:
        """The socket is gone: nothing more is delivered."""
        self._transport = None
        self._queue = None
