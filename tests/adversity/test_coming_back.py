"""Who waits where something is about to come back: sessions that go on, and what is opened in those that stay."""

from __future__ import annotations

import asyncio
import contextlib
import math
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest

from kohakuriver.errors import UnavailableError
from kohakuriver.host.services import tunnel_proxy
from kohakuriver.relay import hub
from kohakuriver.session.carried import Route
from kohakuriver.session.nodes import NodeOfflineError
from kohakuriver.tunnel.ports import GOES_ON
from kohakuriver.tunnel.protocol import (
    CLOSE,
    CONNECT,
    DATA,
    ERROR,
    MARK,
    PROTO_TCP,
    PROTO_TERMINAL,
    PROTO_UDP,
    CloseCode,
    ErrorText,
    Opening,
    pack_limit,
)
from kohakuriver.tunnel.terminal import Start
from tests.support.hops import CONTAINER, Chain, chain, kill, until
from tests.unit.test_relay_kept import OPEN, Peer, opened, session, tunnel

Run = Callable[[Coroutine[Any, Any, None]], None]
AGAIN = f"?{GOES_ON}"
either = pytest.mark.parametrize("query", [pytest.param("", id="new"), pytest.param(AGAIN, id="goes on")])


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


@either
def test_a_session_waits_for_the_tunnel_that_was_lost(run: Run, query: str) -> None:
    async def check() -> None:
        async with chain() as hops:
            await lost(hops)
            waiting = [asyncio.ensure_future(hops.user(query=query)) for _ in range(3)]
            await until(lambda: len(hops.server.hub._returning._events.get(CONTAINER, ())) == 3)
            await hops.tunnel("python")
            await asyncio.gather(*waiting)
            assert not hops.server.hub._returning.watched()

    run(check())


@either
def test_a_session_waits_for_a_tunnel_that_was_there_before_the_runner_began(run: Run, query: str) -> None:
    async def check() -> None:
        async with chain() as hops:
            hops.server.hub._expected = lambda container: container == CONTAINER
            waiting = asyncio.ensure_future(hops.user(query=query))
            await until(lambda: bool(hops.server.hub._returning.watched()))
            await hops.tunnel("python")
            await waiting

    run(check())


def test_a_new_session_that_finds_nobody_at_its_runner_is_looked_up_once_more(run: Run) -> None:
    """The runner may have gone in between, to be started again."""

    async def check() -> None:
        async with chain() as hops:
            await hops.tunnel("python")
            ports = iter((1, hops.runner_port))
            hops.runner_seen_by_host = lambda: next(ports)
            await hops.user()
            with pytest.raises(StopIteration):
                next(ports)

    run(check())


def test_a_new_session_to_a_task_that_moves_is_tried_until_the_task_is_elsewhere(run: Run) -> None:
    """As an agent is when its host ends: it dials the next one."""

    async def check() -> None:
        async with chain() as hops:
            await hops.tunnel("python")
            authorize, looks = hops.proxy.authorize, 0

            async def moving(*asked: Any) -> Route:
                nonlocal looks
                looks += 1
                route = await authorize(*asked)
                return replace(
                    route, moves=True, runner_ws_url=route.runner_ws_url if looks > 3 else "ws://127.0.0.1:1"
                )

            hops.proxy.authorize = moving
            await hops.user()
            assert looks == 4

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


# What is opened in a session that stays. The runner is the one that waits, so what it is told is said byte by byte.

LONG = 60.0
_TERMINAL = Opening(65_536, bytes(16), 3600, mark=bytes(MARK), start=Start(["ls"]).to_bytes()).pack()
kinds = pytest.mark.parametrize(
    ("proto", "port", "payload"),
    [
        pytest.param(PROTO_TCP, "80", OPEN, id="kept"),
        pytest.param(PROTO_TCP, "80", pack_limit(65_536), id="not kept"),
        pytest.param(PROTO_UDP, "80", Opening(0, bytes(16), 3600).pack(), id="udp"),
        pytest.param(PROTO_TERMINAL, "terminal", _TERMINAL, id="terminal"),
    ],
)


async def connect(peer: Peer, stream: int, payload: bytes = OPEN, proto: int = PROTO_TCP) -> None:
    await peer.socket.send(struct.pack(">BBIH", CONNECT, proto, stream, 0) + payload)


def held(hops: Chain) -> list[bool]:
    """Of each session whether it waits for its tunnel."""
    return [each._held is not None for each in hops.server.hub.sessions]


async def refusal(peer: Peer, stream: int) -> str:
    """The code of the ERROR that comes for a stream."""
    got = await peer.hear()
    assert (got.kind, got.stream) == (ERROR, stream)
    return ErrorText.parse(got.payload).code


