"""Asks Slurm how its jobs are: all of them in one question, and seldom, as Slurm's manual wants it (squeue(1))."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

__all__ = ["EVERY", "QueueWatch"]

log = structlog.get_logger("kohakuriver.runner")

EVERY = 30.0
"""Seconds between two questions while there are jobs and nothing happens."""

LEAST = 1.0
"""Seconds between two questions at least, whatever happens."""

SOON = (0.2, 2.0, 6.0)
"""Seconds after something has happened at which it is asked: Slurm takes a moment to start and to end a job."""


class QueueWatch:
    """Calls `look`, which asks once, from when there is something to ask about: `wanted` says whether there is."""

    def __init__(
        self, look: Callable[[], Awaitable[None]], wanted: Callable[[], bool], *, soon: tuple[float, ...] = SOON
    ) -> None:
        self._look = look
        self._wanted = wanted
        self._soon = soon
        self._due: list[float] = []
        self._bell = asyncio.Event()

    def soon(self) -> None:
        """Something has happened: a job was submitted, or its tunnel client came or went."""
        now = asyncio.get_running_loop().time()
        self._due = [now + seconds for seconds in self._soon]
        self._bell.set()

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        last = loop.time() - LEAST
        while True:
            self._bell.clear()
            due = min([*self._due[:1], last + EVERY]) if self._wanted() else None
            wait = None if due is None else max(due, last + LEAST) - loop.time()
            if wait is None or wait > 0:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._bell.wait(), wait)
                continue
            last = loop.time()
            self._due = [each for each in self._due if each > last]
            try:
                await self._look()
            except Exception:  # what can't be asked now is asked again
                log.exception("Slurm could not be asked how its jobs are")
