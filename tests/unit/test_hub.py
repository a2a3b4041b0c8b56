"""Which of several tunnel clients of one container a runner keeps."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Subprotocol

from kohakuriver.errors import NotAllowedError
from kohakuriver.limits import Limits
from kohakuriver.relay.admission import Admission, ConnectRates
from kohakuriver.relay.hub import QUARREL_TIMES, Hub
from kohakuriver.relay.legs import SessionLeg, TunnelLeg
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import (
    CLIENT_HEADER,
    CONNECT,
    ERROR,
    PING,
    PONG,
    PROTO_TCP,
    TUNNEL_V2,
    pack_limit,
    pack_seconds,
)
from tests.support.hops import CONTAINER, Chain, chain, until
from tests.support.peers.fake_transport import Wire

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
            monkeypatch.setattr("kohakuriver.relay.hub.QUARREL_OVER_SECONDS", 0.0)
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


def dial(hops: Chain, client: str | None) -> connect:
    """A tunnel client with the container's token; `client` is the id that it made for itself."""
    headers = {"Authorization": f"Bearer token of {CONTAINER}"}
    headers |= {CLIENT_HEADER: client} if client else {}
    url = f"ws://127.0.0.1:{hops.runner_port}/ws/tunnel/{CONTAINER}"
    return connect(url, subprotocols=[Subprotocol(TUNNEL_V2)], additional_headers=headers)


async def answering(client: ClientConnection) -> None:
    """Answer every PING of the session, as a tunnel client does."""
    async for message in client:
        assert isinstance(message, bytes)
        if message[0] == PING:
            await client.send(bytes([PONG]) + message[1:])


def test_a_second_client_is_refused_while_the_first_answers_and_the_task_says_from_where_it_came(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, dial(hops, "first") as first:
            answers = asyncio.ensure_future(answering(first))
            before = hops.server.hub.tunnel_of(CONTAINER)
            for client in ("second", None):
                with pytest.raises(InvalidStatus) as refused:
                    async with dial(hops, client):
                        pass
                assert refused.value.response.status_code == 409
            assert hops.server.hub.tunnel_of(CONTAINER) is before
            assert hops.troubles[0][0] == CONTAINER
            assert "a second tunnel client came from 127.0.0.1 while the first answers" in hops.troubles[0][1]
            answers.cancel()

    run(check())


def test_a_second_client_takes_over_from_one_that_is_silent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kohakuriver.relay.legs.ANSWER_SECONDS", 0.05)

    async def check() -> None:
        async with chain() as hops, dial(hops, "first"), dial(hops, "second"):
            tunnel = hops.server.hub.tunnel_of(CONTAINER)
            assert tunnel is not None
            assert tunnel.client == "second"
            assert not hops.troubles

    run(check())


def test_a_client_whose_token_becomes_worthless_while_the_one_before_it_is_asked_is_not_taken_in(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohakuriver.relay.legs.ANSWER_SECONDS", 1.0)

    async def check() -> None:
        async with chain() as hops, dial(hops, "first") as first:
            before = hops.server.hub.tunnel_of(CONTAINER)
            second = asyncio.ensure_future(dial(hops, "second").__aenter__())
            assert (await first.recv())[0] == PING  # from here on the second waits for its answer

            async def worthless(container: str, token: str, client: str, peer: Any) -> str:
                raise NotAllowedError("the token is not that of any container")

            hops.server._check_tunnel = worthless
            with pytest.raises(InvalidStatus) as refused:
                await second
            assert refused.value.response.status_code == 403
            assert hops.server.hub.tunnel_of(CONTAINER) is before

    run(check())


def test_the_same_client_takes_over_from_itself_at_once_as_often_as_its_link_dies(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops, contextlib.AsyncExitStack() as stack:
            for _ in range(2 * QUARREL_TIMES):  # none of the links before answers; no time passes
                await asyncio.wait_for(stack.enter_async_context(dial(hops, "one")), 4.0)
            assert not hops.troubles

    run(check())


def test_a_client_without_a_token_takes_nothing_from_one_with_a_token_and_gives_way_to_it(run: Run) -> None:
    async def check() -> None:
        async with chain() as hops:
            bare = connect(f"ws://127.0.0.1:{hops.runner_port}/ws/tunnel/{CONTAINER}")
            async with bare, dial(hops, "first") as first:
                tunnel = hops.server.hub.tunnel_of(CONTAINER)
                assert tunnel is not None
                assert tunnel.client == "first"
                answers = asyncio.ensure_future(answering(first))
                async with connect(f"ws://127.0.0.1:{hops.runner_port}/ws/tunnel/{CONTAINER}") as refused:
                    assert str(await refused.recv()).startswith("Error: another tunnel client")
                assert hops.server.hub.tunnel_of(CONTAINER) is tunnel
                answers.cancel()

    run(check())


def connected(leg: TunnelLeg | SessionLeg) -> Wire:
    wire = Wire(masked=False)
    leg.link = Link(leg, leg.walker, masks=False)
    leg.link.start(wire)
    return wire


def a_session(hub: Hub) -> tuple[SessionLeg, Wire]:
    admission = Admission(Limits(), ConnectRates(0), None, None)
    session = SessionLeg(hub, CONTAINER, 1 << 24, port=0, proto=0, admission=admission, newest=2, mark=bytes(16))
    hub.sessions[session] = None
    return session, connected(session)


def test_a_tunnel_that_goes_with_as_many_streams_as_users_may_have_keeps_nobody_waiting(run: Run) -> None:
    async def check() -> None:
        hub = Hub()
        tunnel = TunnelLeg(hub, CONTAINER, 1 << 24)
        connected(tunnel)
        hub.tunnel_opened(tunnel)
        for _ in range(500):  # whoever has no stream costs nothing either
            a_session(hub)
        streams, limit, hold = Limits().max_streams, pack_limit(1 << 20), pack_seconds(60)
        (kept, _), (other, heard) = a_session(hub), a_session(hub)
        for stream in range(1, streams + 1):
            kept.message(CONNECT, PROTO_TCP, stream, 80, limit + stream.to_bytes(16, "big") + hold + b"\0")
            other.message(CONNECT, PROTO_TCP, stream, 80, limit)
        heard.writes.clear()
        before = time.process_time()
        hub.tunnel_closed(tunnel, "its client is gone")
        took = time.process_time() - before
        ((first, *_),) = heard.kinds()  # one write for all
        assert first == ERROR
        assert len(kept.table) == len(other.table) == len(tunnel.table) == 0
        assert took < 2  # seconds of the processor that all others wait for: a step for each pair takes ten

    run(check())
