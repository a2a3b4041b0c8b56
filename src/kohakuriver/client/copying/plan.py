"""What is to be done to make one tree like the other: pure decisions about two lists of entries."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass, field
from typing import Final

from kohakuriver.client.copying.local_tree import PART
from kohakuriver.tunnel.files import LONGEST_PATH, PIECE, Attributes, Entry

__all__ = ["SMALL", "Options", "Plan", "Planner", "part_name", "plan"]

SMALL: Final = PIECE - 1
"""Files of up to so many bytes are sent whole, many together; larger ones in pieces, by several streams.

One byte more than that is read, which must be one piece.
"""

_SECOND: Final = 1_000_000_000
_STATE: Final = 16  # hexadecimal digits in the name of a part
_ADDED: Final = len(b"." + PART) + _STATE


@dataclass(frozen=True)
class Options:
    """How to copy: `delete` what the source has not, leave alone what is newer (`update`), keep owners (`owner`)."""

    delete: bool = False
    update: bool = False
    owner: bool = False

    def attributes(self, entry: Entry) -> Attributes:
        """What the copy of an entry is given."""
        return Attributes.of(entry, self.owner)


@dataclass
class Plan:
    """What is to be done, by kind; each with the path that it has at the other end. `size` is in bytes."""

    folders: list[tuple[Entry, bytes]] = field(default_factory=list)
    files: list[tuple[Entry, bytes]] = field(default_factory=list)
    touched: list[tuple[Entry, bytes]] = field(default_factory=list)
    symlinks: list[tuple[Entry, bytes]] = field(default_factory=list)
    links: list[tuple[bytes, bytes]] = field(default_factory=list)
    removed: list[tuple[bytes, bool]] = field(default_factory=list)
    failed: list[tuple[bytes, str]] = field(default_factory=list)
    left_out: list[bytes] = field(default_factory=list)
    same: int = 0
    size: int = 0


def part_name(path: bytes, entry: Entry) -> bytes:
    """What the copy of a file is called while it is only partly there: another name for another state of the file.

    And for another file: names may be as long as any may be, and begin alike, so the whole name counts.
    """
    parent, slash, name = path.rpartition(b"/")
    state = hashlib.sha256(b"%d %d " % (entry.size, entry.mtime) + name).hexdigest()[:_STATE]
    return parent + slash + b"." + name[:200] + PART + state.encode()


class Planner:
    """What makes `there` like a source whose entries are told a part at a time, each folder before what is in it.

    Args:
        there: what there is.
        prefix: what the paths of the source have before them at the other end, with a slash, or nothing.
        name: what the one file that is copied is called there; None for a tree.
    """

    def __init__(self, there: list[Entry], prefix: bytes, name: bytes | None, options: Options) -> None:
        self.plan = Plan()
        self.options = options
        self._there = there
        self._prefix = prefix
        self._name = name
        self._has = {entry.path: entry for entry in there}
        self._wanted: set[bytes] = set()
        self._first: dict[tuple[int, int], bytes] = {}
        self._copied: set[bytes] = set()

    def add(self, source: list[Entry]) -> None:
        """Some more of the source."""
        prefix, name, wanted = self._prefix, self._name, self._wanted
        for entry in source:
            path = name if name is not None else prefix + entry.path if entry.path else prefix[:-1]
            if entry.kind == "e":  # first: a folder that can't be opened has been told as a folder before
                self.plan.failed.append((entry.path, entry.target.decode("utf-8", "replace")))
                wanted.add(path)
            elif path not in wanted:  # unless a peer says a name twice
                wanted.add(path)
                self._add(entry, path, self._has.get(path))

    def _add(self, entry: Entry, path: bytes, before: Entry | None) -> None:
        made = self.plan
        if entry.kind == "o":
            made.left_out.append(entry.path)
        elif len(path) > LONGEST_PATH - (_ADDED if entry.kind == "f" else 0):
            made.failed.append((entry.path, os.strerror(errno.ENAMETOOLONG)))
        elif entry.kind == "d":
            made.folders.append((entry, path))
        elif before is not None and before.kind == "d":
            made.failed.append((path, "a folder has that name there"))
        elif before is not None and self.options.update and before.mtime > entry.mtime:
            made.same += 1
        elif entry.kind == "l":
            _symlink(made, entry, path, before)
        else:
            self._file(entry, path, before)

    def _file(self, entry: Entry, path: bytes, before: Entry | None) -> None:
        link = entry.link
        if link is None:
            _file(self.plan, entry, path, before, self.options)
            return
        to = self._first.setdefault(link, path)
        if to == path:
            if _file(self.plan, entry, path, before, self.options):
                self._copied.add(path)
        elif to in self._copied or before is None or self._has[to].link is None or before.link != self._has[to].link:
            self.plan.links.append((path, to))
        else:
            self.plan.same += 1

    def find_extra(self) -> None:
        """When all has been told: what is to be removed, if anything, and all of the source could be read."""
        if self.options.delete and not self.plan.failed:
            self.plan.removed = _extra(self._there, self._wanted, self.plan)


def plan(source: list[Entry], there: list[Entry], prefix: bytes, name: bytes | None, options: Options) -> Plan:
    """What makes `there` like a `source` that is known as a whole; as for a Planner."""
    planner = Planner(there, prefix, name, options)
    planner.add(source)
    planner.find_extra()
    return planner.plan


def _symlink(made: Plan, entry: Entry, path: bytes, before: Entry | None) -> None:
    if before is not None and before.kind == "l" and before.target == entry.target:
        made.same += 1
    else:
        made.symlinks.append((entry, path))


def _file(made: Plan, entry: Entry, path: bytes, before: Entry | None, options: Options) -> bool:
    """Whether its bytes have to be copied."""
    if before is not None and _is_same(entry, before):
        given = options.attributes(entry)
        if before.mode != given.mode or (given.owner is not None and given.owner != (before.uid, before.gid)):
            made.touched.append((entry, path))
        else:
            made.same += 1
        return False
    made.files.append((entry, path))
    made.size += entry.size
    return True


def _is_same(entry: Entry, before: Entry) -> bool:
    """As large and of the same time; a file system may keep whole seconds only."""
    if before.kind != "f" or before.size != entry.size:
        return False
    return before.mtime == entry.mtime or (
        before.mtime % _SECOND == 0 and before.mtime // _SECOND == entry.mtime // _SECOND
    )


def _extra(there: list[Entry], wanted: set[bytes], made: Plan) -> list[tuple[bytes, bool]]:
    """What the source has not, what is in a folder before it. Parts of files that are copied now are of use."""
    parts = {part_name(path, entry) for entry, path in made.files}
    extra = (entry for entry in there if entry.path not in wanted and entry.path not in parts and entry.kind != "e")
    return [(entry.path, entry.kind == "d") for entry in sorted(extra, key=lambda each: each.path, reverse=True)]
