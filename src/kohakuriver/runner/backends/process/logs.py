"""What process tasks print: kept in bounded files, however much it is.

A task's output goes into a pipe. A thread of the runner reads all of these and writes each into `log`, beside which
`log.1` has what was printed before: when the newer file has half of what the task may keep, it becomes the older one.
Starts of a task follow one another in the same files. A user whose tasks print too much too fast waits for it, as a
program waits for a terminal, so that neither this thread nor the disk is one user's. Beside each file another one,
`log.times`, says which byte was printed when.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from kohakuriver.rates import TokenBucket

__all__ = ["MARK", "LogFile", "LogWatch", "TaskLogs", "last_of", "older", "tail", "times"]

RATE, BURST = 4 << 20, 16 << 20
"""Bytes a second of one user's tasks together, and how many may come at once."""

MARK = struct.Struct("<Qd")
"""In the file with the times: from this byte of the log on it was printed at or after this time (since the epoch)."""

_MARK_SECONDS = 0.1
"""How exact these are."""

_READ = 64 << 10
_LAST_SECONDS = 2.0
_TAIL = 4096

log = structlog.get_logger("kohakuriver.runner")


def older(path: Path) -> Path:
    """Where what was printed before the log at `path` is."""
    return path.with_name(f"{path.name}.1")


def times(path: Path) -> Path:
    """Where the times of what is in a log's file are."""
    return path.with_name(f"{path.name}.times")


def tail(path: Path) -> list[str]:
    """The last lines of a log."""
    read = b""
    for file in (older(path), path):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - _TAIL))
            read += opened.read(_TAIL)
    return read[-_TAIL:].decode("utf-8", "replace").split("\n") if read else []


class _Log:
    """One task's files. `most` are their bytes together, 0 for any number; `whose` is the user.

    `number` counts the newer files that there have been.
    """

    def __init__(self, path: Path, whose: str, most: int) -> None:
        self.path = path
        self.whose = whose
        self.most = most
        self.number = 1
        self.length = _size(path)
        self.size = self.length + _size(times(path))
        self.older_size = _size(older(path)) + _size(times(older(path)))
        self._marked = 0.0

    @property
    def total(self) -> int:
        return self.size + self.older_size

    def write(self, data: bytes) -> None:
        """Raises OSError."""
        if self.most and self.size + MARK.size + len(data) > self.most // 2:
            self.rotate()
        if abs(time.time() - self._marked) >= _MARK_SECONDS:
            self._marked = time.time()
            self._append(times(self.path), MARK.pack(self.length, self._marked))
        self._append(self.path, data)
        self.length += len(data)

    def _append(self, path: Path, data: bytes) -> None:
        with open(path, "ab", opener=_for_us_alone) as file:
            file.write(data)
        self.size += len(data)

    def rotate(self) -> None:
        for file in (times(self.path), self.path):
            with contextlib.suppress(FileNotFoundError):
                file.replace(times(older(self.path)) if file != self.path else older(file))
        self.number += 1
        self._marked = 0.0
        self.length, self.size, self.older_size = 0, 0, self.size

    def shrink(self) -> None:
        """Give up the older half, or what there is."""
        if not self.older_size:
            self.rotate()
        older(self.path).unlink(missing_ok=True)
        times(older(self.path)).unlink(missing_ok=True)
        self.older_size = 0

    def opened(self, after: int) -> list[LogFile]:
        """Its files that came after that with the number `after`, oldest first."""
        found = []
        for number, path in ((self.number - 1, older(self.path)), (self.number, self.path)):
            with contextlib.suppress(FileNotFoundError):
                if number > after:
                    found.append(LogFile.at(number, path))
        return found


