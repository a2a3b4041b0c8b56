"""Nodes: registration, heartbeats, who is online, and which node a new task goes to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import structlog

from kohakuriver.backends import kind_of, known
from kohakuriver.changes import Changes
from kohakuriver.errors import KohakuRiverError, NotFoundError, UnavailableError
from kohakuriver.host.schemas import Heartbeat, HeartbeatAnswer, NodeView, Registration, RegistrationAnswer, iso_time
from kohakuriver.host.services.audit import NOWHERE, Audit
from kohakuriver.host.services.hearing import Hearing
from kohakuriver.host.services.reach import Reach
from kohakuriver.session.nodes import NodeOfflineError
from kohakuriver.store import Node, Store, Task

__all__ = ["MISSED_HEARTBEATS", "Nodes"]

log = structlog.get_logger("kohakuriver.host")

MISSED_HEARTBEATS = 3
"""A node is offline after so many heartbeats did not come."""

RESTART_SECONDS, WAIT_SECONDS = 15.0, 6.0
"""For so long after it said that it leaves a node is taken to be started again; who comes to it then waits so long.

Commands wait for 10 seconds, and the task's tunnel may need two of them.
"""

MOST_SHOWN = 10
"""Of how many tasks an error names."""

_TICKET_KEY_BYTES = 32
_NODES_NAMED = 3


class Nodes:
    """The cluster's nodes.

    Args:
        reach: what says whether this host can dial them.
        on_change: called with the ids of tasks whose state a heartbeat changed, or that are gone with their node.
    """

    def __init__(
        self,
        store: Store,
        reach: Reach,
        *,
        heartbeat_seconds: float,
        on_change: Callable[[list[int]], None],
        audit: Audit = NOWHERE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._audit = audit
        self._reach = reach
        self._to_look = asyncio.Event()
        self._heartbeat_seconds = heartbeat_seconds
        self._on_change = on_change
        self._clock = clock
        self.hearing = Hearing(MISSED_HEARTBEATS * heartbeat_seconds, store.check, clock=clock)
        self._registered = Changes[str]()

    def is_online(self, node: Node) -> bool:
        """Whether the node did not say that it leaves, and was heard of lately, or could not be."""
        return not node.left and not self.hearing.is_silent(node.last_seen)

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
            "unavailable": request.unavailable,
            "offer": asdict(request.offer),
            "last_seen": self._clock(),
            "left": False,
        }
        node = await self._store.put_node(request.name, values, secrets.token_bytes(_TICKET_KEY_BYTES))
        self._reach.forget(node.name)
        self._registered.notify([node.name])
        log.info("node registered", node=node.name, url=node.url, backends=",".join(node.backends))
        return RegistrationAnswer(
            heartbeat_seconds=self._heartbeat_seconds, ticket_key=base64.b64encode(node.ticket_key).decode()
        )

    async def enter(self, name: str, **values: Any) -> Node:
        """This host itself is a node, for tasks that dial in to it."""
        values |= {"unavailable": {}, "last_seen": self._clock(), "left": False}
        node = await self._store.put_node(name, values, secrets.token_bytes(_TICKET_KEY_BYTES))
        self._registered.notify([name])
        return node

    def coming_back(self, name: str) -> AbstractContextManager[asyncio.Event]:
        """Meanwhile the event is set when the node of this name registers here."""
        return self._registered.watch(name)

    async def once_back(self, node: Node) -> bool:
        """Wait for a node that has left just now, as in a restart; whether that was so, and it is to be looked anew."""
        if not node.left or self._clock() - node.last_seen >= RESTART_SECONDS:
            return False
        with self.coming_back(node.name) as back:
            known = await self._store.node(node.name)  # it may have come before it was waited for
            if known is not None and known.left:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(back.wait(), WAIT_SECONDS)
        return True

    def doubt(self, name: str) -> None:
        """The node could not be dialled for somebody just now: have it looked at once whether it can be."""
        self._reach.doubt(name)
        self._to_look.set()

    def came_back(self, names: Iterable[str]) -> None:
        """Nodes of these names have registered at another host."""
        for name in names:
            self._reach.forget(name)
            self._registered.notify([name])

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
        for incident in beat.incidents:
            about = {"task": incident.task_id, "reason": incident.reason, "count": incident.count}
            self._audit.of_node("tunnel_refused", name, **about, **{"from": incident.source})
        if not self._reach.was_tried(name):  # now the runner has the key that tickets for it are signed with
            self._to_look.set()
        return HeartbeatAnswer(remove=known.remove, unreachable=self._reach.trouble(name))

    async def run(self) -> None:
        """Dial nodes back, each new one soon and all of them again and again, until cancelled."""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._to_look.wait(), self._heartbeat_seconds)
            self._to_look.clear()
            try:
                await self.look()
            except KohakuRiverError:
                pass  # the database fails, as every request says that needs it
            except Exception:  # a host that can't look at its nodes still carries their sessions
                log.exception("it can't be looked whether nodes can be reached")

    async def look(self) -> None:
        """Dial the online nodes that it is time for. Raises KohakuRiverError when the database fails."""
        await self._reach.look([node for node in await self._store.nodes() if self.is_online(node)])

    async def views(self) -> list[NodeView]:
        """All nodes as users see them."""
        counts = await self._store.active_tasks_by_node()
        taken = await self._store.gpus_in_use(self._clock())
        return [
            self._view(node, counts.get(node.name, 0), taken.get(node.name, ())) for node in await self._store.nodes()
        ]

    def _view(self, node: Node, tasks: int, taken: Collection[str]) -> NodeView:
        online = self.is_online(node)
        trouble = self._reach.trouble(node.name) if online else None
        gpus = list(node.offer.get("gpus") or ())
        return NodeView(
            name=node.name,
            url=node.url,
            status="unreachable" if trouble else "online" if online else "offline",
            reason=trouble,
            cordoned=node.cordoned,
            last_seen=iso_time(node.last_seen),
            backends=node.backends,
            unavailable=node.unavailable,
            tasks=tasks,
            traffic={name: count for name, count in node.traffic.items() if name != "tasks"},
            version=node.version,
            user_processes="process" in node.backends and bool(node.offer.get("user_processes")),
            gpus=gpus,
            gpus_free=[gpu for gpu in gpus if gpu not in taken],
        )

    async def cordon(self, name: str, cordoned: bool) -> NodeView:
        """Give the node no new tasks, or give it some again; those that it has go on. Raises NotFoundError."""
        node = await self._store.change_node(name, {"cordoned": cordoned})
        if node is None:
            raise _no_node(name)
        log.info("node cordoned" if cordoned else "node uncordoned", node=name)
        taken = await self._store.gpus_in_use(self._clock())
        return self._view(node, (await self._store.active_tasks_by_node()).get(name, 0), taken.get(name, ()))

    async def remove(self, name: str, *, force: bool) -> NodeView:
        """Forget a node, as it was. With `force` its tasks are forgotten with it.

        Raises NotFoundError, or KohakuRiverError "node_online" or "node_has_tasks" (409) saying what would be lost.
        """
        node = await self._store.node(name)
        if node is None:
            raise _no_node(name)
        if self.is_online(node):
            raise KohakuRiverError(
                f"Node {name} is online and would register again at once; end its runner first.",
                code="node_online",
                status=409,
            )
        tasks = await self._store.remove_node(name, force=force)
        if tasks and not force:
            raise KohakuRiverError(_would_be_lost(name, tasks), code="node_has_tasks", status=409)
        self._reach.forget(name)
        self._on_change([task.task_id for task in tasks])
        log.info("node removed", node=name, tasks=len(tasks))
        return self._view(node, len(tasks), ())

    async def named(self, name: str) -> Node:
        """The node of that name, which is online. Raises NotFoundError or NodeOfflineError."""
        node = await self._store.node(name)
        if node is None:
            raise _no_node(name)
        self.check_online(node)
        return node

    def check_online(self, node: Node) -> None:
        """Raises NodeOfflineError."""
        if not self.is_online(node):
            raise NodeOfflineError(
                f"Node {node.name} is offline, last seen {iso_time(node.last_seen)}; start its runner again.", node.name
            )

    async def fitting(self, backends: Sequence[str], name: str | None = None) -> list[Node]:
        """Online nodes that offer one of `backends`, least loaded first; only the node `name` if there is one.

        Raises NotFoundError or UnavailableError when there is none, saying why.
        """
        if name is not None:
            node = await self.named(name)
            if node.cordoned:
                raise _cordoned(f"Node {name}", name)
            if not set(backends) & set(node.backends):
                raise _not_offered(f"Node {name} does not offer", backends, [node])
            return [node]
        online = [node for node in await self._store.nodes() if self.is_online(node) and _takes_orders(node)]
        if not online:
            raise UnavailableError("No node is online; start one with `kohakuriver runner`.", code="no_node")
        fit = [node for node in online if set(backends) & set(node.backends)]
        if not fit:
            raise _not_offered("No node that is online offers", backends, online)
        free = [node for node in fit if not node.cordoned]
        if not free:
            raise _cordoned("Every node that could run it", fit[0].name)
        counts = await self._store.active_tasks_by_node()
        # One that can't be reached comes last: its tasks could not be started, and the error then says why.
        return sorted(free, key=lambda node: (bool(self.trouble(node)), counts.get(node.name, 0), node.name))

    def trouble(self, node: Node) -> str | None:
        """Why this host can't reach the node, as a sentence; None where nothing is known against it."""
        return self._reach.trouble(node.name)


