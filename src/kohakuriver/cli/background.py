"""A command that goes on in the background once it has begun: `kohakuriver forward --detach`.

The command splits in two before it does anything. The process behind does all the work, on the terminal as if it were
alone, so that its lines, its errors and its exit code are those of a command in the foreground; the one in front waits
for it. Once the work has begun, the process behind leaves the terminal: it gets a session of its own and gives up
stdin, stdout and stderr. Then the one in front ends. Until then either of them ends with the other.

python-daemon and its like give up the terminal before anything can have failed on it, so they can't be used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path

from kohakuriver.cli import output
from kohakuriver.cli.signals import ENDING
from kohakuriver.errors import UsageError

__all__ = ["Front", "in_background", "log_to", "needs_unix"]

_BEGUN = b"b"
_LONGEST_NAME = 64
_KILLED_BY = 128
_STANDARD = (0, 1, 2)

LOG_BYTES = 128 * 1024
"""How large a log grows before the one before it is thrown away: there are never more than two of this size."""


def needs_unix() -> None:
    """Raises UsageError on Windows, where a process can't be split and has no Unix sockets to be found by."""
    if not hasattr(os, "fork"):
        raise UsageError(
            "Forwards run in the background on Unix systems only; on this one, start it in another window."
        )


class Front:
    """The process in front, as the one behind it knows it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        channel.setblocking(False)

    async def gone(self) -> None:
        """Wait until nobody is in front any more, before `leave` is called."""
        while await asyncio.get_running_loop().sock_recv(self._channel, 1):
            pass

    async def leave(self, name: str) -> bool:
        """Leave the terminal, and have the one in front go on with this name; False where it has ended before.

        To be called once `gone` is waited for no longer.
        """
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in _STANDARD:
            os.dup2(nothing, descriptor)
        os.close(nothing)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            await loop.sock_sendall(self._channel, name.encode())
            if await loop.sock_recv(self._channel, 1):
                self._channel.close()
                return True
        return False


def in_background(work: Callable[[Front], int]) -> tuple[int, str]:
    """0 and the name that `work` has given itself where it goes on in another process, having called `leave`.

    Else the exit code that it ended with, and "". The other process ends with that; it never comes back from here.
    To be called before there are threads, loops or files to share.
    """
    needs_unix()
    ours, theirs = socket.socketpair()
    output.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _keep_only(theirs.fileno())
        output.leave(work(Front(theirs)))
    theirs.close()
    return _until_begun(pid, ours)


def _keep_only(channel: int) -> None:
    """Let go of all that was inherited but `channel`, stdout and stderr: others may wait for the end of a pipe."""
    with contextlib.suppress(OSError):  # there is no such directory
        for number in [int(path.name) for path in Path("/dev/fd").iterdir()]:
            if number not in (*_STANDARD, channel):
                with contextlib.suppress(OSError):  # what the directory itself was read with
                    os.close(number)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)


def _until_begun(pid: int, channel: socket.socket) -> tuple[int, str]:
    """What a process in front does."""

    def end(*_: object) -> None:
        with contextlib.suppress(OSError):  # it has ended by itself
            channel.shutdown(socket.SHUT_RDWR)

    with channel, _on_end(end):
        with contextlib.suppress(OSError):
            if name := channel.recv(_LONGEST_NAME):
                channel.sendall(_BEGUN)
                return 0, name.decode()
        _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        output.error(f"The process that was to go on in the background was ended by {signal.Signals(-code).name}.")
    return (code if code >= 0 else _KILLED_BY - code), ""


@contextlib.contextmanager
def _on_end(react: Callable[..., None]) -> Iterator[None]:
    """Until the block ends, call `react` where a signal would end this process; what is ignored stays ignored."""
    before = {number: signal.getsignal(number) for number in ENDING}
    caught = [number for number, handler in before.items() if handler is not signal.SIG_IGN or number == signal.SIGTERM]
    for number in caught:
        signal.signal(number, react)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


def log_to(path: Path) -> logging.Logger:
    """A logger that writes to `path`, as does everything else that logs in this process; see LOG_BYTES."""
    logging.raiseExceptions = False  # a full disk ends no forward
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)
    logger = logging.getLogger("kohakuriver.background")
    logger.setLevel(logging.INFO)
    return logger
