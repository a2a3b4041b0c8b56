"""Where a browser's request goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kohakuriver.gateway.names import Place
from kohakuriver.tunnel.user_endpoint import UserEndpoint

__all__ = ["Destination", "Pace"]


class Pace(Protocol):
    """What slows browsers down that send too much."""

    def took(self, size: int) -> float:
        """So many bytes were taken: for how many seconds no more is to be."""


@dataclass(frozen=True)
class Destination:
    """A port of a task, and the endpoint whose streams lead there.

    Args:
        trouble: why nothing can be reached now, as a sentence; None where something may be.
        more: fields that the head of the answer gets, each with its CR and LF.
        pace: what a browser's bytes are counted by; None for no limit.
    """

    place: Place
    endpoint: UserEndpoint
    trouble: Callable[[], str | None]
    more: bytes = b""
    pace: Pace | None = None
