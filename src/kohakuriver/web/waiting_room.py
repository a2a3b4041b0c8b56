"""Pre-auth connections: their number is capped, and the oldest is evicted.

Each costs a file and some memory, with TLS about 60 KiB. Many that close at once also block the loop for a while.
Source: docs/guide/limits.md.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from kohakuriver.runtime import file_limit

__all__ = ["WaitingRoom"]

_FEWEST = 16


class WaitingRoom:
    """Connections that wait; when there is one too many, the one that has waited for longest goes.

    Args:
        most: how many there may be; fewer where that is more than a quarter of the files that this process may open.
    """

    def __init__(self, most: int) -> None:
        self._most = min(most, max(_FEWEST, file_limit() // 4))
        self._waiting: dict[Hashable, Callable[[], object]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, who: Hashable, dismiss: Callable[[], object]) -> None:
        """`who` begins to wait; `dismiss` is called if that is for too long."""
        self._waiting.pop(who, None)
        self._waiting[who] = dismiss
        if len(self._waiting) > self._most:
            oldest = next(iter(self._waiting))
            self._waiting.pop(oldest)()

    def leave(self, who: Hashable) -> None:
        """`who` waits no longer, if it did."""
        self._waiting.pop(who, None)
