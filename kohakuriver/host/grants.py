"""Sessions under way, and the right of each to go on.

A session is checked when it is opened and whenever a right was taken away here; besides every few seconds, because a
token expires by itself and another host on the same database may have revoked it. The bytes of a session are no part of
that: all that a session pays is one entry in a set.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from kohakuriver.errors import KohakuRiverError
from kohakuriver.host.credentials import Caller
from kohakuriver.store import Accounts, Use

__all__ = ["CHECK_SECONDS", "Grant", "Grants"]

CHECK_SECONDS = 2.0
"""How often the sessions under way are checked when nothing is known to have changed."""

log = structlog.get_logger("kohakuriver.host")


class Grant:
    """One session's right to go on. Who opens the session attaches what ends it, and releases the grant at its end."""

    def __init__(self, grants: Grants, caller: Caller, use: Use) -> None:
        self.caller = caller
        self.use = use
        self._grants = grants
        self._end: Callable[[str], None] | None = None
        self._withdrawn: str | None = None

    def attach(self, end: Callable[[str], None]) -> None:
        """`end` is called with the reason once the right is gone: at once if that has happened already."""
        self._end = end
        if self._withdrawn is not None:
            end(self._withdrawn)

    def release(self) -> None:
        """The session has ended, or never began."""
        self._grants.forget(self)

    def withdraw(self, reason: str) -> None:
        """End the session."""
        self._withdrawn = reason
        self._grants.forget(self)
        log.info("session ended", user=self.caller.name, task=self.use.task_id, reason=reason)
        if self._end is not None:
            self._end(reason)


class Grants:
    """All sessions of this host, whatever they carry."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._grants: set[Grant] = set()

    def open(self, caller: Caller, task_id: int, key: str | None = None) -> Grant:
        """Enter a session that `caller` opens to a task, before anything is done for it.

        `key` is the public key, as its type and base64, that the task's owner let in and that is all who opens it has.
        """
        grant = Grant(self, caller, Use(caller.digest, task_id, key))
        self._grants.add(grant)
        return grant

    def forget(self, grant: Grant) -> None:
        """The session needs no more checking."""
        self._grants.discard(grant)

    def __len__(self) -> int:
        return len(self._grants)

    async def check(self) -> None:
        """End every session whose token, user or share is gone. Raises KohakuRiverError when the database fails."""
        withdrawn = await self._accounts.withdrawn({grant.use for grant in self._grants})
        for grant in list(self._grants):
            if grant.use in withdrawn:
                grant.withdraw(withdrawn[grant.use])

    async def run(self) -> None:
        """Check every `CHECK_SECONDS`, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if self._grants:
                with contextlib.suppress(KohakuRiverError):  # no new session is opened either while it fails
                    await self.check()
