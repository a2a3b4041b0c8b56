"""Links to one port of one task, for whoever has them.

A link is a row among the tokens, as a browser that is logged in is: it is listed, expires and is revoked as they are,
and what is opened by it hangs on it, and on the right of the user who made it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from kohakuriver.errors import NotFoundError, UsageError
from kohakuriver.store.accounts import check_good, digest, forget_bad_tokens, revoke
from kohakuriver.store.database import Store
from kohakuriver.store.models import TOKEN_ID_LENGTH, Token

__all__ = ["MOST_LINKS", "Links"]

MOST_LINKS = 100
"""Of one task."""


class Links:
    """The links of all tasks. Every method may raise KohakuRiverError when the database fails."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def add(self, secret: str, task_id: int, port: int, maker: Token, expires_at: float | None) -> Token:
        """Have `secret` open a port of a task, by the right of the user whose credential `maker` is.

        It ends with that credential; where that is a browser's login, with the one that let the browser in. Raises
        UnauthenticatedError where it is no good any more, UsageError where the task has too many links.
        """

        def work(session: Session) -> Token:
            now = self._clock()
            shown = check_good(session, maker.digest, now)
            forget_bad_tokens(session, "link", shown.name, now)
            if len(session.scalars(self._good(task_id)).all()) >= MOST_LINKS:
                raise UsageError(f"A task has {MOST_LINKS} links at most; `kohakuriver vps unshare --link` ends one.")
            latest = shown.latest_end
            key = digest(secret)
            link = Token(
                digest=key,
                kind="link",
                name=shown.name,
                label=f"link-{task_id}-{port}-{key[:4]}",
                created_at=now,
                expires_at=latest if expires_at is None else min(expires_at, latest or expires_at),
                parent=shown.parent if shown.kind == "browser" else shown.digest,
                task_id=task_id,
                port=port,
            )
            session.add(link)
            return link

        return await self._store.write(work)

    async def of_task(self, task_id: int) -> list[Token]:
        """The links to ports of a task that are good, the oldest first."""
        query = self._good(task_id).order_by(Token.created_at, Token.digest)
        return await self._store.read(lambda session: list(session.scalars(query)))

    async def end(self, task_id: int, reference: str) -> Token:
        """Make a link worthless, by its id. Raises NotFoundError."""

        def work(session: Session) -> Token:
            is_id = func.substr(Token.digest, 1, TOKEN_ID_LENGTH) == reference
            link: Token | None = session.scalars(self._good(task_id).where(is_id)).first()
            if link is None:
                raise NotFoundError(f"The task has no link {reference!r}; `kohakuriver vps share --list` shows them.")
            revoke(session, link, self._clock())
            return link

        return await self._store.write(work)

    def _good(self, task_id: int) -> Select[Any]:
        lasts = Token.expires_at.is_(None) | (Token.expires_at > self._clock())
        return select(Token).where(Token.kind == "link", Token.task_id == task_id, Token.revoked_at.is_(None), lasts)
