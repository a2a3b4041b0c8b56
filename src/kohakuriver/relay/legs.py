"""The relay of hop 3: the two kinds of links that meet in a runner, and what passes between them.

A user's link and the container's are the two legs of a relay. A message keeps its bytes, and its ClientID is changed
for one that is unique on the other leg. Each leg has a routing table that the frame walker looks ids up in; Python
sees only the messages that open, end or half-close a stream (docs/protocol.md §3–§5).
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from kohakuriver._frame import WHOLE, WS_TEXT, Message, RelayWalker, RoutingTable
from kohakuriver.relay.admission import Admission
from kohakuriver.relay.straight import Paths
from kohakuriver.tunnel.buffers import WHOLE_MESSAGE, Assembler
from kohakuriver.tunnel.closing import CloseState
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import (
    ACK,
    CLOSE,
    CONNECT,
    CONNECTED,
    DATA,
    DETACH,
    END_TASK,
    EOF,
    ERROR,
    NEW_TOKEN,
    PING,
    PONG,
    PORTS,
    PROTO_TCP,
    RESUME,
    RESUMED,
    REVOKE,
    SESSION_ENDED,
    SESSION_ID,
    STRAIGHT,
    WINDOW,
    CloseCode,
    Counts,
    ErrorText,
    PortsAnswer,
    PortScope,
    PortsQuestion,
    Resuming,
    Roll,
    hold_after,
    mark_opening,
    pack_seconds,
    parse_pair,
)
from kohakuriver.tunnel.send_queue import SendQueue
from kohakuriver.tunnel.terminal import beyond_in

__all__ = ["V1_BACKLOG", "V2_BACKLOG", "RelayLeg", "RelayOwner", "SessionLeg", "TunnelLeg"]

MAX_CONTROL = 1 << 20
# What a v1 session may have waiting before its tunnel is read no further; v1 can't slow one stream down.
V1_BACKLOG = 1 << 20
# A v2 session's windows are at most 64 MiB, so more than this waiting means that the container ignores them.
V2_BACKLOG = 96 << 20
# How long after a user's CLOSE a v1 tunnel client may answer it (seconds); users who wait for less say CLOSE again.
V1_REPLY = 60.0
# Of how many streams of a v1 session an answer is waited for; of more, the one that has been waited for longest goes.
MOST_CLOSING = 4096
# How long the client of a tunnel has to show that it is there when another one comes (seconds).
ANSWER_SECONDS = 5.0
# How long it has to look which ports listen (seconds).
PORTS_SECONDS = 5.0
# How long a CONNECT may wait for the tunnel on a straight path (seconds): less than its user's patience with the node.
STRAIGHT_HOLD = 0.8
# How a container's end says that a user broke a window: it can't close the tunnel, which is all users'.
PASSED_WINDOW = "EPROTO"
NO_TUNNEL = ErrorText("ENOTCONN", "the task's tunnel is not connected; is the task running?")
NOT_FOR_THAT = ErrorText("EACCES", "this session is not for that")
TUNNEL_AWAY = ErrorText("EAGAIN", "the task's tunnel is not connected at the moment")

Other = TypeVar("Other", bound="RelayLeg[Any]")


def _went_with(reason: str) -> ErrorText:
    """What ends a stream whose tunnel has gone for this reason, and all that was kept there with it."""
    return ErrorText("ECONNRESET", f"the task's tunnel went away ({reason})")


class RelayOwner(Protocol):
    """Who knows which legs there are."""

    def tunnel_of(self, container: str) -> TunnelLeg | None:
        """The container's tunnel, None where none is connected."""

    def expected_within(self, container: str) -> float:
        """For how many seconds more it is worth waiting for the container's tunnel; 0 where it is there."""

    def ended(self, container: str) -> str:
        """Why nothing of the container's streams is there any more, its task having ended; "" where they may be."""

    def tunnel_closed(self, tunnel: TunnelLeg, reason: str) -> None:
        """A tunnel's link has gone."""

    def session_closed(self, session: SessionLeg) -> None:
        """A user's link has gone."""


