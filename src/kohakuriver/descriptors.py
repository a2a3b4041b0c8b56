"""stdin, stdout and stderr as a program may find them: closed, or in an encoding that has no word for what is said."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import IO

__all__ = ["as_far_as_it_goes", "die_by_interrupt", "discard", "prepare", "raise_on_interrupt"]

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def prepare() -> None:
    """What every program of ours does first: it has all three descriptors, hears signals, and can say any text.

    A descriptor that was closed becomes /dev/null. Else the next file, pipe or socket would get its number, and be
    read as what is typed, or written to as what is said.
    """
    for descriptor, (name, mode) in enumerate(_STREAMS):
        _open(descriptor)
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    _say_anything()
    _hear_signals()


def _open(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        # It gets this number: all lower ones are taken. The programs that we start are to have it too.
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _say_anything() -> None:
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _hear_signals() -> None:
    """Whoever started us may have blocked signals for itself: we would never end, nor hear that a child has."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def discard(stream: IO[str]) -> None:
    """Throw away what is still to come on a stream, and what it could not write so far."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def as_far_as_it_goes() -> Iterator[None]:
    """The program goes on where what the block prints can't be written, as on a full disk: it is not its result."""
    try:
        yield
    except BlockingIOError:  # it can be, later
        pass
    except OSError:  # else the end of the program would try again, and fail
        discard(sys.stdout)


def die_by_interrupt() -> None:
    """Until something is to be undone, Ctrl-C ends this program as it ends any other, without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_interrupt() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
