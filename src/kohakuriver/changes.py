"""Wakes those who wait for something to change."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["Changes"]

K = TypeVar("K", bound=Hashable)


class Changes(Generic[K]):
    """Wakes the callers that wait for a thing to change; `K` is what things are known by."""

    def __init__(self) -> None:
        self._events: defaultdict[K, set[asyncio.Event]] = defaultdict(set)
        self._all: set[asyncio.Event] = set()

    def notify(self, things: Iterable[K]) -> None:
        """Wake everybody who watches one of these, or all."""
        for thing in things:
            for event in self._all:
                event.set()
            for event in self._events.get(thing, ()):
                event.set()

    def notify_all(self) -> None:
        """Wake everybody: anything may have changed."""
        for event in self._all.union(*self._events.values()):
            event.set()

    def watched(self) -> list[K]:
        """What somebody watches."""
        return list(self._events)

    @contextlib.contextmanager
    def watch(self, thing: K) -> Iterator[asyncio.Event]:
        """An event that is set when the thing changes."""
        event = asyncio.Event()
        self._events[thing].add(event)
        try:
            yield event
        finally:
            self._events[thing].discard(event)
            if not self._events[thing]:
                del self._events[thing]

    @contextlib.contextmanager
    def watch_all(self) -> Iterator[asyncio.Event]:
        """An event that is set when anything changes. It is in nobody's way: `watched` does not have it."""
        event = asyncio.Event()
        self._all.add(event)
        try:
            yield event
        finally:
            self._all.discard(event)
