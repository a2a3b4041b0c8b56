"""Where a browser's request goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kohakuriver.gateway.names import Place
from kohakuriver.tunnel.user_endpoint import UserEndpoint

__all__ = ["Destination", "Pace", "Places"]


class Pace(Protocol):
    """What slows browsers down that send too much."""

    def took(self, size: int) -> float:
        """So many bytes were taken: for how many seconds no more is to be."""


class Places(Protocol):
    """What bounds how many connections there are to services."""

    def enter(self) -> bool:
        """Take a place, if there is one."""

    def leave(self) -> None:
        """Give it back."""


@dataclass(frozen=True)
class Destination:
    """A port of a task, and the endpoint whose streams lead there.

    Args:
        trouble: why nothing can be reached now, as a sentence; None where something may be.
        more: fields that the head of the answer gets, each with its CR and LF.
        pace: what a browser's bytes are counted by; None for no limit.
        places: of which each browser's connection that leads there takes one; None for no limit.
    """

    place: Place
    endpoint: UserEndpoint
    trouble: Callable[[], str | None]
    more: bytes = b""
    pace: Pace | None = None
    places: Places | None = None
