"""What ends a program, as events on the loop, on every system; and whose the terminal is just now."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence

__all__ = ["BY_KEYS", "ENDING", "caught", "in_foreground", "suspended"]

ENDING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name))
"""What ends a program, so that it ends what it started before."""

BY_KEYS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGQUIT") if hasattr(signal, name))
"""What a terminal sends to everything in the foreground when a key is pressed."""


@contextlib.contextmanager
def caught(react: Callable[[signal.Signals], None], numbers: Sequence[signal.Signals] = ENDING) -> Iterator[None]:
    """Call `react` on the running loop, in place of what these signals do, until the block ends.

    What was ignored when this program started stays ignored, as SIGHUP is by `nohup` and SIGINT by a script's `&`;
    but a service manager's SIGTERM always counts.
    """
    loop = asyncio.get_running_loop()
    before = {
        number: handler or signal.SIG_DFL
        for number in numbers
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN or number == signal.SIGTERM
    }
    for number in before:
        _catch(loop, number, react)
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)
            signal.signal(number, handler)


def _catch(loop: asyncio.AbstractEventLoop, number: signal.Signals, react: Callable[[signal.Signals], None]) -> None:
    def from_handler(_number: int, _frame: object) -> None:
        loop.call_soon_threadsafe(react, number)

    try:
        loop.add_signal_handler(number, react, number)
    except NotImplementedError:  # Windows
        signal.signal(number, from_handler)


@contextlib.contextmanager
def suspended(before: Callable[[], None]) -> Iterator[None]:
    """Until the block ends, call `before` on the running loop when Ctrl-Z is about to stop this program."""
    number = getattr(signal, "SIGTSTP", None)
    if number is None or signal.getsignal(number) is signal.SIG_IGN:  # a shell without job control
        yield
        return
    loop = asyncio.get_running_loop()

    def stop() -> None:
        before()
        loop.remove_signal_handler(number)
        os.kill(os.getpid(), number)  # comes back when the shell lets us go on
        loop.add_signal_handler(number, stop)

    loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(number)


def in_foreground(fd: int) -> bool:
    """Whether the terminal `fd` is this program's at the moment, and not the shell's or another job's."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except AttributeError:  # Windows: one console for all on it
        return os.isatty(fd)
    except OSError:  # another session's terminal has no foreground that we could see
        return False
