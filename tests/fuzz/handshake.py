"""Fuzz targets for the opening handshake, over real sockets: what a server makes of requests, a client of answers.

`python -m tests.fuzz.handshake server --seconds 60` (or `client`) mutates a corpus for that long and keeps what fails.

The first byte of an input says into pieces of how many bytes the rest is cut. The invariants: a server answers with a
status that it documents and, where it refuses in JSON, with the documented body, and still serves afterwards; a client
gets a link or a KohakuRiverError; and nothing else is raised, on either side.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from kohakuriver import runtime as loops
from kohakuriver._frame import FrameWalker
from kohakuriver.errors import KohakuRiverError
from kohakuriver.tunnel.accept import Ignore, TunnelRoute, UpgradeRequest, greet, serve_ws
from kohakuriver.tunnel.dial import Server, open_session
from kohakuriver.web.app import new_app
from tests.fuzz.mutation import fuzz
from tests.support.serving import serving

# 401 is for an Authorization header that is none.
# 403, 426 and texts are for WebSockets that are none of ours: those are left to uvicorn.
STATUSES = {101, 200, 307, 400, 401, 403, 404, 405, 426}
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
ACCEPT = b"{accept}"


def pieces(data: bytes) -> list[bytes]:
    size, rest = (data[0] or 1 << 16, data[1:]) if data else (1, b"")
    return [rest[i : i + size] for i in range(0, len(rest), size)]


# ---- server ----


class Gate(Ignore):
    """Takes whoever shakes hands on /ws/."""

    def routes(self) -> list[TunnelRoute]:
        return [TunnelRoute(path, self.open) for path in ("/ws/{a}", "/ws/{a}/{b}", "/ws/{a}/{b}/{c}")]

    async def open(self, request: UpgradeRequest, *_parts: str) -> None:
        greet(request.accept(FrameWalker(masked=True), self), "CONNECTED")


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[Callable[[bytes], Any]]:
    """A server, and what checks one input against it."""
    async with serving(new_app("server", "0"), serve_ws(Gate().routes())) as url:
        port = int(url.rpartition(":")[2])

        async def check(data: bytes) -> None:
            judge(await answer(port, pieces(data)))

        yield check
        assert (await answer(port, [b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"])).startswith(b"HTTP/1.1 404 ")


async def write(writer: asyncio.StreamWriter, sent: list[bytes]) -> None:
    """Write as long as somebody is there."""
    for piece in sent:
        if writer.transport.is_closing():
            break
        writer.write(piece)
        await asyncio.sleep(0)


async def answer(port: int, sent: list[bytes]) -> bytes:
    """All that comes back to these bytes and end-of-file."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await write(writer, sent)
    with contextlib.suppress(OSError, RuntimeError):  # the server has hung up
        writer.write_eof()
    received = b""
    with contextlib.suppress(ConnectionError):
        while more := await reader.read(1 << 16):
            received += more
    writer.transport.abort()
    return received


def judge(received: bytes) -> None:
    """Look at the first answer; more may follow where the input was several requests."""
    if not received:
        return
    head, _, rest = received.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    assert words[0] == b"HTTP/1.1", head
    status = int(words[1])
    assert status in STATUSES, head
    if status >= 400 and b"content-type: application/json" in head.lower():
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if rest:  # the answer to HEAD has none
            assert set(json.loads(rest[:length])) == {"error", "message"}, rest


# ---- client ----


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[Callable[[bytes], Any]]:
    """A client that is answered with the input; `{accept}` in it stands for the right Sec-WebSocket-Accept."""
    now: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            key = head.lower().index(b"sec-websocket-key:")
            key_text = head[key:].split(b"\r\n")[0].split(b":")[1].strip().decode()
            accept = base64.b64encode(hashlib.sha1((key_text + GUID).encode()).digest())
            await write(writer, pieces(now[0][:1] + now[0][1:].replace(ACCEPT, accept)))
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{listening.sockets[0].getsockname()[1]}/ws/forward/1/80"

    async def check(data: bytes) -> None:
        now[:] = [data]
        with contextlib.suppress(KohakuRiverError):
            (await open_session(Server(url))).abort()

    try:
        yield check
    finally:
        listening.close()
        await asyncio.sleep(0)


TARGETS = {"server": server, "client": client}


@contextlib.contextmanager
def naming(data: bytes) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"{data!r}") from error


async def check_all(target: str, inputs: list[bytes]) -> None:
    """Raise whatever an input of these leads to that it may not."""
    async with TARGETS[target]() as check:
        for data in inputs:
            with naming(data):
                await check(data)


async def _watched(target: str, data: bytes) -> None:
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
    await check_all(target, [data])
    assert not unseen, unseen


if __name__ == "__main__":
    name = sys.argv.pop(1)
    fuzz(lambda data: loops.run(_watched(name, data)), name)
