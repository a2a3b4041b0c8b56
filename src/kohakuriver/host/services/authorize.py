"""Who may open which forward session, terminal or SSH connection, and where it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from kohakuriver.asking import asker
from kohakuriver.backends import kind_of
from kohakuriver.errors import KohakuRiverError, NotAllowedError, NotFoundError, UnauthenticatedError
from kohakuriver.host.services.access import Access, check_onward
from kohakuriver.host.services.audit import REFUSALS, fingerprint
from kohakuriver.host.services.credentials import Caller, Credentials
from kohakuriver.host.services.grants import Grants
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.host.services.tasks import Tasks, not_running
from kohakuriver.session import ticket
from kohakuriver.session.carried import Route
from kohakuriver.ssh_proxy.jump import Reach
from kohakuriver.store import Node, Passes, Store, Task, Token

__all__ = ["Forwards", "told_by"]

SSH_PORT = 22
"""Where the SSH server of a task is taken to listen that was not given one."""


def told_by(order: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether services of a task that was ordered so are told the browser's address, and the prefix of paths."""
    return bool(order.get("preserve_host")), bool(order.get("keep_prefix"))


class Forwards:
    """Turns a user's request for a session into a ticket for the task's node, and a grant for as long as it lasts.

    `tells` is every how many seconds runners are to tell what sessions carry past this host; None where none may.
    `url_of` says where this host finds a node.
    """

    def __init__(
        self,
        credentials: Credentials,
        access: Access,
        grants: Grants,
        store: Store,
        nodes: Nodes,
        tasks: Tasks,
        tells: float | None = None,
        passes: Passes | None = None,
        url_of: Callable[[Node], str] = lambda node: node.url,
    ) -> None:
        self._url_of = url_of
        self._tells = tells
        self._credentials = credentials
        self._access = access
        self._grants = grants
        self._store = store
        self._nodes = nodes
        self._tasks = tasks
        self._passes = passes or Passes(store)
        self._audit = grants.audit

    async def authorize(
        self, token: str | None, reference: str, port: int | None, proto: str, ports: frozenset[int] | None = None
    ) -> Route:
        """Where a session to `port` (1 to 65535) of a task goes; `proto` is "tcp" or "udp".

        The session reaches `ports` besides, or where that is None all ports. A `port` of None is that of the task's SSH
        server, and then the session reaches no other. Raises UnauthenticatedError,
        NotAllowedError, NotFoundError, or UnavailableError "task_not_running", "node_offline" or
        "too_many_sessions". Source: docs/protocol.md §4.
        """
        with self._noting_refusals(reference):
            caller = await self._credentials.session_caller(token)
            task, node = await self._reached(caller, reference)
            if port is None:
                return await self._ssh_route(task, node, caller, None)
            route = self._route(task, node, caller, "forward", None if ports is None else {port, *ports})
            return replace(route, grant=await self._grants.enter(caller, task))

    async def authorize_app(self, caller: Caller, task_id: int, port: int) -> Route:
        """Where a browser's session to one port of a task goes. Raises as `authorize` does."""
        with self._noting_refusals(str(task_id)):
            task, node = await self._reached(caller, str(task_id))
            route = self._route(task, node, caller, "forward", {port})
            host, prefix = told_by(task.spec)
            grant = await self._grants.enter(caller, task)
            return replace(route, port=port, preserve_host=host, keep_prefix=prefix, grant=grant)

    async def authorize_terminal(self, token: str | None, reference: str, beyond: str = "") -> Route:
        """Where a terminal of a task is opened, or connections lead `beyond` its ports: "to" others, "at" a Unix socket
        or "on" a place there. The latter two whoever has a terminal there can do as well.

        Raises as `authorize` does. Source: docs/protocol.md §6.
        """
        with self._noting_refusals(reference):
            caller = await self._credentials.session_caller(token)
            task, node = await self._reached(caller, reference)
            if beyond == "to":
                check_onward(caller, task)
            route = self._route(task, node, caller, "terminal")
            onward: Literal["", "admin", "owner"] = ""
            if beyond == "to":
                onward = "admin" if caller.is_admin else "owner"
            return replace(route, grant=await self._grants.enter(caller, task, onward=onward))

    async def authorize_ssh(self, token: str | None, reference: str, port: int | None = None) -> Route:
        """Where a connection to a port of a task goes, None being where its SSH server listens.

        `token` may be a pass. Raises as `authorize` does. Source: docs/protocol.md §7.
        """
        only: int | None = None
        with self._noting_refusals(reference):
            if token is not None and token.startswith(Passes.PREFIX):
                caller, only = await self._take_pass(token)
            else:
                caller = await self._credentials.session_caller(token)
            task, node = await self._reached(caller, reference)
            if only not in (None, task.task_id):
                raise NotAllowedError("This pass is for another task; get a new one.")
            return await self._ssh_route(task, node, caller, port)

    async def _reached(self, caller: Caller, reference: str) -> tuple[Task, Node]:
        """The task, which the caller may use, and its node; where that is being started again, once it is back."""
        task, node = await self._access.usable(caller, reference)
        if await self._nodes.once_back(node):
            return await self._access.usable(caller, reference)
        return task, node

    async def _let_in(self, reference: str, key: str) -> tuple[Task, Node]:
        """The task that lets in whoever holds a key, and its node. Raises NotFoundError."""
        task, node = await self._store.task_and_node(reference)
        if not task.lets_in(key):
            raise NotFoundError(f"There is no task {reference!r} that lets your key in.")
        return task, node

    async def _take_pass(self, shown: str) -> tuple[Caller, int]:
        async with self._credentials.looking():
            passed = await self._passes.take(shown)
        if passed is None:
            error = UnauthenticatedError("This pass was used or has run out; get a new one.")
            await self._credentials.refuse(error)
            raise error
        caller = self._credentials.of_token(passed.token, passed.user)
        asker().known.update(user=caller.name, token=caller.token_id)
        return caller, passed.task_id

    @contextlib.contextmanager
    def _noting_refusals(self, reference: str) -> Iterator[None]:
        """Write down that somebody who is known may not do this, or does too much of it."""
        try:
            yield
        except KohakuRiverError as error:
            if error.status in REFUSALS:
                self._audit.refused(error, name=reference)
            raise

    async def ssh_pass(self, token: Token, task_id: int) -> str:
        """What `authorize_ssh` takes once in the place of a token, for this task."""
        return await self._passes.issue(token.name, token.digest, task_id)

    async def keyholder(self, key: str) -> Reach | None:
        """What the holder of a public key (type and base64) may reach: the tasks that it was put into.

        None when there is no such task.
        """

        async def reach(reference: str, port: int | None) -> Route:
            task, node = await self._let_in(reference, key)
            if await self._nodes.once_back(node):
                task, node = await self._let_in(reference, key)
            # The owner's right was to put the key there; it lasts as long as the key is there.
            with self._noting_refusals(reference):
                return await self._ssh_route(task, node, await self._credentials.owner(task.owner), port, key)

        if await self._store.lets_in(key):
            return reach
        self._audit.refused(UnauthenticatedError("No task lets this key in.", code="unknown_key"), key=fingerprint(key))
        return None

    async def _ssh_route(
        self, task: Task, node: Node, caller: Caller, port: int | None, key: str | None = None
    ) -> Route:
        target_port = port or task.ssh_port or SSH_PORT
        route = self._route(task, node, caller, "forward", {target_port})
        own_server = port is None and task.ssh_port is not None
        grant = await self._grants.enter(caller, task, key)
        return replace(route, port=target_port, own_server=own_server, grant=grant)

    def _route(
        self,
        task: Task,
        node: Node,
        caller: Caller,
        scope: Literal["forward", "terminal"],
        ports: set[int] | None = None,
    ) -> Route:
        """Where the runner is and what to show there, without a grant yet. Raises UnavailableError."""
        view = self._tasks.view(task, node)
        if view.status != "running":
            raise not_running(task, view)
        credential = ticket.issue(
            node.ticket_key,
            node=node.name,
            scope=scope,
            task=task.task_id,
            container=task.container,
            user=caller.name,
            ports="*" if ports is None else sorted(ports),
            connects=caller.quotas.connects,
            tells=self._tells,
        )
        return Route(
            runner_ws_url="ws" + self._url_of(node).removeprefix("http"),
            container=task.container,
            ticket=credential,
            task_id=task.task_id,
            task=view.name,
            node=node.name,
            moves=kind_of(task.backend).dials_in,
        )
