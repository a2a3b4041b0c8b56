"""Which event loop runs, and how it ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from kohakuriver import runtime as loops
from kohakuriver.errors import UsageError


async def current() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_the_stock_loop_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKURIVER_LOOP", "asyncio")
    assert loops.run(current()) == "asyncio"


def test_without_uvloop_the_stock_loop_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KOHAKURIVER_LOOP", raising=False)
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loops.run(current()) == "asyncio"


def test_asking_for_uvloop_where_it_is_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKURIVER_LOOP", "uvloop")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with pytest.raises(UsageError, match="not installed"):
        loops.run(current())


def test_an_unknown_loop_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKURIVER_LOOP", "twisted")
    with pytest.raises(UsageError, match="twisted"):
        loops.loop_name()


def test_what_is_left_running_is_cancelled_and_may_clean_up() -> None:
    ended: list[str] = []

    async def left_behind() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    async def main() -> None:
        task = asyncio.ensure_future(left_behind())
        await asyncio.sleep(0)
        assert not task.done()

    loops.run(main())
    assert ended == ["cleaned up"]


def test_an_error_of_the_main_coroutine_is_raised() -> None:
    async def main() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        loops.run(main())


def test_a_cancellation_that_comes_together_with_an_event_is_not_lost() -> None:
    event = asyncio.Event()

    async def serve_for_ever() -> None:
        while True:
            event.clear()
            await asyncio.wait_for(event.wait(), 1000)

    async def main() -> None:
        task = asyncio.ensure_future(serve_for_ever())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        event.set()
        await asyncio.sleep(0)  # the event's waiter has its result, and wait_for has not been told
        await asyncio.wait_for(loops.cancel_all([task]), 20)
        assert task.cancelled()

    loops.run(main())


def test_a_full_collection_passes_by_what_was_there_at_the_start_and_frees_what_came_later() -> None:
    code = """
import gc, weakref
from kohakuriver.runtime import freeze_heap

class Node:
    pass

before = len(gc.get_objects())
freeze_heap()
assert len(gc.get_objects()) < before / 10
node = Node()
node.itself = node
seen = weakref.ref(node)
del node
gc.collect()
assert seen() is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
