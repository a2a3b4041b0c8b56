"""A command that runs beside a process task: on a pseudo-terminal or on three pipes, read and written as asked for."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from pathlib import Path

from kohakuriver.errors import KohakuRiverError, UnavailableError, UsageError
from kohakuriver.runner.backends.base import CTRL_D, STDERR, STDOUT, ExecRequest, ExecSession, locale_for
from kohakuriver.runner.backends.process import terminal_child
from kohakuriver.runner.backends.process.account import Account
from kohakuriver.runner.services.fair_queue import FairQueue
from kohakuriver.text import printable

__all__ = ["ProcessExec", "find_shell", "start"]

PIECE = 64 * 1024
STARTING_SECONDS = 5.0  # a command that does not run by then holds up no others
_NO_SHELLS = ("nologin", "false")


class Descriptor:
    """A file descriptor of ours, read and written without blocking the loop; one reader, one writer."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd  # -1 once it is closed, which no call takes
        self._last = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """What is there, at most PIECE bytes; empty at the end, or once it is closed."""
        while (data := self._read_now()) is None and not self._last:
            self._reader = _future()
            asyncio.get_running_loop().add_reader(self._fd, _wake, self._reader)
            await self._until(self._reader, asyncio.get_running_loop().remove_reader)
        return data or b""

    def _read_now(self) -> bytes | None:
        """What is there; None when that is nothing yet."""
        try:
            return os.read(self._fd, PIECE)
        except BlockingIOError:
            return None
        except OSError:  # it is closed, or (EIO) nobody has the terminal open any more
            return b""

    async def write(self, data: bytes) -> None:
        """Write all of it; what nobody reads any more is thrown away."""
        view = memoryview(data)
        while view := view[self._write_now(view) :]:
            self._writer = _future()
            asyncio.get_running_loop().add_writer(self._fd, _wake, self._writer)
            await self._until(self._writer, asyncio.get_running_loop().remove_writer)

    def _write_now(self, view: memoryview) -> int:
        """How much was taken."""
        try:
            return os.write(self._fd, view)
        except BlockingIOError:
            return 0
        except OSError:  # it is closed, or nobody reads any more
            return len(view)

    async def _until(self, ready: asyncio.Future[None], remove: Callable[[int], bool]) -> None:
        try:
            await ready
        finally:
            if self._fd >= 0:
                remove(self._fd)

    def finish(self) -> None:
        """From now on `read` does not wait for more than there is."""
        self._last = True
        _wake(self._reader)

    def resize(self, rows: int, cols: int) -> None:
        """Tell a terminal its size."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                _set_size(self._fd, rows, cols)

    def close(self) -> None:
        if self._fd < 0:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._fd)
        loop.remove_writer(self._fd)
        os.close(self._fd)
        self._fd = -1
        _wake(self._reader)
        _wake(self._writer)


def _set_size(fd: int, rows: int, cols: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))


def _future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


class ProcessExec(ExecSession):
    """`inputs` is where input goes, `outputs` where output comes from, each with the name of its stream.

    With a terminal both are its one descriptor, and `theirs` is its other end: kept open, so that its output ends with
    the command, not before that has opened it, and not after, whoever else still has it open.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        inputs: Descriptor,
        outputs: dict[int, Descriptor],
        *,
        theirs: int = -1,
    ) -> None:
        self._process = process
        self._theirs = theirs
        self._input = inputs
        self._outputs = outputs
        self._tty = theirs >= 0
        loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(1)
        self._readers = {
            loop.create_task(self._read_all(stream, descriptor)): stream for stream, descriptor in outputs.items()
        }
        self._exit = loop.create_task(self._watch())

    async def _read_all(self, stream: int, descriptor: Descriptor) -> None:
        while data := await descriptor.read():
            await self._pieces.put((stream, data))
        await self._pieces.put((stream, b""))

    async def _watch(self) -> int:
        code = await self._process.wait()
        if self._tty:
            self._input.finish()
            self._close_theirs()
        return code if code >= 0 else 128 - code

    def _close_theirs(self) -> None:
        if self._theirs >= 0:
            os.close(self._theirs)
            self._theirs = -1

    async def read(self) -> tuple[int, bytes] | None:
        while self._outputs:
            stream, data = await self._pieces.get()
            if data:
                return stream, data
            self._outputs.pop(stream).close()
        return None

    async def write(self, data: bytes) -> None:
        await self._input.write(data)

    async def write_eof(self) -> None:
        if self._tty:
            await self._input.write(CTRL_D)
        else:
            self._input.close()

    async def resize(self, rows: int, cols: int) -> None:
        if self._tty:
            self._input.resize(rows, cols)

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    async def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
        for descriptor in (self._input, *self._outputs.values()):
            descriptor.close()
        self._close_theirs()
        if not self._exit.done():
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGHUP)
            _left.add(self._exit)
            self._exit.add_done_callback(_left.discard)


