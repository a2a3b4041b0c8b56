"""Whether a link that nobody has closed still leads anywhere (docs/protocol.md §3, rule 13 of kept streams).

A network that has gone tells nobody. What was sent and is not acknowledged shows it within seconds, and so does a clock
that has jumped: this machine was asleep, and much may have changed meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import PING
from kohakuriver.tunnel.udp import UdpStream

__all__ = ["Doubt"]

TICK = 0.5  # seconds
UNACKED = 2.0  # seconds without an acknowledgement, which comes within one, after which the stream's other end is asked
ANSWER = 2.0  # seconds that it has for its answer
SOON = 0.5  # and that it has where the path beside it has just gone, which may have been by the same way
ASLEEP = 2.0  # a look that is so late means that it was us who slept


def _clock() -> float:
    """Seconds that go on while this machine sleeps, where the system has such a clock."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.time() if boot is None else time.clock_gettime(boot)


class Doubt:
    """Watches the kept streams of an endpoint while they have a link.

    Args:
        streams: those that there are.
        on_doubt: called when the other end of one has not answered: the link may be dead. Again after a while, if that
            changes nothing.
    """

    def __init__(self, streams: Callable[[], Iterable[TcpStream | UdpStream]], on_doubt: Callable[[], None]) -> None:
        self._streams = streams
        self._on_doubt = on_doubt
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0
        self._unacked: dict[TcpStream | UdpStream, tuple[int, float]] = {}  # what it acknowledged, and when
        self._asked: TcpStream | None = None
        self._asked_at = 0.0
        self._patience = ANSWER
        self.doubted = False

    def begin(self) -> None:
        """There is a link."""
        self.end()
        self._looked_at = _clock()
        self._wait()

    def ask(self) -> None:
        """Have it answer at once: another path has gone, and this one was not used meanwhile."""
        if self._timer is not None and self._asked is None:
            self._ask(self._any(), _clock(), SOON)

    def end(self) -> None:
        """It is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unacked.clear()
        self._asked = None
        self.doubted = False

    def answered(self, stream: TcpStream) -> None:
        """A PONG came for it."""
        self.doubted = False
        self._unacked.clear()
        if stream is self._asked:
            self._asked = None

    def over(self, stream: TcpStream | UdpStream) -> None:
        """It has ended: nothing will answer for it."""
        self._unacked.pop(stream, None)
        if stream is self._asked:
            self._asked = None

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK, self._look)

    def _look(self) -> None:
        now, before = _clock(), self._looked_at
        self._looked_at = now
        self._wait()
        slept = now - before > TICK + ASLEEP
        if slept:
            self._unacked.clear()
            self._asked = None
        silent = self._silent(now)
        if self._asked is None:
            self._ask(silent or (self._any() if slept else None), now)
        elif now - self._asked_at >= self._patience:
            self._asked = None
            self._unacked.clear()
            self.doubted = True
            self._on_doubt()

    def _silent(self, now: float) -> TcpStream | None:
        """A stream that has waited for too long for an acknowledgement."""
        found = None
        for stream in self._streams():
            kept = stream.kept if isinstance(stream, TcpStream) else None
            if kept is None or not isinstance(stream, TcpStream):
                continue
            if stream.at is None or not kept.unanswered:
                self._unacked.pop(stream, None)
                continue
            acked, since = self._unacked.setdefault(stream, (kept.acked, now))
            if acked != kept.acked:
                self._unacked[stream] = kept.acked, now
            elif now - since >= UNACKED:
                found = stream
        return found

    def _any(self) -> TcpStream | None:
        return next((each for each in self._streams() if isinstance(each, TcpStream) and each.at is not None), None)

    def _ask(self, stream: TcpStream | None, now: float, patience: float = ANSWER) -> None:
        if stream is not None:
            self._asked, self._asked_at, self._patience = stream, now, patience
            stream.send(PING)
