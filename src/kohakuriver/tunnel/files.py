"""The file protocol's requests, answers and entries as bytes (docs/protocol.md §6, "Files")."""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from kohakuriver._files import Entry, entries_in, is_safe
from kohakuriver.tunnel.terminal import Start

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:  # there is none for this processor: the same sums, a tenth as fast
    from zlib import crc32

__all__ = [
    "EACH",
    "HEAD",
    "LONGEST_PATH",
    "PIECE",
    "SUM",
    "SUMMED",
    "Answer",
    "Ask",
    "Attributes",
    "Entry",
    "crc32",
    "entries_in",
    "files_start",
    "is_safe",
    "pack_path",
    "segments_in",
]

PIECE: Final = 1 << 20
"""Bytes that one read or write has at most, and that one checksum is of."""
EACH: Final = 128
"""Bytes that each of many files counts for beside its own: what all count for is little more than PIECE at most."""
SUMMED: Final = 64 << 20
"""Bytes that one request for checksums may cover."""
LONGEST_PATH: Final = 4096
"""Bytes that a path in a request has at most."""

HEAD: Final = struct.Struct(">BI")
SUM: Final = struct.Struct(">I")
_LENGTH: Final = struct.Struct(">H")
_ATTRIBUTES: Final = struct.Struct(">IBIIqI")
_SEGMENT: Final = struct.Struct(">QQ")
_SECOND: Final = 1_000_000_000


class Ask:
    """What requests are."""

    LIST, READ, MAP, SUMS = 0x21, 0x22, 0x23, 0x24
    PUT, WRITE, PART, FINISH, FOLDER, SYMLINK, LINK, ATTRIBUTES, REMOVE, GET = range(0x25, 0x2F)


class Answer:
    """What answers are."""

    DONE, ENTRIES, DATA, MAP, SUMS, RESULTS, HELLO, ERROR = 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47, 0x4F
    ALL, NOT_OWNER, BEFORE = 0, 1, 2
    NOTHING, FAILED = 2, 3
    """What RESULTS has besides, for a file that had no contents, and for one that could not be written."""


class Attributes(NamedTuple):
    """What a file is given beside its bytes. `owner` is (uid, gid), `mtime` in ns since the epoch."""

    mode: int
    owner: tuple[int, int] | None
    mtime: int

    @classmethod
    def of(cls, entry: Entry, owner: bool) -> Attributes:
        """What the copy of an entry is given. The bits that lend an owner's rights are kept with the owner alone."""
        if owner:
            return cls(entry.mode, (entry.uid, entry.gid), entry.mtime)
        return cls(entry.mode & 0o1777, None, entry.mtime)

    def pack(self) -> bytes:
        """As it stands in requests."""
        uid, gid = self.owner or (0, 0)
        seconds, nanoseconds = divmod(self.mtime, _SECOND)
        return _ATTRIBUTES.pack(self.mode, self.owner is not None, uid, gid, seconds, nanoseconds)


def files_start(access: str, path: bytes, *, folder: bool = False) -> bytes:
    """What CONNECT has behind its mark to read (`from`) or write (`to`) files. A `folder` is made if it is missing."""
    command = [access, os.fsdecode(path), *(["folder"] if folder else [])]
    return Start(command, tty=False).for_files()


def pack_path(path: bytes) -> bytes:
    """A path, or a link's target, in a request."""
    return _LENGTH.pack(len(path)) + path


def segments_in(payload: memoryview) -> list[tuple[int, int]]:
    """Where a file has data: offsets and lengths. Raises struct.error where it makes no sense."""
    return list(_SEGMENT.iter_unpack(payload))
