"""What a TCP stream does in which state, as tables: docs/protocol.md §3, tests/vectors/states.json.

A pair of state and event that has no row changes nothing and does nothing: it is the peer's mistake, or too late.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

__all__ = ["KEPT", "TRANSITIONS", "Do", "Event", "Role", "State", "Step"]


class _Member(enum.Enum):
    """Members that are found in tables without a call of Python's."""

    __hash__ = object.__hash__


class Role(_Member):
    """Which end of a stream: the user's opens it, the container's accepts it and dials."""

    OPENER = "opener"
    ACCEPTOR = "acceptor"


class State(_Member):
    """Where a stream is. "Local" is this end's socket, "remote" the other end of the stream.

    ``local_done`` and ``remote_done`` say whether nothing more is taken from that side, ``gone`` whether the stream is
    over on the wire: its id may be another's.
    """

    WAITING = "waiting"  # an opener has no link yet
    OPENING = "opening"  # CONNECT is on its way, or the acceptor dials
    OPENING_LOCAL_ENDED = "opening_local_ended"
    OPENING_REMOTE_ENDED = "opening_remote_ended"
    OPEN = "open"
    LOCAL_ENDED = "local_ended"
    REMOTE_ENDED = "remote_ended"
    HALF_CLOSED = "half_closed"  # v1: CLOSE is sent, and what the peer still says is taken
    ENDED = "ended"  # kept: both sides have ended, and one of them may not know it yet
    DELIVERING = "delivering"  # over on the wire; the local socket still gets what is queued
    OVER = "over"

    local_done: bool
    remote_done: bool
    gone: bool

    def __init__(self, name: str) -> None:
        self.gone = name in ("delivering", "over")
        self.local_done = self.gone or name.endswith("local_ended") or name in ("half_closed", "ended")
        self.remote_done = self.gone or name.endswith("remote_ended") or name == "ended"


class Event(_Member):
    """What can happen to a stream."""

    LINK = "link"  # there is a link now
    ESTABLISHED = "established"  # CONNECTED came, or the acceptor's dial succeeded
    LOCAL_EOF = "local_eof"  # the local socket read end-of-file, and all before it is sent
    REMOTE_EOF = "remote_eof"
    REMOTE_CLOSE = "remote_close"
    REMOTE_ERROR = "remote_error"
    LOCAL_CLOSED = "local_closed"
    LOCAL_ERROR = "local_error"  # the local socket broke, or could not be dialled
    LINGER_OVER = "linger_over"  # v1: nothing moved for the linger time
    LINK_LOST = "link_lost"  # while WAITING: none came in time; kept: it is not held any longer
    ACKED = "acked"  # kept: the peer is known to have our EOF


class Do(_Member):
    """What a stream has its surroundings do. The last five are not in the tables: they follow from what is held."""

    SEND_CONNECT = "send_connect"
    SEND_CONNECTED = "send_connected"
    SEND_EOF = "send_eof"
    SEND_CLOSE = "send_close"
    SEND_ERROR = "send_error"
    SEND_ACK = "send_ack"
    SHUT_LOCAL = "shut_local"  # shut down the local socket's write side once all that is queued is written
    CLOSE_LOCAL = "close_local"  # close it once all that is queued is written
    RESET_LOCAL = "reset_local"  # reset it at once
    LINGER = "linger"  # v1: begin to wait for the linger time
    PAUSE_LOCAL = "pause_local"  # read no more from the local socket
    RESUME_LOCAL = "resume_local"
    HOLD_LINK = "hold_link"  # v1: read no more from the link
    FREE_LINK = "free_link"
    END_SESSION = "end_session"  # more came than was granted


class Step(NamedTuple):
    """One row: the state after it, and what is done, in this order."""

    to: State
    do: tuple[Do, ...] = ()


Table = dict[tuple[State, Event], Step]
_S, _E, _D = State, Event, Do

