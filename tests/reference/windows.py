"""Flow control's receiving side in plain words (docs/protocol.md §3, "Windows, exactly"): what the vectors come from.

Times are whole microseconds, so that nothing depends on how a language rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EARLY_DATA = 64 << 10
LEAST = 4 << 10
RAREST_PING = FASTEST_OF = 64 << 20


@dataclass
class Way:
    """What was measured of the streams that one process has opened."""

    shortest: int | None = None
    fastest: float = 0.0  # bytes a microsecond of the stream that gets most

    def measured(self, took: int, came: int, since_last: int | None) -> None:
        """A round trip took so long, and since the stream's last one so many bytes came."""
        self.shortest = min(self.shortest or took, took)
        if since_last is not None:
            rate = came / since_last
            self.fastest += (rate - self.fastest) * (1 if rate > self.fastest else min(came / FASTEST_OF, 1))


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
        self.ways: dict[int, Way] = {}

    def take(self, wanted: int) -> int:
        got = min(wanted, self.left)
        self.left -= got
        return got

    def share(self, way: Way) -> int:
        """What each stream may have under way."""
        if not self.shared or not way.fastest or way.shortest is None:
            return self.cap
        return self.parts(way, 1.5 if way.shortest <= 2000 else 4)

    def fair(self, way: Way) -> int:
        """What each stream's window should be."""
        return self.parts(way, 1.5) if self.shared else 0

    def parts(self, way: Way, part: float) -> int:
        if not way.fastest or way.shortest is None:
            return 0
        return min(self.cap, max(self.first, int(part * way.fastest * way.shortest)))


class Window:
    """One stream's."""

    def __init__(self, budget: Budget, opener: int = 0) -> None:
        self.budget = budget
        self.way = budget.ways.setdefault(opener, Way())
        self.paid = budget.take(budget.first)
        self.size = max(self.paid, LEAST)  # the least window is given to every stream and paid by none
        self.granted = self.size
        self.received = self.consumed = self.newest = 0
        self.best = 0.0
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
        return min(self.size, self.budget.share(self.way))

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
        took = max(at - sent_at, 1)
        since_last = None if self.ponged_at is None else max(at - self.ponged_at, 1)
        self.way.measured(took, self.received - self.ended_at, since_last)
        self.ponged_at, self.ended_at = at, self.received
        sample = self.received - before
        rate, share = sample / took, self.budget.share(self.way)
        pays = rate > 1.1 * self.best or self.size < self.budget.fair(self.way)
        self.best = max(self.best, rate)
        under_way = self.in_force()
        if not pays or 3 * sample < 2 * under_way:
            self.skipped = min(max(2 * self.skipped, self.size), RAREST_PING)
            self.pause = self.skipped + self.size // 4
            return None
        if self.size < share:
            extra = self.budget.take(min(self.size, self.budget.cap - self.size))
            self.paid += extra
            self.size += extra
        self.skipped = 0
        self.pause = under_way + self.size // 4
        return self.announce(1)

    def attach(self) -> int:
        """After `close`, which is also what a stream without a link does: there is one again."""
        self.way.shortest, self.way.fastest = None, 0.0
        self.paid = self.budget.take(max(self.size, self.budget.first))
        self.size = max(self.paid, LEAST)
        self.granted = max(self.received, self.consumed + self.size)
        return self.granted

    def close(self) -> None:
        self.budget.left += self.paid
        self.paid = 0
