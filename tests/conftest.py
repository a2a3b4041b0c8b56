"""What all tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from kohakuriver import loops

T = TypeVar("T")


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Run a coroutine on a new loop of the kind that KOHAKURIVER_LOOP names.

    An exception that only the loop saw, in a callback or a task that nobody waits for, fails the test too.
    """
    return lambda main: loops.run(_watched(main))


async def _watched(main: Coroutine[Any, Any, T]) -> T:
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
    result = await main
    for context in unseen:
        raise AssertionError(f"the loop saw: {context}") from context.get("exception")
    return result
