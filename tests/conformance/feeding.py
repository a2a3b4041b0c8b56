"""Ways to give bytes to a walker, as a link does: a buffer that is read into, and what was not consumed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

HEADROOM = 32


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Cut data into reads of these sizes, and the rest."""
    pos = 0
    for size in sizes:
        yield data[pos : pos + size]
        pos += size
    yield data[pos:]


@dataclass
class Reader:
    """The receive buffer of one link: what was not consumed moves to another address before the next read."""

    step: Callable[[bytearray, int, int], int]
    kept: bytes = b""
    reads: int = 0

    def feed(self, data: bytes) -> None:
        self.reads += 1
        start = HEADROOM + self.reads % 3
        buf = bytearray(start) + self.kept + data + b"\xa5" * (self.reads % 5)
        stop = start + len(self.kept) + len(data)
        guard = bytes(buf[stop:])
        try:
            while (consumed := self.step(buf, start, stop)) != start:
                assert start < consumed <= stop
                start = consumed
        finally:
            assert buf[stop:] == guard
            self.kept = bytes(buf[start:stop])


@dataclass
class Joined:
    """Messages of a walker, joined from their pieces: (type, proto, client_id, port, payload)."""

    whole: list[tuple[int, int, int, int, bytes]] = field(default_factory=list)
    open: tuple[tuple[int, int, int, int], bytes] | None = None
    empty_pieces: int = 0

    def take(self, message: tuple[int, ...], buf: bytearray) -> None:
        kind, proto, client_id, port, start, stop, flags = message
        head, payload = (kind, proto, client_id, port), bytes(buf[start:stop])
        if kind in (0x108, 0x109, 0x10A):  # may stand between the pieces of another
            assert flags == 3
            self.whole.append((*head, payload))
            return
        assert (self.open is None) == bool(flags & 1), "FIRST is set on the first piece and on no other"
        assert payload or flags & 2, "only the last piece may be empty"
        before = b"" if self.open is None else self.open[1]
        assert self.open is None or self.open[0] == head, "pieces of one message have one header"
        self.open = (head, before + payload)
        if flags & 2:
            self.whole.append((*head, before + payload))
            self.open = None

    def so_far(self) -> list[tuple[int, int, int, int, bytes]]:
        """All of it, with what there is of the message that has not ended."""
        return self.whole + ([(*self.open[0], self.open[1])] if self.open else [])


def walk_all(frame: Any, reads: Iterable[bytes], limit: int = 256, **options: Any) -> tuple[Joined, int | None]:
    """Feed the reads to a FrameWalker; return what came out, and the close code of the violation that ended it."""
    walker = frame.FrameWalker(**options)
    joined = Joined()

    def step(buf: bytearray, start: int, stop: int) -> int:
        messages, consumed = walker.walk(buf, start, stop, limit)
        for message in messages:
            joined.take(message, buf)
        return int(consumed)

    reader = Reader(step)
    try:
        for data in reads:
            reader.feed(data)
    except frame.FrameViolation as violation:
        return joined, int(violation.code)
    return joined, None
