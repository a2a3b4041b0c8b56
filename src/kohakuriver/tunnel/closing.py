"""How far the end of one WebSocket has come: its closing handshake (RFC 6455 §5.5.1, §7). Sans-I/O.

Whoever has the WebSocket asks what an event means (`begin`, `fail`, `peer_closes`, …), and sends what has to be sent.
"""

from __future__ import annotations

from enum import IntEnum

from kohakuriver.tunnel.protocol import CloseCode

__all__ = ["CLOSE_WAIT", "CloseState", "Closing"]

CLOSE_WAIT = 3.0
"""Seconds that a peer has for its part of a closing handshake."""


class CloseState(IntEnum):
    """The states in the order in which they are passed; some are left out. Only OPEN is false."""

    OPEN = 0
    """Messages pass both ways."""

    CLOSING = 1
    """We send nothing more; the peer's close frame is awaited."""

    FAILED = 2
    """The same, after the peer broke the protocol: nothing more of it is heeded."""

    FINISHING = 3
    """Both sides are through: the TCP connection ends when all is written."""

    CLOSED = 4
    """The TCP connection has ended."""


class Closing:
    """The end of one WebSocket.

    `code` and `reason` say how it ended, by whichever side spoke first; `code` is 1006 where no close frame did.
    `hung_up` says that the peer's system ended the TCP connection then, as it does when a process is killed.
    """

    __slots__ = ("code", "hung_up", "reason", "state")

    def __init__(self) -> None:
        self.state = CloseState.OPEN
        self.code = int(CloseCode.ABNORMAL)  # logs show an enum's member by its name
        self.reason = ""
        self.hung_up = False

    def begin(self, code: int, reason: str, *, failed: bool = False) -> bool:
        """We close, `failed` where the peer broke the protocol. False where the end has begun already."""
        if self.state:
            return False
        self.state = CloseState.FAILED if failed else CloseState.CLOSING
        self.code, self.reason = int(code), self.reason or reason
        return True

    def peer_closes(self, code: int, reason: str) -> bool:
        """The peer's close frame has come. True where it is to be answered; either way the TCP connection can end."""
        answer = self.begin(code, reason)
        self.finish()
        return answer

    def finish(self) -> None:
        """There is nothing more to wait for but what is still to be written."""
        self.state = max(self.state, CloseState.FINISHING)

    def cut(self, reason: str = "") -> None:
        """We end the TCP connection without a handshake."""
        self.state = max(self.state, CloseState.CLOSING)
        self.reason = self.reason or reason

    def lost(self, error: Exception | None) -> bool:
        """The TCP connection has ended, by `error` where it broke. False where that was known."""
        if self.state is CloseState.CLOSED:
            return False
        self.hung_up = self.state is CloseState.OPEN and (error is None or isinstance(error, ConnectionError))
        self.state = CloseState.CLOSED
        if error is not None:
            words = error.strerror if isinstance(error, OSError) else None
            self.reason = self.reason or (f"the connection was lost ({words})" if words else str(error))
        return True
