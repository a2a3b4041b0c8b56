"""A stream under protocol version 1's rules: what stands where version 2 has a window (docs/protocol.md §3, 4 and 6).

When CLOSE answers CLOSE, and what a linger leads to, is in the tables of `states.py`.
"""

from __future__ import annotations

from kohakuriver.tunnel.states import Do

__all__ = ["V1Rules"]


class V1Rules:
    """No limits, so the link itself is held up while one stream holds too much; and no EOF, so its end is guessed.

    It has the face of a `ReceiveWindow` that grants everything and measures nothing.

    Args:
        hold: bytes that the local socket has not taken, above which nothing more is read from the link.
        linger: seconds without data after which a half-closed stream is ended.
    """

    __slots__ = ("_hold", "_linger")

    granted = None  # no limit goes into CONNECT or CONNECTED
    received = 0  # nor is anything acknowledged

    def __init__(self, hold: int, linger: float) -> None:
        self._hold = hold
        self._linger = linger

    def receive(self, size: int) -> bool:
        """Always within the limit that there isn't."""
        return True

    def wants_ping(self, now: float) -> bool:
        """Never: a PING measures for a window."""
        return False

    def consume(self, size: int) -> int | None:
        """No limit is announced."""
        return None

    def pong(self, now: float) -> int | None:
        """Nor does a PONG lead to one."""
        return None

    def close(self) -> None:
        """Nothing was taken from the budget."""

    def link_reading(self, held: int) -> Do | None:
        """What becomes of the link's reading while ``held`` bytes wait for the local socket (rule 6)."""
        if held > self._hold:
            return Do.HOLD_LINK
        return Do.FREE_LINK if held <= self._hold // 2 else None

    def linger_left(self, moved_at: float, now: float) -> float:
        """Seconds until the linger is over, when data last came at ``moved_at`` (rule 4); none where it is."""
        return max(0.0, moved_at + self._linger - now)
