"""Who may open which forward session, terminal or SSH connection, and where it goes."""

from __future__ import annotations

from typing import Literal

from kohakuriver.errors import NotFoundError, UsageError
from kohakuriver.host.credentials import Credentials
from kohakuriver.host.nodes import Nodes
from kohakuriver.host.tasks import Tasks, not_running
from kohakuriver.host.terminal_proxy import TerminalTarget
from kohakuriver.host.tunnel_proxy import ForwardTarget
from kohakuriver.ssh_proxy import SshTarget
from kohakuriver.ssh_proxy.jump import Reach
from kohakuriver.store import Node, Store, Task
from kohakuriver.tunnel import ticket

__all__ = ["Forwards"]

SSH_PORT = 22
"""Where the SSH server of a task is taken to listen that was not given one."""


class Forwards:
    """Turns a user's request for a session into a ticket for the task's node."""

    def __init__(self, credentials: Credentials, store: Store, nodes: Nodes, tasks: Tasks) -> None:
        self._credentials = credentials
        self._store = store
        self._nodes = nodes
        self._tasks = tasks

    async def authorize(self, token: str | None, reference: str, port: int, proto: str) -> ForwardTarget:
        """Where a session to `port` (1 to 65535) of a task goes; `proto` is "tcp" or "udp".

        Raises UnauthenticatedError, NotFoundError, UsageError, or UnavailableError "task_not_running" or
        "node_offline". Source: docs/protocol.md §4.
        """
        user = await self._credentials.session_user(token)
        if not 0 < port < 65536:
            raise UsageError(f"{port} is no port; ports go from 1 to 65535.")
        task, node = await self._store.task_and_node(reference)
        return self._target(task, node, user)

    async def authorize_terminal(self, token: str | None, reference: str) -> TerminalTarget:
        """Where a terminal of a task is opened. Raises as `authorize` does. Source: docs/protocol.md §6."""
        user = await self._credentials.session_user(token)
        task, node = await self._store.task_and_node(reference)
        url, credential = self._ticket(task, node, user, "terminal")
        return TerminalTarget(runner_ws_url=url, task_id=task.task_id, ticket=credential)

    async def authorize_ssh(self, token: str | None, reference: str) -> SshTarget:
        """Where an SSH connection to a task goes. Raises as `authorize` does. Source: docs/protocol.md §7."""
        user = await self._credentials.session_user(token)
        task, node = await self._store.task_and_node(reference)
        return self._ssh_target(task, node, user)

    async def keyholder(self, key: str) -> Reach | None:
        """What the holder of a public key (type and base64) may reach: the tasks that it was put into.

        None when there is no such task.
        """

        async def reach(reference: str) -> SshTarget:
            task, node = await self._store.task_and_node(reference)
            if not _lets_in(task, key):
                raise NotFoundError(f"There is no task {reference!r} that lets your key in.")
            return self._ssh_target(task, node, task.owner)

        return reach if any(_lets_in(task, key) for task in await self._store.tasks()) else None

    def _ssh_target(self, task: Task, node: Node, user: str) -> SshTarget:
        target = self._target(task, node, user)
        return SshTarget(
            task=task.name or str(task.task_id),
            port=task.ssh_port or SSH_PORT,
            runner_ws_url=target.runner_ws_url,
            container=target.container,
            ticket=target.ticket,
            own_server=bool(task.ssh_keys),
        )

    def _target(self, task: Task, node: Node, user: str) -> ForwardTarget:
        url, credential = self._ticket(task, node, user, "forward")
        return ForwardTarget(runner_ws_url=url, container=task.container, ticket=credential)

    def _ticket(self, task: Task, node: Node, user: str, scope: Literal["forward", "terminal"]) -> tuple[str, str]:
        """The runner's WebSocket address, and what to show there. Raises UnavailableError."""
        view = self._tasks.view(task, node)
        if view.status != "running":
            raise not_running(view)
        credential = ticket.issue(
            node.ticket_key, node=node.name, scope=scope, task=task.task_id, container=task.container, user=user
        )
        return "ws" + node.url.removeprefix("http"), credential


def _lets_in(task: Task, key: str) -> bool:
    return key in (" ".join(line.split()[:2]) for line in task.ssh_keys)
