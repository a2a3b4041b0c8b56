"""Whether this host can dial its nodes back: a runner that reaches its host is not by that one that the host reaches.

Behind address translation, a firewall, or with a wrong `--advertise-url` its heartbeats come and no session gets there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import structlog

from kohakuriver.errors import KohakuRiverError
from kohakuriver.host.services.runner_client import RunnerClient
from kohakuriver.store import Node

__all__ = ["AGAIN_SECONDS", "Reach"]

log = structlog.get_logger("kohakuriver.host")

AGAIN_SECONDS = 60.0
"""When a node that answered is dialled again; one that did not is dialled every time."""

_ANSWER_SECONDS = 10.0
_AT_ONCE = 16


class Reach:
    """What came of dialling each node. This is this host's own view: another one may be in another network."""

    def __init__(self, runners: RunnerClient) -> None:
        self._runners = runners
        self._trouble: dict[str, str | None] = {}
        self._again: dict[str, float] = {}
        self._told: dict[str, object] = {}
        self._few = asyncio.Semaphore(_AT_ONCE)

    def trouble(self, name: str) -> str | None:
        """Why this host can't reach the node, as a sentence; None where it can, or was not tried yet."""
        return self._trouble.get(name)

    def was_tried(self, name: str) -> bool:
        """Whether the node was dialled since it registered."""
        return name in self._again

    def forget(self, name: str) -> None:
        """The node has registered, maybe at another address, or is gone."""
        self._again.pop(name, None)
        self._told[name] = object()

    def doubt(self, name: str) -> None:
        """Dial the node when it is looked next, whenever it answered last."""
        if name in self._again:
            self._again[name] = time.monotonic()

    async def look(self, nodes: Iterable[Node]) -> None:
        """Dial those nodes that it is time for, and return when each has answered or failed to."""
        now = time.monotonic()
        await asyncio.gather(*(self._dial(node) for node in nodes if now >= self._again.get(node.name, now)))

    async def _dial(self, node: Node) -> None:
        async with self._few:
            told, trouble = self._told.get(node.name), None
            try:
                await self._runners.call(node, "GET", "/api/node", container="", timeout=_ANSWER_SECONDS)
            except KohakuRiverError as error:
                trouble = error.message
            if self._told.get(node.name) is told:  # else it is of where the node was before
                self._take(node, trouble)

    def _take(self, node: Node, trouble: str | None) -> None:
        before, self._trouble[node.name] = self._trouble.get(node.name), trouble
        self._again[node.name] = time.monotonic() + (AGAIN_SECONDS if trouble is None else 0)
        if trouble is not None and trouble != before:
            log.warning("a node can't be reached from here", node=node.name, url=node.url, reason=trouble)
        elif trouble is None and before is not None:
            log.info("a node is reached again", node=node.name, url=node.url)
