"""Streams that end at their opener while its runner puts them off: the container's end is told all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.tunnel import opener
from kohakuriver.tunnel.kept import Identity, KeptCore, accepted_kept
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import CLOSE, CONNECTED, ERROR, RESUMED, UNKNOWN_TOTAL, Attached, ErrorText, pack_pair
from kohakuriver.tunnel.states import Do, Role
from kohakuriver.tunnel.stream import Rules, Send
from kohakuriver.tunnel.v1_rules import V1Rules
from kohakuriver.tunnel.windows import Budget
from tests.support.peers.fake_transport import FakeTransport
from tests.support.peers.relayed import PORT, Session, World

Run = Callable[[Coroutine[Any, Any, None]], None]

BROKE = ErrorText("ECONNRESET", "the local connection broke").pack()
THERE = Attached(3, 1000, UNKNOWN_TOTAL).pack()


def rules(role: Role) -> Rules:
    return Rules(role, Budget(), V1Rules(hold=1000, linger=2.0))


def resuming(*, opened: bool = True) -> KeptCore:
    """An opener's stream that has sent 3 bytes, and has asked to go on over another link."""
    core = KeptCore(rules(Role.OPENER), Identity(bytes(16), 3600))
    core.link(2)
    if opened:
        core.take(CONNECTED, pack_pair(1000, 0))
        core.local_data(b"abc")
    core.detach()
    core.resuming(1)
    return core


@pytest.mark.parametrize(
    ("error", "here", "there"),
    [(None, [], Send(CLOSE)), (BROKE, [Do.RESET_LOCAL], Send(ERROR, BROKE))],
    ids=["closed", "broken"],
)
def test_an_end_without_a_link_is_told_to_the_peer_that_has_resumed(
    error: bytes | None, here: list[Do], there: Send
) -> None:
    core = resuming()
    assert list(core.local_lost(error)) == here
    assert core.leaving
    assert not core.state.gone
    core.detach()
    core.resuming(2)
    assert list(core.take(RESUMED, THERE)) == [there]
    assert core.state.gone


def test_what_is_over_here_keeps_nothing_for_its_peer() -> None:
    core = resuming()
    assert core.size > 0
    core.local_lost()
    assert core.size == 0


def test_of_two_ends_the_first_is_told() -> None:
    core = resuming()
    core.local_lost(BROKE)
    assert not core.local_lost()
    assert list(core.take(RESUMED, THERE)) == [Send(ERROR, BROKE)]


def test_what_is_over_here_is_not_opened_again_where_its_opening_was_lost() -> None:
    assert resuming(opened=False).opens_again(bytes(16))
    core = resuming(opened=False)
    core.local_lost()
    assert not core.opens_again(bytes(16))


def test_a_stream_that_is_opened_once_more_pays_for_one_window() -> None:
    own = rules(Role.OPENER)
    left = own.budget.left
    core = KeptCore(own, Identity(bytes(16), 3600))
    core.link(2)
    assert core.opens_again(bytes(16))
    core.link(2)
    assert own.budget.left == left - own.budget.first
    core.remote_error()
    assert own.budget.left == left


def test_what_is_over_here_ends_with_what_the_peer_says_or_when_no_link_comes() -> None:
    for ends in (KeptCore.remote_error, KeptCore.link_lost):
        core = resuming()
        core.local_lost()
        ends(core)
        assert core.state.gone


def test_with_a_link_and_at_an_acceptor_a_stream_is_over_at_once() -> None:
    core = resuming()
    core.take(RESUMED, THERE)
    assert list(core.local_lost()) == [Send(CLOSE)]
    accepted = accepted_kept(rules(Role.ACCEPTOR), Identity(bytes(16), 3600), 1000)
    accepted.dialled()
    accepted.detach()
    accepted.local_lost()
    assert accepted.state.gone


class PutOff:
    """A connection whose user came back, and whose RESUME the runner puts off."""

    def __init__(self) -> None:
        self.world = World(1)
        self.user, self.service = FakeTransport(), FakeTransport()
        self.session: Session

    async def begin(self) -> TcpStream:
        world = self.world
        world.connect_tunnel()
        world.connect(0)
        stream = TcpStream(world.users[0], PORT)
        self.user.connect(stream)
        await world.settle()
        world.dials[stream_at(world)].set_result(self.service)
        await world.settle()
        before = world.sessions[0]
        world.user_notices(0)
        world.runner_notices(before)
        world.connect(0)
        self.session = world.sessions[0]
        self.session.busy = True
        await world.settle()
        assert world.keeper.held == 1
        return stream

    def again(self, stream: TcpStream) -> None:
        """It is time to try again."""
        kept = self.world.users[0].kept
        assert kept is not None
        kept._again[stream].cancel()
        kept._once_more(stream)

    async def is_over(self) -> None:
        await self.world.settle()
        kept = self.world.users[0].kept
        assert kept is not None
        assert not kept.streams
        assert not self.world.users[0].stream_count
        assert len(self.world.keeper) == 0
        assert self.service.lost
        assert not self.world.routes
        assert not self.world.errors


def stream_at(world: World) -> TcpStream:
    (stream,) = world.dials
    return stream


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "AGAIN_AFTER", 3600.0)


@pytest.mark.parametrize("error", [None, ConnectionResetError(104, "reset")], ids=["closed", "broken"])
def test_a_connection_that_ends_while_it_is_put_off_ends_in_the_container_too(
    run: Run, error: ConnectionResetError | None
) -> None:
    async def main() -> None:
        there = PutOff()
        stream = await there.begin()
        there.user.fail(error)
        await there.world.settle()
        assert not there.service.lost
        there.again(stream)
        await there.world.settle()
        assert not there.service.lost, "it is put off once more"
        there.session.busy = False
        there.again(stream)
        await there.is_over()

    run(main())


def test_a_connection_that_ended_while_it_was_put_off_ends_in_the_container_over_the_next_link(run: Run) -> None:
    async def main() -> None:
        there = PutOff()
        await there.begin()
        there.user.fail(None)
        await there.world.settle()
        there.world.user_notices(0)
        there.world.connect(0)
        await there.is_over()

    run(main())


def test_a_forward_that_ends_takes_connections_along_that_are_put_off(run: Run) -> None:
    async def main() -> None:
        there = PutOff()
        await there.begin()
        ending = asyncio.ensure_future(there.world.users[0].close())
        await asyncio.sleep(0)
        await there.world.settle()
        there.session.wire.fail(None)
        await ending
        await there.is_over()
        assert there.user.lost

    run(main())
