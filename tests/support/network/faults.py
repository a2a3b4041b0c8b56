"""A relay that misbehaves on demand, to stand between two hops. Its words are toxiproxy's.

``latency`` seconds pass before bytes go on; ``slow`` is a rate in bytes per second; ``slicer`` cuts all into pieces of
that many bytes; ``cut`` ends connections as an orderly close does; ``reset`` as a crash does; ``stall`` keeps them and
lets nothing through until ``resume``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable

PIECE = 1 << 16


class FaultProxy:
    """Relays every connection to ``target()``, a port of 127.0.0.1."""

    def __init__(self, target: Callable[[], int]) -> None:
        self.target = target
        self.latency = 0.0
        self.slow = 0.0
        self.slicer = 0
        self.port = 0
        self._moving = asyncio.Event()
        self._moving.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def stall(self) -> None:
        self._moving.clear()

    def resume(self) -> None:
        self._moving.set()

    def cut(self) -> None:
        for writer in self._writers:
            writer.close()

    def reset(self) -> None:
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward, back = await asyncio.open_connection("127.0.0.1", self.target(), limit=PIECE)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, back}
        self._writers |= ends
        tasks = {asyncio.ensure_future(self._pump(reader, back)), asyncio.ensure_future(self._pump(onward, writer))}
        self._tasks |= tasks
        try:
            await asyncio.wait(tasks)
        finally:
            self._tasks -= tasks
            self._writers -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=0)
        with contextlib.suppress(OSError, RuntimeError):  # uvloop raises RuntimeError for a transport that is closed
            while data := await reader.read(PIECE):
                await self._moving.wait()
                if self.latency or self.slow:
                    await asyncio.sleep(self.latency + (len(data) / self.slow if self.slow else 0.0))
                await self._pass(writer, data)
            writer.write_eof()

    async def _pass(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        size = self.slicer or len(data)
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
            if self.slicer:
                await asyncio.sleep(0)  # so that the reader gets each piece by itself

    async def close(self) -> None:
        self.resume()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@contextlib.asynccontextmanager
async def fault_proxy(target: Callable[[], int]) -> AsyncIterator[FaultProxy]:
    """A proxy in front of the port that ``target`` returns when a connection comes; it listens on ``proxy.port``."""
    proxy = FaultProxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=PIECE)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
