"""Links to one port of one task: who has one opens that in a browser, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from kohakuriver.errors import UsageError
from kohakuriver.host.apps.apps import Apps
from kohakuriver.host.schemas import LinkMade, LinkView, NewLink, iso_time
from kohakuriver.host.services.credentials import new_token
from kohakuriver.host.services.grants import Grants
from kohakuriver.store import Task, Token
from kohakuriver.store.links import Links

__all__ = ["AppLinks"]

log = structlog.get_logger("kohakuriver.host")


class AppLinks:
    """The links of tasks. Who asks may change the task: that was checked."""

    def __init__(self, links: Links, apps: Apps, grants: Grants, *, clock: Callable[[], float] = time.time) -> None:
        self._links = links
        self._apps = apps
        self._grants = grants
        self._audit = grants.audit
        self._clock = clock

    async def make(self, shown: Token, task: Task, request: NewLink, host: str) -> LinkMade:
        """A new link, for whoever asks the host by what `Host` says. Raises UsageError where browsers get to no app."""
        secret = new_token("link")
        url = self._apps.link_at(task, request.port, host, secret)
        if url is None:
            raise UsageError(
                "Browsers get to no port of a task at this host: have it started with --apps-domain or --apps-url."
            )
        expires_at = None if request.expires_in is None else self._clock() + request.expires_in
        link = await self._links.add(secret, task.task_id, request.port, shown, expires_at)
        log.info("link made", id=link.id, task=task.task_id, port=request.port, user=link.name)
        self._audit.write("link_made", task=task.task_id, name=task.name, **_of(link))
        return LinkMade(**_view(link).model_dump(), url=url)

    async def of_task(self, task: Task) -> list[LinkView]:
        """Those that are good, without what opens them."""
        return [_view(link) for link in await self._links.of_task(task.task_id)]

    async def end(self, task: Task, reference: str) -> LinkView:
        """Take a link back; what is open by it ends. Raises NotFoundError."""
        link = await self._links.end(task.task_id, reference)
        log.info("link taken back", id=link.id, task=task.task_id)
        self._audit.write("link_ended", task=task.task_id, name=task.name, **_of(link))
        await self._grants.check()
        return _view(link)


def _of(link: Token) -> dict[str, object]:
    return {"of_token": link.id, "of_user": link.name, "port": link.port}


def _view(link: Token) -> LinkView:
    return LinkView(
        id=link.id,
        user=link.name,
        port=link.port or 0,
        created_at=iso_time(link.created_at),
        expires_at=None if link.expires_at is None else iso_time(link.expires_at),
    )
