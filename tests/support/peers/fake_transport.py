"""Transports without sockets: a test decides byte by byte what moves, when, and which end is slow."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from kohakuriver._frame import FrameWalker


class FakeTransport(asyncio.Transport):
    """A transport whose kernel buffer takes ``room`` bytes; what the protocol reads is handed in by ``feed``."""

    def __init__(self, room: int = 1 << 30) -> None:
        super().__init__()
        self.room = room
        self.sent = bytearray()  # with the kernel: nobody has taken it yet
        self.waiting = bytearray()  # in the transport's own buffer
        self.reading = True
        self.ended = False  # write_eof was called
        self.closing = False
        self.aborted = False
        self.lost = False
        self.secure = False
        self._paused = False
        self._protocol: Any = None

    def connect(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        protocol.connection_made(self)

    # -- what the protocol calls ----------------------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return cast(asyncio.BaseProtocol, self._protocol)

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 1) if name == "peername" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def get_write_buffer_size(self) -> int:
        return len(self.waiting)

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        if not self.closing:
            self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended, "written behind the end"
        if self.closing and self.lost:
            return
        self.waiting += data
        self._flush()
        if self.waiting and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.reading = False
            if not self.waiting:
                self._lose(None)

    def abort(self) -> None:
        self.aborted = True
        self.fail(None)

    # -- what a test calls -----------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> int:
        """Let the protocol read; how many of the bytes it took (0 while it is paused)."""
        fed = 0
        while fed < len(data) and self.reading and not self.lost:
            view = self._protocol.get_buffer(-1)
            size = min(len(view), len(data) - fed)
            view[:size] = data[fed : fed + size]
            self._protocol.buffer_updated(size)
            fed += size
        return fed

    def feed_eof(self) -> bool:
        """Let the protocol read end-of-file; False while it is paused."""
        if not self.reading or self.lost:
            return False
        if not self._protocol.eof_received():
            self.close()
        self.reading = False
        return True

    def take(self, size: int) -> bytes:
        """Take bytes from the kernel's buffer, as the other side of the connection does."""
        taken = bytes(self.sent[:size])
        del self.sent[:size]
        self._flush()
        if self._paused and not self.waiting:
            self._paused = False
            self._protocol.resume_writing()
        if self.closing and not self.waiting:
            self._lose(None)
        return taken

    def fail(self, exc: Exception | None) -> None:
        """The connection breaks."""
        self.closing = True
        self.reading = False
        self.waiting.clear()
        self._lose(exc)

    def _flush(self) -> None:
        size = max(0, self.room - len(self.sent))
        self.sent += self.waiting[:size]
        del self.waiting[:size]

    def _lose(self, exc: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, exc)


class Wire(FakeTransport):
    """A link's transport that knows which bytes were written together. `masked`: a side writes that dialled."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.written = asyncio.Event()
        self._masked = masked

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))
        self.written.set()
        super().write(data)

    def kinds(self) -> list[list[int]]:
        """The types of the messages of each write since the last look."""
        walker = FrameWalker(masked=self._masked)
        writes, self.writes = self.writes, []
        self.written.clear()
        return [[message[0] for message in walker.walk(data, 0, len(data))[0]] for data in map(bytearray, writes)]
