"""Telling the runner what only endpoints can count (docs/protocol.md §3, "PING and PONG on a stream")."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import PING, SESSION_ID, Counts

REPORT_EVERY = 2.0  # seconds


class Reporter:
    """Sends what was counted since it last did, for as long as `goes_on` says that there is something to count."""

    def __init__(self, totals: Callable[[], Counts], goes_on: Callable[[], bool]) -> None:
        self._totals = totals
        self._goes_on = goes_on
        self._reported = Counts(0, 0)
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, link: Link) -> None:
        """Report on `link` from now on; peers of version 1 are told nothing."""
        if self._timer is None and link.version >= 2:
            self._timer = asyncio.get_running_loop().call_later(REPORT_EVERY, self._report, link)

    def stop(self) -> None:
        """The link is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _report(self, link: Link) -> None:
        now, before = self._totals(), self._reported
        if now != before:
            self._reported = now
            new = Counts(now.udp_dropped - before.udp_dropped, now.stalls - before.stalls)
            link.send_message(PING, SESSION_ID, new.pack(), urgent=True)
        self._timer = None
        if self._goes_on():
            self.begin(link)
