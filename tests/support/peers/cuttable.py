"""A relay between two hops, whose connections a test cuts, or freezes as a dead network does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class Relay:
    """Passes bytes on to the port that `target` names."""

    def __init__(self, target: Callable[[], int]) -> None:
        self._target = target
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.port = 0
        self.accepted = 0
        self.lets_in = True

    def cut(self) -> None:
        """Reset all connections, with what is under way."""
        for writer in list(self._open):
            writer.transport.abort()

    def freeze(self) -> None:
        """Pass nothing on any more of the connections that there are, and tell nobody; new ones work."""
        self._flows.clear()
        self._flows = asyncio.Event()
        self._flows.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.lets_in:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        self._open.add(writer)
        far: asyncio.StreamWriter | None = None
        flows = self._flows
        try:
            back, far = await asyncio.open_connection("127.0.0.1", self._target())
            self._open.add(far)
            await asyncio.gather(_pass(reader, far, flows), _pass(back, writer, flows))
        except (OSError, asyncio.CancelledError):
            pass  # by us, below: asyncio's own callback takes a cancelled handler for a failure
        finally:
            for each in (writer, far):
                if each is not None:
                    each.transport.abort()
                    self._open.discard(each)
            self._tasks.discard(task)

    async def end(self) -> None:
        """End what is open."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _pass(source: asyncio.StreamReader, sink: asyncio.StreamWriter, flows: asyncio.Event) -> None:
    while data := await source.read(1 << 16):
        await flows.wait()
        sink.write(data)
        await sink.drain()
    raise ConnectionResetError  # one end has gone: so does the other


@contextlib.asynccontextmanager
async def relay(target: Callable[[], int]) -> AsyncIterator[Relay]:
    """A relay on a free port of 127.0.0.1."""
    made = Relay(target)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.end()
