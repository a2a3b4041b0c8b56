"""Nodes: registration, heartbeats, who is online, and which node a new task goes to."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Callable

import structlog

from kohakuriver.errors import KohakuRiverError, NotFoundError, UnavailableError
from kohakuriver.host.schemas import Heartbeat, HeartbeatAnswer, NodeView, Registration, RegistrationAnswer, iso_time
from kohakuriver.store import Node, Store

__all__ = ["MISSED_HEARTBEATS", "Nodes"]

log = structlog.get_logger("kohakuriver.host")

MISSED_HEARTBEATS = 3
"""A node is offline after so many heartbeats did not come."""

_TICKET_KEY_BYTES = 32


class Nodes:
    """The cluster's nodes. `on_change` is called with the ids of tasks whose state a heartbeat changed."""

    def __init__(
        self,
        store: Store,
        *,
        heartbeat_seconds: float,
        on_change: Callable[[list[int]], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._heartbeat_seconds = heartbeat_seconds
        self._on_change = on_change
        self._clock = clock

    def is_online(self, node: Node) -> bool:
        """Whether the node was heard of lately and did not say that it leaves."""
        return not node.left and self._clock() - node.last_seen <= MISSED_HEARTBEATS * self._heartbeat_seconds

    async def register(self, request: Registration) -> RegistrationAnswer:
        """Take a node in, or back in. Raises KohakuRiverError "name_taken" while another runner has the name."""
        known = await self._store.node(request.name)
        if known is not None and known.instance != request.instance and self.is_online(known):
            raise KohakuRiverError(
                f"Another runner is online as node {request.name!r}; start this one with another --name.",
                code="name_taken",
                status=409,
            )
        values = {
            "url": request.url,
            "instance": request.instance,
            "version": request.version,
            "backends": list(request.backends),
            "last_seen": self._clock(),
            "left": False,
        }
        node = await self._store.put_node(request.name, values, secrets.token_bytes(_TICKET_KEY_BYTES))
        log.info("node registered", node=node.name, url=node.url, backends=",".join(node.backends))
        return RegistrationAnswer(
            heartbeat_seconds=self._heartbeat_seconds, ticket_key=base64.b64encode(node.ticket_key).decode()
        )

    async def heartbeat(self, name: str, beat: Heartbeat) -> HeartbeatAnswer:
        """Take over what a node says. Raises NotFoundError for an unknown node, which then registers again."""
        now = self._clock()
        quiet = now - 2 * self._heartbeat_seconds
        traffic = {str(report.task_id): report.traffic for report in beat.tasks}
        known = await self._store.hear_node(
            name,
            {"last_seen": now, "left": beat.leaving, "traffic": {**beat.traffic, "tasks": traffic}},
            {report.task_id: report.changes() for report in beat.tasks},
            others=set(beat.others),
            quiet=quiet,
        )
        self._on_change(known.changed)
        return HeartbeatAnswer(remove=known.remove)

    async def views(self) -> list[NodeView]:
        """All nodes as users see them."""
        counts = await self._store.active_tasks_by_node()
        return [
            NodeView(
                name=node.name,
                url=node.url,
                status="online" if self.is_online(node) else "offline",
                last_seen=iso_time(node.last_seen),
                backends=node.backends,
                tasks=counts.get(node.name, 0),
                traffic={name: count for name, count in node.traffic.items() if name != "tasks"},
                version=node.version,
            )
            for node in await self._store.nodes()
        ]

    async def named(self, name: str) -> Node:
        """The node of that name, which is online. Raises NotFoundError, or UnavailableError "node_offline"."""
        node = await self._store.node(name)
        if node is None:
            raise NotFoundError(f"There is no node {name!r}; `kohakuriver node list` shows the nodes that there are.")
        self.check_online(node)
        return node

    def check_online(self, node: Node) -> None:
        """Raises UnavailableError "node_offline"."""
        if not self.is_online(node):
            raise UnavailableError(
                f"Node {node.name} is offline, last seen {iso_time(node.last_seen)}; start its runner again.",
                code="node_offline",
            )

    async def fitting(self, backends: tuple[str, ...], name: str | None = None) -> list[Node]:
        """Online nodes that offer one of `backends`, least loaded first; only the node `name` if there is one.

        Raises NotFoundError or UnavailableError when there is none, saying why.
        """
        if name is not None:
            node = await self.named(name)
            if not set(backends) & set(node.backends):
                raise UnavailableError(_not_offered(f"Node {name}", backends), code="backend_not_offered")
            return [node]
        online = [node for node in await self._store.nodes() if self.is_online(node)]
        if not online:
            raise UnavailableError("No node is online; start one with `kohakuriver runner`.", code="no_node")
        fit = [node for node in online if set(backends) & set(node.backends)]
        if not fit:
            raise UnavailableError(_not_offered("No node that is online", backends), code="backend_not_offered")
        counts = await self._store.active_tasks_by_node()
        return sorted(fit, key=lambda node: (counts.get(node.name, 0), node.name))


def _not_offered(who: str, backends: tuple[str, ...]) -> str:
    verb = "offers" if who.startswith("No ") else "does not offer"
    advice = {
        "docker": "check that a Docker engine runs there",
        "process": "start its runner with `--backend process`",
        "address": "start its runner with `--backend address`",
    }[backends[0]]
    return f"{who} {verb} the backend {' or '.join(backends)}; {advice}."
