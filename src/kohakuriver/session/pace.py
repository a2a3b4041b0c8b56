"""Keeping a session to so many bytes a second, each way: what is too much is not read for a while.

Bytes that are not read stay with the sender, whose windows (or TCP itself) make it wait. A session without a limit has
none of this in its way: its relay chooses once, when it begins. Source: docs/guide/limits.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kohakuriver.rates import TokenBucket
from kohakuriver.tunnel.buffers import RECEIVE_SIZE
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.message_link import MessageLink, size_of
from kohakuriver.tunnel.windows import SendWindow

__all__ = ["PacedMessages", "PacedReads", "PacedWindow"]

# What a session with a limited rate may be ahead of it, in seconds: also how long its peers' pings may go unread.
BURST_SECONDS = 0.25
LEAST_READ = 4096


def _bucket(rate: int) -> TokenBucket:
    return TokenBucket(rate, rate * BURST_SECONDS, asyncio.get_running_loop().time())


class PacedReads:
    """What may be read from one link. `rate` is in bytes a second."""

    def __init__(self, rate: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._bucket = _bucket(rate)
        self._burst = int(rate * BURST_SECONDS)
        self._waiting = False
        self._over = False

    def begin(self, link: Link) -> None:
        """Read no more at once than a burst is, where that is little: a long wait would follow."""
        if self._burst < RECEIVE_SIZE:
            link.intake.limit_reads(max(LEAST_READ, self._burst // 4))

    def took(self, link: Link, size: int) -> None:
        """So many bytes were read; read no more before their time has passed."""
        wait = self._bucket.take(size, self._loop.time())
        if wait > 0 and not self._waiting and not self._over:
            self._waiting = True
            link.intake.pause(self)
            self._loop.call_later(wait, self._go_on, link)

    def end(self, link: Link) -> None:
        """The link is being closed: what its peer still says is for nobody, and its close frame is behind that."""
        self._over = True
        link.intake.resume(self)

    def _go_on(self, link: Link) -> None:
        wait = self._bucket.take(0, self._loop.time())
        if wait > 0:  # more came in after the pause had begun
            self._loop.call_later(wait, self._go_on, link)
            return
        self._waiting = False
        link.intake.resume(self)


class PacedWindow(SendWindow):
    """A stream's window whose limit is also never more than a burst ahead of what a rate lets through.

    Args:
        rate: bytes a second.
        on_room: called when there is room again that the rate had taken.
    """

    __slots__ = ("_bucket", "_burst", "_given", "_loop", "_on_room", "_waiting")

    def __init__(self, rate: int, on_room: Callable[[], None]) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._bucket = _bucket(rate)
        self._burst = int(rate * BURST_SECONDS)
        self._given = 0  # the peer's limit
        self._on_room = on_room
        self._waiting = False

    def spend(self, size: int) -> None:
        self.sent += size
        wait = self._bucket.take(size, self._loop.time())
        if wait > 0 and not self._waiting:
            self._waiting = True
            self._loop.call_later(wait, self._go_on)
        self._set_limit()

    def raise_to(self, limit: int) -> bool:
        if limit <= self._given:
            return False
        was_shut = self.sent >= self.limit
        self._given = limit
        self._set_limit()
        return was_shut and self.sent < self.limit

    def _set_limit(self) -> None:
        self.limit = self.sent if self._waiting else min(self._given, self.sent + self._burst)

    def _go_on(self) -> None:
        wait = self._bucket.take(0, self._loop.time())
        if wait > 0:
            self._loop.call_later(wait, self._go_on)
            return
        self._waiting = False
        self._set_limit()
        self._on_room()


class PacedMessages:
    """What may be received from one WebSocket of whole messages. `rate` is in bytes a second."""

    def __init__(self, link: MessageLink, rate: int) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._bucket = _bucket(rate)

    async def receive(self) -> str | bytes | None:
        """`MessageLink.receive`, once those before have had their time."""
        await asyncio.sleep(self._bucket.take(0, self._loop.time()))
        message = await self._link.receive()
        if message is not None:
            self._bucket.take(size_of(message), self._loop.time())
        return message
