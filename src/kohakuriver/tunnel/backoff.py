"""How long to wait before something that was lost is tried again, and when to give up (tests/vectors/reconnect.json).

The pause is a random part of a ceiling that doubles with each failure in a row: what many lost at the same moment, they
do not try again at the same moment.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import ClassVar

from kohakuriver.tunnel.protocol import CloseCode

__all__ = ["STEADY", "Backoff", "Reconnect", "Verdict"]

# What lived this many seconds was a good one: its end is no failure, and the pauses begin anew.
STEADY = 10.0
# The ceiling where trying again soon helps nobody: credentials that were refused, another client in our place.
LONG = 30.0


class Backoff:
    """Counts failures in a row. `first` and `cap` are the ceilings of the first and the longest pause, in seconds."""

    def __init__(self, first: float, cap: float) -> None:
        self.first = first
        self.cap = cap
        self.failures = 0

    def ended(self, lived: float | None) -> None:
        """What was kept up has ended after `lived` seconds, or could not be begun (None)."""
        self.failures = 0 if lived is not None and lived >= STEADY else self.failures + 1

    @property
    def ceiling(self) -> float:
        """The longest that the next pause may be, in seconds."""
        return min(self.cap, self.first * 2.0 ** min(max(self.failures - 1, 0), 16))

    def pause(self, at_most: float = math.inf) -> float:
        """How long to wait now, in seconds."""
        return random.uniform(0.0, min(self.ceiling, at_most))


@dataclass(frozen=True)
class Verdict:
    """Either the bounds of the pause before the next attempt, in seconds, or, in `end`, why there is none."""

    least: float = 0.0
    longest: float = 0.0
    end: str = ""

    def pause(self) -> float:
        """How long to wait now."""
        return random.uniform(self.least, self.longest)


class Reconnect:
    """What a tunnel client does when its tunnel has ended.

    Args:
        delay: the longest ordinary pause, in seconds.
        most: failures in a row to give up after; 0 for never.
        stays: it is a container's first process, and can't end just because another client took over.
    """

    FIRST: ClassVar[float] = 0.1
    # A tunnel that lasted this many seconds was none of the failures, and is tried again at once.
    GOOD: ClassVar[float] = 1.0
    # A runner that answers nothing is tried so often within half a second each: its streams wait for it.
    EAGER: ClassVar[int] = 240
    EAGER_LONGEST: ClassVar[float] = 0.5

    def __init__(self, *, delay: float = 5.0, most: int = 0, stays: bool = False) -> None:
        self.failures = 0
        self._delay = delay
        self._most = most
        self._stays = stays

    def after(self, lived: float | None, code: int | None) -> Verdict:
        """What comes next. `code` is the close code, or the HTTP status of a refusal; None where nobody was reached."""
        if code == CloseCode.REPLACED and not self._stays:
            return Verdict(end="replaced")
        self.failures = 0 if lived is not None and lived >= self.GOOD else self.failures + 1
        if self._most and self.failures >= self._most:
            return Verdict(end="gave_up")
        if code in (401, 403, CloseCode.REPLACED):
            return Verdict(LONG / 2, LONG)
        return Verdict(0.0, self._ceiling(refused=lived is None and code is not None))

    def _ceiling(self, *, refused: bool) -> float:
        if self.failures == 0:
            return 0.0
        pause = self.FIRST * 2.0 ** min(self.failures - 1, 16)
        if not refused and self.failures <= self.EAGER:
            pause = min(pause, self.EAGER_LONGEST)
        elif not refused:
            pause = self.EAGER_LONGEST * 2.0 ** min(self.failures - self.EAGER, 16)
        return min(pause, self._delay)
