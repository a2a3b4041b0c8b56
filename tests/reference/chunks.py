"""The plain twin of what `_frame` skips of a chunked body: whole, plain chunks. The oracle of its tests.

Source: RFC 9112 section 7.1; what is plain is a decision (docs/architecture.md).
"""

from __future__ import annotations

import re

CHUNK_DIGITS = 15
CHUNK_LINE = 1024

_LINE = re.compile(rb"([0-9A-Fa-f]+)(;[\t\x20-\x7e\x80-\xff]*)?\r\n")


def whole_chunks(buf: bytes | bytearray | memoryview, start: int) -> int:
    data = bytes(buf)
    if not 0 <= start <= len(data):
        raise ValueError("start is outside of the buffer")
    at = start
    while (end := _whole_chunk(data, at)) is not None:
        at = end
    return at


def _whole_chunk(data: bytes, at: int) -> int | None:
    line = _LINE.match(data, at)
    if line is None or len(line[1]) > CHUNK_DIGITS or len(line[0]) > CHUNK_LINE:
        return None
    size = int(line[1], 16)
    end = line.end() + size
    return end + 2 if size and data[end : end + 2] == b"\r\n" else None


def chunk_data(buf: bytes | bytearray | memoryview, start: int, stop: int) -> bytes:
    data = bytes(buf)
    if not 0 <= start <= stop <= len(data):
        raise ValueError("the chunks are outside of the buffer")
    at, out = start, b""
    while (end := _whole_chunk(data[:stop], at)) is not None:
        out += data[data.index(b"\n", at) + 1 : end - 2]
        at = end
    return out
