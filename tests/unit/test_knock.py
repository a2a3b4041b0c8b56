"""Whether the machine at an address answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kohakuriver.host.services import tasks
from kohakuriver.runner.services.knock import KNOCK_SECONDS, knock

Run = Callable[[Coroutine[Any, Any, None]], None]


@contextmanager
def a_silent_port() -> Iterator[int]:
    """A port that lets nobody in any more: its queue is full, and the kernel throws what comes then away."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port: int = full.getsockname()[1]
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield port


def test_a_machine_that_refuses_has_answered_and_one_that_is_silent_is_given_up_on(run: Run) -> None:
    async def check() -> None:
        with socket.socket() as unheard, a_silent_port() as silent:
            unheard.bind(("127.0.0.1", 0))
            refused = unheard.getsockname()[1]
            assert await knock("127.0.0.1", (refused,)) is None
            assert await knock("127.0.0.1", (silent, refused)) is None
            told = await asyncio.wait_for(knock("127.0.0.1", (silent,), seconds=0.2), 20)
            assert told == f"no answer on TCP ports {silent} within 0.2 s"

    run(check())


def test_a_host_waits_for_longer_than_a_node_knocks() -> None:
    assert tasks._LOOK_SECONDS > KNOCK_SECONDS
