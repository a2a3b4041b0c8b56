"""A TCP stream without I/O: bytes and events go in, what is owed comes out.

It knows no socket, no link, no id and no clock: whoever has those (`local_socket.py`) tells it what happened and does
what it answers. So a stream lives apart from the link that carries it, and every rule can be tested by itself.
docs/protocol.md §2–§3; the states are in `states.py`, the windows in `windows.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from kohakuriver.tunnel.protocol import ACK, CLOSE, CONNECT, CONNECTED, DATA, EOF, ERROR, OPENER, PING, pack_limit
from kohakuriver.tunnel.states import TRANSITIONS, Do, Event, Role, State, Step, Table
from kohakuriver.tunnel.unacked import Store, Unacked
from kohakuriver.tunnel.v1_rules import V1Rules
from kohakuriver.tunnel.windows import EARLY_DATA, UNLIMITED, Budget, ReceiveWindow, SendWindow

__all__ = ["PIECE", "Action", "Reading", "Rows", "Rules", "Send", "StreamCore", "accepted", "rows"]

PIECE = 256 * 1024  # the most that one message carries of what waited here


class Send(NamedTuple):
    """A message of the stream: its type and its payload. `late`: it comes last, and nobody waits for it."""

    kind: int
    payload: bytes = b""
    late: bool = False


Action = Send | Do
# `Send` of all three at once: a tuple with names is made by a call of Python's, several times for each connection.
_send: Callable[[tuple[int, bytes, bool]], Send] = partial(tuple.__new__, Send)
_PING = Send(PING)
_MESSAGES: dict[Do, Send] = {
    Do.SEND_CONNECT: Send(CONNECT),
    Do.SEND_CONNECTED: Send(CONNECTED),
    Do.SEND_ERROR: Send(ERROR),
    Do.SEND_EOF: Send(EOF),
    Do.SEND_CLOSE: Send(CLOSE),
    Do.SEND_ACK: Send(ACK, late=True),
}
_GRANTS = frozenset({CONNECT, CONNECTED})  # their payload is the first limit


class _Row(NamedTuple):
    """A row of the tables: what is done is a message and the rest, and only the message may need a payload."""

    to: State
    message: Send | None
    rest: tuple[Action, ...]
    whole: tuple[Action, ...]


def _row(step: Step) -> _Row:
    actions = tuple(_MESSAGES.get(do, do) for do in step.do)
    message = actions[0] if actions and isinstance(actions[0], Send) else None
    return _Row(step.to, message, actions[1:], actions)


Rows = dict[tuple[State, Event], _Row]


def rows(table: Table) -> Rows:
    """A table as a stream uses it."""
    return {at: _row(step) for at, step in table.items()}


_TABLES = {key: rows(table) for key, table in TRANSITIONS.items()}


class Reading(enum.Enum):
    """What the local socket's reading is doing."""

    SETTLING = "settling"  # it can't be paused yet
    FLOWING = "flowing"
    PAUSED = "paused"
    ENDED = "ended"  # end-of-file was read; what came before it may still wait here


# Members that each connection asks for: before Python 3.12 a class of them takes longer to find one than a dict does.
_WAITING, _OPENING = State.WAITING, State.OPENING
_SETTLING, _FLOWING, _PAUSED, _READ = Reading.SETTLING, Reading.FLOWING, Reading.PAUSED, Reading.ENDED
_LINK, _ESTABLISHED, _LOCAL_EOF, _LOCAL_CLOSED = Event.LINK, Event.ESTABLISHED, Event.LOCAL_EOF, Event.LOCAL_CLOSED
_REMOTE_EOF, _REMOTE_CLOSE = Event.REMOTE_EOF, Event.REMOTE_CLOSE
_RESUME_LOCAL, _PAUSE_LOCAL = Do.RESUME_LOCAL, Do.PAUSE_LOCAL


@dataclass(frozen=True)
class Rules:
    """What all streams of one endpoint share.

    Their role, the budget of their windows, version 1's settings, and where what is kept lies.
    """

    role: Role
    budget: Budget
    v1: V1Rules
    store: Store = field(default_factory=Store)

    def opener(self, key: bytes | None) -> bytes | None:
        """What tells the process that opened a stream of this key: all that are opened here are one process's."""
        if self.role is Role.OPENER:
            return b""
        return None if key is None else key[:OPENER]


