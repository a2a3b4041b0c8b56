"""What one WebSocket sends, in its order: bulk, and small frames that go ahead of it at frame borders. Sans-I/O.

Bytes go to a `Sink` at once while it takes them. When it says that it can't (`block`), they wait here until it can
again (`resume`), and so do the sources that want to send more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from kohakuriver.tunnel.backlog import Backlog
from kohakuriver.tunnel.protocol import Bytes

__all__ = ["Pausable", "SendQueue", "Sink"]

# A peer that makes us answer and never reads is dropped when this much waits for it: more than any window gives out.
MAX_QUEUED = 128 << 20
MAX_URGENT = 8 << 20
# Frames of up to so many bytes are gathered; to copy a larger one costs more than a system call.
GATHERED = 4 << 10

_IOV_MAX = 512


class Sink(Protocol):
    """Where the bytes go."""

    def write(self, data: Bytes) -> int:
        """How many of the bytes are gone at once, 0 or more; of the others nothing is kept."""

    def writev(self, views: Sequence[memoryview]) -> int:
        """The same for several ranges."""

    def keep(self, rest: bytes) -> None:
        """Take them all, and call `SendQueue.block` now if they can't go at once; `resume` follows when they have."""

    def kept(self) -> int:
        """How many bytes it keeps now."""


class Pausable(Protocol):
    """A source of bulk that waits for a queue to drain."""

    def link_writable(self) -> None:
        """All that waited is gone, or the link is."""


class SendQueue:
    """Frames on their way to one sink.

    A source stops sending while `blocked` is true, and is called when that has changed (`wait_drained`). `queued` are
    the bytes of bulk that wait here, `urgent` the small frames that wait for a frame border. What waits counts in a
    program's `backlog`, as its `owner`'s, once it was told of it (`count_in`).

    Args:
        on_overrun: called when more waits than `max_queued` bytes of bulk or `max_urgent` of urgent frames: the peer
            asks for much and reads nothing.
    """

    max_queued = MAX_QUEUED
    max_urgent = MAX_URGENT

    def __init__(self, on_overrun: Callable[[], None]) -> None:
        self.blocked = False
        self.queued = 0
        self._sink: Sink
        self._given = 0  # bytes that the sink got so far
        self._inside = False  # whether the last byte that the sink got lies inside a frame
        self._queue: deque[tuple[bytes, bool]] = deque()
        self.urgent: list[bytes] = []
        self._urgent_size = 0
        self._waiters: dict[Pausable, None] = {}
        self._gathered: list[bytes] | None = None
        self._over = False
        self._on_overrun = on_overrun
        self.owner: Hashable = None
        self._backlog: Backlog | None = None

    def begin(self, sink: Sink) -> None:
        """Send to `sink` from now on."""
        self._sink = sink

    def count_in(self, backlog: Backlog, owner: Hashable) -> None:
        """Count what waits here, from now on, in `backlog`: as its owner's."""
        self.owner, self._backlog = owner, backlog

    def evict(self) -> None:
        """Too much waits in the whole program, and here most of it: the link ends."""
        self._on_overrun()

    def send(self, data: Bytes, inside: bool = False) -> None:
        """Send bytes in order. The caller may reuse `data` at once: what the sink does not take at once is copied.

        Args:
            inside: whether `data` ends inside a frame, whose rest will be sent next.
        """
        gathered = self._gathered
        if gathered is not None and self._gather(gathered, data, inside):
            return
        if self.blocked:
            self._wait(data, inside)
            return
        size = len(data)
        sent = self._sink.write(data)
        self._given += size
        self._inside = inside
        if sent < size:
            self._sink.keep(bytes(data if sent == 0 else memoryview(data)[sent:]))
        if self.urgent:
            self._send_urgent()

    def send_many(self, views: Sequence[memoryview]) -> None:
        """Send whole frames that lie in several ranges, with one system call where the kernel has room."""
        sent = 0
        if self._gathered is None and not self.blocked and len(views) <= _IOV_MAX:
            sent = self._sink.writev(views)
            self._given += sent
        for view in views:
            if sent >= len(view):
                sent -= len(view)
            else:
                self.send(view[sent:] if sent else view)
                sent = 0

    def post(self, frame: bytes) -> None:
        """Send a small whole frame ahead of all bulk that waits, at the next frame border."""
        if not self.blocked and not self._inside:
            self.send(frame)
            return
        self.urgent.append(frame)
        self._urgent_size += len(frame)
        if self._urgent_size > self.max_urgent:
            self._on_overrun()

    def gather(self) -> bool:
        """Let small frames wait for each other until `scatter`, so that one system call sends them.

        For who works off a read that has several messages: a call for each would wake up the peer for each. False where
        they do already.
        """
        if self._gathered is not None:
            return False
        self._gathered = []
        return True

    def scatter(self) -> None:
        """Send what was gathered, and each frame by itself from now on."""
        gathered, self._gathered = self._gathered, None
        if gathered:
            self.send(gathered[0] if len(gathered) == 1 else b"".join(gathered))

    def _gather(self, gathered: list[bytes], data: Bytes, inside: bool) -> bool:
        if inside or self._inside or self.blocked or len(data) > GATHERED:
            self.scatter()
            self.gather()
            return False
        gathered.append(bytes(data))
        return True

    @property
    def inside(self) -> bool:
        """Whether what was sent so far ends inside a frame."""
        return self._queue[-1][1] if self._queue else self._inside

    @property
    def given(self) -> int:
        """Bytes that were sent so far, or wait here."""
        return self._given + self.queued

    def taken(self) -> int:
        """Bytes that the sink has passed on so far."""
        return self._given - self._sink.kept()

    def wait_drained(self, source: Pausable) -> None:
        """`source.link_writable()` will be called once, when all that waits is gone; at once if the link is."""
        if self._over:
            source.link_writable()
        else:
            self._waiters[source] = None

    # -- what the sink says ----------------------------------------------------------------------------------------

    def block(self) -> None:
        """The sink keeps what it got last: nothing more may go to it."""
        self.blocked = True

    def resume(self) -> bool:
        """The sink has room again. True where all is gone that waited."""
        self.blocked = False
        self._send_urgent()
        while self._queue and not self.blocked:
            data, inside = self._queue.popleft()
            self._count(-len(data))
            self.send(data, inside)
        return not self.blocked

    def end(self) -> None:
        """The sink is gone, and with it all that waits."""
        self._over = True
        self.blocked = False
        self._count(-self.queued)
        self._queue.clear()
        self._gathered = None
        self.urgent.clear()
        self._urgent_size = 0

    def wake(self) -> None:
        """Call those who wait for the queue to drain."""
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            waiter.link_writable()

    # -- what waits ------------------------------------------------------------------------------------------------

    def _wait(self, data: Bytes, inside: bool) -> None:
        self._queue.append((bytes(data), inside))
        self._count(len(data))
        if self.queued > self.max_queued:
            self._on_overrun()

    def _count(self, size: int) -> None:
        self.queued += size
        if self._backlog is not None:
            self._backlog.count(self, size)

    def _send_urgent(self) -> None:
        """At a frame border: all that is urgent goes, with one system call."""
        if self.urgent and not self.blocked and not self._inside:
            frames, self.urgent, self._urgent_size = b"".join(self.urgent), [], 0
            self.send(frames)
