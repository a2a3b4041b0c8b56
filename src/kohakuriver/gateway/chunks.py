"""Chunked bodies (RFC 9112 section 7.1): where they end, and that nobody can take them for something else. No I/O."""

from __future__ import annotations

import enum
import re

from kohakuriver._frame import chunk_data, whole_chunks
from kohakuriver.gateway.heads import Malformed

__all__ = ["Chunks"]

MAX_LINE = 1024
MAX_TRAILER = 8 << 10
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_FIELD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n")
_CRLF = b"\r\n"


class _At(enum.Enum):
    SIZE = enum.auto()
    DATA_END = enum.auto()
    TRAILER = enum.auto()
    OVER = enum.auto()


class Chunks:
    """Follows one chunked body. Chunks are passed on as they lie, what stands behind the last one is left out:
    a trailer's fields could be taken for those of the head, which were checked.

    Args:
        bare: what is in the chunks is passed on without them, for whoever speaks HTTP/1.0.
    """

    def __init__(self, *, bare: bool = False) -> None:
        self._bare = bare
        self._at = _At.SIZE
        self._left = 0  # of the present chunk
        self._line = b""  # what is there of the present line
        self._trailer = 0

    @property
    def over(self) -> bool:
        """Whether the whole body was there."""
        return self._at is _At.OVER

    def walk(self, data: memoryview) -> tuple[int, list[memoryview]]:
        """How many bytes of `data` are the body's, and what of it, or in its place, is passed on. Raises Malformed.

        No line is passed on before all of it was read.
        """
        at, start, size = 0, 0, len(data)
        pieces: list[memoryview] = []
        while at < size and self._at is not _At.OVER:
            if self._left:
                step = min(self._left, size - at)
                if self._bare:
                    pieces.append(data[at : at + step])
                self._left -= step
                at += step
                continue
            if self._at is _At.SIZE and not self._line:
                whole = whole_chunks(data, at)
                if whole > at:
                    if self._bare:
                        pieces.append(memoryview(chunk_data(data, at, whole)))
                    at = whole
                    continue
            before, begun, in_trailer = at, bool(self._line), self._at is _At.TRAILER
            at, line = self._take_line(data, at)
            if self._bare:
                continue
            if in_trailer or not line or begun:
                pieces.append(data[start:before])
                start = at
            if begun and not in_trailer and line:
                pieces.append(memoryview(line))
        if self._bare:
            return at, pieces
        pieces.append(data[start:at])
        if self._at is _At.OVER:
            pieces.append(memoryview(_CRLF))
        return at, [piece for piece in pieces if len(piece)]

    def _take_line(self, data: memoryview, at: int) -> tuple[int, bytes]:
        """Take the rest of the present line, or what is there of it: where that ends, and the line once it is whole."""
        room = MAX_LINE - len(self._line)
        found = bytes(data[at : at + room])
        end = found.find(b"\n") + 1
        if not end and len(found) == room:
            raise Malformed(f"A line between chunks is longer than {MAX_LINE} bytes.")
        self._line += found[:end] if end else found
        if not end:
            return at + len(found), b""
        line, self._line = self._line, b""
        self._read_line(line)
        return at + end, line

    def _read_line(self, line: bytes) -> None:
        if self._at is _At.SIZE:
            match = _SIZE.fullmatch(line)
            if match is None:
                raise Malformed("A chunk does not begin with its size.")
            self._left = int(match[1], 16)
            self._at = _At.DATA_END if self._left else _At.TRAILER
        elif line == _CRLF:
            self._at = _At.SIZE if self._at is _At.DATA_END else _At.OVER
        elif self._at is _At.DATA_END:
            raise Malformed("A chunk is longer than its size.")
        else:
            self._trailer += len(line)
            if self._trailer > MAX_TRAILER or not _FIELD.fullmatch(line):
                raise Malformed("What follows the last chunk is no trailer.")
