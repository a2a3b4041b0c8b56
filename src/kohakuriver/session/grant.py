"""A session's right to go on, as the relay that carries it sees it; the host keeps it (docs/security.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

__all__ = ["NO_GRANT", "Grant"]


class Grant(Protocol):
    """Who opens a session attaches what ends it, and says when it has begun and ended; or releases the grant."""

    def opened(self, **about: Any) -> None:
        """The session has begun; `about` is for the audit log."""

    def counted(self, passed: Callable[[], tuple[int, int]]) -> None:
        """`passed` says how many bytes have gone to the container and to the user so far."""

    def need_room(self) -> None:
        """Raises UnavailableError (429) while its user has done more than can be written down."""

    def ran(self, command: list[str]) -> None:
        """A command was asked for in the session; for the audit log."""

    def stays(self) -> None:
        """Something of the session stays in the task when it has ended, for as long as the right to it."""

    def attach(self, end: Callable[[str], None]) -> None:
        """`end` is called with the reason, a clause, once the right is gone: at once if that has happened already."""

    def closed(self, **how: Any) -> None:
        """The session that had begun has ended; `how` is for the audit log. Only the first call counts.

        `lost` in it says that the session was not ended by anybody: its streams are held for the next one.
        """

    def release(self) -> None:
        """The session never began."""


class _NoGrant:
    """A grant without accounting."""

    def opened(self, **about: Any) -> None:
        pass

    def counted(self, passed: Callable[[], tuple[int, int]]) -> None:
        pass

    def need_room(self) -> None:
        pass

    def ran(self, command: list[str]) -> None:
        pass

    def stays(self) -> None:
        pass

    def attach(self, end: Callable[[str], None]) -> None:
        pass

    def closed(self, **how: Any) -> None:
        pass

    def release(self) -> None:
        pass


NO_GRANT: Final[Grant] = _NoGrant()
"""That of a session which nothing but its own two sides can end."""
