"""Who opened what, from where, for how long: one line of JSON when a session begins and one when it has ended.

The file only ever grows at its end, and a line that was cut short spoils no other. It may be renamed at any time: the
next line begins a new one in its place.
Source: docs/guide/limits.md "Audit log", which has the fields.
"""

from __future__ import annotations

import errno
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import structlog

from kohakuriver.errors import UsageError

__all__ = ["AuditLog"]

log = structlog.get_logger("kohakuriver.audit")

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


class AuditLog:
    """The audit log in `path`, which only this user can read."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError where `path` can't be written to."""
        self._path = path
        self._lost = 0
        try:
            self._append(b"")
        except OSError as error:
            raise UsageError(f"The audit log {path} can't be written to: {error.strerror}.") from error

    def write(self, event: str, **fields: Any) -> None:
        """Add one line. A full disk ends no session: it is logged, and how many lines it cost is added."""
        try:
            if self._lost:
                self._append(_line("lines_lost", count=self._lost))
                self._lost = 0
            self._append(_line(event, **fields))
        except OSError as error:
            if not self._lost:
                log.error("the audit log can't be written to", file=str(self._path), reason=error.strerror)
            self._lost += 1

    def _append(self, line: bytes) -> None:
        file = os.open(self._path, _FLAGS, 0o600)  # anew each time: it may have been renamed
        try:
            size = os.fstat(file).st_size
            if line and size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line  # the machine, or the room on the disk, ended within the last one
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)


def _line(event: str, **fields: Any) -> bytes:
    line = json.dumps({"time": datetime.now(timezone.utc).isoformat(), "event": event, **fields})
    return f"{line}\n".encode()