@dataclass(frozen=True)
class LogFile:
    """One file of a log, open for reading: it may meanwhile have become the older one, or be gone from its directory.

    `marks` is the file with its times, None where there is none.
    """

    number: int
    fd: int
    marks: int | None

    @classmethod
    def at(cls, number: int, path: Path) -> LogFile:
        """Raises OSError."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls(number, fd, os.open(times(path), os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return cls(number, fd, None)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)
        if self.marks is not None:
            os.close(self.marks)


def _close_all(files: list[LogFile]) -> None:
    for file in files:
        file.close()


class LogWatch:
    """Tells a loop that something was written."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._more = asyncio.Event()
        self._told = False

    def tell(self) -> None:
        """There is more; for the thread that writes."""
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._more.set)

    def reset(self) -> None:
        """What there is now will be read."""
        self._told = False
        self._more.clear()

    async def wait(self) -> None:
        """Until there is more than at the last `reset`."""
        await self._more.wait()


class _Pipe:
    """One end of a start's output; `ended` is called, in the thread, when all of it is written."""

    def __init__(self, fd: int, into: _Log, ended: Callable[[], None]) -> None:
        self.fd = fd
        self.into = into
        self.ended = ended


class TaskLogs:
    """The logs of a runner's process tasks.

    Args:
        most: bytes of all of them together, 0 for any number. Of more, the user with the most loses the oldest part of
            the largest log.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._logs: dict[Path, _Log] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._paused: list[tuple[float, _Pipe]] = []
        self._watches: dict[Path, set[LogWatch]] = {}
        self._failing = False
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._selector = selectors.DefaultSelector()
        self._bell, ringing = socket.socketpair()
        self._ringing = ringing
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._bell.setblocking(False)
        self._ringing.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="task-logs", daemon=True)
        self._thread.start()

    # What the runner asks for

    def know(self, path: Path, whose: str) -> None:
        """There is a log from before the restart."""
        self._call(lambda: self._log(path, whose, 0))

    def open(self, path: Path, whose: str, most: int) -> tuple[int, asyncio.Future[None]]:
        """A descriptor to print into, for one start of a task of the user `whose`; whoever gets it closes it.

        `most` are the bytes that are kept, 0 for any number. The future is done when all that was printed is written.
        """
        written, ended = _told()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self._call(lambda: self._begin(_Pipe(reading, self._log(path, whose, most), ended)))
        return writing, written

    async def opened(self, path: Path, after: int = -1) -> list[LogFile]:
        """The files of a log that came after that with the number `after`, oldest first; whoever gets them closes them.

        Rotation waits for that, so that of two calls the second one gives what follows what the first one gave.
        """
        found: list[LogFile] = []
        looked, tell = _told()

        def look() -> None:
            log_of = self._logs.get(path)
            if log_of is not None:
                found.extend(log_of.opened(after))
            tell()

        self._call(look)
        try:
            await asyncio.shield(looked)
        except asyncio.CancelledError:
            looked.add_done_callback(lambda _: _close_all(found))
            raise
        return found

    @contextlib.contextmanager
    def watching(self, path: Path) -> Iterator[LogWatch]:
        """Until the block ends, be told of what is written into a log."""
        watch = LogWatch()
        self._call(lambda: self._watches.setdefault(path, set()).add(watch))
        try:
            yield watch
        finally:
            self._call(lambda: self._unwatch(path, watch))

    async def forget(self, directory: Path) -> None:
        """The task whose directory this is is removed: nobody can print into its files any more."""
        forgotten, tell = _told()

        def forget() -> None:
            self._forget(directory)
            tell()

        self._call(forget)
        await forgotten

    def close(self) -> None:
        """Read what there is, and end. Blocks for that moment."""
        self._call(None)
        self._thread.join()
        self._ringing.close()

    def _call(self, what: Callable[[], object] | None) -> None:
        self._calls.put(what)
        with contextlib.suppress(BlockingIOError):  # it rings already
            self._ringing.send(b"!")

    # In the thread

    def _run(self) -> None:
        running = True
        while running:
            due = [key.data for key, _ in self._selector.select(self._until_next())]
            for pipe in filter(None, due):
                self._pass_on(pipe)
            if None in due:  # the bell, and last: it may end pipes that are due
                running = self._answer()
            self._go_on()
        for pipe in self._pipes():
            self._end(pipe)
        self._selector.close()
        self._bell.close()

    def _answer(self) -> bool:
        """Do what the runner has asked for; False when that is to end."""
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(4096)
        with contextlib.suppress(queue.Empty):
            while True:
                call = self._calls.get_nowait()
                if call is None:
                    return False
                call()
        return True

    def _log(self, path: Path, whose: str, most: int) -> _Log:
        found = self._logs.get(path)
        if found is None:
            found = self._logs[path] = _Log(path, whose, most)
        found.whose, found.most = whose, most
        return found

    def _unwatch(self, path: Path, watch: LogWatch) -> None:
        self._watches[path].discard(watch)
        if not self._watches[path]:
            del self._watches[path]

    def _pipes(self) -> list[_Pipe]:
        read = [key.data for key in self._selector.get_map().values() if key.data is not None]
        return [*read, *(pipe for _, pipe in self._paused)]

    def _forget(self, directory: Path) -> None:
        gone = [each for path, each in self._logs.items() if directory in path.parents]
        self._logs = {path: each for path, each in self._logs.items() if each not in gone}
        for pipe in [pipe for pipe in self._pipes() if pipe.into in gone]:
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe.fd)
            self._end(pipe)
        self._paused = [(when, pipe) for when, pipe in self._paused if pipe.into not in gone]

    def _begin(self, pipe: _Pipe) -> None:
        self._selector.register(pipe.fd, selectors.EVENT_READ, pipe)

    def _pass_on(self, pipe: _Pipe) -> None:
        """Write one read's worth."""
        try:
            data = os.read(pipe.fd, _READ)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(pipe.fd)
            self._end(pipe)
            return
        try:
            pipe.into.write(data)
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("what a task prints can't be written", file=str(pipe.into.path), reason=error.strerror)
            self._failing = True
        self._make_room()
        for watch in self._watches.get(pipe.into.path, ()):
            watch.tell()
        if wait := self._bucket(pipe.into.whose).take(len(data), self._clock()):
            self._selector.unregister(pipe.fd)
            self._paused.append((self._clock() + wait, pipe))

    def _bucket(self, whose: str) -> TokenBucket:
        bucket = self._buckets.get(whose)
        if bucket is None:
            now = self._clock()
            self._buckets = {who: each for who, each in self._buckets.items() if not each.is_full(now)}
            bucket = self._buckets[whose] = TokenBucket(RATE, BURST, now)
        return bucket

    def _until_next(self) -> float | None:
        return max(0.0, min(when for when, _ in self._paused) - self._clock()) if self._paused else None

    def _go_on(self) -> None:
        """Read those again who have waited for long enough."""
        now = self._clock()
        for _, pipe in (due for due in self._paused if due[0] <= now):
            self._begin(pipe)
        self._paused = [due for due in self._paused if due[0] > now]

    def _make_room(self) -> None:
        while self._most and sum(each.total for each in self._logs.values()) > self._most:
            largest = max(self._logs.values(), key=lambda each: (self._of_user(each.whose), each.total))
            largest.shrink()

    def _of_user(self, whose: str) -> int:
        return sum(each.total for each in self._logs.values() if each.whose == whose)

    @staticmethod
    def _end(pipe: _Pipe) -> None:
        os.close(pipe.fd)
        pipe.ended()


def _for_us_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _told() -> tuple[asyncio.Future[None], Callable[[], None]]:
    """A future, and what another thread calls to have it done."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(lambda: None if told.done() else told.set_result(None))

    return told, tell


async def last_of(written: Iterable[asyncio.Future[None]]) -> None:
    """Wait until all is written, for a moment: what has left the task may hold its output open for ever."""
    await asyncio.wait(set(written), timeout=_LAST_SECONDS)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
