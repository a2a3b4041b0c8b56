"""What both ends of a copy can do, so that whoever copies need not know which of them is in the task.

Each operation tells its result by calling `then`, at once or later, with the result or with a FileError. Whoever is
told must not ask the same side for anything in that call: it may come from the middle of reading answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kohakuriver.errors import KohakuRiverError
from kohakuriver.tunnel.files import Attributes, Entry

__all__ = ["CHANGED", "Batch", "Contents", "Done", "FileError", "Side", "StreamGone", "Told", "Written"]

CHANGED = "It changed while it was copied"

T = TypeVar("T")


class FileError(Exception):
    """One file could not be read or written; `code` is the name of a POSIX error. All others go on."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why

    def __str__(self) -> str:
        return self.why


class StreamGone(KohakuRiverError):
    """A side can be asked nothing more: its stream has ended, and who carries that knows why, or it was hung up."""


Batch = list[tuple[Entry, bytes]]
"""Small files: what they are, and the path that each has at the other end."""


@dataclass(frozen=True)
class Contents:
    """The bytes of a batch, as they stand in its messages, and which of its files, by number, have none."""

    data: memoryview
    failed: dict[int, FileError]


@dataclass(frozen=True)
class Written:
    """What became of a batch: which could not be written, by number, and how many not be given their owner."""

    failed: dict[int, FileError]
    not_owner: int = 0


Told = Callable[["T | FileError"], None]
Done = Callable[["int | FileError"], None]


class Side(Protocol):
    """A folder, or one name in it (`only`). Paths are bytes, relative, and never lead out of it."""

    only: bytes | None

    def entries(self, path: bytes) -> Iterator[list[Entry]]:
        """All below a path, or what a file is, each folder before what is in it, a part at a time; b"" is the root.

        Which names there are is known before the first part: what is made meanwhile is not among them. Until the last
        one nothing else may be asked. Raises FileError.
        """

    def segments(self, path: bytes) -> list[tuple[int, int]]:
        """Offsets and lengths of what a file with holes has. Raises FileError."""

    def read(self, path: bytes, offset: int, length: int, then: Told[memoryview]) -> None:
        """Bytes of a file, fewer where it ends. They are there for as long as `then` runs."""

    def sums(self, path: bytes, offset: int, length: int, then: Told[list[int]]) -> None:
        """The checksum of each PIECE of a file from an offset on."""

    def get(self, batch: Batch, then: Told[Contents]) -> None:
        """Whole small files. Their bytes are there for as long as `then` runs."""

    def put(self, batch: Batch, contents: Contents, then: Told[Written], *, owner: bool, beside: bool) -> None:
        """Write those that have contents, each under its name where that is free, else, or always, `beside` what has
        it first. `owner`: as they are the source's, else this side's own."""

    def part(self, path: bytes, size: int, then: Done) -> None:
        """Make sure that there is a file that is written in pieces; BEFORE where it was there."""

    def write(self, path: bytes, offset: int, data: memoryview, then: Done) -> None:
        """Write one piece of it."""

    def finish(self, part: bytes, path: bytes, attributes: Attributes, then: Done) -> None:
        """Give it its attributes and its name."""

    def folder(self, path: bytes, then: Done) -> None:
        """Make a folder, in the place of what is none."""

    def symlink(self, path: bytes, target: bytes, attributes: Attributes, then: Done) -> None:
        """Make a symbolic link, in the place of what is there."""

    def link(self, path: bytes, existing: bytes, then: Done) -> None:
        """Give a file another name."""

    def attributes(self, path: bytes, attributes: Attributes, then: Done) -> None:
        """Set those of a folder or file."""

    def remove(self, path: bytes, folder: bool, then: Done) -> None:
        """Take a name away; a folder must be empty."""

    def settle(self, *, all_of_it: bool = False) -> None:
        """Wait until there is room for more requests, or until all have been answered."""

    def hang_up(self) -> None:
        """From any thread: whoever asks for something, or waits for it, gets StreamGone."""

    def close(self) -> None:
        """Let go of what is open."""
