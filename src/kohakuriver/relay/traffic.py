"""What went through a runner, by container: totals since its start, rates, and what endpoints count themselves.

A relay sees bytes and streams, yet neither windows that are full nor datagrams that an endpoint dropped: endpoints
report those (docs/protocol.md §3).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["COUNTS", "Counted", "Rates", "Traffic"]

COUNTS = ("bytes_to_container", "bytes_to_user", "udp_dropped", "stalls")
"""What is counted for each container."""

_GAUGES = ("version", "sessions", "straight", "streams", "unknown_messages")

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


class Counted(Protocol):
    """A link that bytes of a container go through."""

    container: str

    def counts(self) -> Counter[str]:
        """Totals of what went through it."""

    def gauges(self) -> Counter[str]:
        """What it has now: sessions, straight paths, streams, a tunnel's version, messages that it did not know."""


class Traffic:
    """Counts of all links that there are, by container, and of those that there were.

    `parts` gives those that there are.
    """

    def __init__(self, parts: Callable[[], Sequence[Counted]]) -> None:
        self._parts = parts
        self._closed: dict[str, Counter[str]] = {}
        self._rates = Rates()

    def keep(self, part: Counted) -> None:
        """A link is gone: keep what it had counted."""
        self._closed.setdefault(part.container, Counter()).update(part.counts())

    def forget(self, container: str) -> None:
        """A container is gone for good: what it had counted goes to the total of such."""
        self._closed.setdefault("", Counter()).update(self._closed.pop(container, {}))

    def snapshot(self) -> dict[str, Any]:
        """Counts of now, and totals since the start, of all and of each container that has a tunnel or had traffic."""
        counts, gauges = self._look()
        rates = self._rates.look(counts)
        containers = {
            name: {
                **{key: gauges[name][key] for key in _GAUGES},
                **{key: counts[name][key] for key in COUNTS},
                **rates[name],
            }
            for name in counts
            if name
        }
        return {
            **{key: sum(gauge[key] for gauge in gauges.values()) for key in ("sessions", "straight", "streams")},
            **{key: sum(c[key] for c in counts.values()) for key in COUNTS},
            "containers": containers,
        }

    def _look(self) -> tuple[defaultdict[str, Counter[str]], defaultdict[str, Counter[str]]]:
        """Totals and gauges by container, "" standing for all that are gone."""
        counts = defaultdict(Counter, {name: Counter(closed) for name, closed in self._closed.items()})
        gauges: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for part in self._parts():
            counts[part.container].update(part.counts())
            gauges[part.container].update(part.gauges())
        return counts, gauges
