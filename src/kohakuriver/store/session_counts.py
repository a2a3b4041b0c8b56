"""How many sessions each user has open, at this host and at others on the same database."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from functools import partial
from typing import Literal

from sqlalchemy import BigInteger, delete, func, select, text
from sqlalchemy.orm import Session

from kohakuriver.errors import KohakuRiverError
from kohakuriver.store.database import Store
from kohakuriver.store.models import SessionCount
from kohakuriver.store.transactions import HOSTS

__all__ = ["SessionCounts"]

_USER = 0x6B74
"""First key of the advisory lock under which a user's sessions are counted; the second is of the user's name."""

AT_ONCE = 100
"""Of so many users in one transaction: it holds a lock for each of them until it ends."""

AGAIN_SECONDS = 1.0
"""How long after the database failed it is tried again to write a count."""

_living = (
    text(
        "SELECT CAST(objid AS bigint) AS host FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2 "
        "AND classid = :hosts AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    .bindparams(hosts=HOSTS)
    .columns(host=BigInteger)
    .subquery()
)
_LIVING = select(_living.c.host)
"""The numbers of the hosts that live."""


class SessionCounts:
    """Every method that is awaited, `run` and `leave` aside, may raise KohakuRiverError when the database fails.

    On a database that is one host's alone, and without one, there are no other hosts, and nothing is written.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._shared = store if store is not None and store.server is not None else None
        self._host = 0 if store is None or store.server is None else store.server.host
        self._here: Counter[str] = Counter()
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        self._left = False

    def here(self, user: str) -> int:
        """How many a user has at this host."""
        return self._here[user]

    def add(self, user: str, more: Literal[1, -1]) -> None:
        """The user has one more here, or one less. It is written down soon."""
        self._here[user] += more
        if not self._here[user]:
            del self._here[user]
        if self._shared is not None:
            self._changed.add(user)
            self._wake.set()

    async def elsewhere(self, user: str) -> int:
        """How many the user has at other hosts."""
        return 0 if self._shared is None else await self._shared.read(lambda session: self._others(session, user))

    async def enter(self, user: str) -> int:
        """That, once what the user has here is written down: of two hosts at a time, one sees the other's."""
        if self._shared is None:
            return 0

        def work(session: Session) -> int:
            self._write(session, user)
            return self._others(session, user)

        return await self._shared.write(work)

    async def run(self) -> None:
        """Write down what has changed, until cancelled; while that takes, more is collected."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            users, self._changed = sorted(self._changed), set()
            try:
                await self._write_all(users)
            except KohakuRiverError:
                self._changed.update(users)
                self._wake.set()
                await asyncio.sleep(AGAIN_SECONDS)

    async def _write_all(self, users: list[str]) -> None:
        for start in range(0, len(users), AT_ONCE):
            some = users[start : start + AT_ONCE]
            if self._shared is not None:
                await self._shared.write(partial(self._write_some, some))

    def _write_some(self, users: list[str], session: Session) -> None:
        for user in users:  # in the order of their names, so that two hosts never wait for each other
            self._write(session, user)

    def write_again(self) -> None:
        """Another host may have taken this one for dead, and have deleted what it had written."""
        self._changed.update(self._here)
        self._wake.set()

    async def leave(self) -> None:
        """This host ends: what it has moves to others, where it counts anew."""
        self._left = True
        if self._shared is not None:
            mine = delete(SessionCount).where(SessionCount.host == self._host)
            with contextlib.suppress(KohakuRiverError):
                await self._shared.write(lambda session: session.execute(mine))

    async def forget_the_dead(self) -> None:
        """Delete what hosts have left that live no more."""
        if self._shared is not None:
            dead = delete(SessionCount).where(SessionCount.host.not_in(_LIVING), SessionCount.host != self._host)
            await self._shared.write(lambda session: session.execute(dead))

    def _write(self, session: Session, user: str) -> None:
        """Write down how many a user has here; until this is committed no other host does so for that user."""
        session.execute(select(func.pg_advisory_xact_lock(_USER, func.hashtext(user))))
        sessions = (
            0 if self._left else self._here[user]
        )  # read under the lock: what is written last is what was read last
        row = session.get(SessionCount, (self._host, user))
        if row is None and sessions:
            session.add(SessionCount(host=self._host, user=user, sessions=sessions))
        elif row is not None and sessions:
            row.sessions = sessions
        elif row is not None:
            session.delete(row)
        session.flush()

    def _others(self, session: Session, user: str) -> int:
        others = SessionCount.user == user, SessionCount.host != self._host
        query = select(func.sum(SessionCount.sessions)).where(*others, SessionCount.host.in_(_LIVING))
        return int(session.scalar(query) or 0)
