"""How much the senders of kept streams may keep: what their peers are not known to have (docs/protocol.md §3).

Where the bytes lie, and how they are sent again, is `_frame`'s.
"""

from __future__ import annotations

from kohakuriver._frame import Blocks, Unacked
from kohakuriver.tunnel.windows import EARLY_DATA, MAX_WINDOW, SESSION_BUDGET, Pool, SendWindow

__all__ = ["KeptWindow", "Store", "Unacked"]


class Store(Blocks):
    """What the streams of one endpoint may keep before each has to wait for the others.

    Args:
        total: bytes for all streams together; each may keep a little beside it.
        within: what they are a part of, where other endpoints take from that, too.
    """

    def __init__(self, total: int = SESSION_BUDGET, within: Pool | None = None) -> None:
        super().__init__(Pool(total, within))

    @property
    def share(self) -> int:
        """How many bytes a stream may keep now."""
        return MAX_WINDOW if self.pool.left > 0 else EARLY_DATA


class KeptWindow(SendWindow):
    """What may still be sent on a kept stream: no more than the peer granted, and no more than may be kept."""

    __slots__ = ("_store", "granted", "unacked")

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self.granted = 0
        self.unacked = Unacked(store)

    def raise_to(self, limit: int) -> bool:
        """Take the peer's limit; True if it gave room where there was none. A lower one is ignored."""
        if limit > self.granted:
            self.granted = limit
        return self.renew()

    def renew(self) -> bool:
        """Something was acknowledged; True if that gave room where there was none."""
        was_shut = self.sent >= self.limit
        start, limit = self.unacked.start, self.granted
        if limit > start + EARLY_DATA:  # less than that it may keep, whatever is left
            limit = min(limit, start + self._store.share)
        self.limit = limit
        return was_shut and self.sent < limit
