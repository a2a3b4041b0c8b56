"""This host among the nodes: it ends the tunnels of agents itself, and answers for their tasks as a runner does.

To the rest of the host, and to other hosts on the database, it is a node with a URL, a key for tickets and heartbeats.
So sessions, rights, limits and the audit log are those of every task.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from kohakuriver import __version__
from kohakuriver.config import host_url, write_private
from kohakuriver.errors import KohakuRiverError, NotFoundError, UnauthenticatedError, UnavailableError
from kohakuriver.host.agents.book import STOPPED, AgentTask, Book
from kohakuriver.host.agents.presence import Presence
from kohakuriver.host.schemas import Heartbeat
from kohakuriver.host.services.audit import Audit
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.limits import Limits
from kohakuriver.quotas import Offer
from kohakuriver.relay.hub import EXPECTED_SECONDS
from kohakuriver.relay.open_ports import OpenPorts, TaskSockets
from kohakuriver.relay.traffic import COUNTS
from kohakuriver.relay.tunnel_server import TunnelServer
from kohakuriver.session import ticket
from kohakuriver.session.nodes import NodeOfflineError
from kohakuriver.session.ticket import Scope, Ticket, UsedTickets
from kohakuriver.store import Agents, News, Store, Task
from kohakuriver.store.agents import BACKEND, NODE_PREFIX
from kohakuriver.store.models import ACTIVE
from kohakuriver.task import TaskReport, part_of
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest
from kohakuriver.tunnel.protocol import MARK, TASK_HEADER, CloseCode
from kohakuriver.web.background import in_background

__all__ = ["PREFIX", "AgentNode", "advertised_at"]

log = structlog.get_logger("kohakuriver.host")

PREFIX = "/agents"
"""Where on a host's port other hosts find what is about agents' tasks."""

LOOK_SECONDS = 2.0
"""How often it is looked whether agents may stay."""

STOP_SECONDS = 20.0
"""For so long an agent that was told to end is waited for; it gives its command half of that."""

NOWHERE = "http://started-without-advertise-url.invalid"
"""Where other hosts look for one of which they don't know where it is; there is no such name (RFC 6761 section 6.4)."""

NO_DIRECT = "an agent's task is reached through the host alone"

_TRAFFIC = (*COUNTS, "sessions", "streams")
_TASK_TRAFFIC = (*_TRAFFIC, "version", "to_container_per_second", "to_user_per_second")