_WAITING: Table = {
    (_S.WAITING, _E.LINK): Step(_S.OPENING, (_D.SEND_CONNECT,)),
    (_S.WAITING, _E.LINK_LOST): Step(_S.OVER, (_D.RESET_LOCAL,)),
    (_S.WAITING, _E.LOCAL_CLOSED): Step(_S.OVER),
    (_S.WAITING, _E.LOCAL_ERROR): Step(_S.OVER, (_D.RESET_LOCAL,)),
}
_DELIVERING: Table = {
    (_S.DELIVERING, _E.LOCAL_CLOSED): Step(_S.OVER),
    (_S.DELIVERING, _E.LOCAL_ERROR): Step(_S.OVER, (_D.RESET_LOCAL,)),
}
_V2_EOF: Table = {
    (_S.OPENING, _E.LOCAL_EOF): Step(_S.OPENING_LOCAL_ENDED, (_D.SEND_EOF,)),
    (_S.OPENING, _E.REMOTE_EOF): Step(_S.OPENING_REMOTE_ENDED, (_D.SHUT_LOCAL,)),
    (_S.OPEN, _E.LOCAL_EOF): Step(_S.LOCAL_ENDED, (_D.SEND_EOF,)),
    (_S.OPEN, _E.REMOTE_EOF): Step(_S.REMOTE_ENDED, (_D.SHUT_LOCAL,)),
    (_S.LOCAL_ENDED, _E.REMOTE_EOF): Step(_S.DELIVERING, (_D.CLOSE_LOCAL,)),
    (_S.REMOTE_ENDED, _E.LOCAL_EOF): Step(_S.DELIVERING, (_D.SEND_EOF, _D.CLOSE_LOCAL)),
}
# Version 1 has no EOF: CLOSE goes out once neither side has had data for the linger time.
_V1_EOF: Table = {
    (_S.OPENING, _E.LOCAL_EOF): Step(_S.OPENING_LOCAL_ENDED, (_D.LINGER,)),
    (_S.OPEN, _E.LOCAL_EOF): Step(_S.LOCAL_ENDED, (_D.LINGER,)),
}
# A tunnel client answers it with what the service says to the end of its input, and with its own CLOSE. When that does
# not come either, a second CLOSE tells the relays that nobody waits any more.
_V1_OPENER: Table = {
    (_S.OPENING_LOCAL_ENDED, _E.LINGER_OVER): Step(_S.HALF_CLOSED, (_D.SEND_CLOSE, _D.LINGER)),
    (_S.LOCAL_ENDED, _E.LINGER_OVER): Step(_S.HALF_CLOSED, (_D.SEND_CLOSE, _D.LINGER)),
    (_S.HALF_CLOSED, _E.LINGER_OVER): Step(_S.DELIVERING, (_D.SEND_CLOSE, _D.CLOSE_LOCAL)),
}
_V1_ACCEPTOR: Table = {
    (_S.LOCAL_ENDED, _E.LINGER_OVER): Step(_S.DELIVERING, (_D.SEND_CLOSE, _D.CLOSE_LOCAL)),
}


def _established(alive: tuple[State, ...], do: tuple[Do, ...]) -> Table:
    ways = (
        (_S.OPENING, _S.OPEN),
        (_S.OPENING_LOCAL_ENDED, _S.LOCAL_ENDED),
        (_S.OPENING_REMOTE_ENDED, _S.REMOTE_ENDED),
    )
    return {(state, _E.ESTABLISHED): Step(to, do) for state, to in ways if state in alive}


