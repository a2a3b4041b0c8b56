"""What was done on this host, by whom, from where: one line of JSON for each event.

The file only ever grows at its end, and a line that was cut short spoils no other. It may be renamed at any time: the
next line begins a new one in its place. At its share of the limit it is renamed here, and the oldest such file goes.
Source: docs/guide/limits.md "Audit log", which has the events and their fields.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from kohakuriver.asking import asker
from kohakuriver.errors import KohakuRiverError, UnauthenticatedError, UsageError
from kohakuriver.rates import TokenBucket

__all__ = ["LONGEST_TEXT", "NOWHERE", "REFUSALS", "Audit", "AuditLog", "files_of", "fingerprint", "ranges"]

log = structlog.get_logger("kohakuriver.audit")

FILES = 8
"""In how many files the log is kept, each with as large a share of the limit."""

FREE_BYTES = 64 << 20
"""What the log leaves of a disk to others, of a small one a sixteenth: the database is beside it, as installed."""

LONGEST_TEXT = 500
"""Characters of one text. Peers choose paths and names."""

REFUSALS = (403, 429)
"""Statuses of errors that are written down where they are answered; 401 is where credentials are checked."""

REFUSALS_AT_ONCE = 20
REFUSALS_PER_SECOND = 0.2
"""Of one address so many refusals are written down, and of more only their number."""

OF_ALL = 10
"""How many times as many of all addresses together."""

SOURCES = 4096
"""Addresses that are told apart."""

TELL_SECONDS = 60.0
"""How often those numbers are written down."""

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


class Audit(Protocol):
    """Where it is written down who did what."""

    def write(self, event: str, **fields: Any) -> None:
        """Add an event; fields that it has not been given are those of who asks just now."""

    def refused(self, error: KohakuRiverError, **fields: Any) -> None:
        """Add that somebody was not let in, may not do something, or does too much of it."""


class _Nowhere:
    def write(self, event: str, **fields: Any) -> None:
        pass

    def refused(self, error: KohakuRiverError, **fields: Any) -> None:
        pass


NOWHERE: Final[Audit] = _Nowhere()
"""For a host that writes nothing down."""


class AuditLog:
    """The audit log in `path` and the rotated files beside it, which only this user can read.

    Args:
        path: the file that grows; those that are full are `path` with `.1` behind it, and so on, the newest first.
        most: bytes of all of them together, 0 for any number.
    """

    def __init__(self, path: Path, *, most: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UsageError where `path` can't be written to."""
        self.path = path
        self._share = most // FILES
        self._clock = clock
        self._lost = 0
        self._refusals = _Refusals()
        try:
            self._append(b"")
        except OSError as error:
            raise UsageError(f"The audit log {path} can't be written to: {error.strerror}.") from error

    def write(self, event: str, **fields: Any) -> None:
        """Add one line. A full disk ends no session: it is logged, and how many lines it cost is added."""
        try:
            if self._lost:
                self._append(_line("lines_lost", {"count": self._lost}))
                self._lost = 0
            self._append(_line(event, {**asker().described(), **fields}))
        except OSError as error:
            if not self._lost:
                log.error("the audit log can't be written to", file=str(self.path), reason=error.strerror)
            self._lost += 1

    def refused(self, error: KohakuRiverError, **fields: Any) -> None:
        """Add a refusal, unless there were many from this address."""
        if self._refusals.may_be_told(asker().origin, self._clock()):
            self.write(_kind(error), code=error.code, **fields)

    def tell_left_out(self) -> None:
        """Write down how many refusals have been left out since the last time."""
        for source, count in self._refusals.left_out():
            self.write("refusals_left_out", count=count, **{"from": source})

    async def run(self) -> None:
        """Do so every `TELL_SECONDS`, until cancelled."""
        while True:
            await asyncio.sleep(TELL_SECONDS)
            self.tell_left_out()

    def _append(self, line: bytes) -> None:
        file = os.open(self.path, _FLAGS, 0o600)  # anew each time: it may have been renamed
        try:
            size = os.fstat(file).st_size
            if self._share and size and size + len(line) > self._share:
                file = self._begin_another(file)
                size = 0
            self._leave_room(file)
            if line and size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line  # the machine, or the room on the disk, ended within the last one
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)

    def _begin_another(self, full: int) -> int:
        """Rename the files, each to the next number; the descriptor of a new one. The last file is gone then."""
        for number in range(FILES - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                _numbered(self.path, number - 1).replace(_numbered(self.path, number))
        fresh = os.open(self.path, _FLAGS, 0o600)
        os.close(full)
        return fresh

    def _leave_room(self, file: int) -> None:
        """Raises OSError where the disk has so little room that others need it more."""
        disk = os.fstatvfs(file)
        if disk.f_bavail * disk.f_frsize < min(FREE_BYTES, disk.f_blocks * disk.f_frsize // 16):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Refusals:
    """Which refusals are written down: strangers must not push everything else out of the log."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._of_all: TokenBucket | None = None
        self._left_out: dict[str, int] = {}

    def may_be_told(self, source: str, now: float) -> bool:
        if self._of_all is None:
            self._of_all = _bucket(OF_ALL, now)
        bucket = self._buckets.setdefault(source, _bucket(1, now))
        self._buckets.move_to_end(source)
        if len(self._buckets) > SOURCES:
            self._buckets.popitem(last=False)
        if bucket.try_take(now) and self._of_all.try_take(now):
            return True
        name = source if source in self._left_out or len(self._left_out) < SOURCES else "others"
        self._left_out[name] = self._left_out.get(name, 0) + 1
        return False

    def left_out(self) -> list[tuple[str, int]]:
        counts, self._left_out = self._left_out, {}
        return list(counts.items())


def _bucket(times: int, now: float) -> TokenBucket:
    return TokenBucket(times * REFUSALS_PER_SECOND, times * REFUSALS_AT_ONCE, now)


def _kind(error: KohakuRiverError) -> str:
    if isinstance(error, UnauthenticatedError):
        return "login_refused"
    return "limit_met" if error.status == 429 else "refused"


def _line(event: str, fields: dict[str, Any]) -> bytes:
    known = {
        name: _cut(value) for name, value in fields.items() if value is not None or name in ("ports", "expires_at")
    }
    line = json.dumps({"time": datetime.now(timezone.utc).isoformat(), "event": event, **known})
    return f"{line}\n".encode()


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return value[:LONGEST_TEXT] + "…"
    return value


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def files_of(path: Path) -> list[Path]:
    """All files of the log that grows at `path`, the oldest first."""
    return [file for number in range(FILES - 1, -1, -1) if (file := _numbered(path, number)).exists()]


def ranges(ports: Iterable[int]) -> list[str]:
    """Ports as ranges: `["80", "8000-8010"]`."""
    found: list[list[int]] = []
    for port in sorted(set(ports)):
        if found and found[-1][1] == port - 1:
            found[-1][1] = port
        else:
            found.append([port, port])
    return [f"{first}-{last}" if last > first else str(first) for first, last in found]


def fingerprint(key: str) -> str:
    """A public key's line as `ssh-keygen -l` names it: `SHA256:…`, or "?" for a line that is none."""
    try:
        blob = base64.b64decode(key.split()[1], validate=True)
    except (IndexError, ValueError):
        return "?"
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
