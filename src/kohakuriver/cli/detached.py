"""The forwards of this user that run in the background: how each is found, asked how it is, and stopped.

Each has a Unix socket in one private directory, named after its id, and answers there for itself, whichever process
holds it (holder.py). Whoever connects to the socket of a process that is gone is refused by the kernel, so nothing has
to be concluded from process numbers, which may be another's by then. Where a home directory is several machines', so is
who connects to another's socket: each machine looks at its own alone. On a socket both sides send one JSON object on a
line: `{"want": "state"}` or `{"want": "stop"}`, and the answer is the forward's state.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kohakuriver.config import state_dir
from kohakuriver.errors import KohakuRiverError, NotFoundError, UnavailableError, UsageError
from kohakuriver.tunnel.local_listeners import KEEP_PATH
from kohakuriver.unix_sockets import address_of, is_left

__all__ = [
    "HOLDS",
    "SILENT",
    "Place",
    "directory",
    "find",
    "listed",
    "listener_at",
    "socket_name",
    "sockets",
    "stop",
    "who_has",
]

SILENT = "not answering"
"""The state of a forward whose process is there, and says nothing."""

ANSWER_SECONDS = 2.0
"""How long a forward may take to say how it is."""

STOP_SECONDS = 15.0
"""How long one may take to end, from the moment on that it was told to."""

MAX_LINE = 64 * 1024
SOCK, NEW = ".sock", ".new"
HOLDS = ".hold"
"""How the names of the sockets end on which processes take over forwards."""

KEPT_LOGS = 20
"""Logs of forwards that have ended, of which the newest are kept."""

_LETTERS = "bcdfghjkmnpqrstvwxz23456789"  # no vowels: no words, and nothing that is a task's number
_BEING_MADE_SECONDS = 60.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_WAITING = 128
_AT_ONCE = 200


def directory() -> Path:
    """Where they all are, made for this user alone. Raises UsageError where somebody else could get at it."""
    found = state_dir() / "forwards"
    try:
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = found.stat()
        if status.st_uid != os.getuid():
            raise UsageError(f"{found} belongs to another user; set KOHAKURIVER_CONFIG_DIR to a directory of yours.")
        if stat.S_IMODE(status.st_mode) != 0o700:
            found.chmod(0o700)
    except OSError as error:
        raise UsageError(f"{found} can't be used for what runs in the background: {error.strerror}.") from error
    return found


def socket_name(name: str, kind: str) -> str:
    """What the socket of `name` is called on this machine, as it runs now; `kind` is how the name ends."""
    return f"{name}.{'-'.join(_machine())}{kind}"


def _machine() -> tuple[str, str]:
    """What tells this machine from others, and this run of it from earlier ones, "" where the system does not tell."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = _BOOT.read_text("ascii")
    return _digest(os.uname().nodename), boot and _digest(boot)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:6]


def sockets(where: Path, kind: str) -> list[Path]:
    """The sockets of this machine with such names; those of earlier runs of it are removed."""
    machine, run = _machine()
    found = []
    for path in where.glob(f"*{kind}"):
        of, _, at = path.name.split(".")[1].partition("-")
        if at == run:
            found.append(path)
        elif of == machine:
            _remove(path)
    return found


def _id(path: Path) -> str:
    return path.name.partition(".")[0]


