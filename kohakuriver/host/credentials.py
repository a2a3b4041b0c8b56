"""Who is asking: API tokens of users, tokens of nodes, and the first ones of a new cluster.

For now every user token may do everything; roles and sharing hang on the name that `user` answers with.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from kohakuriver.config import write_private
from kohakuriver.errors import UnauthenticatedError
from kohakuriver.store import Store

__all__ = ["ADMIN", "ANONYMOUS", "Credentials"]

ADMIN = "admin"
ANONYMOUS = "anonymous"


class Credentials:
    """Checks tokens against the store. `allow_anonymous` lets forward sessions without a token in."""

    def __init__(self, store: Store, *, allow_anonymous: bool = False) -> None:
        self._store = store
        self._allow_anonymous = allow_anonymous

    async def user(self, token: str | None) -> str:
        """The name of the user whose token this is. Raises UnauthenticatedError."""
        if token is None:
            raise UnauthenticatedError(
                "This needs a token; set KOHAKURIVER_TOKEN or use the cluster that `up` started."
            )
        row = await self._store.token(token)
        if row is None or row.kind != "user":
            raise UnauthenticatedError("The host does not know this token; ask whoever runs it for a valid one.")
        return row.name

    async def session_user(self, token: str | None) -> str:
        """Like `user`, for a forward session: without a token, `ANONYMOUS` where the host allows that."""
        if token is None and self._allow_anonymous:
            return ANONYMOUS
        return await self.user(token)

    async def node(self, token: str | None) -> None:
        """Check the token of a node. Raises UnauthenticatedError."""
        row = None if token is None else await self._store.token(token)
        if row is None or row.kind != "node":
            raise UnauthenticatedError("The host does not know this node token; use the one in its state directory.")

    async def load_or_make(self, state_dir: Path) -> list[Path]:
        """Make the tokens in `state_dir` valid; the files that had to be made first, each readable by its owner alone.

        The files stand above the database: with a new database the tokens that people have noted stay good.
        """
        made = []
        for file_name, kind, name in (("admin-token", "user", ADMIN), ("node-token", "node", "nodes")):
            path = state_dir / file_name
            if not path.exists():
                write_private(path, secrets.token_urlsafe(32) + "\n")
                made.append(path)
            await self._store.put_token(path.read_text("utf-8").strip(), kind=kind, name=name)
        return made
