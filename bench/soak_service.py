"""What the soak's task serves: `python -m bench.soak_service` prints its port, the same for TCP and UDP, and serves.

A connection's first byte says what it is for: `e` echoes, `s` sends zeros for ever, `d` throws away what comes, `h`
answers with the SHA-256 of all that came once that has ended. Datagrams are echoed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket

BLOCK = bytes(64 * 1024)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        kind = await reader.readexactly(1)
        if kind == b"s":
            while True:
                writer.write(BLOCK)
                await writer.drain()
        digest = hashlib.sha256()
        while data := await reader.read(len(BLOCK)):
            digest.update(data)
            if kind == b"e":
                writer.write(data)
                await writer.drain()
        if kind == b"h":
            writer.write(digest.digest())
    writer.close()


class Echo(asyncio.DatagramProtocol):
    """Sends each datagram back."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        with contextlib.suppress(OSError):
            self._sock.sendto(data, addr)


async def main() -> None:
    """Serve until the process is ended."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", port))
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: Echo(sock), sock=sock)
    print(port, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
