"""stdin, stdout and stderr as bytes, without ever holding the event loop up; and the way out in what is typed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import select
import threading
from typing import TypeVar

__all__ = ["Escapes", "Input", "Output"]

PIECE = 64 * 1024


class Escapes:
    """Finds `~.` at the start of a line in what is typed, as `ssh` does; `~~` there is one `~`."""

    def __init__(self) -> None:
        self._line_start = True
        self._held = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to send, and whether the user wants out."""
        out = bytearray()
        rest = data
        while rest:
            if self._held:
                self._held = False
                if rest[:1] == b".":
                    return bytes(out), True
                if rest[:1] == b"~":
                    rest = rest[1:]
                out += b"~"
                self._line_start = False
            elif self._line_start and rest[:1] == b"~":
                self._held = True
                rest = rest[1:]
            else:
                end = _next_line_start(rest)
                self._line_start = rest[end - 1] in b"\r\n"
                out += rest[:end]
                rest = rest[end:]
        return bytes(out), False


def _next_line_start(data: bytes) -> int:
    """The first place behind a line's end where a `~` stands, or the end of `data`."""
    places = [place + 1 for mark in (b"\r~", b"\n~") if (place := data.find(mark)) >= 0]
    return min(places, default=len(data))


class Input:
    """Reads stdin piece by piece, without ever holding the loop up.

    In a thread that nobody waits for at the end of the program: a read can't be interrupted. So it must not say
    anything either, not even that it failed: Python aborts at its end where such a thread holds stderr.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked: queue.SimpleQueue[asyncio.Future[bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="stdin", daemon=True).start()

    async def read(self) -> bytes:
        """The next piece, of 64 KiB at most; b"" at the end. One that is cancelled takes a piece with it."""
        read: asyncio.Future[bytes] = self._loop.create_future()
        self._asked.put(read)
        return await read

    def _run(self) -> None:
        while True:
            read = self._asked.get()
            data = _read_piece()
            with contextlib.suppress(RuntimeError):  # the loop has ended first
                self._loop.call_soon_threadsafe(_settle, read, data)


def _read_piece() -> bytes:
    while (data := _read_now()) is None:
        select.select([0], [], [])
    return data


def _read_now() -> bytes | None:
    """What is there; None where it can't be waited for, as whoever shares this descriptor has made it so."""
    try:
        return os.read(0, PIECE)
    except BlockingIOError:
        return None
    except OSError:  # the terminal has gone
        return b""


class Output:
    """Writes to stdout and stderr in order, without ever holding the loop up."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._work: queue.SimpleQueue[tuple[int, bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="stdout", daemon=True).start()

    async def write(self, fd: int, data: bytes) -> None:
        """Write all of it. Raises BrokenPipeError when nobody reads it any more, and other OSErrors."""
        written: asyncio.Future[None] = self._loop.create_future()
        self._work.put((fd, data, written))
        await written

    def _run(self) -> None:
        while True:
            fd, data, written = self._work.get()
            failure: Exception | None = None
            try:
                _write_all(fd, data)
            except OSError as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop has ended first
                self._loop.call_soon_threadsafe(_settle, written, None, failure)


T = TypeVar("T")


def _settle(future: asyncio.Future[T], result: T, failure: Exception | None = None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view := view[_write_now(fd, view) :]:
        select.select([], [fd], [])


def _write_now(fd: int, view: memoryview) -> int:
    try:
        return os.write(fd, view)
    except BlockingIOError:
        return 0
