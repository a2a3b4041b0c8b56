"""The server that the Autobahn test suite wants: it echoes messages, here over our handshake, links and frame walker.

    python -m tests.conformance.autobahn PORT
    wstest -m fuzzingclient -s fuzzingclient.json

The suite is the PyPI package `autobahntestsuite`, for Python 2.7. What it says is in docs/websocket.md. Host and runner
take no text; a link can, for the greeting of a session, so that the suite's many cases with text can be run.
"""

from __future__ import annotations

import asyncio
import sys

from kohakuriver._frame import FIRST, LAST, WS_TEXT, FrameViolation, FrameWalker, build_ws, pack_header
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest, serve_ws
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import OP_TEXT, CloseCode
from kohakuriver.web.app import bind, new_app
from kohakuriver.web.server import Server

OP_BINARY = 2


class Echo:
    """Both the route and the handler of its one link."""

    def __init__(self) -> None:
        self._parts = bytearray()

    @staticmethod
    async def open(request: UpgradeRequest) -> None:
        request.accept(FrameWalker(masked=True, allow_text=True), Echo(), version=1)

    def link_received(self, link: Link, start: int, stop: int) -> int:
        count = 0
        while True:
            messages, consumed = link.walker.walk(link.intake.buffer.data, start, stop)
            for kind, proto, client_id, port, begin, end, flags in messages:
                if kind > WS_TEXT:
                    link.control((kind, proto, client_id, port, begin, end, flags))
                    continue
                if flags & FIRST:
                    self._parts = bytearray(b"" if kind == WS_TEXT else pack_header(kind, proto, client_id, port))
                self._parts += link.intake.buffer.view[begin:end]
                if flags & LAST:
                    self._echo(link, OP_TEXT if kind == WS_TEXT else OP_BINARY)
            count += len(messages)
            if not messages or link.intake.turn_over(count):
                return consumed
            start = consumed

    def _echo(self, link: Link, opcode: int) -> None:
        if opcode == OP_TEXT:
            try:
                self._parts.decode()
            except UnicodeDecodeError:
                raise FrameViolation(CloseCode.BAD_DATA, "text that is not UTF-8") from None
        if len(self._parts) < 1 << 20:
            link.send(build_ws(opcode, self._parts))
            return
        # Ours never send messages of more than 1 MiB; here one goes out in fragments.
        view, size = memoryview(self._parts), 1 << 19
        for at in range(0, len(view), size):
            frame = bytearray(build_ws(OP_BINARY, view[at : at + size]))
            frame[0] = (0 if at else opcode) | (0x80 if at + size >= len(view) else 0)
            link.send(frame)

    def link_drained(self, link: Link) -> None:
        pass

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        pass


async def main() -> None:
    async def ready() -> None:
        print("ready", flush=True)

    async def stop() -> None:
        pass

    server = Server(new_app("echo", "0"), ws=serve_ws([TunnelRoute("/", Echo.open)]), on_ready=ready, on_stop=stop)
    await server.serve([bind("127.0.0.1", int(sys.argv[1]))])


if __name__ == "__main__":
    asyncio.run(main())