def _takes_orders(node: Node) -> bool:
    """Whether the node is a runner's, and no host's."""
    return not all(known(name).dials_in for name in node.backends) or not node.backends


def _no_node(name: str) -> NotFoundError:
    return NotFoundError(f"There is no node {name!r}; `kohakuriver node list` shows the nodes that there are.")


def _cordoned(who: str, name: str) -> UnavailableError:
    return UnavailableError(
        f"{who} is cordoned and takes no new tasks; `kohakuriver node uncordon {name}` ends that.", code="node_cordoned"
    )


def _would_be_lost(name: str, tasks: list[Task]) -> str:
    shown = ", ".join(task.name or str(task.task_id) for task in tasks[:MOST_SHOWN])
    more = f" and {len(tasks) - MOST_SHOWN} more" if len(tasks) > MOST_SHOWN else ""
    count = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
    return (
        f"Node {name} has {count}: {shown}{more}; with --force the host forgets them, their names and shares, and what "
        "still runs there must be ended there."
    )


def _not_offered(who_offers: str, backends: Sequence[str], nodes: Sequence[Node]) -> UnavailableError:
    """Why a task can be placed nowhere: what the nodes say is in the way there, else what to do there."""
    said = [(node.name, node.unavailable[name]) for node in nodes for name in backends if name in node.unavailable]
    told = ", ".join(f"node {node}: {reason}" for node, reason in said[:_NODES_NAMED])
    more = f" and {len(said) - _NODES_NAMED} more" if len(said) > _NODES_NAMED else ""
    why = f" ({told}{more})" if said else ""
    advice = "see to that there" if said else kind_of(backends[0]).advice
    return UnavailableError(
        f"{who_offers} the backend {' or '.join(backends)}{why}; {advice}.",
        code="backend_not_offered",
    )
