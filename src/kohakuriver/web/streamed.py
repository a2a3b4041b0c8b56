"""An HTTP answer that goes on for as long as there is more to say: lines of JSON, sent as fast as they are read.

An empty line means nothing: it shows that both ends are still there. An error that comes later than the answer's head
is its last line (docs/protocol.md §4).
"""

from __future__ import annotations

import asyncio
import json
from typing import Final, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kohakuriver.errors import KohakuRiverError
from kohakuriver.runtime import cancel_all

__all__ = ["ALIVE_SECONDS", "LOST_SECONDS", "Source", "Streamed"]

ALIVE_SECONDS: Final = 10.0
"""After so long without a line an empty one is sent."""

LOST_SECONDS: Final = 45.0
"""Who has heard nothing for so long has lost the other side."""


class Source(Protocol):
    """Where the lines come from. One reader, which may be cancelled, and closes it after that."""

    async def read(self) -> bytes | None:
        """The next lines, whole; None at the end. Raises KohakuRiverError."""

    async def close(self) -> None:
        """Free what is held."""


class Streamed(Response):
    """The answer; it closes `source` at its end, be that because the peer has gone."""

    media_type = "application/x-ndjson"

    def __init__(self, source: Source) -> None:
        super().__init__(None)
        del self.headers["content-length"]
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        sending, gone = loop.create_task(self._send(send)), loop.create_task(_until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await cancel_all([sending, gone])
            await self._source.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        reading: asyncio.Task[bytes | None] | None = None
        data: bytes | None = b""
        try:
            while data is not None:
                reading = reading or asyncio.get_running_loop().create_task(self._lines())
                await asyncio.wait({reading}, timeout=ALIVE_SECONDS)
                data = b"\n"
                if reading.done():
                    data, reading = reading.result(), None
                await send({"type": "http.response.body", "body": data or b"", "more_body": data is not None})
        finally:
            await cancel_all([reading] if reading else [])

    async def _lines(self) -> bytes | None:
        try:
            return await self._source.read()
        except KohakuRiverError as error:
            self._source, failed = _Nothing(self._source), error
            return (json.dumps({**failed.to_json(), "status": failed.status}) + "\n").encode()


class _Nothing:
    """What is left of a source that failed."""

    def __init__(self, source: Source) -> None:
        self._source = source

    async def read(self) -> bytes | None:
        return None

    async def close(self) -> None:
        await self._source.close()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
