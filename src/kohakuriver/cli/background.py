"""A process that goes on in the background once the command has ended that it was started by, and what it logs.

python-daemon and its like come with a way of their own to be found, asked and stopped; see holder.py for ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import ClassVar, NoReturn

from kohakuriver import tracing
from kohakuriver.cli import output
from kohakuriver.errors import UsageError

__all__ = ["Log", "in_background", "needs_unix"]

_STANDARD = (0, 1, 2)

LOG_BYTES = 128 * 1024
"""How large a log grows before the one before it is thrown away: there are never more than two of this size."""


def needs_unix() -> None:
    """Raises UsageError on Windows, where a process can't be split and has no Unix sockets to be found by."""
    if not hasattr(os, "fork"):
        raise UsageError(
            "Forwards run in the background on Unix systems only; on this one, start it in another window."
        )


def in_background(work: Callable[[], None], keep: Sequence[int]) -> None:
    """Have `work` done by another process, in a session of its own and with no descriptor of ours but those in `keep`.

    To be called before there are threads or loops to share. The other process never comes back from here.
    """
    output.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        _work(work, keep)


def _work(work: Callable[[], None], keep: Sequence[int]) -> NoReturn:
    """What the other process does. It ends without unwinding what it was forked in: all of that is the command's."""
    try:
        os.setsid()
        _keep_only(keep)
        work()
        tracing.finish()
    except Exception:
        logging.getLogger(__name__).exception("The process broke:")
    finally:
        os._exit(0)


def _keep_only(keep: Sequence[int]) -> None:
    """Let go of all that was inherited but `keep`: others may wait for the end of a pipe, or the terminal be closed."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in _STANDARD:
        os.dup2(nothing, number)
    with contextlib.suppress(OSError):  # there is no such directory
        for number in [int(path.name) for path in Path("/dev/fd").iterdir()]:
            if number not in (*_STANDARD, *keep):
                with contextlib.suppress(OSError):  # what the directory itself was read with
                    os.close(number)


class Log:
    """A log of one piece of work, which gets what is told to `logger`, and what libraries complain of meanwhile.

    From `begin` on, that is in the task of the event loop that calls it and those that it makes. What is about no
    piece of work is in all of their logs. See LOG_BYTES.
    """

    _now: ClassVar[ContextVar[logging.Handler | None]] = ContextVar("log", default=None)
    _open: ClassVar[set[logging.Handler]] = set()

    def __init__(self, path: Path) -> None:
        logging.raiseExceptions = False  # a full disk ends no forward
        self._file = RotatingFileHandler(
            path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace"
        )
        self._file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.logger = logging.Logger("kohakuriver.background", logging.INFO)
        self.logger.addHandler(self._file)

    def begin(self) -> None:
        """Have what happens from here on logged here."""
        if not any(isinstance(each, _Complaints) for each in logging.root.handlers):
            logging.root.addHandler(_Complaints())
        self._open.add(self._file)
        self._now.set(self._file)

    def close(self) -> None:
        """Log nothing any more."""
        self._open.discard(self._file)
        self._file.close()

    @classmethod
    def complain(cls, record: logging.LogRecord) -> None:
        """Write down what a library says."""
        of = cls._now.get()
        for each in set(cls._open) if of is None else cls._open & {of}:
            each.handle(record)


class _Complaints(logging.Handler):
    """Takes what libraries log by the root logger."""

    def emit(self, record: logging.LogRecord) -> None:
        Log.complain(record)
