"""A session that goes on waits where something is about to come back, and only such a session does."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from kohakuriver.errors import UnavailableError
from kohakuriver.host.services import tunnel_proxy
from kohakuriver.runner.services import hub
from kohakuriver.session.carried import Route
from kohakuriver.session.nodes import NodeOfflineError
from kohakuriver.tunnel.ports import GOES_ON
from tests.support.hops import CONTAINER, Chain, chain, kill, until

Run = Callable[[Coroutine[Any, Any, None]], None]
AGAIN = f"?{GOES_ON}"


class Returns:
    """Tells whoever waits for a node that it is back."""

    def __init__(self, hops: Chain) -> None:
        self.waiting: list[asyncio.Event] = []
        hops.proxy._coming_back = self._waiting

    @contextlib.contextmanager
    def _waiting(self, _node: str) -> Iterator[asyncio.Event]:
        back = asyncio.Event()
        self.waiting.append(back)
        try:
            yield back
        finally:
            self.waiting.remove(back)


class Offline:
    """A node that is away for so many of the times that the host looks, as one that has said that it leaves."""

    def __init__(self, hops: Chain, looks: float) -> None:
        self.looks = looks
        self._authorize = hops.proxy.authorize
        hops.proxy.authorize = self._look

    async def _look(self, *asked: Any) -> Route:
        self.looks -= 1
        if self.looks >= 0:
            raise NodeOfflineError("Task web is unknown; it is back when its node is.", "node")
        return await self._authorize(*asked)


async def lost(hops: Chain) -> None:
    """A tunnel that was there, and is no more."""
    await kill(await hops.tunnel("python"))
    await hops.changed(CONTAINER, False)


def test_a_session_that_goes_on_waits_for_the_tunnel_that_was_lost(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops:
            await lost(hops)
            with pytest.raises(UnavailableError, match="not connected"):
                await hops.user()
            waiting = [asyncio.ensure_future(hops.user(query=AGAIN)) for _ in range(3)]
            await until(lambda: len(hops.server.hub._returning._events.get(CONTAINER, ())) == 3)
            await hops.tunnel("python")
            await asyncio.gather(*waiting)
            assert not hops.server.hub._returning.watched()

    run(check())


def test_a_session_that_goes_on_waits_for_a_tunnel_that_was_there_before_the_runner_began(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops:
            hops.server.hub._expected = lambda container: container == CONTAINER
            waiting = asyncio.ensure_future(hops.user(query=AGAIN))
            await until(lambda: bool(hops.server.hub._returning.watched()))
            await hops.tunnel("python")
            await waiting

    run(check())


def test_a_tunnel_that_does_not_come_back_is_told_after_a_while(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BACK_WITHIN", 0.05)

    async def check() -> None:
        async with chain() as hops:
            await lost(hops)
            with pytest.raises(UnavailableError, match="not connected"):
                await hops.user(query=AGAIN)
            assert not hops.server.hub._returning.watched()

    run(check())


def test_a_task_that_ends_lets_nobody_wait_for_its_tunnel(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops:
            await lost(hops)
            waiting = asyncio.ensure_future(hops.user(query=AGAIN))
            await until(lambda: bool(hops.server.hub._returning.watched()))
            hops.server.hub.drop(CONTAINER, "it was stopped")
            with pytest.raises(UnavailableError):
                await waiting
            with pytest.raises(UnavailableError):
                await hops.user(query=AGAIN)

    run(check())


def test_a_session_that_goes_on_waits_for_its_runner_to_register_again(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops:
            await hops.tunnel("python")
            returns, port = Returns(hops), 1
            hops.runner_seen_by_host = lambda: port
            with pytest.raises(UnavailableError):
                await hops.user()
            waiting = [asyncio.ensure_future(hops.user(query=AGAIN)) for _ in range(3)]
            await until(lambda: len(returns.waiting) == 3)
            port = hops.runner_port
            for back in returns.waiting:
                back.set()
            await asyncio.gather(*waiting)
            assert not returns.waiting

    run(check())


def test_a_runner_that_does_not_come_back_is_told_after_a_while(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel_proxy, "BACK_WITHIN", 0.05)

    async def check() -> None:
        async with chain() as hops:
            hops.runner_seen_by_host = lambda: 1
            with pytest.raises(UnavailableError, match="can't reach node"):
                await hops.user(query=AGAIN)

    run(check())


def test_a_session_that_goes_on_waits_for_a_node_that_has_said_that_it_leaves(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops:
            await hops.tunnel("python")
            returns, offline = Returns(hops), Offline(hops, math.inf)
            with pytest.raises(UnavailableError, match="is back when its node is"):
                await hops.user()
            waiting = [asyncio.ensure_future(hops.user(query=AGAIN)) for _ in range(3)]
            await until(lambda: len(returns.waiting) == 3)
            offline.looks = 0
            for back in returns.waiting:
                back.set()
            await asyncio.gather(*waiting)
            assert not returns.waiting

    run(check())


def test_a_node_that_registers_while_it_is_looked_up_is_not_waited_for(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops:
            await hops.tunnel("python")
            returns, offline = Returns(hops), Offline(hops, 1)
            await hops.user(query=AGAIN)
            assert not returns.waiting
            assert offline.looks == -1

    run(check())


def test_a_node_that_stays_away_is_told_after_a_while(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel_proxy, "BACK_WITHIN", 0.05)

    async def check() -> None:
        async with chain() as hops:
            returns, _ = Returns(hops), Offline(hops, math.inf)
            with pytest.raises(UnavailableError, match="is back when its node is"):
                await hops.user(query=AGAIN)
            assert not returns.waiting

    run(check())
