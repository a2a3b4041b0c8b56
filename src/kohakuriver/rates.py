"""How much of something goes through in a second."""

from __future__ import annotations


class TokenBucket:
    """Lets `rate` units a second through, and up to `burst` of them at once.

    Times are those of the caller's clock, in seconds.
    """

    __slots__ = ("_burst", "_left", "_when", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self._burst = burst
        self._left = burst
        self._when = now

    def take(self, units: float, now: float) -> float:
        """Take what has been used already; how many seconds to wait before more is used."""
        self._fill(now)
        self._left -= units
        return self.wait(now)

    def wait(self, now: float) -> float:
        """How many seconds until there is something again."""
        self._fill(now)
        return max(0.0, -self._left / self.rate)

    def try_take(self, now: float) -> bool:
        """Take one unit if there is one."""
        self._fill(now)
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def reserve(self, now: float, patience: float) -> float | None:
        """Take one unit, which is there after so many seconds. None takes nothing: that would be over `patience`."""
        wait = self.take(1, now)
        if wait > patience:
            self._left += 1
            return None
        return wait

    def change(self, rate: float, burst: float, now: float) -> None:
        """Let another rate through from now on; what is left of a burst is not more than before."""
        self._fill(now)
        self.rate, self._burst = rate, burst
        self._left = min(self._left, burst)

    def is_full(self, now: float) -> bool:
        """Whether all of a burst is there again."""
        self._fill(now)
        return self._left >= self._burst

    def _fill(self, now: float) -> None:
        self._left = min(self._burst, self._left + (now - self._when) * self.rate)
        self._when = now
