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
    who has little waiting loses nothing, however many others there are.

    Args:
        most: bytes; 0 for no bound.
        on_evicted: called with a queue that goes, before it does.
    """

    def __init__(self, most: int, on_evicted: Callable[[Queue], None] = lambda queue: None) -> None:
        self.total = 0
        self._most = most
        self._on_evicted = on_evicted
        self._sizes: dict[Queue, int] = {}

    def count(self, queue: Queue, size: int) -> None:
        """So many bytes more wait in a queue, or less where `size` is negative."""
        held = self._sizes.get(queue, 0) + size
        if held < 0:  # it was evicted
            return
        self.total += size
        if held:
            self._sizes[queue] = held
        else:
            self._sizes.pop(queue, None)
        while self._most and self.total > self._most:
            self._evict()

    def _evict(self) -> None:
        held: Counter[Hashable] = Counter()
        for queue, size in self._sizes.items():
            held[queue.owner] += size
        greediest = max(held, key=held.__getitem__)
        fullest = max((queue for queue in self._sizes if queue.owner == greediest), key=self._sizes.__getitem__)
        self._on_evicted(fullest)
        self.total -= self._sizes.pop(fullest)
        fullest.evict()
