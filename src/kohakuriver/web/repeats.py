"""Lines of a log that say again what was just said are counted, and their number is told.

Whoever reaches a port can have it refuse him thousands of times a second. Source: docs/guide/limits.md "Logs".
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from kohakuriver.rates import TokenBucket

__all__ = ["SECONDS", "Repeats"]

SECONDS: Final = 60.0
"""For how long the same line is counted instead of told."""

REFUSALS_AT_ONCE: Final = 20
PER_SECOND: Final = 1.0
"""How many refusals of a kind are told, whatever differs in them; peers choose names and paths."""

MOST_KNOWN: Final = 1000

TUNNELS_AT_ONCE: Final = 1000
"""The same of tunnels and sessions that come and go, which peers choose; those of a large node may all come at once."""

_TUNNELS = ("tunnel connected", "tunnel disconnected", "session opened")
_TOLD_ALWAYS = ("debug", "info")
_OF_THE_PEER = ("peer",)

Event = MutableMapping[str, Any]


@dataclass
class _Seen:
    until: float
    method: str
    values: dict[str, Any]
    more: int = 0


def _ask_nobody(event: str, **_values: Any) -> None:
    pass


class Repeats:
    """A processor of structlog that leaves out warnings and refusals which are told already.

    Who was refused makes no difference: the same reason for another address is the same line. A count is told when
    `SECONDS` are over, as the first such line with `repeated` or, of refusals that differ, `left_out`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[Any, _Seen] = OrderedDict()
        self._refusals: dict[str, TokenBucket] = {}
        self._wakes: float | None = None

    def __call__(self, _logger: object, method: str, event: Event) -> Event:
        name = str(event.get("event"))
        refused = name.endswith(" refused") or name in _TUNNELS
        if "repeated" in event or "left_out" in event or (method in _TOLD_ALWAYS and not refused):
            return event
        self.flush()
        line = ("line", *_key(method, event))
        if line not in self._seen and (not refused or self._may_tell(name)):
            if name not in _TUNNELS:
                self._remember(line, method, event)
            return event
        known = line if line in self._seen else ("kind", name)
        if known not in self._seen:
            self._remember(known, method, {"event": name})
        self._seen[known].more += 1
        raise structlog.DropEvent

    def flush(self) -> None:
        """Tell the counts whose time is over."""
        now = self._clock()
        while self._seen and (next(iter(self._seen.values())).until <= now or len(self._seen) > MOST_KNOWN):
            (kind, *_), seen = self._seen.popitem(last=False)
            if seen.more:
                count = {"repeated" if kind == "line" else "left_out": seen.more}
                tell = getattr(structlog.get_logger(), seen.method, _ask_nobody)
                tell(seen.values["event"], **{key: seen.values[key] for key in seen.values if key != "event"}, **count)

    def _remember(self, key: Any, method: str, event: Event) -> None:
        values = {name: value for name, value in event.items() if name != "exception"}
        self._seen[key] = _Seen(self._clock() + SECONDS, method, values)
        self._wake_at_end()

    def _may_tell(self, name: str) -> bool:
        now = self._clock()
        at_once = TUNNELS_AT_ONCE if name in _TUNNELS else REFUSALS_AT_ONCE
        bucket = self._refusals.setdefault(name, TokenBucket(PER_SECOND, at_once, now))
        return bucket.try_take(now)

    def _wake_at_end(self) -> None:
        """Have the count told in time, where an event loop runs; else with the next line."""
        now = self._clock()
        if self._wakes is not None and self._wakes > now:
            return
        try:
            asyncio.get_running_loop().call_later(SECONDS + 1, self._wake)
        except RuntimeError:
            return
        self._wakes = now + SECONDS + 1

    def _wake(self) -> None:
        self._wakes = None
        self.flush()
        if self._seen:
            self._wake_at_end()


def _key(method: str, event: Event) -> tuple[Any, ...]:
    return method, *((name, str(value)) for name, value in sorted(event.items()) if name not in _OF_THE_PEER)
