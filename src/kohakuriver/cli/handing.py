"""What a command and the process that is to hold its forward say to one another: one JSON object a line.

The command sends what is wanted, with the settings in force, and then nothing but that it has heard of the beginning.
It is told `tell` (an event), `say` (a sentence for a person), and at last one of `begun` (the forward's id), `ended`
(an exit code, where it was stopped before) and `failed`. Both are the same version of this program (holder.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kohakuriver.cli.forward_run import Wanted
from kohakuriver.client.beyond import Address, Back
from kohakuriver.client.events import Event
from kohakuriver.client.ports import PortForward
from kohakuriver.config import Settings
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, LocalAddressError

__all__ = ["HEARD", "Front", "event_of", "failure_of", "lines", "order", "order_of"]

HEARD = b"h"
"""What a command answers to `begun`: from then on the forward goes on without it."""

MAX_LINE = 4 << 20
_MOST_UNREAD = 1 << 20
_LAST_WORDS = 1.0


def order(wanted: Wanted, request_id: str) -> bytes:
    """The line that asks for a forward, on behalf of a command with this id (tracing.py)."""
    return json.dumps({"wanted": asdict(wanted), "request_id": request_id}).encode() + b"\n"


def order_of(line: bytes) -> tuple[Wanted, str]:
    """What such a line asks for, and on whose behalf. Raises ValueError, KeyError or TypeError for another line."""
    told = json.loads(line)
    wanted: dict[str, Any] = told["wanted"]
    settings = wanted["settings"]
    lists = {"ports": PortForward, "addresses": Address, "backs": Back}
    made: dict[str, Any] = {name: [kind(**each) for each in wanted[name]] for name, kind in lists.items()}
    made["settings"] = Settings(**{**settings, "other_hosts": tuple(settings["other_hosts"])})
    return Wanted(**{**wanted, **made}), told["request_id"]


def event_of(told: dict[str, Any]) -> Event:
    """The event that `tell` is about."""
    return _kinds()[told["kind"]](**told["fields"])


def _kinds() -> dict[str, type[Event]]:
    found: dict[str, type[Event]] = {}
    left: list[type[Event]] = [Event]
    while left:
        kind = left.pop()
        found[kind.__name__] = kind
        left.extend(kind.__subclasses__())
    return found


def _failure(error: KohakuRiverError) -> dict[str, Any]:
    told = {"message": error.message, "code": error.code, "exit_code": error.exit_code, "request_id": error.request_id}
    if isinstance(error, LocalAddressError):
        return {**told, "taken": error.taken}
    return {**told, "url": error.url} if isinstance(error, HostUnreachableError) else told


def failure_of(told: dict[str, Any]) -> KohakuRiverError:
    """The error that `failed` tells: with the words, the codes and the place of the first one."""
    message, code = told["message"], told["code"]
    error: KohakuRiverError
    if "taken" in told:
        host, port, proto = told["taken"] or ("", 0, "")
        error = LocalAddressError(message, code=code, taken=(host, port, proto) if told["taken"] else None)
    elif "url" in told:
        error = HostUnreachableError(message, code=code, url=told["url"])
    else:
        error = KohakuRiverError(message, code=code)
    error.exit_code, error.request_id = told["exit_code"], told["request_id"]
    return error


def lines(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """What a command is told, until nothing more comes."""
    with sock.makefile("rb") as file, contextlib.suppress(ConnectionError):
        for line in file:
            yield json.loads(line)


class Front:
    """A command, as the process knows it that is to hold its forward. Made by `met`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def met(cls, sock: socket.socket) -> Front:
        """The command at the other end, which is told that somebody is here."""
        front = cls(*await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE))
        front._send({"here": True})
        return front

    async def order(self) -> tuple[Wanted, str] | None:
        """What it wants, and its id; None where it has gone."""
        line = await self._reader.readline()
        return order_of(line) if line.endswith(b"\n") else None

    def tell(self, event: Event) -> None:
        """Tell it what happened."""
        self._send({"tell": {"kind": type(event).__name__, "fields": asdict(event)}})

    def say(self, text: str) -> None:
        """Have it say a sentence to a person."""
        self._send({"say": text})

    def ended(self, code: int) -> None:
        """Tell it that the forward was stopped before it had begun."""
        self._send({"ended": code})

    def failed(self, error: KohakuRiverError) -> None:
        """Tell it why the forward can't begin."""
        self._send({"failed": _failure(error)})

    async def gone(self) -> None:
        """Wait until it has gone, or wants the forward ended, before `leave` is called."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(1):
                pass

    async def leave(self, name: str) -> bool:
        """Have it end, as the forward has begun and has this id; False where it has gone before.

        To be called once `gone` is waited for no longer.
        """
        self._send({"begun": name})
        with contextlib.suppress(ConnectionError):
            heard = bool(await self._reader.read(1))
            self._writer.close()
            return heard
        return False

    async def close(self) -> None:
        """Say no more, once it has what was said; not for long where it takes nothing."""
        self._writer.close()
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), _LAST_WORDS)

    def _send(self, told: dict[str, Any]) -> None:
        # One whose terminal is on hold is told no more than it can be told.
        if not self._writer.is_closing() and self._writer.transport.get_write_buffer_size() < _MOST_UNREAD:
            self._writer.write(json.dumps(told).encode() + b"\n")
