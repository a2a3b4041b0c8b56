"""Bytes that wait in the send queues of one program: a bound for all together, and whose queue goes when it is met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Protocol

__all__ = ["Backlog", "Queue"]


class Queue(Protocol):
    """One queue that counts."""

    owner: Hashable

    def evict(self) -> None:
        """Give up: what waits here is thrown away, and its link ends."""


class Backlog:
    """The queues of one program in which something waits.

    When more than `most` bytes wait in all of them, the fullest queue of that owner goes who has most in all of his:
    who has little waiting loses nothing, however many others there are. So does the fullest of an owner for whom more
    than `share` bytes wait.

    Args:
        most: bytes; 0 for no bound.
        share: bytes of one owner; 0 for no bound.
        on_evicted: called with a queue that goes, before it does.
    """

    def __init__(self, most: int, share: int = 0, on_evicted: Callable[[Queue], None] = lambda queue: None) -> None:
        self.total = 0
        self._most = most
        self._share = share
        self._on_evicted = on_evicted
        self._sizes: dict[Queue, int] = {}
        self._held: Counter[Hashable] = Counter()

    def count(self, queue: Queue, size: int) -> None:
        """So many bytes more wait in a queue, or less where `size` is negative."""
        held = self._sizes.get(queue, 0) + size
        if held < 0:  # it was evicted
            return
        self._set(queue, held)
        while self._share and self._held[queue.owner] > self._share:
            self._evict(queue.owner)
        while self._most and self.total > self._most:
            self._evict(max(self._held, key=self._held.__getitem__))

    def _set(self, queue: Queue, held: int) -> None:
        """So many bytes wait in a queue now."""
        change = held - self._sizes.pop(queue, 0)
        self.total += change
        self._held[queue.owner] += change
        if held:
            self._sizes[queue] = held
        if not self._held[queue.owner]:
            del self._held[queue.owner]

    def _evict(self, owner: Hashable) -> None:
        fullest = max((queue for queue in self._sizes if queue.owner == owner), key=self._sizes.__getitem__)
        self._on_evicted(fullest)
        self._set(fullest, 0)
        fullest.evict()
