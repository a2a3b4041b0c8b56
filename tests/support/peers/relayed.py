"""Users, a runner that renumbers, and a container, on links that a test cuts where it likes."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

from kohakuriver._frame import FrameWalker, build_frame
from kohakuriver.tunnel.buffers import Assembler
from kohakuriver.tunnel.container_endpoint import ContainerEndpoint
from kohakuriver.tunnel.keeper import Keeper
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.opener import KeptStreams
from kohakuriver.tunnel.protocol import (
    CLOSE,
    CONNECT,
    DATA,
    DETACH,
    ERROR,
    FULL_HOLD,
    PING,
    PONG,
    RESUME,
    ErrorText,
    Resuming,
    Roll,
    pack_seconds,
)
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from tests.support.peers.fake_transport import FakeTransport

PORT = 7


class Pipe:
    """Bytes on their way from one end to the next, and the messages that have come whole."""

    def __init__(self, *, masked: bool) -> None:
        self._walker = FrameWalker(masked=masked)
        self._assembler = Assembler(1 << 20)
        self._rest = bytearray()

    def messages(self, data: bytes) -> list[tuple[int, int, int, int, bytes]]:
        """(type, protocol, id, port, payload) of what is whole with these bytes; DATA also in pieces."""
        buffer = self._rest + data
        out, start = [], 0
        while True:
            messages, start = self._walker.walk(buffer, start, len(buffer))
            for kind, proto, number, port, first, last, flags in messages:
                if kind == DATA:
                    out.append((kind, proto, number, port, bytes(buffer[first:last])))
                elif (whole := self._assembler.add(memoryview(buffer)[first:last], flags)) is not None:
                    out.append((kind, proto, number, port, whole))
            if not messages:
                break
        self._rest = buffer[start:]
        return out


class Container(ContainerEndpoint):
    """One tunnel of a container whose service answers, or refuses, when the test says so."""

    def __init__(self, keeper: Keeper, dials: dict[TcpStream, asyncio.Future[FakeTransport]]) -> None:
        super().__init__(keeper=keeper, config=EndpointConfig())
        self._dials = dials

    async def _try(self, stream: TcpStream, host: str) -> BaseException | None:
        answer = self._dials[stream] = asyncio.get_running_loop().create_future()
        try:
            (await answer).connect(stream)
        except OSError as exc:
            return exc
        return None

    def keeps(self, code: int) -> bool:
        return True


@dataclass(eq=False)
class Session:
    """A user's session, as the runner has it; `ids` are the tunnel's by the user's."""

    mark: bytes
    wire: FakeTransport
    pipe: Pipe = field(default_factory=lambda: Pipe(masked=True))
    to_user: bytearray = field(default_factory=bytearray)
    ids: dict[int, int] = field(default_factory=dict)
    lost_by_user: bool = False
    busy: bool = False  # RESUMEs are put off
    put_off: int = 0  # the epoch of one that was


