"""The chain as it would be written plainly on the `websockets` API: one WebSocket per TCP connection and hop.

    python -m bench.plain_websockets tcp-to-ws|ws-to-ws|ws-to-tcp TARGET_PORT

Prints the port it listens on. Four of these in a row are a baseline of chain.py: what one gets without trying.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import uvloop
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

READ = 256 * 1024
WebSocket = ClientConnection | ServerConnection


async def tcp_chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(READ):
        yield data


async def ws_chunks(ws: WebSocket) -> AsyncIterator[bytes]:
    async for message in ws:
        assert isinstance(message, bytes)
        yield message


def tcp_writer(writer: asyncio.StreamWriter) -> Callable[[bytes], Awaitable[None]]:
    async def write(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    return write


async def pump(chunks: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]]) -> None:
    async for data in chunks:
        await write(data)


async def until_first_ends(*pumps: Any) -> None:
    tasks = [asyncio.ensure_future(pump) for pump in pumps]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, ConnectionClosed, OSError):
            await task


def dial(port: int) -> connect:
    return connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)


async def join_tcp_ws(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ws: WebSocket) -> None:
    try:
        await until_first_ends(pump(tcp_chunks(reader), ws.send), pump(ws_chunks(ws), tcp_writer(writer)))
    finally:
        writer.close()


async def listen(role: str, target: int) -> int:
    async def from_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with dial(target) as ws:
            await join_tcp_ws(reader, writer, ws)

    async def ws_to_ws(near: ServerConnection) -> None:
        async with dial(target) as far:
            await until_first_ends(pump(ws_chunks(near), far.send), pump(ws_chunks(far), near.send))

    async def ws_to_tcp(ws: ServerConnection) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", target, limit=READ)
        await join_tcp_ws(reader, writer, ws)

    if role == "tcp-to-ws":
        server: Any = await asyncio.start_server(from_tcp, "127.0.0.1", 0, limit=READ, backlog=512)
    else:
        handler = {"ws-to-ws": ws_to_ws, "ws-to-tcp": ws_to_tcp}[role]
        server = await serve(handler, "127.0.0.1", 0, compression=None, max_size=None, backlog=512)
    port: int = server.sockets[0].getsockname()[1]
    return port


async def main(role: str, target: int) -> None:
    print(await listen(role, target), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
