"""Streams of the static tunnel client outlive links that are cut anywhere: Python's user ends, real sockets."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from kohakuriver import runtime as loops
from kohakuriver.tunnel.local_socket import TcpStream
from tests.support.peers.fake_transport import FakeTransport
from tests.support.peers.static_container import StaticWorld, static_world

BULK = 2 << 20


@dataclass
class Story:
    """One connection: what its application has written and read. The service echoes."""

    data: bytes
    transport: FakeTransport
    written: int = 0
    received: bytearray = field(default_factory=bytearray)

    def goes_on(self, dice: random.Random) -> None:
        size = dice.choice((10, 1000, 30_000))
        if self.written < len(self.data):
            self.written += self.transport.feed(self.data[self.written : self.written + size])
            if self.written == len(self.data):
                self.transport.feed_eof()
        self.received += self.transport.take(1 << 20)
        assert self.received == self.data[: len(self.received)]

    @property
    def over(self) -> bool:
        return self.transport.ended or self.transport.closing


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


def fault(world: StaticWorld, dice: random.Random) -> None:
    """Something breaks, and comes back: a user's link, one that the runner has not missed yet, or the tunnel."""
    kind = dice.random()
    if kind < 0.2:
        world.cut_tunnel()
        world.connect_tunnel()
    elif kind < 0.6:
        world.user_notices(dice.randrange(2))
    elif world.sessions:
        session = dice.choice(world.sessions)
        if session in world.current:
            world.user_notices(world.current.index(session))
        world.runner_notices(session)
    for user in range(2):
        world.connect(user)


def opened(world: StaticWorld, port: int, dice: random.Random) -> Story:
    user = dice.randrange(2)
    story = Story(dice.randbytes(BULK), FakeTransport())
    story.transport.connect(TcpStream(world.users[user], port))
    return story


async def until_over(world: StaticWorld, stories: list[Story], dice: random.Random) -> None:
    while not all(story.over for story in stories):
        for story in stories:
            story.goes_on(dice)
        world.move(dice.choice((1, 100, 10_000, 1 << 20)))
        await asyncio.sleep(0)
        if dice.random() < 0.15:
            fault(world, dice)


async def run(world: StaticWorld, dice: random.Random) -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    world.connect_tunnel()
    for user in range(2):
        world.connect(user)
    stories = [opened(world, port, dice) for _ in range(6)]
    await asyncio.wait_for(until_over(world, stories, dice), 240)
    for story in stories:
        story.goes_on(dice)
        assert len(story.received) == BULK
        assert not story.transport.aborted
    assert not world.errors
    server.close()
    await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(3))
def test_no_byte_is_lost_and_no_stream_ends_while_links_are_cut_anywhere(seed: int) -> None:
    with static_world() as world:
        loops.run(run(world, random.Random(seed)))
        assert world.cuts > 50, world.cuts
