"""Peers that speak the seed protocol, written plainly on the ``websockets`` library as existing ones are.

The tunnel client has the habits of docs/protocol.md §3 rule 9: it keeps a stream's entry until it gets CLOSE, ignores
CONNECT for an id in use, dials 127.0.0.1 only, queues early DATA, and echoes a PING with its ClientID. To the service
a CLOSE is the end of its input: what the service still says goes out, and a CLOSE behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

CONNECT, CONNECTED, DATA, CLOSE, ERROR, PING, PONG = range(1, 8)
HEADER = struct.Struct(">BBIH")


def pack(kind: int, client_id: int, payload: bytes = b"", *, proto: int = 0, port: int = 0) -> bytes:
    return HEADER.pack(kind, proto, client_id, port) + payload


class V1TunnelClient:
    """An existing container's tunnel client."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self.queues: dict[int, asyncio.Queue[bytes | None]] = {}
        self.ignored: list[tuple[int, int]] = []  # (type, id) that it has no use for
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        try:
            async for message in self.websocket:
                assert isinstance(message, bytes)
                kind, _, client_id, port = HEADER.unpack_from(message)
                await self._message(kind, client_id, port, message[HEADER.size :])
        finally:
            for task in self._tasks:
                task.cancel()

    async def _message(self, kind: int, client_id: int, port: int, payload: bytes) -> None:
        assert not (kind in (CONNECT, CLOSE) and payload), "v1 has no payload there"
        if kind == PING:
            await self.websocket.send(pack(PONG, client_id, payload))
        elif kind == CONNECT and client_id not in self.queues:
            self.queues[client_id] = asyncio.Queue()
            task = asyncio.ensure_future(self._stream(client_id, port))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif kind == DATA and client_id in self.queues:
            self.queues[client_id].put_nowait(payload)
        elif kind == CLOSE and client_id in self.queues:
            self.queues.pop(client_id).put_nowait(None)
        else:
            self.ignored.append((kind, client_id))

    async def _stream(self, client_id: int, port: int) -> None:
        queue = self.queues[client_id]
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError as exc:
            await self.websocket.send(pack(ERROR, client_id, str(exc).encode()))
            return
        await self.websocket.send(pack(CONNECTED, client_id))
        sending = asyncio.ensure_future(self._send(client_id, reader))
        try:
            while (data := await queue.get()) is not None:
                writer.write(data)
                await writer.drain()
            writer.write_eof()
            await sending  # what the service says to that still goes out, and CLOSE behind it
        except (ConnectionError, OSError):
            pass
        finally:
            sending.cancel()
            writer.close()

    async def _send(self, client_id: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError, ConnectionClosed):
            while data := await reader.read(1 << 16):
                await self.websocket.send(pack(DATA, client_id, data))
            await self.websocket.send(pack(CLOSE, client_id))


@contextlib.asynccontextmanager
async def v1_tunnel_client(runner_port: int, container: str) -> AsyncIterator[V1TunnelClient]:
    """One that is connected: no subprotocol, no credentials, the library's own limits and keepalive."""
    async with connect(f"ws://127.0.0.1:{runner_port}/ws/tunnel/{container}") as websocket:
        assert websocket.subprotocol is None
        client = V1TunnelClient(websocket)
        serving = asyncio.ensure_future(client.serve())
        try:
            yield client
        finally:
            serving.cancel()
            await asyncio.wait([serving])


class V1CommandLine:
    """An existing command line's session: streams by hand, one message at a time."""

    def __init__(self, websocket: ClientConnection) -> None:
        self.websocket = websocket
        self.seen: list[tuple[int, int, bytes]] = []

    async def send(self, kind: int, client_id: int, payload: bytes = b"") -> None:
        await self.websocket.send(pack(kind, client_id, payload))

    async def receive(self) -> tuple[int, int, bytes]:
        """The next message: type, id, payload."""
        message = await self.websocket.recv()
        assert isinstance(message, bytes)
        kind, _, client_id, _ = HEADER.unpack_from(message)
        self.seen.append((kind, client_id, message[HEADER.size :]))
        return self.seen[-1]

    async def receive_data(self, client_id: int, size: int) -> bytes:
        """So many bytes of one stream, and nothing else."""
        data = b""
        while len(data) < size:
            kind, number, payload = await self.receive()
            assert (kind, number) == (DATA, client_id)
            data += payload
        return data


@contextlib.asynccontextmanager
async def v1_command_line(host_port: int, port: int, task: str = "1") -> AsyncIterator[V1CommandLine]:
    """One whose session is open."""
    async with connect(f"ws://127.0.0.1:{host_port}/ws/forward/{task}/{port}") as websocket:
        assert websocket.subprotocol is None
        assert await websocket.recv() == "CONNECTED"
        yield V1CommandLine(websocket)
