"""Codes by which a browser that is logged in to the host comes in at the address of an app; kept as SHA-256 alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from kohakuriver.store.accounts import digest
from kohakuriver.store.database import Store
from kohakuriver.store.models import AppCode

__all__ = ["APP_CODE_SECONDS", "AppCodes", "Ticket"]

APP_CODE_SECONDS = 30.0
"""How long a code is good."""

MOST_CODES = 50
"""Of one browser; of more, the oldest goes."""


class Ticket(NamedTuple):
    """What a code stands for: the digest of the browser's login, and the port that it may open."""

    browser: str
    task_id: int
    port: int


class AppCodes:
    """Every method may raise KohakuRiverError when the database fails."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def add(self, code: str, ticket: Ticket, host: str, state: str) -> None:
        """Have `code` stand for a ticket, once, at the address `host`, for who has the state with that hash."""

        def work(session: Session) -> None:
            now = self._clock()
            session.execute(delete(AppCode).where(AppCode.expires_at <= now))
            theirs = select(AppCode).where(AppCode.browser == ticket.browser).order_by(AppCode.expires_at.desc())
            for old in session.scalars(theirs.offset(MOST_CODES - 1)):
                session.delete(old)
            until = now + APP_CODE_SECONDS
            session.add(AppCode(digest=digest(code), expires_at=until, host=host, state=state, **ticket._asdict()))

        await self._store.write(work)

    async def take(self, code: str, host: str, state: str) -> Ticket | None:
        """What a code stands for; None for one that is not good there. It is used up in any case."""

        def work(session: Session) -> Ticket | None:
            found = session.get(AppCode, digest(code), with_for_update=True, populate_existing=True)
            if found is None:
                return None
            session.delete(found)
            if found.expires_at <= self._clock() or (found.host, found.state) != (host, state):
                return None
            return Ticket(found.browser, found.task_id, found.port)

        return await self._store.write(work)
