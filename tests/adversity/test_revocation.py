"""A session whose right to go on ends in the middle of everything: it ends whole, at once, and alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from kohakuriver.session.carried import Route
from tests.support.hops import CLIENTS, Chain, chain, dial, echo, service, until

Run = Callable[[Coroutine[Any, Any, None]], None]


class Grant:
    """A right that the test takes away."""

    def __init__(self) -> None:
        self.end: Callable[[str], None] = lambda reason: None
        self.released = 0
        self.how: dict[str, object] = {}

    def opened(self, **about: object) -> None:
        pass

    def counted(self, passed: Callable[[], tuple[int, int]]) -> None:
        pass

    def need_room(self) -> None:
        pass

    def ran(self, command: list[str]) -> None:
        pass

    def stays(self) -> None:
        pass

    def attach(self, end: Callable[[str], None]) -> None:
        self.end = end

    def closed(self, **how: object) -> None:
        self.released += 1
        self.how = how

    def release(self) -> None:
        self.released += 1


def granting(hops: Chain) -> list[Grant]:
    """The grants of the sessions that are opened from now on."""
    grants: list[Grant] = []
    authorize = hops.proxy.authorize

    async def with_grant(
        token: str | None, task: str, port: int | None, proto: str, ports: frozenset[int] | None
    ) -> Route:
        grants.append(Grant())
        return replace(await authorize(token, task, port, proto, ports), grant=grants[-1])

    hops.proxy.authorize = with_grant
    return grants


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_session_that_loses_its_right_under_full_load_ends_on_every_hop_and_no_other_does(
    run: Run, kind: str
) -> None:
    ended = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal ended

        async def send() -> None:
            while True:
                writer.write(b"d" * 65536)
                await writer.drain()

        async def take() -> None:
            while await reader.read(1 << 16):
                pass

        with contextlib.suppress(ConnectionError):
            await asyncio.gather(send(), take())
        ended += 1
        writer.close()

    async def main() -> None:
        async with chain() as hops, service(flood) as port, service(echo) as echoing:
            await hops.tunnel(kind)
            grants = granting(hops)
            user, other = await hops.user(), await hops.user()
            local = (await user.listen_tcp("127.0.0.1", 0, port)).port
            beside = (await other.listen_tcp("127.0.0.1", 0, echoing)).port
            async with dial(beside) as (echo_reader, echo_writer), dial(local) as (reader, writer):
                uploading = asyncio.ensure_future(upload(writer))
                await reader.readexactly(4 << 20)
                grants[0].end("the token of this session was revoked")
                with contextlib.suppress(ConnectionError):
                    while await reader.read(1 << 16):
                        pass
                await hops.detached.get()
                await asyncio.wait([uploading])
                await until(lambda: ended == 1 and len(hops.proxy.sessions) == len(hops.server.hub.sessions) == 1)
                echo_writer.write(b"still here")
                assert await echo_reader.readexactly(10) == b"still here"
            assert [grant.released for grant in grants] == [1, 0]
            assert (grants[0].how["ended_by"], grants[0].how["code"]) == ("host", 1008)
            await hops.at_rest()

    async def upload(writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"u" * 65536)
                await writer.drain()

    run(main())


def test_a_session_that_is_refused_at_the_runner_holds_no_right(run: Run) -> None:
    async def main() -> None:
        async with chain() as hops:
            grants = granting(hops)
            with pytest.raises(Exception, match="not connected"):
                await hops.user()
            assert [grant.released for grant in grants] == [1]

    run(main())
