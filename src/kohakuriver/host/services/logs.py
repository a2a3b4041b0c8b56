"""What tasks print, passed on from their nodes to who may look at them, as fast as they read it.

Each of these is a session: it counts among those of its user, ends when the right to the task goes, and is in the
audit log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

import httpx

from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotAllowedError
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.grants import Grant, Grants
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.host.services.runner_client import RunnerClient, in_words, makes_no_sense
from kohakuriver.runtime import cancel_all
from kohakuriver.store import Node, Task
from kohakuriver.web.streamed import LOST_SECONDS, Source

__all__ = ["Logs"]

_LONGEST_LINE = 1 << 20


class Logs:
    """All of these that are open on this host."""

    def __init__(self, grants: Grants, nodes: Nodes, runners: RunnerClient) -> None:
        self._grants = grants
        self._nodes = nodes
        self._runners = runners
        self._open: set[_PassedOn] = set()

    async def open(
        self, caller: Caller, task: Task, node: Node, *, follow: bool, tail: int | None, since: datetime | None
    ) -> Source:
        """What a task printed, and with `follow` what it prints; its last `tail` lines, from `since` on
        (UTC where it has no zone).

        Raises NotAllowedError, UnavailableError "too_many_sessions" or "node_offline", or what the runner says.
        """
        self._nodes.check_online(node)
        moment = since if since is None or since.tzinfo else since.replace(tzinfo=timezone.utc)
        wanted = {"follow": str(follow).lower(), "tail": tail, "since": None if moment is None else moment.timestamp()}
        params = {name: value for name, value in wanted.items() if value is not None}
        path = f"/api/tasks/{quote(task.container, safe='')}/logs"
        grant = await self._grants.enter(caller, task)
        try:
            answer = await self._runners.lasting(node, path, params, container=task.container, silence=LOST_SECONDS)
        except BaseException:
            grant.release()
            raise
        grant.opened(proto="logs")
        passed = _PassedOn(answer, node, grant, self._open.discard)
        self._open.add(passed)
        return passed

    def close(self) -> None:
        """End them all: the host shuts down."""
        for each in self._open:
            each.cut(HostUnreachableError("The host is shutting down.", status=503))


class _PassedOn:
    """One answer of a runner, until it ends or has to."""

    def __init__(self, answer: httpx.Response, node: Node, grant: Grant, closed: Callable[[_PassedOn], None]) -> None:
        self._answer = answer
        self._node = node
        self._grant = grant
        self._closed = closed
        self._coming = answer.aiter_raw()
        self._rest = b""
        self._cut: asyncio.Future[KohakuRiverError] = asyncio.get_running_loop().create_future()
        self._said = 0
        grant.counted(lambda: (0, self._said))
        grant.attach(lambda reason: self.cut(NotAllowedError(f"This was ended: {reason}.")))

    def cut(self, error: KohakuRiverError) -> None:
        """End it with an error."""
        if not self._cut.done():
            self._cut.set_result(error)

    async def read(self) -> bytes | None:
        next_lines = asyncio.get_running_loop().create_task(self._next())
        try:
            ends: list[asyncio.Future[Any]] = [next_lines, self._cut]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._cut.done():
                raise self._cut.result()
            lines = next_lines.result()
            self._said += len(lines or b"")
            return lines
        finally:
            await cancel_all([next_lines])

    async def _next(self) -> bytes | None:
        """The next whole lines."""
        with in_words(self._node, LOST_SECONDS):
            async for piece in self._coming:
                lines, end, rest = piece.rpartition(b"\n")
                if end:
                    lines, self._rest = self._rest + lines + end, rest
                    return lines
                self._rest += piece
                if len(self._rest) > _LONGEST_LINE:
                    raise makes_no_sense(self._node)
        return None

    async def close(self) -> None:
        self._closed(self)
        self._grant.closed()
        await self._answer.aclose()