class World:
    """All of them. `cuts` counts the links that were lost."""

    def __init__(self, users: int = 2, *, hold: int = 3600) -> None:
        self.errors: list[str] = []
        self.users = [
            UserEndpoint(kept=KeptStreams(hold), on_stream_error=lambda port, text: self.errors.append(str(text)))
            for _ in range(users)
        ]
        self.marks = [bytes([65 + number]) * 16 for number in range(users)]
        self.current: list[Session | None] = [None] * users
        self.sessions: list[Session] = []
        self.keeper = Keeper()
        self.dials: dict[TcpStream, asyncio.Future[FakeTransport]] = {}
        self.cuts = 0
        self.tunnel: FakeTransport | None = None
        self.to_container = bytearray()
        self.routes: dict[int, tuple[Session, int]] = {}
        self._pipe = Pipe(masked=True)
        self._ids = itertools.count(1)

    # -- links come and go -----------------------------------------------------------------------------------------

    def connect_tunnel(self) -> None:
        """The container comes (back)."""
        if self.tunnel is None:
            self.tunnel, self._pipe, self._ids = FakeTransport(), Pipe(masked=True), itertools.count(1)
            container = Container(self.keeper, self.dials)
            link = Link(container, FrameWalker(masked=False), masks=True)
            link.start(self.tunnel)
            container.attach(link)

    def connect(self, user: int) -> None:
        """A user comes (back), if the container is there; the runner may think the session before alive."""
        if self.tunnel is None or self.current[user] is not None:
            return
        session = Session(self.marks[user], FakeTransport())
        self.current[user] = session
        self.sessions.append(session)
        link = Link(self.users[user], FrameWalker(masked=False), masks=True)
        link.start(session.wire)
        self.users[user].attach(link)

    def user_notices(self, user: int) -> None:
        """The user's end learns that its link is gone; what it has sent may arrive still."""
        session, self.current[user] = self.current[user], None
        if session is not None:
            self.cuts += 1
            session.lost_by_user = True
            session.wire.fail(None)

    def runner_notices(self, session: Session) -> None:
        """The runner learns it: it holds the streams."""
        if session not in self.sessions:
            return
        self.cuts += 1
        self.sessions.remove(session)
        for number in session.ids.values():
            self.routes.pop(number, None)
            self._down(DETACH, 0, number, 0, pack_seconds(FULL_HOLD))

    def cut_tunnel(self) -> None:
        """The tunnel breaks: the runner closes all sessions."""
        if self.tunnel is None:
            return
        self.cuts += 1
        self.tunnel.fail(None)
        self.tunnel = None
        self.to_container.clear()
        self.routes.clear()
        for session in self.sessions:
            session.ids.clear()
        self.sessions.clear()
        for user in range(len(self.users)):
            self.user_notices(user)

    # -- bytes move ------------------------------------------------------------------------------------------------

    def move(self, size: int) -> bool:
        """Move up to so many bytes over every hop; whether any moved."""
        moved = [self.up(session, size) for session in list(self.sessions)]
        moved += [self.down(size), self.back(size)]
        moved += [self.to_user(session, size) for session in list(self.sessions)]
        return any(moved)

    def up(self, session: Session, size: int) -> bool:
        """From a user to the runner."""
        data = session.wire.take(size)
        for kind, proto, number, port, payload in session.pipe.messages(data):
            self._from_user(session, kind, proto, number, port, payload)
        return bool(data)

    def down(self, size: int) -> bool:
        """From the runner to the container."""
        if self.tunnel is None or not self.tunnel.reading:
            return False
        data = bytes(self.to_container[:size])
        del self.to_container[:size]
        self.tunnel.feed(data)
        return bool(data)

    def back(self, size: int) -> bool:
        """From the container to the runner."""
        if self.tunnel is None:
            return False
        data = self.tunnel.take(size)
        for kind, proto, number, _, payload in self._pipe.messages(data):
            self._from_container(kind, proto, number, payload)
        return bool(data)

    def to_user(self, session: Session, size: int) -> bool:
        """From the runner to a user, unless it is gone."""
        data = bytes(session.to_user[:size])
        if not session.lost_by_user and not session.wire.reading:
            return False
        del session.to_user[:size]
        if not session.lost_by_user:
            session.wire.feed(data)
        return bool(data)

    async def settle(self) -> None:
        """Move everything until nothing moves any more."""
        quiet = rounds = 0
        while quiet < 3:
            rounds += 1
            assert rounds < 2000, "messages go to and fro for ever"
            for _ in range(6):
                await asyncio.sleep(0)
            quiet = 0 if self.move(1 << 20) else quiet + 1

    # -- what the runner does --------------------------------------------------------------------------------------

    def _down(self, kind: int, proto: int, number: int, port: int, payload: bytes) -> None:
        self.to_container += build_frame(kind, proto, number, port, payload)

    def _answer(self, session: Session, kind: int, proto: int, number: int, payload: bytes) -> None:
        session.to_user += build_frame(kind, proto, number, 0, payload)

    def _from_user(self, session: Session, kind: int, proto: int, number: int, port: int, payload: bytes) -> None:
        if kind in (CONNECT, RESUME):
            self._begin(session, kind, proto, number, port, payload)
        elif number in session.ids:
            there = session.ids[number]
            self._down(kind, proto, there, 0, payload)
            if kind in (CLOSE, ERROR):
                del session.ids[number]
                self.routes.pop(there, None)
        elif kind == PING:
            self._answer(session, PONG, proto, number, payload)

    def _begin(self, session: Session, kind: int, proto: int, number: int, port: int, payload: bytes) -> None:
        asked = Resuming.parse(payload) if kind == RESUME else None
        roll = Roll.parse(payload) if kind == RESUME and not number else None
        if session.busy and asked is not None:
            session.put_off = max(session.put_off, asked.epoch)
            self._answer(session, ERROR, proto, number, ErrorText("EAGAIN", "too many at once").pack())
            return
        if roll is not None and roll.epoch <= session.put_off:
            return
        there = 0
        if number:
            there = session.ids[number] = next(self._ids)
            self.routes[there] = session, number
        self._down(kind, proto, there, port, payload + session.mark)

    def _from_container(self, kind: int, proto: int, number: int, payload: bytes) -> None:
        if number in self.routes:
            session, there = self.routes[number]
            self._answer(session, kind, proto, there, payload)
            if kind in (CLOSE, ERROR):
                del self.routes[number]
                del session.ids[there]
        elif kind == PING:
            self._down(PONG, proto, number, 0, payload)
