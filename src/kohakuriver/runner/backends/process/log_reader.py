"""Reads what a process task printed out of the files in which it is kept, also while these are written and rotated."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kohakuriver.runner.backends.printed import CLIENT_CHATTER, LogRequest, Pieces, Printed, cut
from kohakuriver.runner.backends.process.logs import MARK, LogFile, LogWatch, TaskLogs
from kohakuriver.runtime import cancel_all
from kohakuriver.task import LogLine

__all__ = ["LogReader"]

_READ = 64 << 10
_CHATTER = tuple(each.encode() for each in CLIENT_CHATTER)
_LONGEST_CHATTER = max(map(len, _CHATTER))
_LONGEST_SAID = 512
_MISSING = LogLine("some of the output is missing here: it came faster than it was read\n", "note")


class _OpenFile:
    """One file of a log, and how far it has been read; `after_gap`: the one before it was gone already.

    Where nobody follows, what is written from now on doesn't count.
    """

    def __init__(self, file: LogFile, follow: bool, after_gap: bool) -> None:
        self.file = file
        self.at = 0
        self.after_gap = after_gap
        self._end = None if follow else os.fstat(file.fd).st_size
        self._marks = _marks(file.marks)
        self._time: float | None = None
        self._next: tuple[int, float] | None = None

    def read(self) -> list[tuple[bytes, float | None]]:
        """Its next pieces, with their times; none where no more has been written. Blocks."""
        most = _READ if self._end is None else min(_READ, self._end - self.at)
        data = os.pread(self.file.fd, most, self.at)
        found = [(piece, self._time_at(self.at + place)) for place, piece in cut(data)]
        self.at += len(data)
        return found

    def _time_at(self, place: int) -> float | None:
        while True:
            if self._next is None:
                self._next = next(self._marks)
            if self._next is None or self._next[0] > place:
                return self._time
            self._time, self._next = self._next[1], None


def _marks(fd: int | None) -> Iterator[tuple[int, float] | None]:
    """The marks in a file; None wherever there is none yet."""
    at = 0
    while True:
        read = b"" if fd is None else os.pread(fd, MARK.size * 256, at)
        marks = [MARK.unpack_from(read, place) for place in range(0, len(read) - MARK.size + 1, MARK.size)]
        at += len(marks) * MARK.size
        yield from marks
        if not marks:
            yield None


class LogReader(Printed):
    """`ended` is done when the task has ended and all that it printed is written; None where nobody waits for that."""

    def __init__(
        self, logs: TaskLogs, path: Path, request: LogRequest, ended: asyncio.Future[Any] | None = None
    ) -> None:
        self._logs = logs
        self._path = path
        self._request = request
        self._ended = ended
        self._pieces = Pieces("stdout")
        self._files: list[_OpenFile] | None = None
        self._last = -1
        self._stack = ExitStack()
        self._watch: LogWatch = self._stack.enter_context(logs.watching(path))

    async def read(self) -> list[LogLine] | None:
        if self._files is None:
            await self._begin()
        while True:
            over = self._ended is not None and self._ended.done()
            self._watch.reset()
            if lines := await self._read_on():
                return lines
            if self._ended is None:
                return None
            # What the file before has got since it was looked at is read first: it has become the older one.
            if not await self._more_files():
                if over:
                    return None
                await self._until_more()

    async def _begin(self) -> None:
        self._files = self._took(await self._logs.opened(self._path))
        if self._request.tail is not None:
            await self._blocking(_skip_to_last, self._files, self._request.tail)

    def _took(self, files: list[LogFile]) -> list[_OpenFile]:
        taken = []
        for file in files:
            after_gap = 0 <= self._last < file.number - 1
            taken.append(_OpenFile(file, self._ended is not None, after_gap))
            self._last = file.number
        return taken

    async def _read_on(self) -> list[LogLine]:
        """The next lines of the files that are open; none at the end of the last."""
        assert self._files is not None
        while self._files:
            while pieces := await self._blocking(self._files[0].read):
                if lines := [line for piece in pieces if (line := self._line(*piece)) is not None]:
                    return lines
            if len(self._files) == 1:
                break
            self._files.pop(0).file.close()
            if self._files[0].after_gap:
                return [_MISSING]
        return []

    def _line(self, data: bytes, time: float | None) -> LogLine | None:
        line = self._pieces.take(data, time)
        too_old = self._request.since is not None and time is not None and time < self._request.since
        return None if too_old else line

    async def _more_files(self) -> bool:
        assert self._files is not None
        files = await self._logs.opened(self._path, self._last)
        self._files += self._took(files)
        return bool(files)

    async def _until_more(self) -> None:
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._watch.wait())]
        assert self._ended is not None
        try:
            await asyncio.wait([*waits, self._ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_all(waits)

    @staticmethod
    async def _blocking(what: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, what, *arguments)

    async def close(self) -> None:
        self._stack.close()
        for each in self._files or ():
            each.file.close()
        self._files = []


def _skip_to_last(files: list[_OpenFile], count: int) -> None:
    """Go to where the last `count` lines begin, those of the tunnel client left out. Blocks."""
    starts = _line_starts_backwards(files)
    where = None
    for index, place in starts:
        if count == 0:
            break
        if _is_the_tasks(files[index].file.fd, place):
            where, count = (index, place), count - 1
    index, place = where or (len(files), 0)
    for number, each in enumerate(files):
        each.at = place if number == index else 0 if number > index else _size(each)


def _is_the_tasks(fd: int, place: int) -> bool:
    """Whether a line of the task begins there: neither the client's nor the rest of one that it broke."""
    if os.pread(fd, _LONGEST_CHATTER, place).startswith(_CHATTER):
        return False
    far = min(place, _LONGEST_SAID)
    before = os.pread(fd, far, place - far)[:-1].rpartition(b"\n")[2]
    return before.startswith(_CHATTER) or not any(each in before for each in _CHATTER)


def _line_starts_backwards(files: list[_OpenFile]) -> Iterator[tuple[int, int]]:
    """(file, place) of where each line begins, the last line first."""
    for index in reversed(range(len(files))):
        size = end = _size(files[index])
        while end:
            begin = max(0, end - _READ)
            block = os.pread(files[index].file.fd, end - begin, begin)
            at = len(block)
            while (at := block.rfind(b"\n", 0, at)) >= 0:
                if begin + at + 1 < size:
                    yield index, begin + at + 1
            end = begin
        if size and _begins_a_line(files, index):
            yield index, 0


def _begins_a_line(files: list[_OpenFile], index: int) -> bool:
    if index == 0:
        return True
    before = files[index - 1]
    return os.pread(before.file.fd, 1, max(0, _size(before) - 1)) in (b"", b"\n")


def _size(each: _OpenFile) -> int:
    return os.fstat(each.file.fd).st_size
