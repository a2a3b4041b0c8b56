"""What a sender of a kept stream keeps: the bytes that its peer is not known to have (docs/protocol.md §3).

Bulk stays where it was read, masked as it was sent, in blocks that go from stream to stream. The key stays with it, so
that it can be sent again. What comes in small parts is copied. A stream whose peer has everything keeps nothing.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar

from kohakuriver._frame import HEADROOM, mask
from kohakuriver.tunnel.buffers import ReceiveBuffer, receive_buffer
from kohakuriver.tunnel.protocol import Bytes
from kohakuriver.tunnel.windows import EARLY_DATA, MAX_WINDOW, SESSION_BUDGET, Pool, SendWindow

__all__ = ["BLOCK", "BULK", "KeptWindow", "Store", "Unacked"]

BLOCK = 1024 * 1024
BULK = 16 * 1024  # a read of so many bytes is kept where it lies, and the next one is made where it can be
_CALM = 8  # small reads in a row after which no bulk is expected
_LEAST_ROOM = 256 * 1024  # with less left in a block, bulk is read into the next
_COPIES = 64 * 1024  # bytes of small writes that are kept in one piece
_SPARE = 16  # blocks that no stream has, and that are not given back to the system
_NO_KEY = -1


class _Block(ReceiveBuffer):
    """A buffer that keeps what is read into it."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        super().__init__(BLOCK - HEADROOM)
        self.pieces = 0  # that are in use


class Store:
    """Blocks, and how many bytes the streams of one endpoint may keep before each has to wait for the others.

    Args:
        total: bytes for all streams together; each may keep a little beside it.
        within: what they are a part of, where other endpoints take from that, too.
    """

    _spare: ClassVar[deque[_Block]] = deque(maxlen=_SPARE)  # of the process

    def __init__(self, total: int = SESSION_BUDGET, within: Pool | None = None) -> None:
        self._pool = Pool(total, within)
        self._next: _Block | None = None
        self.used = 0

    def next(self) -> _Block | None:
        """The block that `take` gives, to be read into now; None where there is none left for bulk."""
        if self._next is None and self._pool.left >= BLOCK:
            self._next = self._spare.pop() if self._spare else _Block()
        return self._next

    def take(self) -> None:
        """Something was read into the next block: it is a stream's now."""
        self._next = None
        self.spend(BLOCK)

    def give_back(self, block: _Block) -> None:
        """It is another's now."""
        self.spend(-BLOCK)
        self._spare.append(block)
        if not self.used and self._next is not None:
            self._spare.append(self._next)
            self._next = None

    def spend(self, size: int) -> None:
        """A stream keeps so many bytes more, or less where `size` is negative."""
        self.used += size
        self._pool.take(size)

    @property
    def share(self) -> int:
        """How many bytes a stream may keep now."""
        return MAX_WINDOW if self._pool.left > 0 else EARLY_DATA


class _Piece:
    """Bytes that lie together: copies of what was written, or a part of a block, masked with `key`.

    `paid` is what it takes of the store's budget, if it is a copy.
    """

    __slots__ = ("block", "data", "key", "paid", "size", "start")

    def __init__(self, data: bytearray, start: int, size: int, key: int = _NO_KEY, block: _Block | None = None) -> None:
        self.data = data
        self.start = start
        self.size = size
        self.key = key
        self.block = block
        self.paid = 0

    def read(self, start: int, stop: int) -> bytearray:
        """A copy of its bytes from `start` to `stop`, without the mask."""
        found = self.data[self.start + start : self.start + stop]
        if self.key != _NO_KEY:
            mask(found, 0, len(found), self.key, start % 4)
        return found


