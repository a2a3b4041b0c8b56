"""The hosts on one database: what one hears of the others, and what one of them does for all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from kohakuriver.changes import Changes
from kohakuriver.errors import KohakuRiverError, UnavailableError
from kohakuriver.host.services.grants import Grants
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.store import Agents, News, Store, forget_what_has_run_out

__all__ = ["Hosts", "Readiness"]

log = structlog.get_logger("kohakuriver.host")

CARE_SECONDS = 60.0
"""How often what nobody needs any more is deleted."""


class Hosts:
    """This host among the others on the database.

    Args:
        changes: wakes those who wait for a task, by its id.
    """

    def __init__(
        self,
        store: Store,
        grants: Grants,
        nodes: Nodes,
        changes: Changes[int],
        agents: Agents,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._grants = grants
        self._nodes = nodes
        self._changes = changes
        self._agents = agents
        self._clock = clock

    @property
    def leads(self) -> bool:
        """Whether this is the host that cares for all; alone on a database it is."""
        server = self._store.server
        return server is None or server.line.leads

    async def run(self, also: Callable[[News], None] = lambda news: None) -> None:
        """Listen to the other hosts, until cancelled; `also` is told, too. A host alone has nobody to listen to."""
        server = self._store.server

        def heard(news: News) -> None:
            self.heard(news)
            also(news)

        if server is not None:
            await server.line.run(heard)

    def heard(self, news: News) -> None:
        """Another host has told something: look at once, where a look every few seconds would find it."""
        if news.rights or news.all:
            self._grants.look_now()
        if news.all:
            self._grants.counts.write_again()
        if news.all:
            self._changes.notify_all()
        else:
            self._changes.notify(news.tasks)
        self._nodes.came_back(news.nodes)

    async def care(self) -> None:
        """Delete what nobody needs any more, again and again, until cancelled: one host does it for all."""
        while True:
            await asyncio.sleep(CARE_SECONDS)
            try:
                await self.clean()
            except KohakuRiverError as error:
                log.warning("what has run out stays in the database for now", reason=error.message)

    async def clean(self) -> None:
        """Do that once, if it is for this host to do. Raises KohakuRiverError when the database fails."""
        if self.leads:
            await forget_what_has_run_out(self._store, self._clock())
            await self._grants.counts.forget_the_dead()
            await self._agents.forget_the_gone()


class Readiness:
    """Whether new work should come to this host; `leaving` says that it is about to end."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.leaving = False

    async def check(self) -> None:
        """Raises UnavailableError "leaving" (503), or HostUnreachableError "database_down" (503)."""
        if self.leaving:
            raise UnavailableError("This host is about to end; use another one.", code="leaving", status=503)
        await self._store.check()
