"""Flow control of one direction of a stream: what may be sent, what is granted, and the budget that pays for it.

docs/protocol.md §3, "Windows, exactly". Nothing here touches a socket or a clock that is not handed in.
"""

from __future__ import annotations

import math
from collections import deque
from weakref import WeakValueDictionary

__all__ = [
    "EARLY_DATA",
    "FIRST_WINDOW",
    "MAX_WINDOW",
    "MIN_WINDOW",
    "SESSION_BUDGET",
    "UNLIMITED",
    "Budget",
    "Pool",
    "ReceiveWindow",
    "SendWindow",
    "Way",
]

EARLY_DATA = 64 * 1024
FIRST_WINDOW = 256 * 1024
MAX_WINDOW = 16 * 1024 * 1024
MIN_WINDOW = 4 * 1024
SESSION_BUDGET = 64 * 1024 * 1024
# A window grows only while that pays: this much more throughput than the best seen with a smaller one.
WORTHWHILE = 1.1
# While it does not, PINGs get rarer, to one in this many bytes: each one costs every hop two small frames.
RAREST_PING = 64 * 1024 * 1024
# On a full link each stream gets what part it has of all bytes in flight, so streams that share one need equal windows.
# While several receive, each of an opener's has so many times what its fastest has in flight in a round trip.
SHARED_PART = 1.5
# On a short link that is all that is in force: small messages of the others wait behind what is more. A long link takes
# its time anyway, and there the window needs room to grow.
SHORT_LINK = 0.002  # seconds there and back
LONG_PART = 4
FASTEST_OF = 64 * 1024 * 1024  # bytes, in which what was the fastest stream's rate is forgotten
OPENERS = 64  # how many openers' ways are remembered while they have no stream
UNLIMITED = 1 << 62  # the limit under v1 rules, which have none


class Pool:
    """Bytes that several have together, and that are a part of what more have.

    Args:
        total: bytes; None for any number.
        within: what they are a part of.
    """

    def __init__(self, total: int | None = None, within: Pool | None = None) -> None:
        self._left = UNLIMITED if total is None else total
        self._within = within

    @property
    def left(self) -> int:
        """Bytes that nobody has."""
        left, within = self._left, self._within
        if within is None or (there := within.left) > left:
            return left
        return there

    def take(self, size: int) -> None:
        """Somebody has so many bytes more, or less where `size` is negative; whether they are left is not asked."""
        self._left -= size
        if self._within is not None:
            self._within.take(size)


class Way:
    """What was measured between the two ends of some streams: all of those that one process has opened."""

    __slots__ = ("__weakref__", "fastest", "shortest")

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """It is another one."""
        self.shortest = math.inf  # seconds there and back
        self.fastest = 0.0  # bytes a second of the stream that gets most

    def measured(self, took: float, came: int, seconds: float) -> None:
        """A PONG came.

        Args:
            took: seconds since its PING.
            came: bytes of its stream since the stream's last PONG.
            seconds: the time since that; 0 if this is the first.
        """
        self.shortest = min(self.shortest, took)
        if seconds:
            rate = came / seconds
            part = 1.0 if rate > self.fastest else min(came / FASTEST_OF, 1.0)
            self.fastest += (rate - self.fastest) * part


class Budget:
    """The bytes of window that all streams of one endpoint share.

    Args:
        total: bytes for all streams together.
        first, cap: bytes a new stream starts with, and the most that one may get.
        within: what they are a part of, where other endpoints take from that, too.
    """

    def __init__(
        self,
        total: int = SESSION_BUDGET,
        first: int = FIRST_WINDOW,
        cap: int = MAX_WINDOW,
        within: Pool | None = None,
    ) -> None:
        self._pool = Pool(total, within)
        self.first = first
        self.least = min(MIN_WINDOW, first)
        """The window (bytes) that every stream gets, whatever is left: the budget does not pay for it."""
        self.cap = cap
        self.shared = False  # several streams receive by turns
        self._ways: WeakValueDictionary[bytes, Way] = WeakValueDictionary()  # those that a window has
        self._recent: deque[Way] = deque(maxlen=OPENERS)  # which are remembered without one, too

    def way(self, opener: bytes | None) -> Way:
        """The way of the streams that one process has opened; where that is not known, a new one."""
        way = self._ways.get(opener) if opener is not None else None
        if way is None:
            way = Way()
            if opener is not None:
                self._ways[opener] = way
                self._recent.append(way)
        return way

    def begin(self) -> None:
        """Another link carries the streams: what was measured of the last one says nothing of it."""
        for way in self._ways.values():
            way.begin()

    def share(self, way: Way) -> int:
        """Bytes that each stream of a way may have under way now."""
        if not self.shared or not way.fastest:
            return self.cap
        return self._parts(way, SHARED_PART if way.shortest <= SHORT_LINK else LONG_PART)

    def fair(self, way: Way) -> int:
        """Bytes of window that each stream should have now, since another has; 0 while one has the link to itself."""
        return self._parts(way, SHARED_PART) if self.shared else 0

    def _parts(self, way: Way, part: float) -> int:
        return min(self.cap, max(self.first, int(part * way.fastest * way.shortest))) if way.fastest else 0

    @property
    def left(self) -> int:
        """Bytes that no window has."""
        return self._pool.left

    def take(self, wanted: int) -> int:
        """As many of the ``wanted`` bytes as are left."""
        got = min(wanted, self._pool.left)
        if got <= 0:
            return 0
        self._pool.take(got)
        return got

    def give_back(self, size: int) -> None:
        """A stream has ended: what its window took goes back."""
        self._pool.take(-size)


