"""The plain twin of what `_frame` keeps of a kept stream: which bytes, not where they lie. The oracle of its tests.

Source: docs/protocol.md §3, "Streams that outlive links"; what is copied and what stays in blocks is a decision
(docs/architecture.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tests.reference.frame import HEADROOM, MAX_SEND, TYPE_DATA, build_frame

BLOCK = 1024 * 1024
BULK = 16 * 1024
CALM = 8
LEAST_ROOM = 256 * 1024
COPIES = 64 * 1024


class Pool(Protocol):
    @property
    def left(self) -> int: ...

    def take(self, size: int, /) -> None: ...


class Blocks:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.used = 0
        self.fresh = False  # a block is there for whoever reads next

    def next(self) -> bool:
        self.fresh = self.fresh or self.pool.left >= BLOCK
        return self.fresh

    def spend(self, size: int) -> None:
        self.used += size
        self.pool.take(size)


@dataclass(eq=False)
class _Block:
    free: int = HEADROOM
    pieces: int = 0


@dataclass(eq=False)
class _Piece:
    data: bytes
    block: _Block | None = None
    paid: int = 0
    open: bool = True  # what is copied next may be added


@dataclass
class Unacked:
    blocks: Blocks
    start: int = 0
    end: int = 0
    bulk: int = 0
    _pieces: list[_Piece] = field(default_factory=list)
    _block: _Block | None = None
    _reading: _Block | None = None
    _space: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def memory(self) -> int:
        blocks = {id(piece.block) for piece in self._pieces if piece.block is not None}
        return len(blocks) * BLOCK + sum(len(piece.data) for piece in self._pieces if piece.block is None)

    def space(self, size: int) -> memoryview | None:
        self._reading = None
        if not self.bulk:
            return None
        if self._block is not None and BLOCK - self._block.free >= LEAST_ROOM:
            self._reading = self._block
        elif self.blocks.next():
            self._reading = _Block()
        else:
            return None
        self._space = bytearray(min(size, BLOCK - self._reading.free))
        return memoryview(self._space)

    def came(self, view: memoryview, size: int) -> memoryview:
        reading, self._reading = self._reading, None
        if reading is None:
            return view[HEADROOM : HEADROOM + size]
        if size > len(self._space):
            raise ValueError("more than there was room for")
        return memoryview(self._space)[:size]

    def frame(self, view: memoryview, size: int, client_id: int, key: int = -1) -> memoryview:
        if size + 8 > MAX_SEND or (self._reading is None and HEADROOM + size > len(view)):
            raise ValueError("too much")
        reading = self._reading
        data = bytes(self.came(view, size))
        frame = build_frame(TYPE_DATA, 0, client_id, 0, data, key)
        if reading is None or size < BULK:
            self.add(data)
        else:
            self._keep(reading, data)
        return memoryview(frame)

    def _keep(self, block: _Block, data: bytes) -> None:
        if block is not self._block:
            self.blocks.fresh = False
            self.blocks.spend(BLOCK)
            self._block = block
        block.free = -(-(block.free + len(data)) // HEADROOM) * HEADROOM + HEADROOM
        block.pieces += 1
        self._close()
        self._pieces.append(_Piece(data, block, open=False))
        self.end += len(data)
        self.bulk = CALM

    def add(self, data: bytes | memoryview) -> None:
        if not data:
            return
        if not self._pieces or not self._pieces[-1].open:
            self._pieces.append(_Piece(b""))
        last = self._pieces[-1]
        last.data += data
        self.end += len(data)
        self.bulk = CALM if len(data) >= BULK else max(0, self.bulk - 1)
        if len(last.data) >= COPIES:
            self._close()

    def _close(self) -> None:
        """Nothing is added to the copies that are the last piece: they are paid for."""
        if self._pieces and self._pieces[-1].open:
            last = self._pieces[-1]
            last.open, last.paid = False, len(last.data)
            self.blocks.spend(last.paid)

    def ack(self, offset: int) -> None:
        if not self.start <= offset <= self.end:
            raise ValueError("not what is kept")
        self.start = offset
        at = self.end - sum(len(piece.data) for piece in self._pieces)
        while self._pieces and at + len(self._pieces[0].data) <= offset:
            piece = self._pieces.pop(0)
            at += len(piece.data)
            self._release(piece)

    def _release(self, piece: _Piece) -> None:
        block = piece.block
        if block is None:
            self.blocks.spend(-piece.paid)
            return
        block.pieces -= 1
        if not block.pieces:
            self._block = None if block is self._block else self._block
            self._reading = None if block is self._reading else self._reading
            self.blocks.spend(-BLOCK)
            self.blocks.fresh = self.blocks.fresh and self.blocks.used > 0

    def clear(self) -> None:
        self.ack(self.end)

    def read(self, offset: int, size: int) -> bytes:
        if not self.start <= offset <= offset + size <= self.end:
            raise ValueError("not what is kept")
        whole = b"".join(piece.data for piece in self._pieces)
        first = self.end - len(whole)
        return whole[offset - first :][:size]
