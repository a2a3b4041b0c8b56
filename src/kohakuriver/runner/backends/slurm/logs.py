"""What a job printed: its output file, read as the user whose it is. tail(1) follows it on every file system."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess

from kohakuriver.runner.backends.printed import LogRequest, Pieces, Printed, cut
from kohakuriver.runner.backends.slurm.programs import END_SECONDS, Leash, as_whom
from kohakuriver.runner.backends.slurm.users import ClusterUser
from kohakuriver.task import LogLine

__all__ = ["JobOutput", "last_lines"]

_READ = 64 << 10
_QUIET_SECONDS = 1.5
"""A job has ended, and nothing more has come for so long: tail(1) looks once a second on file systems of others."""

_LAST = 4096

LAST_SECONDS = 5.0
"""How long it may take to read the last words of a job."""


class JobOutput(Printed):
    """Lines of a file. `ended` is set once the job has ended; what is followed ends a little later.

    The file has no times, so `since` leaves nothing out.
    """

    def __init__(self, who: ClusterUser, path: str, request: LogRequest, ended: asyncio.Event) -> None:
        self._who = who
        self._command = _words(path, request)
        self._ended = ended if request.follow else None
        self._tail: _Tail | None = None
        self._pieces = Pieces("stdout")
        self._rest = b""

    async def read(self) -> list[LogLine] | None:
        if self._tail is None:
            self._tail = _Tail(self._who, self._command)
        while True:
            data = await self._next(self._tail)
            if not data and not self._rest:
                return None
            whole = self._rest + data
            border = whole.rfind(b"\n") + 1 if data else len(whole)
            if data and not border and len(whole) < _READ:
                self._rest = whole  # a line that is not whole yet
                continue
            border = border or len(whole)
            self._rest = whole[border:]
            pieces = (self._pieces.take(piece, None) for _, piece in cut(whole[:border]))
            if lines := [piece for piece in pieces if piece is not None]:
                return lines

    async def _next(self, tail: _Tail) -> bytes:
        reading = asyncio.ensure_future(tail.output.read())
        try:
            while self._ended is not None:
                quiet = _QUIET_SECONDS if self._ended.is_set() else None
                ending = asyncio.ensure_future(asyncio.sleep(quiet) if quiet else self._ended.wait())
                try:
                    await asyncio.wait({reading, ending}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    ending.cancel()
                if reading.done() or quiet:
                    break
            return await reading if self._ended is None or reading.done() else b""
        finally:
            reading.cancel()

    async def close(self) -> None:
        tail, self._tail = self._tail, None
        if tail is not None:
            await tail.close()


async def last_lines(who: ClusterUser, path: str) -> list[str]:
    """The last few lines of a file; none where it can't be read, or not soon: a pipe is a file, too."""
    try:
        tail = _Tail(who, ["tail", "-c", str(_LAST), "--", path])
    except OSError:
        return []
    try:
        out = await asyncio.wait_for(tail.all(), LAST_SECONDS)
    except asyncio.TimeoutError:
        return []
    finally:
        await tail.close()
    return out.decode("utf-8", "replace").splitlines()


class _Tail:
    """tail(1), as a user; what it reads may be a pipe that nobody ever opens. Raises OSError.

    The event loop, which would wait for a process, has nothing to do with it.
    """

    def __init__(self, who: ClusterUser, words: list[str]) -> None:
        # Its modules are not there on every system.
        from kohakuriver.runner.backends.process.exec import Descriptor

        self._leash = Leash(who)
        reader, writer = os.pipe()
        try:
            how = self._leash.on(as_whom(words, who))
            self._process = subprocess.Popen(**how, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.DEVNULL)
        except BaseException:
            os.close(reader)
            self._leash.let_go()
            raise
        finally:
            os.close(writer)
        self.output = Descriptor(reader)

    async def all(self) -> bytes:
        """What it prints until it ends."""
        out = b""
        while data := await self.output.read():
            out += data
        return out

    async def close(self) -> None:
        self._leash.end(self._process)
        self.output.close()
        await asyncio.get_running_loop().run_in_executor(None, self._wait)

    def _wait(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)


def _words(path: str, request: LogRequest) -> list[str]:
    lines = "+1" if request.tail is None else str(request.tail)
    return ["tail", "-n", lines, *(["-F"] if request.follow else []), "--", path]
