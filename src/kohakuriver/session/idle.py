"""Ending sessions in which nothing has passed for long (docs/guide/limits.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

__all__ = ["IdleWatch"]

# How often in its idle time a session is looked at.
LOOKS = 4


class _Watched:
    def __init__(self, passed: Callable[[], int], end: Callable[[str], None]) -> None:
        self.passed = passed
        self.end = end
        self._at_look = 0
        self._quiet = -1  # between the beginning and the first look there is less time than between two looks

    def quiet_looks(self) -> int:
        """How many looks in a row, this one included, have seen nothing pass."""
        passed = self.passed()
        self._quiet = self._quiet + 1 if passed == self._at_look else 0
        self._at_look = passed
        return self._quiet


class IdleWatch:
    """Looks now and then at how many bytes have passed in each session: nothing that passes is held up for it.

    Args:
        seconds: without a byte, after which a session is ended; 0 for never.
    """

    def __init__(self, seconds: float) -> None:
        self._most = seconds
        self._watched: dict[Hashable, _Watched] = {}
        self._look: asyncio.TimerHandle | None = None

    def add(self, session: Hashable, passed: Callable[[], int], end: Callable[[str], None]) -> None:
        """Watch a session that has begun: `passed` says how many bytes, `end` is called with the reason, a clause."""
        if not self._most:
            return
        self._watched[session] = _Watched(passed, end)
        if self._look is None:
            self._look_soon()

    def discard(self, session: Hashable) -> None:
        """The session has ended."""
        self._watched.pop(session, None)

    def _look_soon(self) -> None:
        self._look = asyncio.get_running_loop().call_later(self._most / LOOKS, self._look_at_all)

    def _look_at_all(self) -> None:
        # Looks are counted, not seconds: a host that was suspended must not take that for its sessions' silence.
        for session, watched in list(self._watched.items()):
            if watched.quiet_looks() >= LOOKS:
                self.discard(session)
                watched.end(f"nothing passed for {self._most:g} s, which is as long as this host waits")
        self._look = None
        if self._watched:
            self._look_soon()
