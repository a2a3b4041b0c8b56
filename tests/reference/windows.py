"""Flow control's receiving side in plain words (docs/protocol.md §3, "Windows, exactly"): what the vectors come from.

Times are whole microseconds, so that nothing depends on how a language rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EARLY_DATA = 64 << 10
LEAST = 4 << 10
RAREST_PING = 64 << 20


@dataclass
class Budget:
    """What all windows of one endpoint come out of; `left` is never negative."""

    total: int
    first: int
    cap: int
    shared: bool = False
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.total

    def take(self, wanted: int) -> int:
        got = min(wanted, self.left)
        self.left -= got
        return got


class Window:
    """One stream's."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.paid = budget.take(budget.first)
        self.size = max(self.paid, LEAST)  # the least window is given to every stream and paid by none
        self.granted = self.size
        self.received = self.consumed = self.newest = 0
        self.best = self.steady = 0.0
        self.shortest: int | None = None
        self.ping: tuple[int, int] | None = None  # when it was sent, and what had been received before
        self.ponged_at: int | None = None
        self.ended_at = 0
        self.skipped = 0
        self.pause = self.size // 4

    def receive(self, size: int, at: int) -> tuple[bool, bool]:
        """(whether the peer kept its limit, whether a PING is sent)."""
        self.received += size
        if self.received > max(self.granted, EARLY_DATA):
            return False, False
        due = self.ping is None and self.size < self.budget.cap and self.received - self.ended_at >= self.pause
        if due:
            self.ping = at, self.received - size
        return True, due

    def consume(self, size: int) -> int | None:
        self.consumed += size
        return self.announce(self.in_force() // 4)

    def in_force(self) -> int:
        if not self.budget.shared or self.shortest is None or self.shortest > 2000:
            return self.size
        return min(self.size, max(self.budget.first, int(1.5 * self.steady * self.shortest)))

    def announce(self, least: int) -> int | None:
        limit = self.consumed + self.in_force()
        if limit - self.granted < max(1, least):
            return None
        self.granted = limit
        return limit

    def pong(self, at: int) -> int | None:
        if self.ping is None:
            return None
        (sent_at, before), self.ping = self.ping, None
        if self.ponged_at is not None:
            self.steady = max(self.steady, (self.received - self.ended_at) / max(at - self.ponged_at, 1))
        took = max(at - sent_at, 1)
        self.ponged_at, self.ended_at = at, self.received
        self.shortest = min(self.shortest or took, took)
        sample = self.received - before
        rate = sample / took
        pays = rate > 1.1 * self.best
        self.best = max(self.best, rate)
        if not pays or 3 * sample < 2 * self.size:
            self.skipped = min(max(2 * self.skipped, self.size), RAREST_PING)
            self.pause = self.skipped + self.size // 4
            return None
        under_way = self.size
        extra = self.budget.take(min(self.size, self.budget.cap - self.size))
        self.paid += extra
        self.size += extra
        self.skipped = 0
        self.pause = under_way + self.size // 4
        return self.announce(1)

    def attach(self) -> int:
        """After `close`, which is also what a stream without a link does: there is one again."""
        self.paid = self.budget.take(max(self.size, self.budget.first))
        self.size = max(self.paid, LEAST)
        self.granted = max(self.received, self.consumed + self.size)
        return self.granted

    def close(self) -> None:
        self.budget.left += self.paid
        self.paid = 0
