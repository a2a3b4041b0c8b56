"""When a quiet peer is pinged, and when it counts as gone (docs/protocol.md §3 rule 11). Sans-I/O.

Whoever has a WebSocket calls `tick` when the time has come that the step before named, and does what it says.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

IDLE_PING = 15.0
PONG_WAIT = 20.0


class Act(Enum):
    """What is to be done now."""

    WAIT = "wait"
    PING = "ping"
    DROP = "drop"


class Step(NamedTuple):
    """What is to be done now, and after how many seconds the next `tick` is due."""

    act: Act
    delay: float


class Keepalive:
    """One peer's signs of life.

    Args:
        idle_ping: seconds without a byte from the peer after which it is pinged.
        pong_wait: seconds after that, without a byte from it and without one that it took, after which it is dropped.
    """

    def __init__(self, idle_ping: float = IDLE_PING, pong_wait: float = PONG_WAIT) -> None:
        self.idle_ping = idle_ping
        self.pong_wait = pong_wait
        self._asked_at: float | None = None
        self._received = 0
        self._written = 0

    def tick(self, now: float, *, heard_at: float, received: int, written: int, reading: bool) -> Step:
        """Judge the peer. After Act.PING the caller sends a ping and then calls `pinged`.

        Args:
            now: seconds on the caller's clock.
            heard_at: when the last byte came, or when reading began again.
            received: bytes that came so far.
            written: bytes that the kernel has taken so far.
            reading: False while the caller itself has paused: silence then says nothing about the peer.
        """
        if not reading:  # only show that we are alive
            self._asked_at = None
            return Step(Act.PING, self.idle_ping)
        # Bytes tell what the clock does not: an answer may come within one of its ticks.
        if self._asked_at is not None and received == self._received:
            return self._unanswered(now, self._asked_at, written)
        idle = now - heard_at
        if idle < self.idle_ping:
            self._asked_at = None
            return Step(Act.WAIT, self.idle_ping - idle)
        self._asked_at = now
        return Step(Act.PING, self._look_again)

    def pinged(self, received: int, written: int) -> None:
        """A ping was sent. The counts are those after it: its own bytes are no sign that the peer takes any."""
        self._received = received
        self._written = written

    def _unanswered(self, now: float, asked_at: float, written: int) -> Step:
        late = now - asked_at - self.pong_wait
        # The peer may be slow, yet alive: our ping has perhaps not even left. And a timer that is so late means that
        # it was us who slept: what came meanwhile is read after this.
        if written > self._written or late > self.pong_wait / 2:
            self._asked_at = now
            self._written = written
            return Step(Act.WAIT, self._look_again)
        if late >= 0:
            return Step(Act.DROP, 0.0)
        return Step(Act.WAIT, -late)

    @property
    def reason(self) -> str:
        """Why a peer is dropped, as a clause."""
        return f"no answer to a ping for {self.pong_wait:g} s"

    @property
    def _look_again(self) -> float:
        return min(self.idle_ping, self.pong_wait)
