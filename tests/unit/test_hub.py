"""Which of several tunnel clients of one container a runner keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from kohakuriver.runner.services.hub import QUARREL_TIMES
from kohakuriver.tunnel.protocol import TUNNEL_V2
from tests.support.hops import CONTAINER, chain, until

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_of_two_tunnel_clients_that_replace_each_other_the_connected_one_stays_and_the_task_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with chain() as hops, contextlib.AsyncExitStack() as stack:
            url = f"ws://127.0.0.1:{hops.runner_port}/ws/tunnel/{CONTAINER}"

            def dial() -> connect:
                return connect(url, subprotocols=[Subprotocol(TUNNEL_V2)])

            for _ in range(1 + QUARREL_TIMES):  # a client whose link died unseen comes again, and is let in
                await stack.enter_async_context(dial())
            winner = hops.server.hub.tunnel_of(CONTAINER)
            assert winner is not None
            assert not hops.troubles
            with pytest.raises(InvalidStatus) as refused:
                async with dial():
                    pass
            assert refused.value.response.status_code == 409
            assert hops.server.hub.tunnel_of(CONTAINER) is winner
            assert not winner.link.closing.state
            ((container, sentence),) = hops.troubles
            assert container == CONTAINER
            assert "end one of them" in sentence
            monkeypatch.setattr("kohakuriver.runner.services.hub.QUARREL_OVER_SECONDS", 0.0)
            with pytest.raises(InvalidStatus):
                async with dial():
                    pass
            await until(lambda: hops.troubles[-1] == (CONTAINER, ""))  # the other has not come again: all is well

            winner.link.abort()  # it is gone: whoever comes now is welcome
            while hops.server.hub.tunnel_of(CONTAINER) is not None:
                await hops.changes.get()
            async with dial():
                assert hops.server.hub.tunnel_of(CONTAINER) is not None

    run(check())
