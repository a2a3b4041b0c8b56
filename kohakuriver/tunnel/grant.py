"""A session's right to go on, as whoever carries the session sees it; the host keeps it (docs/security.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

__all__ = ["Grant"]


class Grant(Protocol):
    """Who opens a session attaches what ends it, and releases the grant at the session's end, also at an early one."""

    def attach(self, end: Callable[[str], None]) -> None:
        """`end` is called with the reason, a clause, once the right is gone: at once if that has happened already."""

    def release(self) -> None:
        """The session has ended, or never began."""