_left: set[asyncio.Task[int]] = set()
"""Waits for commands whose session is over: somebody has to reap them."""


async def start(
    request: ExecRequest, environment: Mapping[str, str], cwd: Path, account: Account, starts: FairQueue
) -> ProcessExec:
    """Start a command on this node, in a session of its own, as this account, when `starts` has a place for it.

    Raises KohakuRiverError when the node can't start anything, UsageError for a user or a directory that can't be had,
    UnavailableError "no_shell".
    """
    if request.user:
        raise UsageError("All that runs in a process task is one user's, and --user can't change that; leave it out.")
    cwd = Path(request.workdir or cwd)
    if not cwd.is_dir() or not account.reaches(cwd):
        raise UsageError(f"There is no directory {printable(str(cwd))!r} for --workdir.")
    environment = {**environment, **request.env}
    environment.update(locale_for(request, environment))
    command = list(request.command) or [find_shell(environment)]
    run = _on_terminal if request.tty else _on_pipes
    try:
        async with starts.place():
            return await run(request, command, environment, cwd, account)
    except OSError as error:
        raise KohakuRiverError(f"The node can't start a command: {error.strerror}.") from error


def find_shell(environment: Mapping[str, str]) -> str:
    """The best shell there is: $SHELL, bash, ash, sh. Raises UnavailableError."""
    for name in (environment.get("SHELL", ""), "bash", "ash", "sh"):
        found = shutil.which(name, path=environment.get("PATH", os.defpath)) if name else None
        if found and Path(found).name not in _NO_SHELLS:
            return found
    raise UnavailableError("The node has no shell; name a program to run behind `--`.", code="no_shell")


async def _on_terminal(
    request: ExecRequest, command: list[str], environment: Mapping[str, str], cwd: Path, account: Account
) -> ProcessExec:
    ours, theirs = os.openpty()
    try:
        _set_size(ours, request.rows, request.cols)
        account.gets(theirs)
        process = await _spawn([os.ttyname(theirs), account.ids or "-", *command], environment, cwd)
    except BaseException:
        os.close(ours)
        os.close(theirs)
        raise
    terminal = Descriptor(ours)
    return ProcessExec(process, terminal, {STDOUT: terminal}, theirs=theirs)


async def _on_pipes(
    request: ExecRequest, command: list[str], environment: Mapping[str, str], cwd: Path, account: Account
) -> ProcessExec:
    ends: list[int] = []
    try:
        for _ in range(3):
            ends += os.pipe()
        stdin, to_stdin, from_stdout, stdout, from_stderr, stderr = ends
        account.gets(stdin, stdout, stderr)  # a program may open /dev/stdout anew
        child = ["-", account.ids or "-", *command]
        process = await _spawn(child, environment, cwd, stdin=stdin, stdout=stdout, stderr=stderr)
    except BaseException:
        for end in ends:
            os.close(end)
        raise
    for end in (stdin, stdout, stderr):
        os.close(end)
    outputs = {STDOUT: Descriptor(from_stdout), STDERR: Descriptor(from_stderr)}
    return ProcessExec(process, Descriptor(to_stdin), outputs)


async def _spawn(
    child: list[str],
    environment: Mapping[str, str],
    cwd: Path,
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
) -> asyncio.subprocess.Process:
    """Returns once the command itself runs, or has failed: until then it takes a processor."""
    tty, user, *command = child
    runs, starting = os.pipe()
    with contextlib.closing(Descriptor(runs)) as watched:
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", terminal_child.__file__, tty, user, str(starting), *command),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=cwd,
                env=environment,
                start_new_session=True,
                pass_fds=(starting,),
            )
        finally:
            os.close(starting)
        try:
            await asyncio.wait_for(watched.read(), STARTING_SECONDS)
        except asyncio.TimeoutError:
            pass  # its directory may be on a disk that does not answer
        except BaseException:
            process.kill()
            raise
    return process
