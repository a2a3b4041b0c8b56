"""What went through a runner, by container: totals since its start, rates, and what endpoints count themselves.

A relay sees bytes and streams, yet neither windows that are full nor datagrams that an endpoint dropped: endpoints
report those (docs/protocol.md §3).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

__all__ = ["COUNTS", "Rates"]

COUNTS = ("bytes_to_container", "bytes_to_user", "udp_dropped", "stalls")
"""What is counted for each container."""

# A rate is taken over at least so many seconds.
SHORTEST = 1.0


class Rates:
    """Bytes a second of each container, between one look and the next."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._before: dict[str, Counter[str]] = {}
        self._rates: defaultdict[str, dict[str, int]] = defaultdict(_still)

    def look(self, totals: Mapping[str, Counter[str]]) -> Mapping[str, dict[str, int]]:
        """The rates by container, given what each has had until now; looks that come too soon change nothing."""
        seconds = self._clock() - self._since
        if seconds >= SHORTEST:
            self._rates.clear()
            for container, now in totals.items():
                before = self._before.get(container, Counter())
                self._rates[container] = {
                    f"{way}_per_second": max(0, round((now[f"bytes_{way}"] - before[f"bytes_{way}"]) / seconds))
                    for way in ("to_container", "to_user")
                }
            self._before = {container: Counter(now) for container, now in totals.items()}
            self._since += seconds
        return self._rates


def _still() -> dict[str, int]:
    return {"to_container_per_second": 0, "to_user_per_second": 0}
