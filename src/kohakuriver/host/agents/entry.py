"""Where agents come in: what they show and want, and the task that each is (docs/protocol.md "Agents")."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable

import structlog
from pydantic import TypeAdapter, ValidationError

from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.host.agents.node import AgentNode
from kohakuriver.host.services.audit import REFUSALS, Audit
from kohakuriver.host.services.credentials import Credentials
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.host.services.requests import Requests
from kohakuriver.host.services.tasks import container_name, new_task_id
from kohakuriver.store import Agents, Task
from kohakuriver.store.agents import BACKEND, Coming, Taken
from kohakuriver.task import TaskOrder, TaskReport, is_task_name
from kohakuriver.text import printable
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest

__all__ = ["AgentEntry"]

log = structlog.get_logger("kohakuriver.host")

PATH = "/ws/agent"

LONGEST_MACHINE = 64
"""Characters of the name of an agent's machine that are told."""

_NO_ROOM = ("name_taken", "over_limit")
"""Why an agent can't be a new task that can be the one of its name, should that have no agent any more."""

_ID = re.compile(r"[0-9a-f]{32}")
_reports: TypeAdapter[TaskReport] = TypeAdapter(TaskReport)


class AgentEntry:
    """Answers agents at `PATH`."""

    def __init__(
        self,
        node: AgentNode,
        agents: Agents,
        credentials: Credentials,
        requests: Requests,
        nodes: Nodes,
        audit: Audit,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._node, self._agents, self._credentials = node, agents, credentials
        self._requests, self._nodes, self._audit = requests, nodes, audit
        self._clock = clock

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that agents dial."""
        return [TunnelRoute(PATH, self._open)]

    async def _open(self, request: UpgradeRequest) -> None:
        name = request.query.get("name", "")
        try:
            await self._let_in(request, name)
        except KohakuRiverError as error:
            log.info("agent refused", peer=request.peer, reason=error.message)
            if error.status in REFUSALS or error.code == "token_ended":
                self._audit.refused(error, name=name)
            raise

    async def _let_in(self, request: UpgradeRequest, name: str) -> None:
        """Raises KohakuRiverError where that may or can not be."""
        client, task_id, about = _said(request, name)
        caller, token = await self._credentials.agent(request.token)
        self._requests.count(caller)
        await self._node.enter()
        coming = Coming(token.digest, client, name, task_id, lambda new_id: self._task(new_id, name, caller.name))
        taken = await self._take(coming, caller.name, request)
        self._tell_made(taken, caller.name)
        try:
            await self._node.tunnels.hub.check_replacement(taken.task.container, client, _address(request))
            self._node.admit(request, taken.task, token.digest, about)
        except BaseException:
            self._node.hung_up(taken.task)
            raise
        await self._node.write()
        if taken.before != taken.task.node:
            self._nodes.came_back([taken.before])  # sessions that wait for it find the task here

    async def _take(self, coming: Coming, owner: str, request: UpgradeRequest) -> Taken:
        """The task of an agent, which may be that of one that is silent."""
        try:
            return await self._agents.take(coming, self._node.name, new_task_id())
        except KohakuRiverError as error:
            # It has shown by now that it may be a task, so another one may end for it.
            if error.code not in _NO_ROOM or not coming.name or not await self._end_silent(coming, owner, request):
                raise
        return await self._agents.take(coming, self._node.name, new_task_id())

    async def _end_silent(self, coming: Coming, owner: str, request: UpgradeRequest) -> bool:
        """Whether another agent had the name here whose machine went without a word; it has no more.

        Raises "tunnel_taken" where that answers.
        """
        there = await self._agents.named(coming.name, owner)
        if there is None or there.node != self._node.name or there.engine_name == coming.client:
            return False
        hub = self._node.tunnels.hub
        await hub.check_replacement(there.container, coming.client, _address(request))
        hub.drop(there.container, "its agent does not answer")
        await self._node.write()
        return True

    def _task(self, task_id: int, name: str, owner: str) -> Task:
        container = container_name(BACKEND, task_id)
        order = TaskOrder(task_id=task_id, container=container, backend=BACKEND, name=name or f"agent-{task_id}")
        return Task.ordered(order, node=self._node.name, owner=owner, now=self._clock())

    def _tell_made(self, taken: Taken, owner: str) -> None:
        task = taken.task
        if taken.made:
            log.info("task started", task=task.task_id, name=task.name, node=task.node, backend=BACKEND)
            about = {"task": task.task_id, "name": task.name, "owner": owner, "node": task.node}
            self._audit.write("task_created", **about, backend=BACKEND)


def _address(request: UpgradeRequest) -> str:
    """Where an agent comes from, also behind a proxy that is trusted."""
    return request.peer.rpartition(":")[0].strip("[]")


def _said(request: UpgradeRequest, name: str) -> tuple[str, int | None, TaskReport]:
    """The digest of an agent's own id, its task's id as it knows it, and its SSH server. Raises UsageError."""
    if not request.offers_v2:
        raise UsageError("An agent speaks version 2 of the tunnel protocol.")
    if not _ID.fullmatch(request.client):
        raise UsageError("An agent says who it is in KohakuRiver-Client, by 32 hexadecimal digits.")
    if name and not is_task_name(name):
        raise UsageError(f"{name!r} can't be a task's name; give 1 to 63 of a-z, 0-9, dot, dash and underscore.")
    known = request.query.get("task")
    if known is not None and not (known.isascii() and known.isdigit() and len(known) < 19):
        raise UsageError(f"{known!r} is no task's id.")
    machine = printable(request.query.get("machine", ""), keep="")[:LONGEST_MACHINE]
    keys = ("ssh_port", "ssh_host_key", "ssh_host_key_ecdsa")
    told = {key: request.query[key] for key in keys if key in request.query}
    try:
        about = _reports.validate_python({"task_id": 0, "status": "running", "message": machine, **told})
    except ValidationError as error:
        raise UsageError("What the agent says of its SSH server makes no sense.") from error
    client = hashlib.sha256(request.client.encode()).hexdigest()
    return client, None if known is None else int(known), about
