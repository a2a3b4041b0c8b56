"""The files of an audit log, and the thread that writes them: no session waits for a disk.

The file only ever grows at its end, and a line that was cut short spoils no other. It may be renamed at any time: the
next line begins a new one in its place. At its share of the limit it is renamed here, and the oldest such file goes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from kohakuriver.errors import UsageError

if sys.platform == "win32":  # no host has workers there

    def _alone(file: int) -> None:
        pass
else:
    import fcntl

    def _alone(file: int) -> None:
        """Wait until no other process has this file; it is this one's until the descriptor is closed."""
        fcntl.flock(file, fcntl.LOCK_EX)


__all__ = ["FILES", "AuditFile", "files_of"]

log = structlog.get_logger("kohakuriver.audit")

FILES = 8
"""In how many files the log is kept, each with as large a share of the limit."""

FREE_BYTES = 64 << 20
"""What the log leaves of a disk to others, of a small one a sixteenth: the database is beside it, as installed."""

WAITING_BYTES = 8 << 20
"""Bytes of lines that may wait for the disk; of more only the number is kept. At 200 bytes each, 40,000 lines."""

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


class AuditFile:
    """Lines on their way to `path`, in the order in which they are added; a thread of its own writes them.

    Args:
        share: bytes that the file may have until another is begun, 0 for any number.
        line: makes a line of an event and its fields, for what this class itself has to say.
    """

    def __init__(self, path: Path, share: int, line: Callable[[str, dict[str, Any]], bytes]) -> None:
        """Raises UsageError where `path` can't be written to."""
        self._path = path
        self._share = share
        self._line = line
        self._lock = threading.Lock()
        self._waiting: deque[bytes | int] = deque()  # lines, and in their place the number of those that found no room
        self._waiting_bytes = 0
        self._busy = False
        self._lost = 0
        try:
            self._append(b"")
        except OSError as error:
            raise UsageError(f"The audit log {path} can't be written to: {error.strerror}.") from error
        # Its thread is waited for when the program ends, however it ends.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")

    def add(self, line: bytes) -> None:
        """Have a line written."""
        with self._lock:
            if self._waiting_bytes + len(line) <= WAITING_BYTES:
                self._waiting.append(line)
                self._waiting_bytes += len(line)
            elif isinstance(last := self._waiting[-1], int):
                self._waiting[-1] = last + 1
            else:
                self._waiting.append(1)
            if not self._busy:
                self._busy = True
                self._thread.submit(self._work)

    def done(self) -> Future[None]:
        """Done when all that was added before is written, or lost."""
        return self._thread.submit(lambda: None)

    def close(self) -> None:
        """Write what waits, and how many lines were lost last. Blocks until that is done."""
        self._thread.submit(self._tell_lost)
        self._thread.shutdown()

    def _work(self) -> None:
        while True:
            with self._lock:
                lines, self._waiting, self._waiting_bytes = self._waiting, deque(), 0
                self._busy = bool(lines)
            if not lines:
                return
            for line in lines:
                if isinstance(line, int):
                    self._lose(line, "the disk is too slow for all that is written down")
                else:
                    self._write(line)

    def _write(self, line: bytes) -> None:
        try:
            if self._lost:
                self._append(self._line("lines_lost", {"count": self._lost}))
                self._lost = 0
            if line:
                self._append(line)
        except OSError as error:
            self._lose(1 if line else 0, error.strerror or str(error))

    def _tell_lost(self) -> None:
        self._write(b"")

    def _lose(self, lines: int, reason: str) -> None:
        if not self._lost:
            log.error("the audit log can't be written to", file=str(self._path), reason=reason)
        self._lost += lines

    def _append(self, line: bytes) -> None:
        file = self._open()
        try:
            size = os.fstat(file).st_size
            if self._share and size and size + len(line) > self._share:
                file = self._begin_another(file)
                size = 0
            _leave_room(file)
            if line and size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line  # the machine, or the room on the disk, ended within the last one
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)

    def _open(self) -> int:
        """The file that grows, which only one process has at a time: another may be about to rename it.

        Anew for each line, since it may have been renamed.
        """
        while True:
            file = os.open(self._path, _FLAGS, 0o600)
            try:
                _alone(file)
                if os.path.samestat(os.fstat(file), self._path.stat()):
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _begin_another(self, full: int) -> int:
        """Rename the files, each to the next number; the descriptor of a new one. The last file is gone then."""
        for number in range(FILES - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                _numbered(self._path, number - 1).replace(_numbered(self._path, number))
        fresh = os.open(self._path, _FLAGS, 0o600)
        os.close(full)
        return fresh


def _leave_room(file: int) -> None:
    """Raises OSError where the disk has so little room that others need it more."""
    disk = os.fstatvfs(file)
    if disk.f_bavail * disk.f_frsize < min(FREE_BYTES, disk.f_blocks * disk.f_frsize // 16):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def files_of(path: Path) -> list[Path]:
    """All files of the log that grows at `path`, the oldest first."""
    return [file for number in range(FILES - 1, -1, -1) if (file := _numbered(path, number)).exists()]
