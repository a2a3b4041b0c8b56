"""Hop 2: a splice between a user's session at the host and the same session at the runner (docs/protocol.md §4).

Frames pass as they are, with the mask that they came with; only their headers are walked, so that WebSocket control
frames stay between neighbours and nothing malformed gets through.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import quote

import structlog

from kohakuriver import tracing
from kohakuriver._frame import WS_PING, FrameViolation, FrameWalker, Message, SpliceWalker
from kohakuriver.errors import KohakuRiverError, UnavailableError, UsageError
from kohakuriver.host.services.audit import ranges
from kohakuriver.limits import Limits
from kohakuriver.session.carried import Carrier, Passed, Route, at_runner
from kohakuriver.session.nodes import NodeOfflineError
from kohakuriver.session.pace import PacedReads
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest, greet
from kohakuriver.tunnel.buffers import Assembler
from kohakuriver.tunnel.dial import open_session
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.message_link import may_close_with
from kohakuriver.tunnel.ports import BEYOND, GOES_ON, beyond_of, port_in, ports_in, ports_query
from kohakuriver.tunnel.protocol import (
    CONNECT,
    GOAWAY,
    OP_CLOSE,
    OP_TEXT,
    PROTO_TERMINAL,
    SESSION_ID,
    TASK_HEADER,
    TUNNEL_V2,
    CloseCode,
    Opening,
    WentStraight,
    pack_seconds,
)
from kohakuriver.tunnel.terminal import Start, beyond_in

log = structlog.get_logger("kohakuriver.proxy")

SSH = "ssh"
"""In the place of a port: where the task's SSH server listens."""

TERMINAL = "terminal"
"""In the place of a port: the session is for a terminal."""

MAX_START = 1 << 20

MOST_TOLD = 256
"""So many destinations of a session are remembered as written down; what leads to others is written down each time."""

FIRST_OPCODES = (OP_TEXT, 0x2)
SHORTEST, KEY = 2, 4
LONGER = {126: 2, 127: 8}
"""Of a frame's header (RFC 6455 section 5.2): its first bytes, its key, and what a long length takes more."""

BACK_WITHIN = 4.0
"""So many seconds a session that goes on waits for a runner that is about to come back."""

