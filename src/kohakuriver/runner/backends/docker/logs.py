"""What a container printed, as its engine tells it: on a connection of its own, read as fast as somebody reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeAlias, cast

import aiodocker
import aiohttp

from kohakuriver.runner.backends.base import STDERR
from kohakuriver.runner.backends.docker.engine import ENGINE_SECONDS, own_connection, sentences
from kohakuriver.runner.backends.printed import PIECE, LogRequest, Pieces, Printed, cut
from kohakuriver.task import LogLine

__all__ = ["open_logs"]

_Opening: TypeAlias = Awaitable[aiohttp.StreamReader]

_HEAD = 8
_LONGEST_TIME = 64


class _Framed(Printed):
    """A container without a terminal: each line comes in a frame that says whose it is, with its time in front.

    Source: the engine's API, "Stream format" of attaching to a container.
    """

    def __init__(
        self, content: aiohttp.StreamReader, held: AsyncExitStack, rest: Callable[[str | None], _Opening] | None
    ) -> None:
        self._content = content
        self._held = held
        self._rest = rest
        self._stamp = b""
        self._same = self._known = 0  # frames with this time, and how many of those to come are known already
        self._pieces = {False: Pieces("stdout"), True: Pieces("stderr")}
        self._left = 0  # bytes of the frame that has been begun
        self._of_stderr = False
        self._time: float | None = None

    async def read(self) -> list[LogLine] | None:
        with sentences("go on reading what the container printed"):
            while (data := await self._next()) is not None:
                pieces = self._pieces[self._of_stderr]
                found = [line for _, piece in cut(data) if (line := pieces.take(piece, self._time)) is not None]
                if found:
                    return found
        return None

    async def _next(self) -> bytes | None:
        """The next part of a frame without its time, None at the end."""
        if self._left:
            return await self._take(PIECE)
        while (head := await self._head()) is not None:
            self._of_stderr, self._left = head[0] == STDERR, int.from_bytes(head[4:], "big")
            begun = await self._take(PIECE + _LONGEST_TIME)
            stamp, _, data = begun.partition(b" ")
            self._time = _seconds(stamp)
            if self._time is None:
                return begun
            if not self._seen(stamp):
                return data
            while self._left:
                await self._take(PIECE)
        return None

    def _seen(self, stamp: bytes) -> bool:
        """Whether a frame with this time is one that came before."""
        if stamp == self._stamp and self._known:
            self._known -= 1
            return True
        self._same, self._known = (self._same if stamp == self._stamp else 0) + 1, 0
        self._stamp = stamp
        return False

    async def _head(self) -> bytes | None:
        """The next frame's head, None at the end."""
        try:
            return await self._content.readexactly(_HEAD)
        except asyncio.IncompleteReadError:
            if self._rest is None:
                return None
        # An engine ends with the container, though there may be more in its files that it has not told yet.
        rest, self._rest, self._known = self._rest, None, self._same
        self._content = await rest(_since(self._stamp) if self._stamp else None)
        return await self._head()

    async def _take(self, most: int) -> bytes:
        try:
            data = await self._content.readexactly(min(most, self._left))
        except asyncio.IncompleteReadError as error:
            self._left = 0
            return error.partial
        self._left -= len(data)
        return data

    async def close(self) -> None:
        await self._held.aclose()


class _Plain(Printed):
    """A container with a terminal, as one that was adopted may have: all that there is are bytes."""

    def __init__(self, content: aiohttp.StreamReader, held: AsyncExitStack) -> None:
        self._content = content
        self._held = held
        self._pieces = Pieces("stdout")

    async def read(self) -> list[LogLine] | None:
        with sentences("go on reading what the container printed"):
            while data := await self._content.readany():
                found = [line for _, piece in cut(data) if (line := self._pieces.take(piece, None)) is not None]
                if found:
                    return found
        return None

    async def close(self) -> None:
        await self._held.aclose()


def _since(stamp: bytes) -> str:
    """An engine's time, RFC 3339 in UTC, as seconds since the epoch and nanoseconds. Raises ValueError."""
    text = stamp.decode("ascii").rstrip("Z")
    whole = datetime.fromisoformat(text[:19] + "+00:00").timestamp()
    return f"{whole:.0f}.{text[20:]:0<9}"


def _seconds(stamp: bytes) -> float | None:
    try:
        return float(_since(stamp))
    except ValueError:
        return None


async def open_logs(docker: aiodocker.Docker, container: str, request: LogRequest) -> Printed:
    """What a container printed. Raises the engine's own errors."""
    show = await docker.containers.container(container).show()
    terminal = bool(show["Config"]["Tty"])
    own = own_connection(docker)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(own.close)

        async def asked(what: dict[str, str]) -> aiohttp.StreamReader:
            query = own._query(
                f"containers/{container}/logs",
                params=cast(Any, what),
                timeout=aiohttp.ClientTimeout(sock_connect=ENGINE_SECONDS),
            )
            answer = await asyncio.wait_for(query.__aenter__(), ENGINE_SECONDS)
            held.callback(answer.close)
            return answer.content

        held = stack
        content = await asked(_wanted(request, times=not terminal))
        held = stack.pop_all()
        if terminal:
            return _Plain(content, held)
        ended = replace(request, follow=False)

        def rest(since: str | None) -> _Opening:
            after = {} if since is None else {"since": since, "tail": "all"}
            return asked({**_wanted(ended, times=True), **after})

        return _Framed(content, held, rest if request.follow else None)
    raise AssertionError


def _wanted(request: LogRequest, *, times: bool) -> dict[str, str]:
    return {
        "stdout": "1",
        "stderr": "1",
        "follow": str(int(request.follow)),
        "timestamps": str(int(times)),
        "tail": "all" if request.tail is None else str(request.tail),
        **({} if request.since is None else {"since": f"{request.since:.9f}"}),
    }
