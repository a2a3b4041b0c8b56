"""The host's forward sessions: what begins while something else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from kohakuriver.session.carried import Route
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from tests.support.hops import CLIENTS, chain

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