class StreamCore:
    """One TCP stream: its state, its windows, and what was read before it could be sent.

    Large because it has a method for each event, and what its kept kind does otherwise.

    Methods named after an event return what is to be done, in this order: messages to send, and what becomes of the
    local socket. Afterwards `flow` says whether that is to be read.

    DATA goes a fast way on which nothing is allocated: `passes` says that bytes read from the local socket may be sent
    as they lie, `arrive` and `consumed` only count those that the peer sent. `local_data` is the slow way, for bytes
    that have to wait.

    Args:
        rules: what it has in common with the other streams of its end.
        sending: its window to the peer, for streams that have one of another kind.
    """

    __slots__ = ("_rules", "_table", "early", "held", "inbound", "moved_at", "owing", "reading", "sending", "state")

    # What a kept stream has: the bytes that it may have to send again, and whether both ends know its link.
    unacked: Unacked | None = None
    attached: bool = True

    def __init__(self, rules: Rules, sending: SendWindow | None = None) -> None:
        self._rules = rules
        self.state = _WAITING
        self.sending = sending or SendWindow()
        self.reading = _SETTLING
        self.early = b""  # read from the local socket and not sent
        self.held = 0  # bytes received that the local socket has not taken
        self.moved_at = 0.0  # when the peer's bytes last came
        self.owing = True  # a kept one: it is noted that it owes an ACK; others owe none, and nothing is to be noted
        self.inbound: ReceiveWindow | V1Rules = rules.v1
        self._table: Rows = _TABLES[1, rules.role]

    def speak(self, version: int) -> None:
        """Go by the rules of ``version`` from now on."""
        rules = self._rules
        self.inbound.close()
        self.inbound = ReceiveWindow(rules.budget, rules.opener(None)) if version >= 2 else rules.v1
        self._table = _TABLES[min(version, 2), rules.role]

    # -- events ------------------------------------------------------------------------------------------------

    def link(self, version: int) -> Sequence[Action]:
        """There is a link that speaks ``version``: CONNECT, and what was read before."""
        if self.state is not _WAITING:
            return ()
        self.speak(version)
        self.sending.raise_to(EARLY_DATA if version >= 2 else UNLIMITED)
        return [*self._step(_LINK), *self.flush()]

    def connected(self, limit: int | None) -> Sequence[Action]:
        """CONNECTED came, with the peer's limit (bytes); None: it runs the stream under version 1's rules."""
        if (self.state, _ESTABLISHED) not in self._table:
            return ()
        late: tuple[Action, ...] = ()
        if limit is None and isinstance(self.inbound, ReceiveWindow):
            if self.state is State.OPENING_REMOTE_ENDED:
                return ()  # it has sent EOF, which version 1 has not
            self.speak(1)
            late = (Do.LINGER,) if self.state is State.OPENING_LOCAL_ENDED else ()  # our EOF told it nothing
        self.sending.raise_to(UNLIMITED if limit is None else limit)
        return [*self._step(_ESTABLISHED), *late, *self.flush()]

    def dialled(self) -> Sequence[Action]:
        """The acceptor's dial succeeded."""
        return [*self._step(_ESTABLISHED), *self.flush()]

    def local_data(self, data: bytes | memoryview) -> Sequence[Action]:
        """Bytes of the local side: sent as far as there is room, the rest waits."""
        if not self.state.local_done:
            self.early += data
        return self.flush()

    def local_eof(self) -> Sequence[Action]:
        """The local socket read end-of-file."""
        self.reading = _READ
        return self.flush()

    def flush(self) -> Sequence[Action]:
        """Send what waits, as far as the window goes, and the end-of-file behind it."""
        if self.state is _WAITING or self.state.local_done:
            return ()
        owed: list[Action] = []
        while self.early and self.sending.room > 0:
            size = min(len(self.early), self.sending.room, PIECE)
            owed.append(Send(DATA, self.early[:size]))
            self.early = self.early[size:]
            self.sending.spend(size)
        if self.reading is _READ and not self.early:
            owed += self._step(_LOCAL_EOF)
        return owed

    def local_lost(self, error: bytes | None = None) -> Sequence[Action]:
        """The local socket is gone; ``error``: it broke, or could not be dialled, and that is what the peer is told."""
        return self._step(_LOCAL_CLOSED if error is None else Event.LOCAL_ERROR, error or b"")

    def remote_eof(self) -> Sequence[Action]:
        """The peer sends no more."""
        return self._step(_REMOTE_EOF)

    def remote_close(self) -> Sequence[Action]:
        """CLOSE came: what is queued is still delivered."""
        return self._step(_REMOTE_CLOSE)

    def remote_error(self) -> Sequence[Action]:
        """ERROR came."""
        return self._step(Event.REMOTE_ERROR)

    def link_lost(self) -> Sequence[Action]:
        """The link is gone, or none came in time."""
        return self._step(Event.LINK_LOST)

    def linger_begins(self, now: float) -> float:
        """LINGER was asked for: how many seconds to wait before `linger_left` is asked."""
        self.moved_at = now
        return self.linger_left(now)

    def linger_left(self, now: float) -> float:
        """v1: how many seconds to wait before `linger_over`, since data that comes makes a linger begin anew."""
        return self.inbound.linger_left(self.moved_at, now) if isinstance(self.inbound, V1Rules) else 0.0

    def linger_over(self) -> Sequence[Action]:
        """v1: nothing has moved for the linger time."""
        return self._step(Event.LINGER_OVER)

    def pong(self, now: float) -> int | None:
        """The answer to this stream's PING; a new limit if there is one to announce."""
        return None if self.state.gone else self.inbound.pong(now)

    # -- the fast way ------------------------------------------------------------------------------------------

    def passes(self, size: int) -> bool:
        """Whether ``size`` bytes just read may be sent at once, behind all that were read before; they then count."""
        window = self.sending
        if self.early or self.state.local_done or window.limit - window.sent < size:
            return False
        window.spend(size)
        return True

    def arrive(self, size: int, now: float) -> Action | None:
        """``size`` bytes came from the peer and are held from now on: perhaps a PING is due. END_SESSION: too many."""
        inbound = self.inbound
        self.held += size
        self.moved_at = now
        if not inbound.receive(size):
            self.held -= size
            return Do.END_SESSION
        if self.state is not _OPENING and inbound.wants_ping(now):
            return _PING
        return None

    @property
    def waits(self) -> int:
        """Bytes that were read from the local socket and not sent."""
        return len(self.early)

    @property
    def unsent(self) -> bool:
        """Whether `flush` has anything to send, once the window and the link have room."""
        return bool(self.early) or (self.reading is _READ and not self.state.local_done)

    @property
    def may_send(self) -> bool:
        """Whether `flush` would send more, once the link has taken what it sent last."""
        return False

    def announcement(self, limit: int) -> bytes:
        """The payload of the WINDOW that tells of a new limit."""
        return pack_limit(limit)

    def consumed(self, size: int) -> int | None:
        """The local socket took ``size`` bytes; a new limit if it is time to announce one."""
        self.held -= size
        limit = self.inbound.consume(size)
        return None if self.state.remote_done else limit

    # -- reading -----------------------------------------------------------------------------------------------

    def begins(self, blocked: bool) -> bool:
        """Reading of the local socket begins. False where it is to be paused: once it can be, which `settled` says."""
        may = self._may_read(blocked)
        if may and self.reading is _SETTLING:
            self.reading = _FLOWING
        return may

    def settled(self) -> None:
        """The local socket can be paused from now on."""
        if self.reading is _SETTLING:
            self.reading = _FLOWING

    def _may_read(self, blocked: bool) -> bool:
        window = self.sending
        return not blocked and self.state is not _WAITING and self.attached and window.limit > window.sent

    def flow(self, blocked: bool) -> Do | None:
        """Whether the local socket is to be read, now that its link is ``blocked`` or not: only what can be sent is."""
        reading = self.reading
        if reading is _SETTLING or reading is _READ or self.state.local_done:
            return None
        may = self._may_read(blocked)
        if may == (reading is _FLOWING):
            return None
        self.reading = _FLOWING if may else _PAUSED
        return _RESUME_LOCAL if may else _PAUSE_LOCAL

    def link_reading(self) -> Do | None:
        """v1: what becomes of the link's reading with what is held (§3 rule 6)."""
        return self.inbound.link_reading(self.held) if isinstance(self.inbound, V1Rules) else None

    def drop(self) -> None:
        """Nothing more is delivered: what was held no longer holds anybody up."""
        self.held = 0
        self.inbound.close()

    # -- the tables --------------------------------------------------------------------------------------------

    def _step(self, event: Event, text: bytes = b"") -> Sequence[Action]:
        row = self._table.get((self.state, event))
        if row is None:
            return ()
        to, message, rest, whole = row
        before, self.state = self.state, to
        if to.gone and not before.gone:
            self._gone()
            if not self.held:
                self.inbound.close()  # else once it has delivered, so that what it holds stays paid for
        if message is None:
            return whole
        kind, _, late = message
        payload = text or self._payload(kind)
        return (_send((kind, payload, late)), *rest) if payload else whole

    def _payload(self, kind: int) -> bytes:
        """What a message of this type says, but for an ERROR's text."""
        return pack_limit(self.inbound.granted) if kind in _GRANTS and self.inbound.granted is not None else b""

    def _gone(self) -> None:
        """Nothing is sent any more."""
        self.early = b""


def accepted(rules: Rules, limit: int | None) -> StreamCore:
    """The stream of a CONNECT that came, with its limit (bytes) or, from a peer of version 1, none."""
    core = StreamCore(rules)
    core.state = _OPENING
    core.speak(1 if limit is None else 2)
    core.sending.raise_to(UNLIMITED if limit is None else limit)
    return core