ONCE_MORE, MOVES_WITHIN = (0.0,), (0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds before a new session that found nobody is tried again, where its task is to stay and where it moves."""

NOT_THERE = ("runner_unreachable", "tunnel_not_connected")
"""The codes of errors by which a task that moves is not there any more; the first one for others, too."""

TELLS_SECONDS = 5.0
"""How often a runner tells what went past the host, where nothing makes it more often."""

AWAY_EVERY, AWAY_AT_ONCE = 0.1, 20
"""Of a host that ends, so many sessions are told each so many seconds; more where time would not do."""

Authorize = Callable[["str | None", str, "int | None", str, "frozenset[int] | None"], Awaitable[Route]]


def straight_tells(limits: Limits) -> float | None:
    """Every how many seconds runners tell what sessions carry past this host; None where none may.

    Only what comes through the host can be slowed down here.
    """
    if limits.max_rate:
        return None
    return min(TELLS_SECONDS, limits.idle_timeout / 8) if limits.idle_timeout else TELLS_SECONDS


class Splice:
    """One direction's end: what comes from ``link`` goes to ``other.link``."""

    def __init__(self, walker: SpliceWalker, session: ProxySession) -> None:
        self.walker = walker
        self.session = session
        self.link: Link
        self.other: Splice

    def link_received(self, link: Link, start: int, stop: int) -> int:
        data, view, walker, target = link.intake.buffer.data, link.intake.buffer.view, self.walker, self.other.link
        events = 0
        while True:
            end, event, consumed = walker.splice(data, start, stop)
            if end > start:
                self._pass(target, view, start, end)
            if event is not None:
                self._control(link, event, view)
                events += 1
                if link.intake.turn_over(events):
                    break
            elif consumed == start or consumed >= stop:
                break
            start = consumed
        if target.out.blocked:
            link.intake.pause(self)
            target.out.wait_drained(self)
        return consumed

    def _control(self, link: Link, event: Message, view: memoryview) -> None:
        """Neighbours alone talk in control frames: a runner tells in a ping what went past this host."""
        went = WentStraight.parse(view[event[4] : event[5]]) if event[0] == WS_PING else None
        if went is not None and self is self.session.container_side:
            self.session.went_straight(went)
        link.control(event)

    def _pass(self, target: Link, view: memoryview, start: int, end: int) -> None:
        """Pass a range on; a small frame that waits for a frame border goes in at the first one."""
        if target.out.urgent:
            border = self.walker.boundary
            if border > start:
                target.send(view[start:border])
                start = border
        if start < end:
            target.send(view[start:end], not self.walker.at_boundary)

    def link_writable(self) -> None:
        """The other side's link has drained."""
        self.link.intake.resume(self)

    def link_drained(self, link: Link) -> None:
        pass

    def end_pace(self) -> None:
        """Its link is being closed: it is read as fast as it comes."""

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        hung_up = self is self.session.user and link.closing.hung_up
        told = CloseCode.USER_LOST if hung_up else may_close_with(code)
        if self is self.session.user and told == CloseCode.GOING_AWAY:  # of a host's own end alone a runner is told so
            told = CloseCode.SERVICE_RESTART
        went = "the user went" if self is self.session.user else "the connection to the task's node was lost"
        # Of a node that says nothing the user is not told how its TCP connection ended.
        self.other.end_pace()
        self.other.link.close(told, went if code == CloseCode.ABNORMAL else reason or went)
        self.session.closed(self, code, reason)


class RatedSplice(Splice):
    """A direction that may take only so many bytes a second. ``rate`` is in bytes a second."""

    def __init__(self, walker: SpliceWalker, session: ProxySession, rate: int) -> None:
        super().__init__(walker, session)
        self.pace = PacedReads(rate)

    def link_received(self, link: Link, start: int, stop: int) -> int:
        consumed = super().link_received(link, start, stop)
        self.pace.took(link, consumed - start)
        return consumed

    def end_pace(self) -> None:
        self.pace.end(self.link)


class StartWatch:
    """Reads along what a user sends in a session for terminals; `started` is told what each is started with.

    What is no CONNECT is stepped over by its frames' headers: it may be a data set.
    """

    def __init__(self, max_message: int, started: Callable[[bytes], None]) -> None:
        self._walker = FrameWalker(masked=True, max_message=max_message)
        self._assembler = Assembler(MAX_START)
        self._head = bytearray()
        self._connects = False  # whether the message that has begun may be a CONNECT
        self._kept = False  # whether the frame that is under way is of such a message
        self._left = 0  # bytes of that frame
        self._rest = bytearray()
        self._started = started

    def read(self, data: memoryview) -> None:
        """The next bytes, of frames that a splice lets through.

        Raises FrameViolation (1009) where a CONNECT is longer than what is read of one: nothing is to pass then.
        """
        at = 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                if self._kept:
                    self._rest += data[at : at + step]
                self._left -= step
            else:
                step = min(_head_size(self._head) - len(self._head), len(data) - at)
                self._head += data[at : at + step]
                if len(self._head) == _head_size(self._head):
                    self._begin_frame()
            at += step
        if self._rest:
            self._walk()

    def _begin_frame(self) -> None:
        """All is there that tells what a frame is."""
        head, opcode = self._head, self._head[0] & 0x0F
        size, length = _frame_size(head)
        if opcode in FIRST_OPCODES:
            # Of a first frame that is empty it is not known yet.
            self._connects = len(head) == size or head[size] ^ head[size - KEY] == CONNECT
        self._kept = opcode < OP_CLOSE and self._connects
        self._left = size + length - len(head)
        if self._kept:
            self._rest += head
        head.clear()

    def _walk(self) -> None:
        done, more = 0, True
        while more:
            messages, at = self._walker.walk(self._rest, done, len(self._rest))
            for message in messages:
                self._message(message)
            more, done = bool(messages) and done < at < len(self._rest), at
        del self._rest[:done]

    def _message(self, message: Message) -> None:
        if message[0] != CONNECT:
            return
        payload = self._assembler.add(memoryview(bytes(self._rest[message[4] : message[5]])), message[6])
        opening = None if payload is None else Opening.parse(payload, PROTO_TERMINAL)
        if opening is not None:
            self._started(opening.start)


def _frame_size(head: bytearray) -> tuple[int, int]:
    """Bytes of a masked frame's header and of its payload (RFC 6455 section 5.2), or what is known of them so far."""
    if len(head) < SHORTEST:
        return SHORTEST, 0
    length = head[1] & 0x7F
    longer = LONGER.get(length, 0)
    size = SHORTEST + longer + KEY
    return size, int.from_bytes(head[SHORTEST : SHORTEST + longer], "big") if longer else length


def _head_size(head: bytearray) -> int:
    """How much of a frame has to be there to tell what it is: its header, and of a first frame a byte more."""
    size, length = _frame_size(head)
    return size + (len(head) >= size > SHORTEST and head[0] & 0x0F in FIRST_OPCODES and length > 0)


class _Watching(Splice):
    """What comes from the user of a terminal. Nothing is passed on that was not read, whatever comes behind it."""

    watch: StartWatch

    def _pass(self, target: Link, view: memoryview, start: int, end: int) -> None:
        self.watch.read(view[start:end])
        super()._pass(target, view, start, end)


class TerminalSplice(_Watching, Splice):
    """That, as fast as it comes."""


class RatedTerminalSplice(_Watching, RatedSplice):
    """That, with a rate."""


class ProxySession:
    """One user's session through this host; `terminal` says that it is for one, or for ways `beyond` the task."""

    def __init__(self, proxy: TunnelProxy, route: Route, *, terminal: bool = False, beyond: str = "") -> None:
        self.limits = proxy.limits
        self._terminal = terminal
        self._beyond = beyond
        self._told: set[tuple[str, ...]] = set()
        self.carried = proxy.carrier.carry(self, route)
        self._straight: WentStraight | None = (
            None  # what went past this host, as of now; None where there is no such way
        )
        self.user = self._side(masked=True)
        self.container_side = self._side(masked=False)
        self.user.other, self.container_side.other = self.container_side, self.user

    def _side(self, *, masked: bool) -> Splice:
        walker = SpliceWalker(masked=masked, max_message=self.limits.max_message)
        rate = self.limits.max_rate
        if masked and self._terminal:
            side = RatedTerminalSplice(walker, self, rate) if rate else TerminalSplice(walker, self)
            side.watch = StartWatch(self.limits.max_message, self._started)
            return side
        return RatedSplice(walker, self, rate) if rate else Splice(walker, self)

    def _started(self, start: bytes) -> None:
        """The user asked for a terminal; `start` is what CONNECT says of it.

        Where a connection leads is written down once.

        Raises FrameViolation (1008) where the session is not for that, or more was asked for than can be written down.
        """
        if beyond_in(start) != self._beyond:
            raise FrameViolation(CloseCode.POLICY, "this session is not for that")
        command = Start.command_in(start)
        if command and tuple(command) not in self._told:
            try:
                self.carried.need_room()
            except UnavailableError as error:
                raise FrameViolation(CloseCode.POLICY, "more was asked for than can be written down") from error
            self.carried.ran(command)
        if self._beyond and len(self._told) < MOST_TOLD:
            self._told.add(tuple(command))
        if Start.is_named(start):
            self.carried.stays()

    def begin(self, user: Link, runner: Link) -> None:
        """Both links are there."""
        self.user.link, self.container_side.link = user, runner
        for side in (self.user, self.container_side):
            if isinstance(side, RatedSplice):
                side.pace.begin(side.link)

    def cut(self, code: int, reason: str) -> None:
        """Close both links. Where the right to go on is gone nothing more is passed, either way."""
        for side in (self.user, self.container_side):
            side.end_pace()
        for link in (self.user.link, self.container_side.link):
            # What a runner says last, how much went past us, is heeded.
            heeds = link is self.container_side.link and self._straight is not None
            (link.fail if code == CloseCode.POLICY and not heeds else link.close)(code, reason)

    def send_away(self, seconds: int) -> None:
        """Tell the user's end, if it understands that, to go on over another session."""
        user = self.user.link
        if user.version >= 2:
            user.send_message(GOAWAY, SESSION_ID, pack_seconds(seconds, "the host is going"), urgent=True)

    def closed(self, side: Splice, code: int, reason: str) -> None:
        """One of the two links has gone; the other follows."""
        self.carried.end("user" if side is self.user else "node", code, reason)
        if side is self.container_side or self._straight is None:  # else it is known soon how much went past us
            self.carried.over()

    def went_straight(self, went: WentStraight) -> None:
        """The runner has told how many bytes of the session went past this host; never less than before."""
        before = self._straight or WentStraight(0, 0)
        self._straight = WentStraight(*map(max, before, went))

    def passed(self) -> Passed:
        """Bytes of frames' payloads so far, with those that went past this host."""
        to_container, to_user = self._straight or (0, 0)
        return self.user.walker.bytes_passed + to_container, self.container_side.walker.bytes_passed + to_user


async def _until_back(back: asyncio.Event, error: UnavailableError) -> None:
    """Wait until a node is back, which is away by this error. Raises that where the node does not come."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(back.wait(), BACK_WITHIN)
    if not back.is_set():
        raise error


@contextlib.contextmanager
def _nobody_comes_back(_node: str) -> Iterator[asyncio.Event]:
    yield asyncio.Event()


class TunnelProxy:
    """All forward sessions of a host.

    Args:
        authorize: (bearer token or None, task's id or name, port or None for that of its SSH server, "tcp" or "udp",
            the ports that it may reach or None for all) → where the session goes. Raises KohakuRiverError.
        authorize_terminal: (bearer token or None, task's id or name, which way beyond the task or "") → where a session
            for a terminal goes. Raises too.
        coming_back: node's name → a context in which an event is set when the node registers here.
        doubt: called with the name of a node that could not be dialled.
        trusted: how runners that serve TLS are checked; None for the system's authorities.
        limits: what a session may take.
        credential: what the opening handshake of a terminal shows: `authorize_terminal` is asked with that. Raises
            NotAllowedError.
    """

    def __init__(
        self,
        *,
        authorize: Authorize,
        authorize_terminal: Callable[[str | None, str, str], Awaitable[Route]],
        credential: Callable[[UpgradeRequest], str | None] = lambda request: request.token,
        coming_back: Callable[[str], AbstractContextManager[asyncio.Event]] = _nobody_comes_back,
        doubt: Callable[[str], None] = lambda name: None,
        trusted: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.authorize = authorize
        self.authorize_terminal = authorize_terminal
        self._credential = credential
        self._coming_back = coming_back
        self._doubt = doubt
        self.trusted = trusted
        self.limits = limits or Limits()
        self.carrier: Carrier[ProxySession] = Carrier(self.limits)
        self._away: float | None = None

    @property
    def sessions(self) -> Collection[ProxySession]:
        """Those that are open."""
        return self.carrier.open.keys()

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that this proxy answers."""
        return [TunnelRoute("/ws/forward/{task_id}/{port}", self._open)]

    def snapshot(self) -> dict[str, int]:
        """Sessions now, and bytes of frames' payloads passed since the start."""
        return self.carrier.snapshot()

    async def drain(self, seconds: int) -> None:
        """Have users go on at a host that takes this one's place; wait for that, for so many seconds at most.

        They are told one after the other, over half of that time where they are many: the next host is not to get all
        of them at once.
        """
        began = time.monotonic()
        self._away = began + seconds  # for those, too, that are being opened now
        told = list(self.sessions)
        most_at_once = max(AWAY_AT_ONCE, math.ceil(len(told) * 2 * AWAY_EVERY / seconds) if seconds else len(told))
        for start in range(0, len(told), most_at_once):
            for session in told[start : start + most_at_once]:
                if session in self.carrier.open:
                    session.send_away(max(0, round(self._away - time.monotonic())))
            if start + most_at_once < len(told):
                await asyncio.sleep(AWAY_EVERY)
        await self.carrier.emptied(self._away - time.monotonic())

    async def close(self) -> None:
        """Close every session."""
        self.carrier.cut_all("the host is shutting down")

    async def _open(self, request: UpgradeRequest, task: str, port: str) -> None:
        """Answer a command line or a browser."""
        try:
            if port == TERMINAL:
                await self._open_terminal(request, task)
            else:
                await self._open_session(request, task, None if port == SSH else port_in(port))
        except KohakuRiverError as error:
            log.info("session refused", task=task, port=port, peer=request.peer, reason=str(error))
            raise

    async def _open_session(self, request: UpgradeRequest, task: str, named: int | None) -> None:
        """Open the session at the runner first: its answer decides ours, the version included."""
        proto = request.query.get("proto", "tcp")
        if proto not in ("tcp", "udp"):
            raise UsageError(f"proto must be tcp or udp, not {proto!r}")
        ports = ports_in(request.query)
        query = f"proto={proto}" if ports is None else f"proto={proto}&{ports_query(ports)}"

        async def begin(route: Route) -> None:
            port = named or route.port
            about = {
                "proto": SSH if named is None else proto,
                "port": port,
                "ports": None if ports is None else ranges(ports),
            }
            await self._carry(request, route, f"{port}?{query}", about)

        await self._begin(request, lambda: self.authorize(request.token, task, named, proto, ports), begin)

    async def _open_terminal(self, request: UpgradeRequest, task: str) -> None:
        """The same for a session that is for a terminal, or for connections beyond the task."""
        beyond = beyond_of(request.query)
        query, about = (f"{BEYOND}={beyond}", {BEYOND: beyond}) if beyond else ("", {})
        await self._begin(
            request,
            lambda: self.authorize_terminal(request.token if beyond else self._credential(request), task, beyond),
            lambda route: self._carry(request, route, f"{TERMINAL}?{query}", {"proto": TERMINAL, **about}),
        )

    async def _begin(
        self,
        request: UpgradeRequest,
        authorize: Callable[[], Awaitable[Route]],
        begin: Callable[[Route], Awaitable[None]],
    ) -> None:
        """Begin a session. One that goes on waits for a runner that is away: its user would come again, and later.

        A new one waits, by `authorize`, for a runner that is being started again; the dial alone may tell that it is.
        """
        if not request.goes_on:
            await self._begin_new(authorize, begin)
            return
        route = await self._authorized_once_online(authorize)
        with self._coming_back(route.node) as back:
            try:
                await self._begin_at(route, begin)
                return
            except UnavailableError as error:
                if error.code != "runner_unreachable":
                    raise
                await _until_back(back, error)
        await self._begin_at(await authorize(), begin)  # it may be somewhere else now

    async def _begin_new(
        self, authorize: Callable[[], Awaitable[Route]], begin: Callable[[Route], Awaitable[None]]
    ) -> None:
        began, tries = time.monotonic(), 0
        while True:
            with tracing.span("look whether the session may be"):
                route = await authorize()
            pauses, gone = (MOVES_WITHIN, NOT_THERE) if route.moves else (ONCE_MORE, NOT_THERE[:1])
            try:
                await self._begin_at(route, begin)
                return
            except UnavailableError as error:
                late = tries == len(pauses) or time.monotonic() - began > BACK_WITHIN
                if late or error.code not in gone:
                    raise
            await asyncio.sleep(pauses[tries])
            tries += 1

    async def _begin_at(self, route: Route, begin: Callable[[Route], Awaitable[None]]) -> None:
        try:
            await begin(route)
        except UnavailableError as error:
            if error.code == "runner_unreachable":
                self._doubt(route.node)
            raise

    async def _authorized_once_online(self, authorize: Callable[[], Awaitable[Route]]) -> Route:
        """Where a session goes; the node of one that goes on may be silent and come back, as when it was killed."""
        began = time.monotonic()
        try:
            return await authorize()
        except NodeOfflineError as error:
            if time.monotonic() - began > BACK_WITHIN:  # it was waited for
                raise
            node = error.node
        with self._coming_back(node) as back:
            try:
                return await authorize()  # it may have come before it was waited for
            except NodeOfflineError as error:
                await _until_back(back, error)
        return await authorize()

    async def _carry(self, request: UpgradeRequest, route: Route, port_and_query: str, about: dict[str, Any]) -> None:
        session = ProxySession(self, route, terminal=about["proto"] == TERMINAL, beyond=about.get(BEYOND, ""))
        if request.goes_on:
            port_and_query, about = f"{port_and_query}&{GOES_ON}", {**about, "resumed": True}
            if about["proto"] == TERMINAL and BEYOND not in about:
                session.carried.stays()  # it may have a name, which was told in a session before
        with session.carried:
            runner = await self._open_at_runner(session, route, request, port_and_query)
            self._splice(session, request, runner, about, route.task_id)
        log.info("session opened", task=route.task, proto=about["proto"], peer=request.peer)

    async def _open_at_runner(
        self, session: ProxySession, route: Route, request: UpgradeRequest, port_and_query: str
    ) -> Link:
        with at_runner(route):
            return await open_session(
                route.runner(f"/ws/forward/{quote(route.container, safe='')}/{port_and_query}", self.trusted),
                subprotocols=(TUNNEL_V2,) if request.offers_v2 else (),
                # The walker is the session's own, so that what it counts and where it stands stay with it.
                walker=session.container_side.walker,
            )

    def _splice(
        self, session: ProxySession, request: UpgradeRequest, runner: Link, about: dict[str, Any], task_id: int
    ) -> None:
        told = {TASK_HEADER: str(task_id)} if task_id else {}
        try:
            user = request.accept(session.user.walker, session.user, version=runner.version, headers=told)
        except KohakuRiverError:  # the user has hung up
            runner.close()
            raise
        session.begin(user, runner)
        session.carried.begin(request.peer, **about, version=runner.version)
        greet(user, "CONNECTED")
        runner.hand_over(session.container_side)
        if self._away is not None:
            session.send_away(max(0, round(self._away - time.monotonic())))
        session.carried.hang_on_right()
