"""What a job printed: its output file, read as the user whose it is. tail(1) follows it on every file system."""

from __future__ import annotations

import asyncio
import subprocess

from kohakuriver.runner.backends.printed import LogRequest, Pieces, Printed, cut
from kohakuriver.runner.backends.slurm.users import ClusterUser
from kohakuriver.task import LogLine

__all__ = ["JobOutput", "last_lines"]

_READ = 64 << 10
_QUIET_SECONDS = 1.5
"""A job has ended, and nothing more has come for so long: tail(1) looks once a second on file systems of others."""


class JobOutput(Printed):
    """Lines of a file. `ended` is set once the job has ended; what is followed ends a little later.

    The file has no times, so `since` leaves nothing out.
    """

    def __init__(self, who: ClusterUser, path: str, request: LogRequest, ended: asyncio.Event) -> None:
        self._command = who.command(_tail(path, request))
        self._ended = ended if request.follow else None
        self._process: asyncio.subprocess.Process | None = None
        self._pieces = Pieces("stdout")
        self._rest = b""

    async def read(self) -> list[LogLine] | None:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/"
            )
        while True:
            data = await self._next(self._process)
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

    async def _next(self, process: asyncio.subprocess.Process) -> bytes:
        assert process.stdout is not None
        reading = asyncio.ensure_future(process.stdout.read(_READ))
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
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


async def last_lines(who: ClusterUser, path: str) -> list[str]:
    """The last few lines of a file; none where it can't be read."""
    process = await asyncio.create_subprocess_exec(
        *who.command(["tail", "-c", "4096", "--", path]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    out, _ = await process.communicate()
    return out.decode("utf-8", "replace").splitlines()


def _tail(path: str, request: LogRequest) -> list[str]:
    lines = "+1" if request.tail is None else str(request.tail)
    return ["tail", "-n", lines, *(["-F"] if request.follow else []), "--", path]
