"""Stand-ins for tokens where others may listen: each opens one SSH connection to one task, within a minute.

They are in the database, because the connection may come to another host than the wish for it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from kohakuriver.store.accounts import digest
from kohakuriver.store.database import Store
from kohakuriver.store.models import SshPass, Token, User

__all__ = ["MAX_PASSES", "PASS_SECONDS", "Passed", "Passes"]

PASS_SECONDS = 60.0
"""How long a pass is good."""

MAX_PASSES = 1000
"""How many of one user may wait to be used; of more, the oldest goes."""


class Passed(NamedTuple):
    """Who may come in by a pass, by which token, and to which task."""

    token: Token
    user: User
    task_id: int


class Passes:
    """The passes that there are. Every method may raise KohakuRiverError when the database fails."""

    PREFIX = "krp_"

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def issue(self, user: str, token: str, task_id: int) -> str:
        """A pass for what the user of a token, given by its digest, may reach."""
        made, now = self.PREFIX + secrets.token_urlsafe(32), self._clock()

        def work(session: Session) -> None:
            theirs = select(SshPass).where(SshPass.user == user)
            session.execute(delete(SshPass).where(SshPass.user == user, SshPass.expires_at <= now))
            for old in session.scalars(theirs.order_by(SshPass.expires_at.desc()).offset(MAX_PASSES - 1)):
                session.delete(old)
            row = SshPass(digest=digest(made), token=token, user=user, task_id=task_id, expires_at=now + PASS_SECONDS)
            session.add(row)

        await self._store.write(work)
        return made

    async def take(self, shown: str) -> Passed | None:
        """What a pass stands for, which is used up with that; None for one that was used, or has run out."""
        now = self._clock()

        def work(session: Session) -> Passed | None:
            found = session.get(SshPass, digest(shown), with_for_update=True, populate_existing=True)
            if found is None:
                return None
            session.delete(found)
            token, user = session.get(Token, found.token), session.get(User, found.user)
            good = token is not None and token.is_good(now) and user is not None and found.expires_at > now
            return Passed(token, user, found.task_id) if good and token is not None and user is not None else None

        return await self._store.write(work)
