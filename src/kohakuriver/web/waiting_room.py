"""Pre-auth connections: their number is capped, and the oldest is evicted.

Each costs a file and some memory, with TLS about 60 KiB. Many that close at once also block the loop for a while.
Source: docs/guide/limits.md.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Hashable

from kohakuriver.runtime import file_limit

__all__ = ["WaitingRoom"]

_FEWEST = 16


_LOOK_SECONDS = 0.01


class WaitingRoom:
    """Connections that wait; when there is one too many, the one that has waited for longest goes.

    Many may come at once, where the loop was held up: what each of them has sent is read before one has to go. There
    are never more than twice as many as there may be.

    Args:
        most: how many there may be; fewer where that is more than a quarter of the files that this process may open.
        most_of_source: how many of one source; of that source the oldest goes then. None for no such limit.
    """

    def __init__(self, most: int, most_of_source: int | None = None) -> None:
        self._most = min(most, max(_FEWEST, file_limit() // 4))
        self._most_of_source = most_of_source or sys.maxsize
        self._waiting: dict[Hashable, tuple[str, Callable[[], object]]] = {}
        self._of: dict[str, dict[Hashable, None]] = {}
        self._looking = False

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, who: Hashable, dismiss: Callable[[], object], source: str = "") -> None:
        """`who` begins to wait; `dismiss` is called if that is for too long."""
        self.leave(who)
        self._waiting[who] = source, dismiss
        of_source = self._of.setdefault(source, {})
        of_source[who] = None
        if len(of_source) > self._most_of_source:
            self._evict(next(iter(of_source)))
        elif len(self._waiting) > 2 * self._most:
            self._evict(next(iter(self._waiting)))
        elif len(self._waiting) > self._most and not self._looking:
            self._looking = True
            # A timer comes ahead of what there is to read then; the next one comes after it.
            loop = asyncio.get_running_loop()
            loop.call_later(_LOOK_SECONDS, loop.call_later, _LOOK_SECONDS, self._make_room)

    def _make_room(self) -> None:
        self._looking = False
        while len(self._waiting) > self._most:
            self._evict(next(iter(self._waiting)))

    def leave(self, who: Hashable) -> None:
        """`who` waits no longer, if it did."""
        source, _ = self._waiting.pop(who, ("", None))
        of_source = self._of.get(source, {})
        of_source.pop(who, None)
        if not of_source:
            self._of.pop(source, None)

    def _evict(self, oldest: Hashable) -> None:
        dismiss = self._waiting[oldest][1]
        self.leave(oldest)
        dismiss()