@contextlib.asynccontextmanager
async def without_tunnel(hops: Chain, port: str = "80") -> AsyncIterator[Peer]:
    """A session that has stayed though its tunnel has gone."""
    async with tunnel(hops) as container, session(hops, port=port) as user:
        container.socket.transport.abort()
        await hops.changed(CONTAINER, False)
        yield user


@kinds
def test_what_is_opened_while_the_tunnel_is_away_is_opened_once_it_is_back(
    run: Run, monkeypatch: pytest.MonkeyPatch, proto: int, port: str, payload: bytes
) -> None:
    monkeypatch.setattr(hub, "BACK_WITHIN", LONG)

    async def check() -> None:
        async with chain() as hops, without_tunnel(hops, port) as user:
            await connect(user, 1, payload, proto)
            await user.say(DATA, 1, b"early")
            await until(lambda: held(hops) == [True])
            async with tunnel(hops) as container:
                got = await container.hear()
                assert got.kind == CONNECT
                assert await container.hear() == (DATA, got.stream, b"early", 0)
                await container.say(DATA, got.stream, b"answer")
                assert await user.hear() == (DATA, 1, b"answer", 0)

    run(check())


@kinds
def test_what_is_opened_without_a_tunnel_is_refused_once_that_has_been_away_for_too_long(
    run: Run, monkeypatch: pytest.MonkeyPatch, proto: int, port: str, payload: bytes
) -> None:
    monkeypatch.setattr(hub, "BACK_WITHIN", 0.2)

    async def check() -> None:
        async with chain() as hops, without_tunnel(hops, port) as user:
            for stream in (1, 2):  # the second one waits for nothing
                await connect(user, stream, payload, proto)
                assert await refusal(user, stream) == "ENOTCONN"
                assert hops.server.hub.expected_within(CONTAINER) == 0.0
                assert held(hops) == [False]

    run(check())


@kinds
def test_what_waits_for_a_tunnel_is_told_at_once_that_its_task_has_ended(
    run: Run, monkeypatch: pytest.MonkeyPatch, proto: int, port: str, payload: bytes
) -> None:
    monkeypatch.setattr(hub, "BACK_WITHIN", LONG)

    async def check() -> None:
        async with chain() as hops, without_tunnel(hops, port) as user:
            await connect(user, 1, payload, proto)
            await until(lambda: held(hops) == [True])
            hops.server.hub.drop(CONTAINER, "it was stopped")
            assert await refusal(user, 1) == "ENOTCONN"
            await connect(user, 2, payload, proto)
            assert await refusal(user, 2) == "ENOTCONN"

    run(check())


def test_thousands_that_wait_for_a_tunnel_are_held_by_those_who_sent_them_and_opened_in_their_order(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BACK_WITHIN", LONG)

    async def check() -> None:
        async with chain() as hops, without_tunnel(hops) as user:
            for stream in range(1, 5001):
                await connect(user, stream, pack_limit(stream))
                await user.say(CLOSE, stream)  # who gives up meanwhile
            await until(lambda: held(hops) == [True])
            (leg,) = hops.server.hub.sessions
            assert not leg.table.items()
            async with tunnel(hops) as container:
                for stream in range(1, 5001):
                    got = await container.hear()
                    assert got[::2] == (CONNECT, pack_limit(stream))
                    assert (await container.hear())[:2] == (CLOSE, got.stream)
            assert not leg.table.items()

    run(check())


def test_a_session_that_is_sent_back_is_gone_at_once_though_it_waits_for_its_tunnel(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BACK_WITHIN", LONG)
    monkeypatch.setattr("kohakuriver.tunnel.link.CLOSE_WAIT", LONG)

    async def check() -> None:
        async with chain() as hops, tunnel(hops) as container, session(hops) as user:
            await opened(user, container)
            container.socket.transport.abort()
            await hops.changed(CONTAINER, False)
            await connect(user, 2, OPEN[::-1])
            await user.socket.wait_closed()
            assert user.socket.close_code == CloseCode.SERVICE_RESTART
            await until(lambda: not hops.server.hub.sessions)
            async with tunnel(hops) as back, session(hops) as again:  # and nothing of it is left to be opened
                await connect(again, 1, pack_limit(1))
                assert (await back.hear())[::2] == (CONNECT, pack_limit(1))

    run(check())


def test_a_session_of_version_1_is_told_at_once_that_there_is_no_tunnel(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BACK_WITHIN", LONG)

    async def check() -> None:
        async with chain() as hops:
            client = await hops.tunnel("python")
            user = await hops.user(version=1)
            await kill(client)
            await hops.changed(CONTAINER, False)
            local = await user.listen_tcp("127.0.0.1", 0, 80)
            reader, writer = await asyncio.open_connection("127.0.0.1", local.port)
            with pytest.raises(ConnectionResetError):
                await reader.read()
            writer.close()
            assert "the task's tunnel is not connected" in (await hops.errors.get())[1]

    run(check())