class SendWindow:
    """What may still be sent: ``limit`` is the offset up to which, ``sent`` the one that is reached."""

    __slots__ = ("limit", "sent")

    def __init__(self) -> None:
        self.limit = 0
        self.sent = 0

    @property
    def room(self) -> int:
        """Bytes that may be sent now."""
        return self.limit - self.sent

    def spend(self, size: int) -> None:
        """Count ``size`` bytes, for which there was room."""
        self.sent += size

    def raise_to(self, limit: int) -> bool:
        """Take an absolute limit; True if it gave room where there was none. A lower one is ignored."""
        if limit <= self.limit:
            return False
        was_shut = self.sent >= self.limit
        self.limit = limit
        return was_shut


class ReceiveWindow:
    """What the peer may send us on a v2 stream, and how that limit grows.

    Credit is given on consumption (``consume``) and told to the peer a quarter of the window at a time, and at once
    when the window has grown. The size follows the bandwidth-delay product: the bytes that arrive between a PING and
    its PONG.

    Over a long link a whole window arrives as one burst a round trip, and PONGs come ahead of bulk: right before a
    burst. So the read that makes a PING due counts as well, and PINGs become due a quarter of a window into a burst:
    one sent at its end would see nothing arrive until its PONG.
    """

    __slots__ = (
        "_best",
        "_budget",
        "_newest",
        "_opener",
        "_paid",
        "_pause",
        "_ping_at",
        "_ping_from",
        "_pinged",
        "_ponged",
        "_ponged_at",
        "_skipped",
        "_way",
        "consumed",
        "granted",
        "received",
        "size",
    )

    def __init__(self, budget: Budget, opener: bytes | None = b"") -> None:
        """`opener` tells the process that has opened the stream from others; None where nobody knows it."""
        self._budget = budget
        self._opener = opener
        self._way = budget.way(opener)
        self._paid = budget.take(budget.first)
        self.size = max(self._paid, budget.least)
        self.received = 0
        self.consumed = 0
        self.granted = self.size
        self._best = 0.0  # bytes a second, over one round trip
        self._ponged = 0
        self._ponged_at = 0.0
        self._pause = self.size // 4  # bytes between the end of one PING and the next
        self._skipped = 0  # bytes of that for which no PING is worth its while
        self._newest = 0  # size of the last read
        self._pinged = False
        self._ping_from = 0
        self._ping_at = 0.0

    def receive(self, size: int) -> bool:
        """Count ``size`` bytes that arrived; False if the peer went over what it was given."""
        self.received += size
        self._newest = size
        return self.received <= self.granted or self.received <= EARLY_DATA

    def consume(self, size: int) -> int | None:
        """Count ``size`` bytes that the local socket took; the new limit if it is time to send one."""
        self.consumed += size
        size = self.in_force if self._budget.shared else self.size
        return self._grant(size, size // 4 or 1)

    @property
    def in_force(self) -> int:
        """The part of the window (bytes) that the peer may have under way now."""
        return min(self.size, self._budget.share(self._way))

    def _grant(self, size: int, least: int) -> int | None:
        limit = self.consumed + size
        if limit - self.granted < least:
            return None
        self.granted = limit
        return limit

    def wants_ping(self, now: float) -> bool:
        """Whether a PING is due (seconds on any steady clock); the caller sends it then."""
        if self._pinged or self.size >= self._budget.cap or self.received - self._ping_from < self._pause:
            return False
        self._pinged = True
        self._ping_from = self.received - self._newest
        self._ping_at = now
        return True

    def pong(self, now: float) -> int | None:
        """The PING came back: perhaps grow. The new limit if there is one to send."""
        if not self._pinged:
            return None
        self._pinged = False
        sample = self.received - self._ping_from
        took = max(now - self._ping_at, 1e-6)
        # What comes in one round trip may have waited for it, so a steady rate is one between two PONGs.
        seconds = max(now - self._ponged_at, 1e-6) if self._ponged_at else 0.0
        self._way.measured(took, self.received - self._ponged, seconds)
        self._ponged_at, self._ponged = now, self.received
        self._ping_from = self.received
        rate, share = sample / took, self._budget.share(self._way)
        pays = rate > WORTHWHILE * self._best or self.size < self._budget.fair(self._way)
        self._best = max(self._best, rate)
        in_flight = min(self.size, share)
        if not pays or sample * 3 < in_flight * 2:
            self._skipped = min(max(2 * self._skipped, self.size), RAREST_PING)
            self._pause = self._skipped + self.size // 4
            return None
        if self.size < share:
            extra = self._budget.take(min(self.size, self._budget.cap - self.size))
            self._paid += extra
            self.size += extra
        self._skipped = 0
        self._pause = in_flight + self.size // 4  # what comes first was sent for the smaller window
        return self._grant(self.in_force, 1)

    def unanswered(self) -> None:
        """The PING that is under way, if one is, went with its link; a rate over both links would be none."""
        self._pinged = False
        self._ponged_at = 0.0
        self._ping_from = self._ponged = self.received

    def detach(self) -> None:
        """There is no link: nothing can come, and others may have what the window took."""
        if self._paid:
            self._budget.give_back(self._paid)
            self._paid = 0

    def attach(self, budget: Budget) -> None:
        """There is one again: take a window as large as before, or what is left. The limit is another one (rule 2)."""
        self.detach()
        self._budget = budget
        self._way = budget.way(self._opener)
        self._way.begin()
        self._paid = budget.take(max(self.size, budget.first))
        self.size = max(self._paid, budget.least)
        self.granted = max(self.received, self.consumed + self.size)

    def close(self) -> None:
        """Give what the window took back to the budget."""
        if self._paid:
            self.detach()
        self.size = 0
