"""The host's forward sessions: what begins while something else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from kohakuriver.host.services.tunnel_proxy import AWAY_AT_ONCE
from kohakuriver.runtime import cancel_all
from kohakuriver.session.carried import Route
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from tests.support.hops import CLIENTS, chain, until

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_a_session_that_is_being_opened_when_its_host_begins_to_drain_is_sent_away_too(run: Run) -> None:
    async def main() -> None:
        async with chain() as hops:
            await hops.tunnel(CLIENTS[0])
            authorize = hops.proxy.authorize
            asked, drains = asyncio.Event(), asyncio.Event()

            async def slowly(*arguments: Any) -> Route:
                asked.set()
                await drains.wait()
                return await authorize(*arguments)

            hops.proxy.authorize = slowly
            going: asyncio.Queue[str] = asyncio.Queue()
            endpoint = UserEndpoint(on_going_away=going.put_nowait)
            hops.stack.push_async_callback(endpoint.close)
            opening = asyncio.ensure_future(hops.attach(endpoint))
            await asked.wait()
            await hops.proxy.drain(20)  # nobody is there yet: it is done at once
            drains.set()
            await opening
            assert await asyncio.wait_for(going.get(), 20) == "the host is going"

    run(main())


class Away:
    """A session that is only told to go elsewhere."""

    def __init__(self, told: list[Away]) -> None:
        self._told = told

    def send_away(self, seconds: int) -> None:
        self._told.append(self)


def test_many_sessions_are_sent_away_one_after_the_other_and_all_in_time(run: Run) -> None:
    """Else the next host would get all of them at once."""

    async def main() -> None:
        async with chain() as hops:
            told: list[Away] = []
            sessions: dict[Any, Any] = {Away(told): None for _ in range(5 * AWAY_AT_ONCE)}
            hops.proxy.carrier.open.update(sessions)
            draining = asyncio.ensure_future(hops.proxy.drain(20))
            await asyncio.sleep(0)
            assert len(told) == AWAY_AT_ONCE
            await until(lambda: len(told) == len(sessions))
            assert told == list(sessions)
            hops.proxy.carrier.open.clear()
            await cancel_all([draining])

    run(main())
