"""The timer of one WebSocket: keepalive while it is open, then what a closing handshake may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kohakuriver.tunnel.keepalive import Act, Keepalive

__all__ = ["PeerWatch"]


class PeerWatch:
    """Drops a peer that shows no sign of life, and one that does not end a closing handshake.

    Its owner tells it what comes: by `heard`, or, once for every read on the data path, by counting in `received` and
    noting in `heard_at` when (on the loop's clock).

    Args:
        idle_ping: seconds without a byte from the peer after which it is pinged.
        pong_wait: seconds after that, without a byte from it and without one that it took, after which it is dropped.
        ping: sends a ping.
        written: how many bytes the kernel has taken so far.
        drop: ends the connection at once, with the reason as a clause, "" where there is one already.
    """

    def __init__(
        self,
        idle_ping: float,
        pong_wait: float,
        *,
        ping: Callable[[], None],
        written: Callable[[], int],
        drop: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.received = 0
        self.heard_at = self._loop.time()
        self._keepalive = Keepalive(idle_ping, pong_wait)
        self._ping = ping
        self._written = written
        self._drop = drop
        self._reading = True
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """The WebSocket is open."""
        self.heard_at = self._loop.time()
        self._timer = self._loop.call_later(self._keepalive.idle_ping, self._tick)

    def heard(self, size: int) -> None:
        """So many bytes came."""
        self.received += size
        self.heard_at = self._loop.time()

    def paused(self) -> None:
        """We have stopped reading: silence says nothing about the peer from now on."""
        self._reading = False

    def resumed(self) -> None:
        """We read again."""
        self._reading = True
        self.heard_at = self._loop.time()

    def end_within(self, seconds: float) -> None:
        """No keepalive any more: the peer is dropped if the connection has not ended after so long."""
        self.stop()
        self._timer = self._loop.call_later(seconds, self._drop, "")

    def stop(self) -> None:
        """The connection has ended."""
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        """Ping an idle peer; drop one that neither answered since nor took a byte of what waits for it."""
        act, delay = self._keepalive.tick(
            self._loop.time(),
            heard_at=self.heard_at,
            received=self.received,
            written=self._written(),
            reading=self._reading,
        )
        if act is Act.DROP:
            self._drop(self._keepalive.reason)
            return
        if act is Act.PING:
            self._ping()
            self._keepalive.pinged(self.received, self._written())
        self._timer = self._loop.call_later(delay, self._tick)
