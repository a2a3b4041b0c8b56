"""What one link reads: where it lies, what is left of it for later, and when reading stops.

Bytes are read into the loop's shared receive buffer and handed on where they lie. What is not consumed at once is kept,
and lies in front of what comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kohakuriver._frame import HEADROOM
from kohakuriver.tunnel.buffers import ReceiveBuffer, receive_buffer
from kohakuriver.tunnel.peer_watch import PeerWatch
from kohakuriver.tunnel.turns import Turn

__all__ = ["Intake"]

_TURN = object()
_HELD = object()


class Intake:
    """The receiving half of a link.

    Args:
        deliver: called with the range of `buffer.data` to be looked at, (start, stop); returns the offset of the first
            byte that it has not consumed.
        watch: is told of everything that comes, and when nothing can come because reading has stopped.
    """

    def __init__(self, deliver: Callable[[int, int], int], watch: PeerWatch) -> None:
        self.buffer = receive_buffer()
        self._free = self.buffer.view[HEADROOM:]
        self._deliver = deliver
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._pauses: set[object] = set()
        self.turn = Turn()  # may be replaced by one that is shared
        self._messages = 0  # of this delivery
        self._more = False  # a handler has returned before it was through
        self._turn_due = False
        self._held = False

    def begin(self, transport: asyncio.Transport, early: bytes) -> None:
        """Read from `transport`, behind the bytes that came `early`."""
        self._transport = transport
        if early:
            self._rest = early
            self._loop.call_soon(self._deliver_rest)

    def end(self) -> None:
        """Nothing comes any more."""
        self._transport = None
        self.discard()

    def discard(self) -> None:
        """Throw away what is there and what still comes."""
        self._rest = b""
        self._held = False
        self._deliver = _discard

    # -- reading ---------------------------------------------------------------------------------------------------

    def space(self) -> memoryview:
        """Where the next bytes go."""
        rest = self._rest
        if not rest:
            return self._free
        end = HEADROOM + len(rest)
        if end >= len(self.buffer.data):  # it is read on though we have paused, as TLS of Python 3.10 does
            self._read_into(ReceiveBuffer(2 * len(rest)))
        self.buffer.data[HEADROOM:end] = rest
        return self.buffer.view[end:]

    def took(self, size: int) -> None:
        """So many bytes were read into `space`."""
        watch, now, stop = self._watch, self._now(), HEADROOM + len(self._rest) + size
        watch.received += size
        # libuv reads up to 32 times before it looks at another socket, and its clock stands still meanwhile.
        again = now == watch.heard_at and stop == len(self.buffer.data)
        watch.heard_at = now
        self._consume(stop)
        if again:
            self._give_way()

    def limit_reads(self, size: int) -> None:
        """Read at most `size` bytes at a time from now on, into a buffer of this link's own."""
        if len(self._rest) < size // 2:  # else what is there already would leave no room
            self._read_into(ReceiveBuffer(size))

    def _read_into(self, buffer: ReceiveBuffer) -> None:
        self.buffer = buffer
        self._free = buffer.view[HEADROOM:]

    def _consume(self, stop: int) -> None:
        if self._held:
            consumed = HEADROOM
        elif self.turn.left > 0:
            consumed = self._deliver(HEADROOM, stop)
            if self._messages:
                self.turn.spend(self._messages)
                self._messages = 0
        else:  # other links that share it have had it
            consumed, self._more = HEADROOM, True
        self._rest = bytes(self.buffer.view[consumed:stop]) if consumed < stop else b""
        if self._more:
            self._give_way()

    def _deliver_rest(self) -> None:
        if self._rest:
            self.space()
            self._consume(HEADROOM + len(self._rest))

    # -- turns and pauses ------------------------------------------------------------------------------------------

    def turn_over(self, messages: int) -> bool:
        """Whether a handler that has worked off so many messages in this call is to return; it is soon called again."""
        self._messages = messages
        self._more = messages >= self.turn.left
        return self._more or self._held

    def _give_way(self) -> None:
        """Read on in the next turn."""
        if not self._turn_due:
            self._turn_due = True
            self.pause(_TURN)  # what is left may fill the buffer
            self.turn.wait(self._next_turn)

    def _next_turn(self) -> None:
        self._turn_due = self._more = False
        self._deliver_rest()
        if not self._turn_due:
            self.resume(_TURN)

    def pause(self, why: object) -> None:
        """Stop reading until everything that paused it has resumed it."""
        if not self._pauses and self._transport is not None:
            self._transport.pause_reading()
            self._watch.paused()
        self._pauses.add(why)

    def resume(self, why: object) -> None:
        """Read on, unless something else has paused as well."""
        if why in self._pauses:
            self._pauses.discard(why)
            if not self._pauses and self._transport is not None:
                self._watch.resumed()
                self._transport.resume_reading()

    def hold(self) -> None:
        """Stop reading, and deliver nothing of what is there either, until `release`.

        A handler that calls it returns behind the message that it is at, as `turn_over` tells it to.
        """
        self._held = True
        self.pause(_HELD)

    def release(self) -> None:
        """Go on where `hold` has stopped."""
        if self._held:
            self._held = False
            self._give_way()
        self.resume(_HELD)

    def hand_over(self) -> None:
        """Somebody else takes what is delivered: what is left is his, and the pauses of the one before are void."""
        if self._rest:
            self._loop.call_soon(self._deliver_rest)
        for why in self._pauses - {_TURN}:
            self.resume(why)


def _discard(start: int, stop: int) -> int:
    return stop
