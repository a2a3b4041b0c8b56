"""Who may open which forward session, and where it goes."""

from __future__ import annotations

from kohakuriver.errors import UsageError
from kohakuriver.host.credentials import Credentials
from kohakuriver.host.nodes import Nodes
from kohakuriver.host.tasks import Tasks, not_running
from kohakuriver.host.tunnel_proxy import ForwardTarget
from kohakuriver.store import Store
from kohakuriver.tunnel import ticket

__all__ = ["Forwards"]


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
        view = self._tasks.view(task, node)
        if view.status != "running":
            raise not_running(view)
        credential = ticket.issue(
            node.ticket_key, node=node.name, scope="forward", task=task.task_id, container=task.container, user=user
        )
        url = "ws" + node.url.removeprefix("http")
        return ForwardTarget(url, task.container, credential, user=user, task=task.task_id, node=node.name)