def listener_at(path: Path) -> socket.socket:
    """A Unix socket that listens at `path`, for this user alone. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        with address_of(path) as address:
            sock.bind(address)
        path.chmod(0o600)
        sock.listen(_WAITING)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class Place:
    """One forward's own place among them, until `leave`: its id, its log, and the socket that it is asked on.

    It is made before the forward is, and found by others from `open` on. Raises UsageError where it can't be made.
    """

    def __init__(self) -> None:
        where = directory()
        _clean(where)
        self.id, self.log = _new_log(where)
        self._path = where / socket_name(self.id, SOCK)
        self._left = False
        # Whoever told us to stop hears the end of the connection when this forward has ended.
        self._kept: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self._unfinished = where / socket_name(self.id, NEW)
        try:
            self._sock = listener_at(self._unfinished)
        except OSError as error:
            _remove(self.log)
            _remove(self._unfinished)
            raise UsageError(f"{self._unfinished} can't be made: {error.strerror}.") from error

    async def open(self, state: Callable[[], dict[str, Any]], stop: Callable[[], None]) -> None:
        """Answer whoever asks with `state()`, and call `stop` when one tells the forward to end."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            # A cancellation is the end of the process; asyncio's streams would complain about it.
            with contextlib.suppress(OSError, ValueError, asyncio.TimeoutError, asyncio.CancelledError):
                if await _asked_to_stop(reader, writer, state):
                    self._kept.append(writer)
                    stop()
                    return
            writer.close()

        self._server = await asyncio.start_unix_server(answer, sock=self._sock, limit=MAX_LINE, **KEEP_PATH)
        self._unfinished.replace(self._path)

    def leave(self, *, log: bool = False) -> None:
        """Be found no more; with `log`, as if it had never been."""
        if self._left:
            return
        self._left = True
        for path in [self._path, self._unfinished, *([self.log] if log else [])]:
            _remove(path)
        if self._server is not None:
            self._server.close()
        self._sock.close()
        for each in self._kept:
            each.close()


async def _asked_to_stop(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: Callable[[], dict[str, Any]]
) -> bool:
    """Answer one question; whether it was to stop."""
    asked = json.loads(await asyncio.wait_for(reader.readline(), ANSWER_SECONDS))
    wanted = asked.get("want") if isinstance(asked, dict) else None
    writer.write(json.dumps(state()).encode() + b"\n")
    await asyncio.wait_for(writer.drain(), ANSWER_SECONDS)
    return bool(wanted == "stop")


def _new_log(directory: Path) -> tuple[str, Path]:
    """An id that no other forward has, and its log, which is what makes it so."""
    while True:
        name = "".join(secrets.choice(_LETTERS) for _ in range(4))
        log = directory / f"{name}.log"
        try:
            os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"{log} can't be made: {error.strerror}.") from error
        return name, log


