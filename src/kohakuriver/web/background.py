"""What a program does beside serving, and that nobody waits for: no failure of it goes unseen.

asyncio tells of an exception that ended a task when the task is forgotten. One that the program keeps is never
forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

__all__ = ["in_background"]

T = TypeVar("T")

log = structlog.get_logger("kohakuriver")


def in_background(
    work: Coroutine[Any, Any, T], what: str, *, failed: Callable[[], None] = lambda: None
) -> asyncio.Task[T]:
    """Run `work` as a task. An exception that ends it is logged, with `what` it was; then `failed` is called."""

    def ended(task: asyncio.Task[T]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work in the background failed", what=what, exc_info=error)
            failed()

    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(ended)
    return task
