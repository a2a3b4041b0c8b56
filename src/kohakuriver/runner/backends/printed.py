"""What a task prints, on its way to whoever reads it: in pieces that are lines, or parts of very long ones."""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kohakuriver.task import LogLine, LogStream

__all__ = ["CLIENT_CHATTER", "PIECE", "LogRequest", "Pieces", "Printed", "cut"]

PIECE: Final = 16 << 10
"""Bytes of a line that are passed on at a time."""

CLIENT_CHATTER: Final = ("tunnel-client: debug:", "tunnel-client: info:", "tunnel-client: warn:")
"""How lines begin that the tunnel client writes where the task prints."""

_CHATTER = re.compile(b"(?:%s)[^\\n]*\\n" % "|".join(CLIENT_CHATTER).encode())


@dataclass(frozen=True)
class LogRequest:
    """What to read of what a task printed: its last `tail` lines, None for all, from `since` on, in seconds since the
    epoch. With `follow` also what it prints from now on, until it ends.
    """

    follow: bool = False
    tail: int | None = None
    since: float | None = None


class Printed(ABC):
    """What a task printed, and with `follow` what it prints. One reader; `close` may be called at any time.

    What is not read is not buffered: it stays where it is kept, on disk, as long as it is kept there.
    """

    @abstractmethod
    async def read(self) -> list[LogLine] | None:
        """The next pieces, at least one; None at the end. Raises KohakuRiverError. Who cancels it closes it."""

    @abstractmethod
    async def close(self) -> None:
        """Free what it holds."""


class Pieces:
    """Makes pieces of a task's output out of bytes of one of its streams, without the tunnel client's own lines."""

    def __init__(self, stream: LogStream) -> None:
        self._stream: LogStream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, data: bytes, time: float | None) -> LogLine | None:
        """The piece that `data`, of one line at most, is; None for what the tunnel client says.

        That may stand within a line: many programs write a line and its end one after the other.
        """
        data = _CHATTER.sub(b"", data)
        return LogLine(self._decoder.decode(data), self._stream, time) if data else None


def cut(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines of `data`, and parts of those that are longer than a piece; each with its place."""
    at = 0
    while at < len(data):
        end = data.find(b"\n", at, at + PIECE) + 1 or min(at + PIECE, len(data))
        yield at, data[at:end]
        at = end
