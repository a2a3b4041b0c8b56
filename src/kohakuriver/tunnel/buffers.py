"""Where received bytes lie: the one buffer that the sockets of a loop read into, and messages that come in pieces."""

from __future__ import annotations

import threading

from kohakuriver._frame import FIRST, HEADROOM, LAST, FrameViolation
from kohakuriver.tunnel.protocol import CloseCode

__all__ = ["RECEIVE_SIZE", "WHOLE_MESSAGE", "Assembler", "ReceiveBuffer", "receive_buffer"]

RECEIVE_SIZE = 1 << 20
WHOLE_MESSAGE = FIRST | LAST
"""The flags of a message that has come whole, of which an `Assembler` makes nothing else."""


class ReceiveBuffer:
    """The one buffer that all sockets of a loop read into; valid until the reading callback returns.

    ``data`` is HEADROOM + ``size`` bytes: the head room lets a frame's headers be written right before a payload
    that was read at offset HEADROOM, so that payloads never move.
    """

    __slots__ = ("data", "view")

    def __init__(self, size: int = RECEIVE_SIZE) -> None:
        self.data = bytearray(HEADROOM + size)
        self.view = memoryview(self.data)


class _PerThread(threading.local):
    buffer: ReceiveBuffer | None = None


_per_thread = _PerThread()


def receive_buffer() -> ReceiveBuffer:
    """The receive buffer of this thread's loop."""
    if _per_thread.buffer is None:
        _per_thread.buffer = ReceiveBuffer()
    return _per_thread.buffer


class Assembler:
    """Puts the pieces of a message together that was too large, or fragmented, to come whole."""

    __slots__ = ("_parts", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._parts = bytearray()

    def add(self, view: memoryview, flags: int) -> bytes | None:
        """The whole payload at its last piece, otherwise None. Raises FrameViolation (1009) over the limit."""
        if flags == WHOLE_MESSAGE:
            return bytes(view)
        if flags & FIRST:
            self._parts.clear()
        self._parts += view
        if len(self._parts) > self.limit:
            raise FrameViolation(CloseCode.TOO_BIG, f"a message of this type may have at most {self.limit} bytes")
        if not flags & LAST:
            return None
        whole = bytes(self._parts)
        self._parts.clear()
        return whole
