"""Many echo streams and bulk with checksums through a local port, until stdin ends: what became of them, as JSON.

    python -m tests.support.network.load PORT STREAMS

A line `moving` says that all streams have been used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time

PIECE = 1 << 18


class Load:
    def __init__(self, port: int) -> None:
        self.port = port
        self.over = asyncio.Event()
        self.echoes = 0
        self.bulk = 0
        self.longest = 0.0
        self.errors: list[str] = []
        self.used = 0
        self.moving = asyncio.Event()

    async def echo(self, number: int, streams: int) -> None:
        """One message after another, each of which has to come back as it went."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        turn = 0
        while not self.over.is_set():
            text = b"%d %d;" % (number, turn) * 10
            began = time.monotonic()
            writer.write(text)
            if await reader.readexactly(len(text)) != text:
                self.errors.append(f"stream {number} got something else")
                return
            self.longest = max(self.longest, time.monotonic() - began)
            self.echoes += 1
            turn += 1
            if turn == 1:
                self.used += 1
                if self.used == streams:
                    self.moving.set()
            await asyncio.sleep(0.01)
        writer.close()

    async def pour(self) -> None:
        """As much as goes, both ways at once; what comes back is what went."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        sent, back, piece = hashlib.sha256(), hashlib.sha256(), os.urandom(PIECE)

        async def send() -> None:
            number = 0
            while not self.over.is_set():
                data = number.to_bytes(8, "big") + piece[8:]
                sent.update(data)
                writer.write(data)
                await writer.drain()
                number += 1
            writer.write_eof()

        sending = asyncio.ensure_future(send())
        while data := await reader.read(PIECE):
            back.update(data)
            self.bulk += len(data)
        await sending
        if sent.digest() != back.digest():
            self.errors.append("bulk came back as something else")

    async def noting(self, doing: object) -> None:
        try:
            await doing  # type: ignore[misc]
        except (OSError, asyncio.IncompleteReadError) as error:
            self.errors.append(repr(error))


async def main(port: int, streams: int) -> None:
    load = Load(port)
    tasks = [asyncio.ensure_future(load.noting(load.echo(number, streams))) for number in range(streams)]
    tasks.append(asyncio.ensure_future(load.noting(load.pour())))
    await load.moving.wait()
    print("moving", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    load.over.set()
    await asyncio.gather(*tasks)
    print(json.dumps({key: getattr(load, key) for key in ("echoes", "bulk", "longest", "errors")}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
