"""What a caller may do with which task (docs/security.md).

An owner and an admin may do everything with a task. Whom it is shared with may look at it and open sessions to it.
Where a host lets sessions without a token in, those reach every task: who opens them is not known.
"""

from __future__ import annotations

from kohakuriver.backends import known
from kohakuriver.errors import NotAllowedError
from kohakuriver.host.services.credentials import ANONYMOUS, Caller
from kohakuriver.store import Accounts, Node, Store, Task

__all__ = ["Access", "check_onward"]


class Access:
    """Looks tasks up for the callers who may use them."""

    def __init__(self, store: Store, accounts: Accounts) -> None:
        self._store = store
        self._accounts = accounts

    async def usable(self, caller: Caller, reference: str) -> tuple[Task, Node]:
        """The task with that id or name, which the caller may use, and its node.

        Raises NotFoundError or NotAllowedError.
        """
        task, node = await self._store.task_and_node(reference)
        await self.check_usable(caller, task)
        return task, node

    async def check_usable(self, caller: Caller, task: Task) -> None:
        """Raises NotAllowedError unless the caller may look at the task and open sessions to it."""
        if _owns(caller, task) or caller.role == ANONYMOUS:
            return
        if not await self._accounts.may_use(task.task_id, caller.name):
            raise NotAllowedError(
                f"Task {task.name} is not yours; its owner can share it with `kohakuriver vps share {task.name} "
                f"{caller.name}`.",
                code="not_your_task",
            )

    async def own(self, caller: Caller, reference: str) -> tuple[Task, Node]:
        """The task with that id or name, which the caller may change, and its node. Raises as `usable` does."""
        task, node = await self.usable(caller, reference)
        if not _owns(caller, task):
            raise NotAllowedError(
                f"Task {task.name} is shared with you to use it; only its owner, {task.owner}, may change it.",
                code="not_your_task",
            )
        return task, node


def check_onward(caller: Caller, task: Task) -> None:
    """Raises NotAllowedError unless the caller may forward through the task to what it reaches.

    That goes by the task's network and in its name, so it is its owner's. A task without a network of its own reaches
    what its node does, the node's own services with it.
    """
    if caller.is_admin:
        return
    if caller.name != task.owner:
        raise NotAllowedError(
            f"Task {task.name} is shared with you: through it to other addresses only its owner, {task.owner}, may "
            "forward.",
            code="not_your_task",
        )
    if not known(task.backend).network:
        raise NotAllowedError(
            f"Task {task.name} is on its node's own network: through it to other addresses only admins may forward.",
            code="on_node_network",
        )


def _owns(caller: Caller, task: Task) -> bool:
    return caller.is_admin or caller.name == task.owner