def _ends(state: State, echo: tuple[Do, ...]) -> Table:
    """How a stream ends that is known at the other end. ``echo``: v1 peers keep their entry until they get a CLOSE."""
    return {
        (state, _E.LOCAL_CLOSED): Step(_S.OVER, (_D.SEND_CLOSE,)),
        (state, _E.LOCAL_ERROR): Step(_S.OVER, (_D.SEND_ERROR, _D.RESET_LOCAL)),
        (state, _E.LINK_LOST): Step(_S.OVER, (_D.RESET_LOCAL,)),
        (state, _E.REMOTE_CLOSE): Step(_S.DELIVERING, (*echo, _D.CLOSE_LOCAL)),
        (state, _E.REMOTE_ERROR): Step(_S.OVER, (*echo, _D.RESET_LOCAL)),
    }


def _table(role: Role, alive: tuple[State, ...], echo: tuple[Do, ...], *own: Table) -> Table:
    opens = role is Role.OPENER
    table = _established(alive, () if opens else (_D.SEND_CONNECTED,)) | _DELIVERING | (_WAITING if opens else {})
    for state in alive:
        table |= _ends(state, echo)
    for rows in own:
        table |= rows
    return table


_V2 = (_S.OPENING, _S.OPENING_REMOTE_ENDED, _S.OPEN, _S.LOCAL_ENDED, _S.REMOTE_ENDED)
_V1 = (_S.OPENING, _S.OPEN, _S.LOCAL_ENDED)
_OPENS_ENDED = (_S.OPENING_LOCAL_ENDED,)  # an acceptor reads nothing from its service before the dial has succeeded

# By protocol version and role.
TRANSITIONS: dict[tuple[int, Role], Table] = {
    (2, Role.OPENER): _table(Role.OPENER, _V2 + _OPENS_ENDED, (), _V2_EOF),
    (2, Role.ACCEPTOR): _table(Role.ACCEPTOR, _V2, (), _V2_EOF),
    (1, Role.OPENER): _table(
        Role.OPENER, _V1 + _OPENS_ENDED, (_D.SEND_CLOSE,), _V1_EOF, _V1_OPENER, _ends(_S.HALF_CLOSED, ())
    ),
    (1, Role.ACCEPTOR): _table(Role.ACCEPTOR, _V1, (_D.SEND_CLOSE,), _V1_EOF, _V1_ACCEPTOR),
}

# Kept streams: one whose both sides have ended is over when the acceptor knows that its own end has arrived; it says so
# with CLOSE. What becomes of the local socket by then is no longer the peer's business.
_V2_ENDS = {(_S.LOCAL_ENDED, _E.REMOTE_EOF), (_S.REMOTE_ENDED, _E.LOCAL_EOF)}
_KEPT_EOF: Table = {at: step for at, step in _V2_EOF.items() if at not in _V2_ENDS} | {
    (_S.REMOTE_ENDED, _E.LOCAL_EOF): Step(_S.ENDED, (_D.SEND_EOF, _D.CLOSE_LOCAL)),
    (_S.ENDED, _E.REMOTE_CLOSE): Step(_S.DELIVERING),
    (_S.ENDED, _E.REMOTE_ERROR): Step(_S.OVER, (_D.RESET_LOCAL,)),
    (_S.ENDED, _E.LINK_LOST): Step(_S.OVER, (_D.RESET_LOCAL,)),
}
_KEPT_OPENER: Table = {(_S.LOCAL_ENDED, _E.REMOTE_EOF): Step(_S.ENDED, (_D.SEND_ACK, _D.CLOSE_LOCAL))}
_KEPT_ACCEPTOR: Table = {
    (_S.LOCAL_ENDED, _E.REMOTE_EOF): Step(_S.ENDED, (_D.CLOSE_LOCAL,)),
    (_S.ENDED, _E.ACKED): Step(_S.DELIVERING, (_D.SEND_CLOSE,)),
}

# By role.
KEPT: dict[Role, Table] = {
    Role.OPENER: _table(Role.OPENER, _V2 + _OPENS_ENDED, (), _KEPT_EOF, _KEPT_OPENER),
    Role.ACCEPTOR: _table(Role.ACCEPTOR, _V2, (), _KEPT_EOF, _KEPT_ACCEPTOR),
}
