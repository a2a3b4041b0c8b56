"""Reading the audit log: some lines at a time, so that no answer holds up what else the host does.

Where a reader stands is the number of a file's inode and a position in it, and stays right when the file is renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kohakuriver.errors import UsageError
from kohakuriver.host.services.audit_file import files_of

__all__ = ["AuditPage", "read_page"]

SCANNED_BYTES = 1 << 20
"""How much of the log one answer looks through: some 10 ms of work."""

_TIME_AT = len(b'{"time": "')


class AuditPage(BaseModel):
    """Events, the oldest first. `after` asks for those that follow; `more` says that there may be some already."""

    events: list[dict[str, Any]]
    after: str
    more: bool


@dataclass(frozen=True)
class _Wanted:
    since: bytes
    user: str | None
    task: str | None

    def event(self, line: bytes) -> dict[str, Any] | None:
        """What is in a line, where it is wanted."""
        if line[_TIME_AT : _TIME_AT + len(self.since)] < self.since:
            return None
        try:
            event = json.loads(line)
        except ValueError:  # cut short by a crash
            return None
        return event if isinstance(event, dict) and self._is_about(event) else None

    def _is_about(self, event: dict[str, Any]) -> bool:
        if self.user is not None and self.user not in (event.get("user"), event.get("of_user"), event.get("owner")):
            return False
        return self.task is None or self.task in (str(event.get("task")), event.get("name"))


async def read_page(
    path: Path,
    *,
    since: datetime | None = None,
    user: str | None = None,
    task: str | None = None,
    after: str | None = None,
) -> AuditPage:
    """What the log at `path` has behind `after`, from the beginning without one. Raises UsageError for a wrong one."""
    moment = "" if since is None else since.astimezone(timezone.utc).isoformat()[: len("2026-01-01T00:00:00")]
    wanted = _Wanted(moment.encode(), user, task)
    with contextlib.ExitStack() as stack:
        files = []  # opened here, where nothing renames them meanwhile
        for file in files_of(path):
            files.append(os.open(file, os.O_RDONLY))
            stack.callback(os.close, files[-1])
        where = _place(after, [os.fstat(file).st_ino for file in files])
        return await asyncio.to_thread(_page, files, where, wanted)


def _place(after: str | None, inodes: list[int]) -> tuple[int, int]:
    """In which of the files to go on, and from which byte."""
    if after is None:
        return 0, 0
    inode, colon, offset = after.partition(":")
    if not colon or not inode.isdecimal() or not offset.isdecimal() or len(after) > 60:
        raise UsageError("`after` must be what an earlier answer gave.")
    # The file may be gone: then all that is left came later.
    return (inodes.index(int(inode)), int(offset)) if int(inode) in inodes else (0, 0)


def _page(files: list[int], where: tuple[int, int], wanted: _Wanted) -> AuditPage:
    number, offset = where
    left = SCANNED_BYTES
    events: list[dict[str, Any]] = []
    while number < len(files):
        piece = os.pread(files[number], left, offset)
        whole = piece[: piece.rfind(b"\n") + 1]
        events.extend(_events(whole, wanted))
        offset += len(whole)
        left -= len(piece)
        if left <= 0 or number == len(files) - 1:
            break
        number, offset = number + 1, 0
    at = f"{os.fstat(files[number]).st_ino}:{offset}" if files else "0:0"
    return AuditPage(events=events, after=at, more=left <= 0)


def _events(lines: bytes, wanted: _Wanted) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        if (event := wanted.event(line)) is not None:
            yield event