class Unacked:
    """The bytes from offset `start` up to `end` of one direction of a stream.

    Bytes come by `add`, which copies them. While they are `bulk` they are read into `space` instead, and framed there:
    they lie in `buffer` from `at` on, and `keep` is told how many they are, before anything else happens.
    """

    __slots__ = ("_block", "_copies", "_first", "_free", "_pieces", "_store", "at", "buffer", "bulk", "end", "start")

    def __init__(self, store: Store) -> None:
        self.start = 0
        self.end = 0
        self.bulk = 0  # how many small reads it takes until no bulk is expected
        self.buffer = receive_buffer()
        self.at = HEADROOM
        self._store = store
        self._pieces: deque[_Piece] | None = None
        self._first = 0  # the offset of the first piece, at most `start`
        self._copies: _Piece | None = None  # the last piece, as long as small writes may be added to it
        self._block: _Block | None = None  # the last one that bulk was read into
        self._free = 0  # where there is room in it

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def memory(self) -> int:
        """The bytes of memory that it takes."""
        pieces = self._pieces or ()
        blocks = {id(piece.block) for piece in pieces if piece.block is not None}
        return len(blocks) * BLOCK + sum(piece.size for piece in pieces if piece.block is None)

    # -- what comes --------------------------------------------------------------------------------------------

    def space(self, size: int) -> memoryview:
        """Where up to `size` bytes of bulk are to be read."""
        if self._block is not None and BLOCK - self._free >= _LEAST_ROOM:
            self.buffer, self.at = self._block, self._free
        else:
            self.buffer, self.at = self._store.next() or receive_buffer(), HEADROOM
        return self.buffer.view[self.at : self.at + size]

    def keep(self, size: int, key: int) -> None:
        """Keep what was read into `space`, which is masked with `key` next, if that is not -1."""
        buffer = self.buffer
        if size >= BULK and isinstance(buffer, _Block):
            if buffer is not self._block:
                self._store.take()
                self._block = buffer
            self.bulk = _CALM
            self._free = (self.at + size + 2 * HEADROOM - 1) & -HEADROOM
            buffer.pieces += 1
            self._append(_Piece(buffer.data, self.at, size, key, buffer))
        else:
            self.bulk -= 1
            self.add(buffer.view[self.at : self.at + size])

    def add(self, data: Bytes) -> None:
        """Keep a copy of what comes behind `end`; `data` is only valid during the call."""
        copies, size = self._copies, len(data)
        if copies is None:
            copies = _Piece(bytearray(data), 0, size)
            self._append(copies)
            self._copies = copies
        else:
            copies.data += data
            copies.size += size
            self.end += size
        if size >= BULK:
            self.bulk = _CALM
        if copies.size >= _COPIES:
            self._pay()

    def _append(self, piece: _Piece) -> None:
        if self._pieces is None:
            self._pieces, self._first = deque(), self.end
        if self._copies is not None:
            self._pay()
        self._pieces.append(piece)
        self.end += piece.size

    def _pay(self) -> None:
        """The copies are out of the budget from now on, and nothing is added to them."""
        copies, self._copies = self._copies, None
        if copies is not None:
            copies.paid = copies.size
            self._store.spend(copies.size)

    # -- what has arrived --------------------------------------------------------------------------------------

    def ack(self, offset: int) -> None:
        """The peer has all before `offset`, which lies between `start` and `end`."""
        self.start = offset
        pieces = self._pieces
        if pieces is None:
            return
        while pieces and self._first + pieces[0].size <= offset:
            piece = pieces.popleft()
            self._first += piece.size
            self._release(piece)
        if not pieces:
            self._pieces = None

    def _release(self, piece: _Piece) -> None:
        block = piece.block
        if block is None:
            self._store.spend(-piece.paid)
            if piece is self._copies:
                self._copies = None
            return
        block.pieces -= 1
        if block.pieces:
            return
        if block is self._block:
            self._block = None
        if block is self.buffer:
            self.buffer, self.at = receive_buffer(), HEADROOM
        self._store.give_back(block)

    def clear(self) -> None:
        """Nothing is sent any more."""
        self.ack(self.end)

    # -- what is sent again ------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, all of which are kept."""
        parts = []
        at, stop = self._first, offset + size
        for piece in self._pieces or ():
            if at >= stop:
                break
            if at + piece.size > offset:
                parts.append(piece.read(max(0, offset - at), min(stop - at, piece.size)))
            at += piece.size
        return b"".join(parts)


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
        self.granted = max(self.granted, limit)
        return self.renew()

    def renew(self) -> bool:
        """Something was acknowledged; True if that gave room where there was none."""
        was_shut = self.sent >= self.limit
        self.limit = min(self.granted, self.unacked.start + self._store.share)
        return was_shut and self.sent < self.limit