class RelayLeg(Generic[Other]):
    """One link of the relay, with its table of ids to the other side's links."""

    link: Link

    def __init__(self, owner: RelayOwner, container: str, max_message: int) -> None:
        self.owner = owner
        self.container = container
        self._max_message = max_message
        self.walker = RelayWalker(masked=True, max_message=max_message)
        self.table: RoutingTable[Other] = RoutingTable()
        self.unknown_messages = 0
        self.unroutable = 0
        self.reported: Counter[str] = Counter()
        self._assembler = Assembler(MAX_CONTROL)

    @property
    def version(self) -> int:
        """What this leg's link speaks; a session's is never more than its tunnel's."""
        return self.link.version

    def link_received(self, link: Link, start: int, stop: int) -> int:
        gathering: list[SendQueue] = []
        try:
            return self._relay(link, start, stop, gathering)
        finally:
            for out in gathering:
                out.scatter()

    def _relay(self, link: Link, start: int, stop: int, gathering: list[SendQueue]) -> int:
        """Work off a read, as far as it goes; what it has for one of `gathering` waits until all of it is there."""
        data, view, relay = link.intake.buffer.data, link.intake.buffer.view, self.walker.relay
        events = 0
        while True:
            runs, event, consumed = relay(data, start, stop, self.table)
            if event is not None and (runs or consumed < stop):
                targets = (*[run[0] for run in runs], self.target_of(event[2]))
                gathering += [each.link.out for each in targets if each is not None and each.link.out.gather()]
            if runs:
                self._pass(runs, view)
            if event is not None:
                self._event(event, view)
                events += 1
                if link.intake.turn_over(events):
                    return consumed
            elif consumed == start or consumed >= stop:
                return consumed
            start = consumed

    def target_of(self, client_id: int) -> Other | None:
        """Where what is said under this id goes, if that is known."""
        route = self.table.get(client_id)
        return None if route is None else route[0]

    def _pass(self, runs: list[tuple[Other, int, int]], view: memoryview) -> None:
        """Send the runs, those of one target together."""
        i, count = 0, len(runs)
        while i < count:
            target = runs[i][0]
            views = [view[runs[i][1] : runs[i][2]]]
            i += 1
            while i < count and runs[i][0] is target:
                views.append(view[runs[i][1] : runs[i][2]])
                i += 1
            if len(views) == 1:
                target.link.send(views[0])
            else:
                target.link.send_many(views)
            self.passed_to(target)

    def _event(self, message: Message, view: memoryview) -> None:
        if message[0] >= WS_TEXT:
            self.link.control(message)
            return
        kind, proto, client_id, port, start, stop, flags = message
        payload = bytes(view[start:stop]) if flags == WHOLE_MESSAGE else self._assembler.add(view[start:stop], flags)
        if payload is not None:
            self.message(kind, proto, client_id, port, payload)

    def message(self, kind: int, proto: int, client_id: int, port: int, payload: bytes) -> None:
        """A message that the walker does not relay by itself."""
        if kind in (CLOSE, ERROR):
            self.end(kind, proto, client_id, payload)
        elif kind == EOF:
            self._half_close(proto, client_id, payload)
        elif kind in (PING, PONG):
            self._ping(kind, proto, client_id, payload)
        elif kind in (DATA, WINDOW, CONNECTED, ACK, RESUMED):
            self._route(kind, proto, client_id, payload)
        else:
            self.unknown_messages += 1

    def _route(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        """Pass on what the walker would have, had it not come in fragments; nothing longer can be meant."""
        route = self.table.get(client_id)
        if route is None or len(payload) > WHOLE:
            self.unroutable += 1
            return
        target, other_id = route
        target.link.send_message(kind, other_id, payload, proto=proto)
        self.passed_to(target)

    def _ping(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        """A PING on a stream's id goes to the stream's other end; any other is ours to answer."""
        route = self.table.get(client_id)
        if route is not None:
            target, other_id = route
            target.link.send_message(kind, other_id, payload, proto=proto, urgent=True)
        elif kind == PING:
            counts = Counts.parse(payload)
            if client_id == SESSION_ID and counts is not None:
                self.reported.update(counts._asdict())
            self.link.send_message(PONG, client_id, payload, proto=proto, urgent=True)

    def _half_close(self, proto: int, client_id: int, payload: bytes) -> None:
        """EOF came from this side; after both, the ids of a stream that is not kept are free."""
        route = self.table.get(client_id)
        if route is None:
            return
        target, other_id = route
        kept = parse_pair(payload) is not None
        target.link.send_message(EOF, other_id, payload if kept else b"", proto=proto)
        if self.ended_twice(client_id, target, other_id):
            self.table.remove(client_id)
            target.table.remove(other_id)
            self.freed()
            target.freed()

    def freed(self) -> None:
        """Streams of this leg have ended."""

    def counts(self) -> Counter[str]:
        """Totals of what came from this side, and of what its endpoint reported."""
        raise NotImplementedError

    def gauges(self) -> Counter[str]:
        """How much of what this leg has now."""
        raise NotImplementedError

    def passed_to(self, target: Other) -> None:
        """Bytes were just sent to ``target``: see to backpressure."""
        raise NotImplementedError

    def end(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        """CLOSE or ERROR came from this side."""
        raise NotImplementedError

    def ended_twice(self, client_id: int, target: Other, other_id: int) -> bool:
        """EOF came from this side: whether one had come from the other before."""
        raise NotImplementedError


class TunnelLeg(RelayLeg["SessionLeg"]):
    """A container's one link.

    `client` tells its tunnel client from others, "" where nothing does; it is None where that has shown no token.
    """

    def __init__(self, owner: RelayOwner, container: str, max_message: int, client: str | None = None) -> None:
        super().__init__(owner, container, max_message)
        self.client = client
        self.ended_by: tuple[int, str] | None = None  # how its link was closed: code and reason
        self._last_id = 0
        self._asked: dict[bytes, asyncio.Future[bool]] = {}
        self._last_question = 0
        self._questions: dict[int, asyncio.Future[PortsAnswer | None]] = {}

    async def answers(self) -> bool:
        """Whether its client is there: it answers a PING soon, or at least sends something."""
        received, mark = self.link.watch.received, secrets.token_bytes(8)
        answer = self._asked[mark] = asyncio.get_running_loop().create_future()
        self.link.send_message(PING, SESSION_ID, mark, urgent=True)
        try:
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        except asyncio.TimeoutError:
            return self.link.watch.received != received
        finally:
            del self._asked[mark]

    def message(self, kind: int, proto: int, client_id: int, port: int, payload: bytes) -> None:
        if kind == PONG and client_id == SESSION_ID and (asked := self._asked.get(payload)) is not None:
            if not asked.done():
                asked.set_result(True)
            return
        if kind == PORTS and client_id == SESSION_ID:
            self._tells_ports(payload)
            return
        super().message(kind, proto, client_id, port, payload)

    async def ask_ports(self, scope: PortScope, mark: bytes = b"") -> PortsAnswer | None:
        """Which ports its client says that listen; None for an answer that makes no sense.

        Raises asyncio.TimeoutError where it does not answer in time, and ConnectionError where it has gone.
        """
        self._last_question = number = (self._last_question + 1) & 0xFFFFFFFF
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        self.link.send_message(PORTS, SESSION_ID, PortsQuestion(number, scope, mark).pack(), urgent=True)
        try:
            return await asyncio.wait_for(answer, PORTS_SECONDS)
        finally:
            del self._questions[number]

    def _tells_ports(self, payload: bytes) -> None:
        """An answer to the question of its number, or to all that there are where it is too short to have one.

        What nobody asked for is not looked at.
        """
        number = PortsAnswer.number_of(payload)
        asked = [each for known, each in self._questions.items() if number in (None, known) and not each.done()]
        if not asked:
            self.unknown_messages += 1
            return
        answer = PortsAnswer.parse(payload)
        for question in asked:
            question.set_result(answer)

    def announce_token(self) -> None:
        """Tell its client that a new token lies where the one that it has was."""
        self.link.send_message(PING, SESSION_ID, NEW_TOKEN, urgent=True)

    def ask_to_end(self) -> None:
        """Tell its client, which is an agent, to end what it was started for."""
        self.link.send_message(PING, SESSION_ID, END_TASK, urgent=True)

    def counts(self) -> Counter[str]:
        return self.reported + Counter({"bytes_to_user": self.walker.bytes_routed})

    def gauges(self) -> Counter[str]:
        return Counter(version=self.version, streams=len(self.table), unknown_messages=self.unknown_messages)

    def new_id(self) -> int:
        """A ClientID that is free on this tunnel."""
        while True:
            self._last_id = self._last_id + 1 if self._last_id < 0xFFFFFFFF else 1
            if self._last_id not in self.table:
                return self._last_id

    def passed_to(self, target: SessionLeg) -> None:
        queued = target.link.out.queued
        if queued <= V1_BACKLOG:
            return
        if target.version == 1:
            self.link.intake.pause(target)
        elif queued > V2_BACKLOG:
            target.link.fail(CloseCode.POLICY, "more is waiting for this session than its windows allow")

    def end(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        route, told = self.table.remove(client_id), False
        if route is not None:
            session, user_id = route
            told = session.free(user_id)
            session.link.send_message(kind, user_id, payload, proto=proto)
            if kind == ERROR and self.version >= 2 and (text := ErrorText.parse(payload)).code == PASSED_WINDOW:
                session.link.fail(CloseCode.PROTOCOL_ERROR, str(text))
        if self.version == 1 and not told:  # its entry stays until it gets one (§3 rule 9)
            self.link.send_message(CLOSE, client_id, proto=proto)

    def ended_twice(self, client_id: int, target: SessionLeg, other_id: int) -> bool:
        return target.note_end(other_id, self)

    def revoke(self, mark: bytes, reason: str) -> None:
        """End what is held here of a user whose right has gone."""
        if self.version >= 2:
            self.link.send_message(REVOKE, SESSION_ID, mark + reason.encode(), urgent=True)

    def link_drained(self, link: Link) -> None:
        pass  # the sessions that wait are the link's waiters

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_result(False)
        for question in self._questions.values():
            if not question.done():
                question.set_exception(ConnectionResetError("the tunnel client has gone"))
        self.ended_by = (code, reason)
        self.owner.tunnel_closed(self, reason or "its tunnel client is gone")


class SessionLeg(RelayLeg[TunnelLeg]):
    """One user's link to one container.

    What its CONNECTs call port 0 is ``port``; ``newest`` is the latest version that the user's side speaks. ``mark`` is
    what the container's end knows the user by. ``paths`` are the links of its session, where it may have another.

    Large because each method is what one message, or one change of its links, means to a session.
    """

    def __init__(
        self,
        owner: RelayOwner,
        container: str,
        max_message: int,
        *,
        port: int,
        proto: int,
        admission: Admission,
        newest: int,
        mark: bytes,
    ) -> None:
        super().__init__(owner, container, max_message)
        self.newest = newest
        self.kept: set[int] = set()
        self._put_off = 0  # the epoch of a RESUME that was: its stream is not one that the opener has no more
        self._held: tuple[int, int, int, bytes] | None = None  # the CONNECT that waits for the tunnel
        self._patience: asyncio.TimerHandle | None = None
        self._closing: dict[int, asyncio.TimerHandle] = {}
        self.port = port
        self.proto = proto
        self.admission = admission
        self.beyond = bool(admission.beyond)
        self.mark = mark
        self.paths: Paths | None = None
        self.ended: dict[int, object] = {}
        self.on_closed: Callable[[], None] = lambda: None

    def again(self) -> SessionLeg:
        """Another link of the same session."""
        return SessionLeg(
            self.owner,
            self.container,
            self._max_message,
            port=self.port,
            proto=self.proto,
            admission=self.admission.again(),
            newest=self.newest,
            mark=self.mark,
        )

    def counts(self) -> Counter[str]:
        return self.reported + Counter({"bytes_to_container": self.walker.bytes_routed})

    def gauges(self) -> Counter[str]:
        return Counter(straight=1) if self.is_straight else Counter(sessions=1)

    @property
    def is_straight(self) -> bool:
        """Whether it comes from its user, past the host."""
        return self.paths is not None and self.paths.through is not self

    @property
    def user_link(self) -> Link | None:
        """Its link, None where that has gone."""
        return None if self.link.closing.state is CloseState.CLOSED else self.link

    def passed(self) -> tuple[int, int]:
        """Bytes that came, and bytes that its user's system took."""
        return self.walker.bytes_routed, max(0, self.link.out.taken() - self.link.posted)

    def passed_to(self, target: TunnelLeg) -> None:
        if target.link.out.blocked:
            self.link.intake.pause(self)
            target.link.out.wait_drained(self)

    def target_of(self, client_id: int) -> TunnelLeg | None:
        return self.owner.tunnel_of(self.container)

    def link_writable(self) -> None:
        """The tunnel takes more."""
        self.link.intake.resume(self)

    def message(self, kind: int, proto: int, client_id: int, port: int, payload: bytes) -> None:
        if kind == CONNECT:
            if not self._waits((proto, client_id, port, payload)):
                self._connect(proto, client_id, port or self.port, payload)
        elif kind == RESUME:
            self._resume(proto, client_id, port or self.port, payload)
        elif kind == STRAIGHT and client_id == SESSION_ID and self.paths is not None and not self.is_straight:
            self.link.send_message(STRAIGHT, SESSION_ID, self.paths.offer().pack(), urgent=True)
        else:
            super().message(kind, proto, client_id, port, payload)

    def _waits(self, connect: tuple[int, int, int, bytes]) -> bool:
        """Whether a CONNECT has to wait, and all that comes behind it, since the tunnel is about to be back (rule 10).

        Nothing else can be served here meanwhile, and what waits stays with those who sent it.
        """
        if self.version < 2 or self.link.closing.state:
            return False
        seconds = self.owner.expected_within(self.container)
        if self.is_straight:  # its user takes a node for gone that answers nothing
            seconds = min(seconds, STRAIGHT_HOLD)
        if seconds <= 0:
            return False
        self._held = connect
        self._patience = asyncio.get_running_loop().call_later(seconds, self.go_on)
        self.link.intake.hold()
        return True

    def go_on(self) -> None:
        """The tunnel is there, or is not waited for any longer."""
        held = self._take_held()
        if held is not None and not self.link.closing.state:  # else it is sent again over the next link
            self.message(CONNECT, *held)
        if self._held is None:
            self.link.intake.release()

    def _take_held(self) -> tuple[int, int, int, bytes] | None:
        held, self._held = self._held, None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        return held

    def _connect(self, proto: int, client_id: int, port: int, payload: bytes) -> None:
        if client_id in self._closing:  # its user waits for no reply
            self._free_both(client_id)
        late = self.paths is not None and self.paths.in_use is not self  # it was overtaken by the other link
        if client_id == SESSION_ID or client_id in self.table or late:
            self.unknown_messages += 1
            return
        if self.is_straight and self.admission.terminal:  # the host writes down what is started
            text = ErrorText("EACCES", "a terminal is opened through the host")
            self.link.send_message(ERROR, client_id, text.pack(), proto=proto)
            return
        if self.version < 2:
            payload = b""
        elif (opening := mark_opening(payload, self.mark, proto)) is not None:
            payload, start = opening
            if beyond_in(start) != self.admission.beyond:
                self.link.send_message(ERROR, client_id, NOT_FOR_THAT.pack(), proto=proto)
                return
            self.kept.add(client_id)
        self._enter(CONNECT, proto, client_id, port, payload, NO_TUNNEL)

    def _resume(self, proto: int, client_id: int, port: int, payload: bytes) -> None:
        """RESUME: of one stream, or behind them of an opener who has no others."""
        resuming = Resuming.parse(payload)
        roll = Roll.parse(payload) if client_id == SESSION_ID else None
        asked = roll or resuming
        late = asked is None or (self.paths is not None and not self.paths.resumes(self, asked.epoch))
        tunnel = self.owner.tunnel_of(self.container)
        if self.version < 2 or client_id in self.table or late:
            self.unknown_messages += 1
        elif client_id == SESSION_ID:
            if tunnel is not None and roll is not None and roll.epoch > self._put_off:
                tunnel.link.send_message(RESUME, SESSION_ID, roll._replace(mark=self.mark).pack(), urgent=True)
        elif resuming is None:
            self.unknown_messages += 1
        else:
            self.kept.add(client_id)
            marked = resuming._replace(mark=self.mark).pack()
            ended = self.owner.ended(self.container)
            away = _went_with(ended) if ended else TUNNEL_AWAY
            moves = self.paths is not None and self.paths.moves()
            if self._enter(RESUME, proto, client_id, port, marked, away, moves=moves) == TUNNEL_AWAY.code:
                self._put_off = max(self._put_off, resuming.epoch)

    def _enter(
        self, kind: int, proto: int, client_id: int, port: int, payload: bytes, away: ErrorText, *, moves: bool = False
    ) -> str:
        """Give a stream its two ids and tell the container; or say why not, by `away` where there is no tunnel.

        The code of the reason, "" where there was none.
        """
        tunnel = self.owner.tunnel_of(self.container)
        refusal = self.admission.refusal(port, len(self.table) - len(self._closing), proto, moves=moves)
        if tunnel is None and refusal is None:
            refusal = away
        if tunnel is None or refusal is not None:
            text = refusal or away
            self.kept.discard(client_id)
            self.link.send_message(ERROR, client_id, text.pack(), proto=proto)
            return text.code
        tunnel_id = tunnel.new_id()
        self.table.add(client_id, tunnel, tunnel_id)
        self.admission.count(len(self.table))
        tunnel.table.add(tunnel_id, self, client_id)
        tunnel.link.send_message(kind, tunnel_id, payload, proto=proto, port=port, urgent=True)
        return ""

    def end(self, kind: int, proto: int, client_id: int, payload: bytes) -> None:
        route = self.table.get(client_id)
        if route is None:
            return
        tunnel, tunnel_id = route
        told = client_id in self._closing
        if kind == CLOSE and tunnel.version == 1 and proto == PROTO_TCP and not told:
            timer = asyncio.get_running_loop().call_later(V1_REPLY, self._free_both, client_id)
            self._closing[client_id] = timer  # the service may have a reply to the end of its input
            if len(self._closing) > MOST_CLOSING:
                self._free_both(next(iter(self._closing)))
        else:
            self._free_both(client_id)
        if tunnel.version >= 2:
            tunnel.link.send_message(kind, tunnel_id, payload, proto=proto)
        elif not told:
            tunnel.link.send_message(CLOSE, tunnel_id, proto=proto)

    def free(self, client_id: int) -> bool:
        """The id names no stream any more; whether the reply to its CLOSE was still waited for."""
        waited = self._forget(client_id)
        self.freed()
        return waited

    def _forget(self, client_id: int) -> bool:
        """As `free`, before it is counted."""
        self.table.remove(client_id)
        self.ended.pop(client_id, None)
        self.kept.discard(client_id)
        timer = self._closing.pop(client_id, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def freed(self) -> None:
        self.admission.count(len(self.table))

    def _free_both(self, client_id: int) -> None:
        """Let go of a stream's two ids."""
        route = self.table.get(client_id)
        self.free(client_id)
        if route is not None:
            tunnel, tunnel_id = route
            tunnel.table.remove(tunnel_id)

    def ended_twice(self, client_id: int, target: TunnelLeg, other_id: int) -> bool:
        return self.note_end(client_id, self)

    def note_end(self, client_id: int, by: object) -> bool:
        """Of this session's stream, the leg ``by`` has sent EOF: whether both have now. A kept one ends by CLOSE."""
        if client_id in self.kept:
            return False
        others = self.ended.setdefault(client_id, by)
        if others is by:
            return False
        del self.ended[client_id]
        return True

    def lost(self, client_ids: list[int], reason: str) -> list[int]:
        """The tunnel of these streams is gone. The ids of kept ones are answered: their ends are still there."""
        kept: list[int] = []
        over: list[int] = []  # in one pass: thousands of streams go at once, while all other users wait
        for client_id in client_ids:
            (kept if client_id in self.kept else over).append(client_id)
            self._forget(client_id)
        self.freed()
        self.over(over, reason)
        return kept

    def over(self, client_ids: list[int], reason: str) -> None:
        """These streams have ended with the tunnel that they ran on."""
        text = _went_with(reason).pack()
        link = self.link
        if client_ids:
            link.send(b"".join(link.build_message(ERROR, each, text, proto=self.proto) for each in client_ids))

    def link_drained(self, link: Link) -> None:
        tunnel = self.owner.tunnel_of(self.container)
        if tunnel is not None:
            tunnel.link.intake.resume(self)

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        if self.paths is not None and self.is_straight:
            self.paths.straight_closed(self, len(self.kept))
        elif self.paths is not None:
            self.paths.through_closed(code, reason)
        self._leave(code)
        self.link_drained(link)
        self.on_closed()
        self.owner.session_closed(self)

    def let_go(self) -> int:
        streams = len(self.kept)
        if self._take_held() is not None:  # its stream is opened over the other link
            self.link.intake.release()
        if len(self.table):
            self._leave(CloseCode.SERVICE_RESTART)
            self.kept.clear()
        return streams

    def _leave(self, code: int) -> None:
        """No stream is on this link any more, as after its end with this code."""
        self._take_held()
        for client_id in list(self._closing):
            self._free_both(client_id)
        closing: dict[TunnelLeg, list[bytes]] = {}
        hold = pack_seconds(hold_after(code))
        kept: set[int] | frozenset[int] = frozenset() if code in SESSION_ENDED else self.kept
        for client_id, (tunnel, tunnel_id) in self.table.items():
            tunnel.table.remove(tunnel_id)
            last = (DETACH, tunnel_id, hold) if client_id in kept else (CLOSE, tunnel_id)
            closing.setdefault(tunnel, []).append(tunnel.link.build_message(*last, proto=self.proto))
        self.table = RoutingTable()
        self.freed()
        for tunnel, frames in closing.items():
            tunnel.link.send(b"".join(frames))  # at once: one system call each would keep everybody else waiting
