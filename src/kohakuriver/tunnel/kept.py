"""A stream that outlives its links, without I/O (docs/protocol.md §3, "Streams that outlive links").

It is a stream of version 2 besides. While it has no link (`detach`) its local socket is not read, and what was sent and
not acknowledged waits to be sent again over the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

from kohakuriver.tunnel.error_text import NOT_SENT
from kohakuriver.tunnel.protocol import (
    ACK,
    CLOSE,
    CONNECT,
    CONNECTED,
    DATA,
    EOF,
    ERROR,
    MARK,
    RESUMED,
    UNKNOWN_TOTAL,
    WINDOW,
    Attached,
    ErrorText,
    Resuming,
    pack_limit,
    pack_opening,
    pack_pair,
    parse_limit,
    parse_pair,
)
from kohakuriver.tunnel.states import KEPT, Do, Event, Role, State
from kohakuriver.tunnel.stream import PIECE, Action, Reading, Rules, Send, StreamCore, rows
from kohakuriver.tunnel.unacked import KeptWindow
from kohakuriver.tunnel.windows import Budget, ReceiveWindow

__all__ = ["Identity", "KeptCore", "accepted_kept", "opening_kept"]

_TABLES = {role: rows(table) for role, table in KEPT.items()}
_PAIRS = frozenset({WINDOW, CONNECTED, EOF})  # they say two numbers

# Members that each connection asks for, as in `stream.py`.
_WAITING, _READ, _OPENER = State.WAITING, Reading.ENDED, Role.OPENER
_ESTABLISHED, _LOCAL_EOF, _LOCAL_CLOSED = Event.ESTABLISHED, Event.LOCAL_EOF, Event.LOCAL_CLOSED
_REMOTE_EOF, _ACKED = Event.REMOTE_EOF, Event.ACKED


class Identity:
    """What a kept stream is known by, whatever link it is on.

    `key` and `mark` as in CONNECT, `hold` in seconds; `epoch` is that of its latest attachment.
    """

    __slots__ = ("epoch", "hold", "key", "mark", "port", "start")

    def __init__(self, key: bytes, hold: int, mark: bytes = b"", port: int = 0) -> None:
        self.key = key
        self.hold = hold
        self.mark = mark
        self.port = port
        self.epoch = 0
        self.start = b""  # what an opener has started, where that is a terminal

    def resuming(self, epoch: int, received: int, limit: int, total: int) -> bytes:
        """The payload of RESUME."""
        self.epoch = epoch
        return Resuming(self.key, epoch, received, limit, total).pack()

    @property
    def name(self) -> bytes:
        """What an acceptor knows it by: one user's key is never another's."""
        return self.mark + self.key


class KeptCore(StreamCore):
    """One TCP stream that outlives its links.

    Large because what each end has, what is sent and what comes change the same few numbers.

    The peer's messages, all but DATA, PONG and ERROR, come in by `take`. `detach` says that the link is gone. An opener
    is there again once it takes RESUMED, which answers what `resuming` says; an acceptor with `resume`.
    """

    __slots__ = (
        "_acked",
        "_eof_came",
        "_eof_owed",
        "_eof_sent",
        "_last_word",
        "_most",
        "_told",
        "attached",
        "error",
        "identity",
        "unacked",
    )

    sending: KeptWindow

    def __init__(self, rules: Rules, identity: Identity) -> None:
        super().__init__(rules, KeptWindow(rules.store))
        self._table = _TABLES[rules.role]
        self.identity = identity
        self.unacked = self.sending.unacked
        self.owing = False  # something came that the peer was not told of, and it is noted that it will be
        self.attached = False  # there is a link, and both ends know it
        self.error = b""  # the ERROR that ended it
        self._told = 0
        self._acked = 0  # the peer's `received`
        self._most = 0  # the offset up to which anything went out over links that are gone
        self._eof_came = False
        self._eof_sent = False
        self._eof_owed = False  # it went out over a link that is gone, and did not arrive
        self._last_word: tuple[Event, bytes] | None = None  # how its local socket went while there was no link

    def speak(self, version: int) -> None:
        """Kept streams are those of version 2."""
        self.inbound.close()
        self.inbound = ReceiveWindow(self._rules.budget, self._rules.opener(self.identity.key))

    # -- what each end has -------------------------------------------------------------------------------------

    @property
    def received(self) -> int:
        """How much has arrived here; the end-of-file counts as one byte."""
        return self.inbound.received + self._eof_came

    @property
    def total(self) -> int:
        """The length of our direction, once it has ended."""
        return self.sending.unacked.end if self._eof_sent else UNKNOWN_TOTAL

    @property
    def acked(self) -> int:
        """How much the peer is known to have; the end-of-file counts as one byte."""
        return self._acked

    @property
    def unanswered(self) -> bool:
        """Whether the peer owes an acknowledgement, or its word that the stream goes on."""
        return not self.attached or self.sending.sent + self._eof_sent > self._acked

    @property
    def size(self) -> int:
        """How much memory (bytes) takes what it holds: for its peer, and for its local socket."""
        return self.sending.unacked.memory + self.held

    def attachment(self, *, over: bool = False) -> bytes:
        """The payload of RESUMED. Where the stream is `over`, no more is granted than has come."""
        self._told = self.received
        return Attached(self._told, self._told if over else self.inbound.granted or 0, self.total).pack()

    def _acknowledged(self, received: int, sent: int) -> bool:
        """The peer has so much, of what we have `sent`; False if that can't be."""
        if received <= self._acked:
            return True
        window = self.sending
        unacked = window.unacked
        end = unacked.end
        if received > sent + (self._eof_sent and sent == end):
            return False
        self._acked = received
        unacked.ack(received if received < end else end)
        if window.limit < window.granted:  # else it may send all that it was granted
            window.renew()
        return True

    def _settle(self) -> Sequence[Action]:
        """An acceptor is through once the peer has all, the end-of-file included (rule 4)."""
        if not self._eof_sent or self._rules.role is _OPENER:
            return ()
        if self._acked <= self.sending.unacked.end or not self._step(_ACKED):
            return ()
        return (Send(CLOSE, late=True),)

    # -- links come and go -------------------------------------------------------------------------------------

    @property
    def leaving(self) -> bool:
        """Whether it is over here, and is kept to tell the other end so (rule 7)."""
        return self._last_word is not None and not self.state.gone

    def local_lost(self, error: bytes | None = None) -> Sequence[Action]:
        """An opener says it once both ends know of a link: the other one would hold the stream for nothing."""
        event = _LOCAL_CLOSED if error is None else Event.LOCAL_ERROR
        self.error = self.error or error or b""
        if self.attached or self._rules.role is not _OPENER or self.state not in _KNOWN_THERE:
            return super().local_lost(error)
        if self._last_word is None:
            self._last_word = event, error or b""
            self.sending.unacked.clear()
        return () if error is None else (Do.RESET_LOCAL,)

    def _takes_leave(self, event: Event, error: bytes) -> Sequence[Action]:
        self.attached = True
        return [action for action in self._step(event, error) if isinstance(action, Send)]

    def link(self, version: int) -> Sequence[Action]:
        self.attached = True
        return super().link(version)

    def detach(self) -> None:
        """The link is gone; the stream is not."""
        self.attached = self.owing = False
        self._most = max(self._most, self.sending.sent)
        self._eof_owed = self._eof_sent
        if isinstance(self.inbound, ReceiveWindow):
            self.inbound.unanswered()
            if self._rules.role is Role.ACCEPTOR:
                self.inbound.detach()

    def resuming(self, epoch: int) -> bytes:
        """The payload of the RESUME that attaches it to another link."""
        self._told = self.received
        return self.identity.resuming(epoch, self._told, self.inbound.granted or 0, self.total)

    def resume(self, asked: Resuming, budget: Budget) -> Sequence[Action]:
        """An acceptor was asked to go on over another link, whose windows come out of `budget`."""
        self.identity.epoch = asked.epoch
        if isinstance(self.inbound, ReceiveWindow):
            self.inbound.attach(budget)
        owed = self._go_on(asked.received, asked.limit)
        return self.broken() if owed is None else [Send(RESUMED, self.attachment()), *owed, *self.flush()]

    def _resumed(self, there: Attached) -> Sequence[Action]:
        if self._last_word is not None:
            return self._takes_leave(*self._last_word)
        self.sending.granted = 0  # what was granted over links that are gone holds no longer
        owed = self._go_on(there.received, there.limit)
        return self.broken() if owed is None else [*self._step(_ESTABLISHED), *owed, *self.flush()]

    def _go_on(self, received: int, limit: int) -> Sequence[Action] | None:
        """Go on from what the peer has; None if it can't have that."""
        window = self.sending
        if received < self._acked or not self._acknowledged(received, max(self._most, window.sent)):
            return None
        self.attached = True
        window.sent = min(received, window.unacked.end)
        self._eof_owed = self._eof_sent and received <= window.unacked.end
        window.raise_to(limit)
        return self._settle()

    def opens_again(self, key: bytes) -> bool:
        """The CONNECT was lost: whether the stream may be opened once more, under another key (rule 6)."""
        if self.state not in _OPENING or self.received or self._acked or self.leaving:
            return False
        self.detach()
        self.identity.key, self.identity.epoch = key, 0
        self.sending.sent = self._most = 0
        self._eof_sent = self._eof_owed = False
        self.state = _WAITING
        return True

    def unkept(self) -> StreamCore:
        """The same stream, which has no link yet and gets one that keeps none."""
        core, unacked = StreamCore(self._rules), self.sending.unacked
        core.reading = self.reading
        core.early = unacked.read(unacked.start, len(unacked))  # all of it, as nothing was sent
        unacked.clear()
        return core

    def end(self, text: ErrorText) -> Sequence[Action]:
        """It is held no longer, or the right to it is gone."""
        if self.state.gone:
            return ()
        self.error = text.pack()
        return [Send(ERROR, self.error), *self._step(Event.LINK_LOST)]

    def broken(self) -> Sequence[Action]:
        """The peer claims what can't be."""
        return self.end(NOT_SENT)

    # -- messages ----------------------------------------------------------------------------------------------

    def take(self, kind: int, payload: bytes) -> Sequence[Action]:
        """A message of the peer: CONNECTED, RESUMED, WINDOW, ACK, EOF or CLOSE; any other is ignored."""
        if kind == ACK:
            received = parse_limit(payload)
            return () if received is None else self._ack(received)
        if kind in _PAIRS:
            pair = parse_pair(payload)
            if pair is None:
                return ()
            return self._ended(*pair) if kind == EOF else self._granted(kind, *pair)
        if kind == RESUMED:
            there = Attached.parse(payload)
            return () if there is None or self.attached else self._resumed(there)
        return self.remote_close() if kind == CLOSE else ()

    def _ack(self, received: int) -> Sequence[Action]:
        if not self.attached:
            return ()
        if received > self._acked and not self._acknowledged(received, self.sending.sent):
            return self.broken()
        return self._settle() if self._eof_sent else ()

    def _granted(self, kind: int, limit: int, received: int) -> Sequence[Action]:
        """CONNECTED or WINDOW."""
        settled = self._ack(received)
        if not self.attached or self.state.gone:
            return settled
        self.sending.raise_to(limit)
        return [*self._step(_ESTABLISHED), *self.flush()] if kind == CONNECTED else settled

    def _ended(self, total: int, received: int) -> Sequence[Action]:
        """EOF."""
        settled = self._ack(received)
        if not self.attached or self.state.remote_done:
            return settled
        if total != self.received:
            return self.broken()
        self._eof_came = True
        return [*self._step(_REMOTE_EOF), *self._settle()]

    # -- what is sent ------------------------------------------------------------------------------------------

    @property
    def waits(self) -> int:
        window = self.sending
        return window.unacked.end - window.sent

    @property
    def unsent(self) -> bool:
        return self.sending.unacked.end > self.sending.sent or (
            self._eof_owed if self._eof_sent else self.reading is _READ and not self.state.local_done
        )

    @property
    def may_send(self) -> bool:
        if not self.attached or self.state.gone:
            return False
        return self.sending.room > 0 if self.waits else self._eof_owed

    def passes(self, size: int) -> bool:
        window = self.sending
        if window.sent != window.unacked.end or self.state.local_done or window.limit - window.sent < size:
            return False
        if not self.attached:
            return False
        window.sent += size
        return True

    def local_data(self, data: bytes | memoryview) -> Sequence[Action]:
        if not self.state.local_done:
            self.sending.unacked.add(data)
        return self.flush()

    def flush(self) -> Sequence[Action]:
        """Send what waits, as far as the window goes: one message of it, and the end-of-file where that was all."""
        if not self.attached or self.state.gone or self.state is _WAITING:
            return ()
        window = self.sending
        sent = window.sent
        waiting = window.unacked.end - sent
        if not waiting:
            return self._end_of_file() if self.reading is _READ else ()
        size = min(waiting, window.limit - sent, PIECE)
        if size <= 0:
            return ()
        data = Send(DATA, window.unacked.read(sent, size))
        window.sent = sent + size
        return (data,) if size < waiting else (data, *self._end_of_file())

    def _end_of_file(self) -> Sequence[Action]:
        if self._eof_owed:
            self._eof_owed = False
            return (Send(EOF, self._payload(EOF)),)
        if self.reading is not _READ or self.state.local_done:
            return ()
        owed = self._step(_LOCAL_EOF)
        self._eof_sent = self.state.local_done
        return owed

    def announcement(self, limit: int) -> bytes:
        self._told = self.received
        return pack_pair(limit, self._told)

    def acknowledgement(self) -> bytes:
        """The payload of the ACK that is owed; none where the peer was told meanwhile."""
        self.owing = False
        return b"" if self._told == self.received or not self.attached else self._payload(ACK)

    def _payload(self, kind: int) -> bytes:
        granted = self.inbound.granted or 0
        if kind == CONNECT:
            identity = self.identity
            opening = pack_opening(granted, identity.key, identity.hold)
            return opening + bytes(MARK) + identity.start if identity.start else opening
        if kind == CONNECTED:
            return self.announcement(granted)
        self._told = self.received
        if kind == EOF:
            return pack_pair(self.sending.unacked.end, self._told)
        return pack_limit(self._told) if kind == ACK else b""

    def _gone(self) -> None:
        self.sending.unacked.clear()


_OPENING = frozenset({State.OPENING, State.OPENING_LOCAL_ENDED})
_KNOWN_THERE = frozenset(state for state in State if (state, Event.REMOTE_CLOSE) in KEPT[_OPENER]) - {State.ENDED}


def opening_kept(rules: Rules, identity: Identity, before: StreamCore) -> KeptCore:
    """The stream of a local connection that began while there was no link, and is to be kept now."""
    core = KeptCore(rules, identity)
    core.reading = before.reading
    core.sending.unacked.add(before.early)
    return core


def accepted_kept(rules: Rules, identity: Identity, limit: int) -> KeptCore:
    """The stream of a CONNECT that came, with its limit (bytes)."""
    core = KeptCore(rules, identity)
    core.state = State.OPENING
    core.attached = True
    core.speak(2)
    core.sending.raise_to(limit)
    return core
