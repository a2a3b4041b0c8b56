"""The file protocol's requests, answers and entries as bytes (docs/protocol.md §6, "Files")."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from kohakuriver.tunnel.terminal import Start

__all__ = [
    "HEAD",
    "LONGEST_PATH",
    "PIECE",
    "SUM",
    "SUMMED",
    "Answer",
    "Ask",
    "Attributes",
    "Entry",
    "entries_in",
    "files_start",
    "is_safe",
    "pack_path",
    "segments_in",
]

PIECE: Final = 1 << 20
"""Bytes that one read or write has at most, and that one checksum is of."""
SUMMED: Final = 64 << 20
"""Bytes that one request for checksums may cover."""
LONGEST_PATH: Final = 4096
"""Bytes that a path in a request has at most."""
LONGEST_NAME: Final = 255

HEAD: Final = struct.Struct(">BI")
SUM: Final = struct.Struct(">I")
_LENGTH: Final = struct.Struct(">H")
_ATTRIBUTES: Final = struct.Struct(">IBIIqI")
_ENTRY: Final = struct.Struct(">BBIIIqIQQQH")
_SEGMENT: Final = struct.Struct(">QQ")
_SPARSE: Final = 1
_SECOND: Final = 1_000_000_000


class Ask:
    """What requests are."""

    LIST, READ, MAP, SUMS = 0x21, 0x22, 0x23, 0x24
    PUT, WRITE, PART, FINISH, FOLDER, SYMLINK, LINK, ATTRIBUTES, REMOVE = range(0x25, 0x2E)


class Answer:
    """What answers are."""

    HELLO, DONE, ENTRIES, DATA, MAP, SUMS, ERROR = 0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x4F
    ALL, NOT_OWNER, BEFORE = 0, 1, 2


class Attributes(NamedTuple):
    """What a file is given beside its bytes. `owner` is (uid, gid), `mtime` in ns since the epoch."""

    mode: int
    owner: tuple[int, int] | None
    mtime: int

    def pack(self) -> bytes:
        """As it stands in requests."""
        uid, gid = self.owner or (0, 0)
        seconds, nanoseconds = divmod(self.mtime, _SECOND)
        return _ATTRIBUTES.pack(self.mode, self.owner is not None, uid, gid, seconds, nanoseconds)


class Entry(NamedTuple):
    """One name in a tree.

    `kind` is `f` a file, `d` a folder, `l` a symbolic link, `o` something else, `e` what can't be read. `link` is what
    all names of one file have in common, or None where there is one. `target` is a link's, or why nothing can be read.
    """

    path: bytes
    kind: str
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    sparse: bool = False
    link: tuple[int, int] | None = None
    target: bytes = b""


def files_start(access: str, path: bytes, *, folder: bool = False) -> bytes:
    """What CONNECT has behind its mark to read (`from`) or write (`to`) files. A `folder` is made if it is missing."""
    command = [access, os.fsdecode(path), *(["folder"] if folder else [])]
    return Start(command, tty=False).for_files()


def pack_path(path: bytes) -> bytes:
    """A path, or a link's target, in a request."""
    return _LENGTH.pack(len(path)) + path


def is_safe(path: bytes) -> bool:
    """Whether a path that a peer says stays below where it begins, by its names."""
    if len(path) > LONGEST_PATH or b"\0" in path:
        return False
    return all(part not in (b"", b".", b"..") and len(part) <= LONGEST_NAME for part in path.split(b"/"))


def entries_in(payload: memoryview) -> Iterator[Entry]:
    """The entries of one answer. Raises ValueError or struct.error where it makes no sense, or a path leads away."""
    at, size = 0, len(payload)
    while at < size:
        kind, flags, mode, uid, gid, seconds, ns, length, device, number, named = _ENTRY.unpack_from(payload, at)
        at += _ENTRY.size
        path = bytes(payload[at : at + named])
        at += named
        (said,) = _LENGTH.unpack_from(payload, at)
        at += _LENGTH.size
        target = bytes(payload[at : at + said])
        at += said
        # The root itself has no name here.
        named_well = is_safe(path) or (not path and kind in b"de")
        if at > size or kind not in b"fdloe" or not named_well or b"\0" in target or ns >= _SECOND or length >> 62:
            raise ValueError("an entry that is none")
        yield Entry(
            path,
            chr(kind),
            mode & 0o7777,
            uid,
            gid,
            seconds * _SECOND + ns,
            length,
            bool(flags & _SPARSE),
            (device, number) if device or number else None,
            target,
        )


def segments_in(payload: memoryview) -> list[tuple[int, int]]:
    """Where a file has data: offsets and lengths. Raises struct.error where it makes no sense."""
    return list(_SEGMENT.iter_unpack(payload))