class AgentNode:
    """Takes agents in, and answers for their tasks.

    Args:
        directory: the host's state.
        mark_key: what users' marks are made with; all hosts on the database have the same.
        advertised: where the other hosts on the database find what is under `PREFIX`, "" where they can't.
        told: called with the ids of tasks about which something is another.
    """

    def __init__(
        self,
        directory: Path,
        store: Store,
        agents: Agents,
        nodes: Nodes,
        *,
        limits: Limits,
        mark_key: bytes,
        audit: Audit,
        told: Callable[[Collection[int]], None],
        heartbeat_seconds: float,
        advertised: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._agents, self._nodes = store, agents, nodes
        self._mark_key = mark_key
        self._told = told
        self._look_seconds = min(LOOK_SECONDS, heartbeat_seconds)
        self._looked_at = 0.0
        self._strays: set[int] = set()
        self._advertised = advertised
        self._clock = clock
        self._began = clock()
        self._instance = _kept(directory / "agents-instance")
        self._used = UsedTickets(directory / "agents-used-tickets")
        self._key: bytes | None = None
        self._entering = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._to_tell = asyncio.Event()
        self.own_url = ""
        self.name = NODE_PREFIX + "agents" + ("" if store.server is None else f"-{self._instance[:8]}")
        self.book = Book(self._to_tell.set, clock)
        self._presence = Presence(audit, clock)
        self.tunnels = TunnelServer(
            allow_anonymous=False,
            check_ticket=lambda credential: self.check_ticket(credential, "forward"),
            check_terminal_ticket=lambda credential: self.check_ticket(credential, "terminal"),
            mark=self._mark,
            expected=self._expected,
            on_tunnel_change=self._tunnel_changed,
            limits=limits,
        )
        self.ports: OpenPorts[AgentTask] = OpenPorts(self.book.get, _sockets, self.tunnels.hub.tunnel_of)

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths under `PREFIX`, which hosts dial with tickets."""
        terminal = TunnelRoute(PREFIX + "/ws/task/{task_id}/terminal", _no_terminal)
        return [self.tunnels.session_routes(PREFIX)[0], terminal]

    def _mark(self, user: str, container: str) -> bytes:
        return hmac.new(self._mark_key, f"agent\0{user}\0{container}".encode(), hashlib.sha256).digest()[:MARK]

    def check_ticket(self, credential: str | None, scope: Scope) -> Ticket:
        """What a ticket says that a host has signed; each is good once.

        Raises UnauthenticatedError, NotAllowedError, or UnavailableError "busy".
        """
        if credential is None or self._key is None:
            raise UnauthenticatedError("This needs a ticket of a host.")
        shown = ticket.check(self._key, credential, node=self.name, scope=scope)
        self._used.take(shown)
        return shown

    # Being a node

    async def open(self, own_url: str) -> None:
        """Begin: whoever was here before this host was started again is about to come back."""
        self.own_url = own_url
        if await self._store.node(self.name) is not None:
            await self.enter()

    async def enter(self) -> None:
        """Be among the nodes, from the first agent on."""
        async with self._entering:
            if self._key is not None:
                return
            node = await self._nodes.enter(
                self.name,
                url=self._advertised or (self.own_url if self._store.server is None else NOWHERE),
                instance=self._instance,
                version=__version__,
                backends=[BACKEND],
                offer=asdict(Offer(no_direct=NO_DIRECT)),
            )
            for task in (await self._agents.of_node(self.name)).values():
                if task.status not in ("stopped", "failed"):
                    self.book.add(task)
            self._key = node.ticket_key

    def _expected(self, container: str) -> bool:
        """Whether its agent was connected before this host began, and comes as soon as it notices that."""
        if self._clock() - self._began > EXPECTED_SECONDS or container not in self.book:
            return False
        return self.book.get(container).status == "running"

    # Agents

    def admit(self, request: UpgradeRequest, task: Task, token: str, about: TaskReport) -> None:
        """Take an agent in, which is this task; `about` has what it says of its SSH server, and of where it runs.

        Raises HostUnreachableError where it has hung up.
        """
        known = self.book.add(task)
        known.token, known.machine = token, about.message or ""
        known.ssh_port, known.ssh_host_key = about.ssh_port, about.ssh_host_key
        known.ssh_host_key_ecdsa = about.ssh_host_key_ecdsa
        headers = {TASK_HEADER: f"{task.task_id} {known.name}"}
        self.tunnels.take_in(request, task.container, task.engine_name, headers)

    def hung_up(self, task: Task) -> None:
        """An agent was let in as this task, and never was connected: the next may have its name."""
        self.book.hung_up(task)

    def _tunnel_changed(self, container: str, connected: bool) -> None:
        before = self.book.get(container).leg if container in self.book else None
        self.book.tunnel_changed(container, self.tunnels.hub.tunnel_of(container))
        if connected and container in self.book:
            self._presence.came(self.book.get(container), self.name)
        elif container in self.book:
            self._presence.left(self.book.get(container), None if before is None else before.ended_by)
        if not connected and container in self.book and self.book.get(container).over.is_set():
            reason = self.book.get(container).message or "it has ended"
            asyncio.get_running_loop().call_soon(self.tunnels.hub.drop, container, reason)

    async def stop(self, container: str) -> dict[str, Any]:
        """End an agent and its command, as a report. One that is away is told when it comes back."""
        if container not in self.book:
            return await self._report_of(container)
        task = self.book.get(container)
        if not task.over.is_set():
            await self._end(task)
        await self.write()
        return part_of(task, TaskReport, without=("traffic",))

    async def _report_of(self, container: str) -> dict[str, Any]:
        """A task that ended before this host was started again. Raises NotFoundError."""
        for task in (await self._agents.of_node(self.name)).values():
            if task.container == container:
                return part_of(task, TaskReport, without=("traffic",))
        raise NotFoundError(f"There is no agent's task {container} here.")

    async def _end(self, task: AgentTask) -> None:
        if task.leg is not None:
            task.stopping = True
            task.leg.ask_to_end()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(task.over.wait(), STOP_SECONDS)
        if not task.over.is_set():
            self.tunnels.hub.drop(task.container, STOPPED)
            task.end("stopped", STOPPED)
            self.book.note(task)

    async def remove(self, container: str) -> dict[str, Any]:
        """End an agent, and forget its task; the task as it was.

        Raises NodeOfflineError where the agent is away: it is told when it comes back, which the host has to remember.
        """
        told = container not in self.book or self.book.get(container).leg is not None
        report = await self.stop(container)
        if not told and report["status"] == "stopped":
            raise NodeOfflineError("The agent is away, and ends when it comes back.", self.name)
        if container in self.book:
            self.tunnels.hub.drop(container, "the task was removed", gone=True)
            self.book.forget(self.book.get(container))
        return report

    def _gone(self, task: AgentTask) -> None:
        """Its agent has gone to another host, with all that goes on in it; or it ended, and made room for another."""
        if task.over.is_set():
            self.tunnels.hub.drop(task.container, "the task was forgotten", gone=True)
        else:
            self.tunnels.hub.moved(task.container, "its agent is connected to another host")
        self.book.forget(task)

    # What is told of them

    def heard(self, news: News) -> None:
        """Another host has told something: a task that is here may be there now, or an agent's right be gone."""
        here = {task.task_id for task in self.book}
        if news.all or news.rights or not here.isdisjoint(news.tasks):
            self._looked_at = 0.0
            self._to_tell.set()

    async def run(self) -> None:
        """Write down what changes, look who may stay, and say that this host is there, until cancelled."""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._to_tell.wait(), LOOK_SECONDS)
            self._to_tell.clear()
            try:
                await self.write()
                if self._key is not None and self._clock() - self._looked_at >= self._look_seconds:
                    self._looked_at = self._clock()
                    await self.look()
            except KohakuRiverError as error:
                log.warning("agents' tasks can't be looked after for now", reason=error.message)
            except Exception:  # unheard, it would end the heartbeats, and agents' tasks would count as lost
                log.exception("agents' tasks could not be looked after")

    async def write(self) -> None:
        """Write down what has changed of tasks. Raises KohakuRiverError when the database fails."""
        async with self._writing:
            if news := self.book.news():
                try:
                    changed = await self._agents.change(self.name, news)
                except BaseException:
                    self.book.untold(news)
                    raise
                self._told(changed)

    async def look(self) -> None:
        """Let go of tasks that are here no more, and of agents without a right; tell how all others are."""
        self.book.look()
        known = {task.task_id for task in self.book}  # one that comes meanwhile may be too new for the answer
        here = await self._agents.of_node(self.name)
        for task in self.book:
            if task.task_id in known and task.task_id not in here:
                self._gone(task)
        self._find_strays(here)
        links = [(task.task_id, task.token) for task in self.book if task.leg is not None]
        withdrawn = await self._agents.withdrawn(links) if links else {}
        for task in self.book:
            if task.leg is not None and task.task_id in withdrawn:
                task.leg.link.fail(CloseCode.POLICY, withdrawn[task.task_id])
        await self.write()
        for task in self.book:
            if task.ended_long_ago(self._clock()) and self.tunnels.hub.forget(task.container):
                self.book.forget(task)  # what became of it is in the database
        answer = await self._nodes.heartbeat(self.name, self._beat(set(here)))
        for task in self.book:
            if task.task_id in answer.remove and task.leg is not None and not task.stopping:
                # An agent may take its time, and all others count as lost without a heartbeat.
                in_background(self._remove(task.container), "ending an agent whose task was removed")

    def _find_strays(self, here: Mapping[int, Task]) -> None:
        """Tasks whose agents were let in and never heard of again: they are lost, as soon as they are in the book.

        What is about to be connected, or was forgotten just now, is so at one look and not at the next.
        """
        strays = {each.task_id for each in here.values() if each.status in ACTIVE and each.container not in self.book}
        for task_id in strays & self._strays:
            self.book.add(here[task_id])
        self._strays = strays

    async def _remove(self, container: str) -> None:
        try:
            await self.remove(container)
        except NotFoundError:
            pass  # somebody else was faster
        except KohakuRiverError as error:
            log.warning("a task that was removed can't be ended for now", reason=error.message)

    def _beat(self, here: set[int]) -> Heartbeat:
        """A heartbeat. Tasks that have ended are no more in the book, and stay as they are."""
        snapshot = self.tunnels.snapshot()
        tasks = []
        for task in self.book:
            seen = snapshot["containers"].get(task.container, {})
            report = TaskReport(**part_of(task, TaskReport, without=("traffic",)))
            report.traffic = {name: seen.get(name, 0) for name in _TASK_TRAFFIC}
            tasks.append(report)
        others = sorted(here - {task.task_id for task in tasks})
        return Heartbeat(tasks=tasks, others=others, traffic={name: snapshot[name] for name in _TRAFFIC})

    def snapshot(self) -> Counter[str]:
        """How many agents are in each state (AgentTask.state), `streams` to them, and what passed since the start."""
        passed = self.tunnels.snapshot()
        return Counter(task.state for task in self.book) + Counter({name: passed[name] for name in _TRAFFIC})

    async def close(self) -> None:
        """Close every link; agents come back to whichever host answers."""
        await self.tunnels.close()
        self._used.close()


async def _no_terminal(request: UpgradeRequest, _task_id: str) -> None:
    """A terminal that ends with its connection: an agent has the other kind, as long as it is connected."""
    error = UnavailableError("The agent is not connected.", code="tunnel_not_connected")
    request.reject(error.status, error.code, error.message)


async def _sockets(_task: AgentTask) -> TaskSockets:
    """All that the agent sees and offers; what that is, is for it to say."""
    return TaskSockets()


def advertised_at(url: str | None) -> str:
    """Where other hosts find what is under `PREFIX`, of a host at this URL; "" where they can't. Raises UsageError."""
    return host_url(url) + PREFIX if url else ""


def _kept(path: Path) -> str:
    """What tells this host from others, over its restarts."""
    if not path.exists():
        write_private(path, secrets.token_hex(16) + "\n")
    return path.read_text("utf-8").strip()
