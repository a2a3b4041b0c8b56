"""Who opened what, from where, for how long: one line of JSON when a session begins and one when it has ended.

The file only ever grows at its end. It may be renamed at any time: the next line begins a new one in its place.
Source: docs/guide/limits.md "Audit log", which has the fields.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import structlog

from kohakuriver.errors import UsageError

__all__ = ["AuditLog"]

log = structlog.get_logger("kohakuriver.audit")

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


class AuditLog:
    """The audit log in `path`, which only this user can read."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError where `path` can't be written to."""
        self._path = path
        self._trouble = False
        try:
            self._append(b"")
        except OSError as error:
            raise UsageError(f"The audit log {path} can't be written to: {error.strerror}.") from error

    def write(self, event: str, **fields: Any) -> None:
        """Add one line. A disk that is full ends nobody's session: that is logged instead, once until it is well."""
        line = json.dumps({"time": datetime.now(timezone.utc).isoformat(), "event": event, **fields})
        try:
            self._append(f"{line}\n".encode())
        except OSError as error:
            if not self._trouble:
                log.error("the audit log can't be written to", file=str(self._path), reason=error.strerror)
            self._trouble = True
        else:
            self._trouble = False

    def _append(self, line: bytes) -> None:
        file = os.open(self._path, _FLAGS, 0o600)  # anew each time: it may have been renamed
        try:
            os.write(file, line)
        finally:
            os.close(file)
