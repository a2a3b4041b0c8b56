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


def test_a_thread_that_computes_lets_the_loop_go_on_soon() -> None:
    async def check() -> float:
        return sys.getswitchinterval()

    assert loops.run(check()) == pytest.approx(0.0005)


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
import asyncio, gc, weakref
from kohakuriver.runtime import Collector, freeze_heap

class Node:
    pass

async def main():
    before = len(gc.get_objects())
    freeze_heap()
    assert len(gc.get_objects()) < before / 10
    seen = made()
    gc.collect()
    assert seen() is None

def made():
    node = Node()
    node.itself = node
    return weakref.ref(node)

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_objects_of_many_that_wait_are_not_looked_at_until_they_are_few_or_it_is_time() -> None:
    code = """
import asyncio, gc, weakref
from kohakuriver.runtime import Collector, freeze_heap

full = []
now = 0.0

class Node:
    pass

def old_ring():
    node = Node()
    node.itself = node
    gc.collect(1)
    return weakref.ref(node)

async def main():
    global now
    freeze_heap()
    gc.callbacks.append(lambda phase, info: phase == "stop" and info["generation"] == 2 and full.append(info))
    collector = Collector(lambda: now)
    waiting = [[i] for i in range(400_000)]
    lost = old_ring()
    collector.look()
    assert not full
    assert lost() is not None
    now += Collector.LONG_SECONDS
    collector.look()
    assert len(full) == 1
    assert lost() is None
    del waiting
    collector.look()
    few = [old_ring() for _ in range(Collector.WORTHWHILE)]
    assert len(full) == 1
    assert all(each() for each in few)
    collector.look()
    assert len(full) == 2
    assert not any(each() for each in few)

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