def _clean(directory: Path) -> None:
    """Remove what forwards left that could not do it themselves, and the oldest logs of those that have ended."""
    for path in sockets(directory, NEW):
        if time.time() - _age(path) > _BEING_MADE_SECONDS and is_left(path):
            _remove(path)
    there = {_id(path) for kind in (SOCK, NEW) for path in directory.glob(f"*{kind}")}
    logs = [path for path in directory.glob("*.log") if _id(path) not in there]
    for path in sorted(logs, key=_age, reverse=True)[KEPT_LOGS:]:
        _remove(path)
        _remove(path.with_suffix(".log.1"))


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return time.time()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _asked(path: Path, want: str) -> socket.socket:
    """The connection on which the forward at `path` will answer. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(ANSWER_SECONDS)
        with address_of(path) as address:
            sock.connect(address)
        sock.sendall(json.dumps({"want": want}).encode() + b"\n")
    except BaseException:
        sock.close()
        raise
    return sock


def _answered(path: Path, sock: socket.socket, until: float) -> dict[str, Any] | None:
    """What it says of itself; only that it is there, where it says nothing. None where it is just ending.

    One that goes on lets nobody go without a word: where the connection ends like that, so does the forward.
    """
    said = b""
    with contextlib.suppress(OSError, ValueError):
        while not said.endswith(b"\n"):
            sock.settimeout(max(until - time.monotonic(), 0.01))
            try:
                more = sock.recv(MAX_LINE)
            except ConnectionError:
                more = b""
            if not more and not said:
                return None
            if not more:
                break
            said += more
        told = json.loads(said)
        if isinstance(told, dict):
            return {**_silent(path, sock), **told, "id": _id(path)}
    return _silent(path, sock)


def _silent(path: Path, sock: socket.socket | None = None) -> dict[str, Any]:
    known: dict[str, Any] = {
        "id": _id(path),
        "task": None,
        "ports": [],
        "reversed": [],
        "pid": None if sock is None else _other_process(sock),
    }
    return {
        **known,
        "since": None,
        "connections": None,
        "state": SILENT,
        "log": str(path.with_name(f"{_id(path)}.log")),
    }


def _other_process(sock: socket.socket) -> int | None:
    """The process that listens there, where the system tells (SO_PEERCRED, unix(7))."""
    if sys.platform != "linux":
        return None
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid or None


def _put(path: Path, want: str) -> socket.socket | None:
    """A connection to the forward at `path`, which was asked, or None where its process is gone or ends."""
    try:
        return _asked(path, want)
    except (ConnectionRefusedError, FileNotFoundError):
        _remove(path)
        return None
    except ConnectionError:  # it has just ended
        return None
    except OSError:  # too many wait for it to listen
        return socket.socket(socket.AF_UNIX)


def _ask_all(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """What those say of themselves that are there, which have ANSWER_SECONDS together: one process may hold many."""
    asked = [(path, sock) for path in paths if (sock := _put(path, "state")) is not None]
    until = time.monotonic() + ANSWER_SECONDS
    for path, sock in asked:
        with sock:
            told = _answered(path, sock, until)
        if told is not None:
            yield told


def listed() -> list[dict[str, Any]]:
    """What each forward in the background says of itself, the oldest first.

    `id`, `task`, `ports` (of each `local_host`, `local_port`, `remote_port`, `proto`), `reversed` (of each
    `remote_port`, `local_host`, `local_port`), `pid`, `since` (ISO 8601), `connections`, `state`, `log`. One that does
    not answer has the state SILENT, and None for what is not known.
    What processes left that are gone is removed.
    """
    where = directory()
    for path in sockets(where, HOLDS):
        if is_left(path):
            _remove(path)
    paths = sockets(where, SOCK)
    found = [each for first in range(0, len(paths), _AT_ONCE) for each in _ask_all(paths[first : first + _AT_ONCE])]
    return sorted(found, key=lambda each: (each.get("since") or "", each["id"]))


def find(name: str, forwards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of those that were listed the one of this id, else those to the task that was named so. Raises NotFoundError."""
    found = [each for each in forwards if each["id"] == name] or [each for each in forwards if each.get("task") == name]
    if not found:
        raise NotFoundError(
            f"No forward in the background has the id {name!r} or leads to a task of that name; "
            "`kohakuriver forward --list` shows those that there are."
        )
    return found


def stop(name: str) -> dict[str, Any]:
    """End the forward with this id, and wait until it has; what it said of itself.

    Raises UnavailableError where it does not answer, or does not end.
    """
    path = directory() / socket_name(name, SOCK)
    ended = NotFoundError(f"The forward {name} has ended meanwhile.")
    sock = _put(path, "stop")
    if sock is None:
        raise ended
    with sock:
        told = _answered(path, sock, time.monotonic() + ANSWER_SECONDS)
        if told is None:
            raise ended
        if told["state"] == SILENT or not _ended(sock):
            pid = told.get("pid")
            by_force = f"; `kill -9 {pid}` ends it by force, and all others in its process" if pid else ""
            raise UnavailableError(f"The forward {name} does not answer{by_force}.", code="not_answering")
    return {**told, "state": "stopped"}


def _ended(sock: socket.socket) -> bool:
    sock.settimeout(STOP_SECONDS)
    try:
        return not sock.recv(1)
    except ConnectionError:
        return True
    except OSError:
        return False


def who_has(local: str | int, proto: str) -> dict[str, Any] | None:
    """The forward in the background that listens on this local port, or this path; None where none does."""
    if not hasattr(os, "fork"):  # Windows, where there are none
        return None
    try:
        forwards = listed()
    except KohakuRiverError:
        return None
    for each in forwards:
        of_kind = [at for at in each["ports"] if (at["proto"] == "udp") == (proto == "udp")]
        if any(local in (at.get("local_port"), at.get("local_path")) for at in of_kind):
            return each
    return None
