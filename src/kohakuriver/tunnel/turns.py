"""Whose turn it is: so that links with much to work off keep no other link waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["REST_SECONDS", "TURN", "Turn"]

TURN = 256
"""How many messages that are not just relayed may be worked off at a time: a few milliseconds' worth.

A read of 1 MiB can hold 170,000 pings.
"""

REST_SECONDS = 0.05
"""How long whoever went beyond a limit waits for the next turn; 5,120 messages a second are left to them."""


class Turn:
    """What some links may work off, together, before all others get their turn.

    A link has one for itself, unless it is given one that it shares: a user with a hundred links then gets no more done
    than a user with one. Those that find nothing left wait, and go on in the order in which they came.

    Args:
        most: how much may be worked off in a turn, in pieces.
    """

    def __init__(self, most: int = TURN) -> None:
        self.left = most
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Callable[[], None]] = []
        self._due = False
        self._rests = False

    def rest(self) -> None:
        """Begin the next turn after a while: something was asked for beyond a limit, and to say so is work, too."""
        self._rests = True

    def spend(self, messages: int) -> None:
        """So many messages were worked off."""
        self.left -= messages
        if self.left < self._most // 2:  # links that send little share one renewal between many reads
            self._renew_soon()

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call `go_on` when there is something left, after all other links were looked at."""
        self._waiting.append(go_on)
        self._renew_soon()

    def begin(self, work: Callable[[], None]) -> None:
        """Do one piece of work: at once, or when its turn has come."""

        def go_on() -> None:
            self.spend(1)
            work()

        if self.left > 0:
            go_on()
        else:
            self.wait(go_on)

    def _renew_soon(self) -> None:
        if self._due:
            return
        self._due = True
        if self._rests:
            self._rests = False
            self._loop.call_later(REST_SECONDS, self._renew)
        else:
            self._loop.call_soon(self._renew)

    def _renew(self) -> None:
        self._due = False
        self.left = self._most
        waiting, self._waiting = self._waiting, []
        for i, go_on in enumerate(waiting):
            if self.left <= 0:
                self._waiting = waiting[i:] + self._waiting
                break
            go_on()
        if self._waiting:
            self._renew_soon()
