"""Ctrl-C and SIGTERM as events on the loop, on every system."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence

__all__ = ["ENDING", "caught"]

ENDING: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def caught(react: Callable[[signal.Signals], None], numbers: Sequence[signal.Signals] = ENDING) -> Iterator[None]:
    """Call `react` on the running loop, in place of what Ctrl-C and SIGTERM do, until the block ends."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
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
