"""Streams that outlive links: two users, a runner that renumbers, a container; links are cut anywhere at any time."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from kohakuriver import runtime as loops
from kohakuriver.tunnel import opener, streams
from kohakuriver.tunnel.kept import KeptCore
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.windows import EARLY_DATA, MAX_WINDOW
from tests.support.peers.fake_transport import FakeTransport
from tests.support.peers.relayed import PORT, Session, World

SIZES = st.one_of(st.integers(1, 40), st.integers(1, 70_000), st.just(300_000))
MOVES = st.one_of(st.integers(1, 100), st.integers(1, 100_000), st.just(1 << 20))


def pattern(number: int, side: str) -> bytes:
    return random.Random(f"{number}{side}").randbytes(1 << 20)


@dataclass
class Side:
    """What the application of one end writes and reads."""

    data: bytes
    transport: FakeTransport | None = None
    written: int = 0
    received: bytearray = field(default_factory=bytearray)
    ended: bool = False

    def write(self, size: int) -> None:
        if self.transport is not None and not self.ended:
            self.written += self.transport.feed(self.data[self.written : self.written + size])

    def end(self) -> None:
        if self.transport is not None and not self.ended:
            self.ended = self.transport.feed_eof()

    def read(self, size: int) -> None:
        if self.transport is not None and not self.transport.aborted:
            self.received += self.transport.take(size)

    @property
    def left(self) -> bool:
        """Whether the application sees that its peer has ended."""
        return self.transport is not None and (self.transport.ended or self.transport.closing)


@dataclass
class Story:
    user: Side
    service: Side
    broken: bool = False  # by one of its applications
    refused: bool = False


class Model(RuleBasedStateMachine):
    """Every byte arrives once, in order, on its own stream, or the stream ends on both sides."""

    stories = Bundle("stories")
    cuts = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = loops.new_event_loop()
        self.unseen: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.unseen.append(context))
        self.all: list[Story] = []
        self.serial = itertools.count()
        self.before = streams.ACK_AFTER, streams.LATE, opener.AGAIN_AFTER
        streams.LATE = opener.AGAIN_AFTER = 0.0

    def do(self, act: Callable[[], object]) -> Any:
        async def main() -> object:
            result = act()
            for _ in range(6):
                await asyncio.sleep(0)
            self.answer_dials()
            return result

        return self.loop.run_until_complete(main())

    @initialize(lazy=st.booleans())
    def begin(self, lazy: bool) -> None:
        streams.ACK_AFTER = 3600.0 if lazy else 0.0

        def act() -> None:
            self.world = World()
            self.waiting: dict[int, Story] = {}
            self.world.connect_tunnel()
            for user in range(2):
                self.world.connect(user)

        self.do(act)

    def answer_dials(self) -> None:
        """Dials are answered in the order in which they came: which story's it is, its first bytes say."""

    @rule(target=stories, user=st.integers(0, 1), refused=st.sampled_from([False] * 7 + [True]))
    def open(self, user: int, refused: bool) -> Story:
        number = next(self.serial)
        story = Story(Side(pattern(number, "up")), Side(pattern(number, "down")))
        story.refused = refused

        def act() -> None:
            stream, transport = TcpStream(self.world.users[user], PORT + number), FakeTransport()
            transport.connect(stream)
            story.user.transport = transport
            self.waiting[PORT + number] = story

        self.do(act)
        self.all.append(story)
        return story

    @rule()
    def dials_are_answered(self) -> None:
        def act() -> None:
            for stream, answer in list(self.world.dials.items()):
                del self.world.dials[stream]
                story = self.waiting[stream.port]
                assert story.service.transport is None, "never two dials that succeed for one connection"
                if story.refused:
                    answer.set_exception(PermissionError(13, "not allowed"))
                else:
                    story.service.transport = transport = FakeTransport()
                    answer.set_result(transport)

        self.do(act)

    @rule(story=stories, size=SIZES, up=st.booleans())
    def writes(self, story: Story, size: int, up: bool) -> None:
        self.do(lambda: (story.user if up else story.service).write(size))

    @rule(story=stories, up=st.booleans())
    def ends(self, story: Story, up: bool) -> None:
        self.do((story.user if up else story.service).end)

    @rule(story=stories, up=st.booleans(), error=st.booleans())
    def breaks(self, story: Story, up: bool, error: bool) -> None:
        side = story.user if up else story.service
        if side.transport is not None and not side.transport.lost:
            story.broken = True
            transport = side.transport
            self.do(lambda: transport.fail(ConnectionResetError(104, "reset") if error else None))

    @rule(story=stories, size=SIZES, up=st.booleans())
    def reads(self, story: Story, size: int, up: bool) -> None:
        self.do(lambda: (story.user if up else story.service).read(size))

    @rule(story=stories, room=st.sampled_from([0, 1, 1000, 1 << 30]), up=st.booleans())
    def takes_no_more_than(self, story: Story, room: int, up: bool) -> None:
        transport = (story.user if up else story.service).transport
        if transport is not None:
            transport.room = room

    @rule(size=MOVES)
    def everything_moves(self, size: int) -> None:
        self.do(lambda: self.world.move(size))

    @rule(size=MOVES, hop=st.sampled_from(["down", "back"]))
    def one_hop_moves(self, size: int, hop: str) -> None:
        self.do(lambda: getattr(self.world, hop)(size))

    @rule(size=MOVES, which=st.integers(0, 5), up=st.booleans())
    def one_session_moves(self, size: int, which: int, up: bool) -> None:
        sessions = self.world.sessions
        if sessions:
            move = self.world.up if up else self.world.to_user
            self.do(lambda: move(sessions[which % len(sessions)], size))

    @rule(user=st.integers(0, 1), back=st.booleans())
    def a_user_loses_its_link(self, user: int, back: bool) -> None:
        self.do(lambda: self.world.user_notices(user))
        if back:
            self.do(lambda: self.world.connect(user))

    @rule(user=st.integers(0, 1))
    def a_user_goes_on_over_another_link(self, user: int) -> None:
        def act() -> None:
            session, self.world.current[user] = self.world.current[user], None
            self.world.connect(user)
            if session is not None:
                session.lost_by_user = True

        self.do(act)

    @rule(which=st.integers(0, 5))
    def the_runner_loses_a_session(self, which: int) -> None:
        sessions = self.world.sessions
        if sessions:
            self.do(lambda: self.world.runner_notices(sessions[which % len(sessions)]))

    @rule(busy=st.booleans(), which=st.integers(0, 5))
    def the_runner_is_busy(self, busy: bool, which: int) -> None:
        sessions: list[Session] = self.world.sessions
        if sessions:
            sessions[which % len(sessions)].busy = busy

    @rule(back=st.booleans())
    def the_tunnel_breaks(self, back: bool) -> None:
        self.do(self.world.cut_tunnel)
        if back:
            self.all_come_back()

    @rule()
    def all_come_back(self) -> None:
        def act() -> None:
            self.world.connect_tunnel()
            for user in range(2):
                self.world.connect(user)

        self.do(act)

    @invariant()
    def bytes_arrive_once_and_in_order(self) -> None:
        for story in self.all:
            for side, other in ((story.user, story.service), (story.service, story.user)):
                assert side.received == other.data[: len(side.received)]
                assert len(side.received) <= other.written

    @invariant()
    def no_more_is_kept_than_the_window_allows(self) -> None:
        if not hasattr(self, "world"):
            return
        for user in self.world.users:
            assert user.kept is not None
            for stream in user.kept.streams:
                core = stream.core if isinstance(stream, TcpStream) else None
                assert isinstance(core, KeptCore)
                assert len(core.sending.unacked) <= MAX_WINDOW + EARLY_DATA

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.heals()
        finally:
            streams.ACK_AFTER, streams.LATE, opener.AGAIN_AFTER = self.before
            self.loop.close()

    def heals(self) -> None:
        """All links come back, all applications read and then end: each stream is whole, or over at both ends."""
        world = self.world
        Model.cuts += world.cuts

        def known(session: Session) -> bool:
            return session in world.current

        def open_up() -> None:
            for session in list(world.sessions):
                session.busy = False
                if not known(session):
                    world.runner_notices(session)
            for user in range(2):
                if world.current[user] not in world.sessions:
                    world.user_notices(user)
            world.connect_tunnel()
            for user in range(2):
                world.connect(user)
            for story in self.all:
                for side in (story.user, story.service):
                    if side.transport is not None:
                        side.transport.room = 1 << 30

        self.do(open_up)
        for _ in range(4):
            self.settle()
            self.dials_are_answered()
        for story in self.all:
            if not story.broken and not story.refused:
                self.check_whole(story)
        for story in self.all:
            self.do(story.user.end)
            self.do(story.service.end)
        self.settle()
        for story in self.all:
            self.check_over(story)
        assert [len(user.kept.streams) for user in world.users if user.kept is not None] == [0, 0]
        assert len(world.keeper) == 0
        assert [user.stream_count for user in world.users] == [0, 0]
        assert not world.routes
        assert not self.unseen, self.unseen

    def settle(self) -> None:
        def read() -> int:
            before = sum(len(side.received) for story in self.all for side in (story.user, story.service))
            for story in self.all:
                story.user.read(1 << 20)
                story.service.read(1 << 20)
            return sum(len(side.received) for story in self.all for side in (story.user, story.service)) - before

        async def main() -> None:
            await asyncio.sleep(0.001)
            await self.world.settle()
            while read():
                await self.world.settle()

        self.loop.run_until_complete(main())

    def check_whole(self, story: Story) -> None:
        assert story.service.transport is not None
        assert not story.user.transport or not story.user.transport.aborted
        assert len(story.service.received) == story.user.written
        assert len(story.user.received) == story.service.written
        assert story.service.left == story.user.ended or story.service.left
        assert not story.user.ended or story.service.left
        assert not story.service.ended or story.user.left

    def check_over(self, story: Story) -> None:
        assert story.user.left
        assert story.service.transport is None or story.service.left


TestKeptStreams = Model.TestCase
TestKeptStreams.settings = settings(
    max_examples=50, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
