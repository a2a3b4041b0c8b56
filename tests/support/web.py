"""Addresses of a task's ports over the four hops in one process, and a browser's end of connections to them."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from kohakuriver.client.forward import Event, PortForward
from kohakuriver.client.web import WebForwarder
from kohakuriver.config import Settings
from tests.support.hops import Chain, chain
from tests.support.peers.cuttable import Relay, relay

__all__ = ["Answer", "Visitor", "Web", "web"]


@dataclass
class Answer:
    """What a browser got: `fields` in lower case, the last of each name."""

    status: int
    fields: dict[str, str]
    raw: bytes
    body: bytes


class Visitor:
    """One connection of a browser, which is let in to the address that it asks for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, cookie: str) -> None:
        self.reader = reader
        self.writer = writer
        self.host = host
        self.cookie = cookie

    def head(self, line: str, *fields: str) -> bytes:
        """A request's head, with Host and Cookie."""
        return "\r\n".join(
            [f"{line} HTTP/1.1", f"Host: {self.host}", f"Cookie: {self.cookie}", *fields, "", ""]
        ).encode("latin-1")

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def ask(self, line: str, *fields: str, body: bytes = b"") -> Answer:
        """Send one request and take its answer."""
        self.send(self.head(line, *fields) + body)
        return await self.answer(line.partition(" ")[0])

    async def answer(self, method: str = "GET") -> Answer:
        """The next answer, whole; its body as it was before it was cut into chunks."""
        raw = await self.reader.readuntil(b"\r\n\r\n")
        lines = raw.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}
        status = int(lines[0].split()[1])
        if method == "HEAD" or status < 200 or status in (204, 304):
            return Answer(status, fields, raw, b"")
        if "chunked" in fields.get("transfer-encoding", ""):
            return Answer(status, fields, raw, await self._chunks())
        if "content-length" in fields:
            return Answer(status, fields, raw, await self.reader.readexactly(int(fields["content-length"])))
        return Answer(status, fields, raw, await self.reader.read())

    async def _chunks(self) -> bytes:
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        assert await self.reader.readexactly(2) == b"\r\n"
        return body

    async def ended(self) -> bool:
        """Wait for the end of the connection: whether it was one in good order, with nothing more before it."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return False


@dataclass
class Web:
    """A forward whose ports have addresses. `link` is the way to the host, which can be cut; `client` ends the hops."""

    hops: Chain
    forwarder: WebForwarder
    events: list[Event]
    link: Relay
    client: Any

    @property
    def port(self) -> int:
        """The local port of all addresses."""
        return self.forwarder.doors[0].place.served_on

    def host(self, port: int) -> str:
        return f"lab-{port}.localhost:{self.port}"

    @contextlib.asynccontextmanager
    async def stranger(self, port: int, cookie: str = "a=b") -> AsyncIterator[Visitor]:
        """Somebody's connection, who has not been let in."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Visitor(reader, writer, self.host(port), cookie)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def login(self, port: int) -> str:
        """The Cookie of a browser that has followed a new link to the address of `port`."""
        door = next(each for each in self.forwarder.doors if each.place.port == port)
        async with self.stranger(port) as browser:
            answer = await browser.ask(f"GET {door.link().removeprefix(door.place.origin)}")
            assert (answer.status, answer.fields["location"]) == (303, "/")
            found = re.match("[^;]*", answer.fields["set-cookie"])
            assert found
            return found[0]

    @contextlib.asynccontextmanager
    async def visitor(self, port: int) -> AsyncIterator[Visitor]:
        """A browser's connection to the address of `port`."""
        async with self.stranger(port, await self.login(port)) as browser:
            yield browser


@contextlib.asynccontextmanager
async def web(
    *ports: int,
    kind: str = "python",
    plain: bool = False,
    web_port: int = 0,
) -> AsyncIterator[Web]:
    """Addresses for these ports of a container that has a tunnel client of this kind."""
    async with chain() as hops, relay(lambda: hops.host_port) as link:
        client = await hops.tunnel(kind)
        events: list[Event] = []
        forwarder = WebForwarder(
            "1",
            [PortForward(0, port) for port in ports],
            label="lab",
            settings=Settings(f"http://127.0.0.1:{link.port}"),
            plain=plain,
            web_port=web_port,
            on_event=events.append,
        )
        await forwarder.start()
        try:
            yield Web(hops, forwarder, events, link, client)
        finally:
            await forwarder.close()
