"""Those who have connected and not shown yet what they want, or whether they may: nobody keeps places from others.

Each costs memory, and all of them at once, when they go, time in which nobody else is served.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

__all__ = ["WaitingRoom"]


class WaitingRoom:
    """At most `most` connections that wait; when one more comes, the one that has waited for longest goes."""

    def __init__(self, most: int) -> None:
        self._most = most
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
