"""What happened to tasks that their owners and the host's audit log should hear of."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from kohakuriver.rates import TokenBucket

__all__ = ["Incidents"]

TOLD_AT_ONCE, TOLD_EVERY = 20, 5.0
"""How many heartbeats may tell of some one after the other, and after how many seconds the next may."""

MOST = 100
"""How many are told apart until the host has heard of them."""


class _Incident(NamedTuple):
    task_id: int
    reason: str
    source: str


class Incidents:
    """Refused tunnel clients that the host has not heard of yet, each with how often it happened.

    A heartbeat may come with each of them, and each that it tells of is a line of the host's audit log: some are told
    at once, the others are counted until it is time again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts: Counter[_Incident] = Counter()
        self._clock = clock
        self._tells = TokenBucket(1 / TOLD_EVERY, TOLD_AT_ONCE, clock())

    def add(self, task_id: int, reason: str, source: str) -> None:
        """It happened to a task, once more; `source` is the address that did it."""
        incident = _Incident(task_id, reason, source)
        if incident in self._counts or len(self._counts) < MOST:
            self._counts[incident] += 1

    def pending(self) -> list[dict[str, Any]]:
        """Those that the next heartbeat is to tell."""
        if not self._counts or not self._tells.try_take(self._clock()):
            return []
        return [{**incident._asdict(), "count": count} for incident, count in self._counts.items()]

    def told(self, pending: Iterable[dict[str, Any]]) -> None:
        """The host has heard of these."""
        for told in pending:
            incident = _Incident(told["task_id"], told["reason"], told["source"])
            self._counts[incident] -= told["count"]
            if self._counts[incident] <= 0:
                del self._counts[incident]
