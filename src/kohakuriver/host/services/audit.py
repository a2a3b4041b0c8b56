"""What was done on this host, by whom, from where: one line of JSON for each event.

What becomes of the lines is audit_file.py's. Source: docs/guide/limits.md "Audit log", which has the events and their
fields.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Protocol

from kohakuriver.asking import asker
from kohakuriver.errors import KohakuRiverError, UnauthenticatedError, UnavailableError
from kohakuriver.host.services.audit_file import FILES, AuditFile
from kohakuriver.rates import TokenBucket

__all__ = ["LONGEST_TEXT", "NOWHERE", "REFUSALS", "Audit", "AuditLog", "fingerprint", "ranges"]

LONGEST_TEXT = 500
"""Characters of one text. Peers choose paths and names."""

REFUSALS = (403, 429)
"""Statuses of errors that are written down where they are answered; 401 is where credentials are checked."""

REFUSALS_AT_ONCE = 20
REFUSALS_PER_SECOND = 0.2
"""Of one address so many refusals are written down, and of more only their number."""

OF_ALL = 10
"""How many times as many of all addresses together."""

OF_ALL_NODES = 1000
"""How many times as many of all nodes together: they come back at once when a host was away."""

SOURCES = 4096
"""Addresses that are told apart."""

TELL_SECONDS = 60.0
"""How often those numbers are written down."""

FILL_SECONDS = 86_400.0
"""In how much time what one user does may fill the log: who reads it as often misses nothing because of that user."""

USERS = 4096
"""Users that are told apart; of more the one of whom least was written lately starts anew."""


class Audit(Protocol):
    """Where it is written down who did what."""

    def write(self, event: str, **fields: Any) -> None:
        """Add an event; fields that it has not been given are those of who asks just now."""

    def of_node(self, event: str, node: str, **fields: Any) -> None:
        """Add what a node says of itself, or of its tasks, unless it says much."""

    def refused(self, error: KohakuRiverError, **fields: Any) -> None:
        """Add that somebody was not let in, may not do something, or does too much of it."""

    def need_room(self, user: str) -> None:
        """Raises UnavailableError "too_many_requests" (429) while a user has done more than can be written down."""


class _Nowhere:
    def write(self, event: str, **fields: Any) -> None:
        pass

    def of_node(self, event: str, node: str, **fields: Any) -> None:
        pass

    def refused(self, error: KohakuRiverError, **fields: Any) -> None:
        pass

    def need_room(self, user: str) -> None:
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
        self._file = AuditFile(path, most // FILES, _line)
        self._clock = clock
        self._refusals = _Refusals(OF_ALL)
        self._of_nodes = _Refusals(OF_ALL_NODES)
        self._shares = _Shares(most)

    def write(self, event: str, **fields: Any) -> None:
        """Add one line, soon. A full disk ends no session: it is logged, and how many lines it cost is added."""
        told = {**asker().described(), **fields}
        line = _line(event, told)
        if isinstance(told.get("user"), str):
            self._shares.take(told["user"], len(line), self._clock())
        self._file.add(line)

    def need_room(self, user: str) -> None:
        """Raises UnavailableError "too_many_requests" (429) while a user has done more than can be written down.

        A user has one file's part of the log at once, and five more in `FILL_SECONDS`: else who wants something
        forgotten would only have to do enough after it.
        """
        wait = self._shares.wait(user, self._clock())
        if wait:
            raise UnavailableError(
                f"{user} has done more than this host can write down in its audit log; ask again in {wait:.0f} s.",
                code="too_many_requests",
                status=429,
            )

    def of_node(self, event: str, node: str, **fields: Any) -> None:
        """Add what a node says, unless it said much: heartbeats are never refused, and each may tell of 100 things."""
        if self._of_nodes.may_be_told(node, self._clock()):
            self.write(event, node=node, **fields)

    def refused(self, error: KohakuRiverError, **fields: Any) -> None:
        """Add a refusal, unless there were many from this address."""
        if self._refusals.may_be_told(asker().origin, self._clock()):  # of these there are few enough
            self._file.add(_line(_kind(error), {**asker().described(), "code": error.code, **fields}))

    def tell_left_out(self) -> None:
        """Write down how many refusals, and how much of what nodes said, have been left out since the last time."""
        for source, count in self._refusals.left_out():
            self.write("refusals_left_out", count=count, **{"from": source})
        for node, count in self._of_nodes.left_out():
            self.write("refusals_left_out", count=count, node=node)

    async def run(self) -> None:
        """Do so every `TELL_SECONDS`, until cancelled."""
        while True:
            await asyncio.sleep(TELL_SECONDS)
            self.tell_left_out()

    async def written(self) -> None:
        """Return once all that was added so far is in the file, or lost."""
        await asyncio.wrap_future(self._file.done())

    def close(self) -> None:
        """Write what is left, and how many refusals were left out. Blocks until that is done."""
        self.tell_left_out()
        self._file.close()


class _Shares:
    """How much of the log's bytes is still each user's."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, user: str, size: int, now: float) -> None:
        if not self._most:
            return
        bucket = self._buckets.get(user)
        if bucket is None:
            file = self._most / FILES
            # One file at once and five more in a day: when a file is begun, seven of the eight are there.
            bucket = self._buckets[user] = TokenBucket((FILES - 3) * file / FILL_SECONDS, file, now)
            if len(self._buckets) > USERS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(user)
        bucket.take(size, now)

    def wait(self, user: str, now: float) -> float:
        """Seconds until this user may do something that is written down."""
        bucket = self._buckets.get(user)
        return 0.0 if bucket is None else bucket.wait(now)


class _Refusals:
    """Which refusals are written down: strangers must not push everything else out of the log, nor a stolen node.

    Of all sources together there are at most `of_all` times as many as of one.
    """

    def __init__(self, of_all: int) -> None:
        self._times = of_all
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._of_all: TokenBucket | None = None
        self._left_out: dict[str, int] = {}

    def may_be_told(self, source: str, now: float) -> bool:
        if self._of_all is None:
            self._of_all = _bucket(self._times, now)
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
