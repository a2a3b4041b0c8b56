"""Which tunnel client may be a task's: whoever shows its token from where it runs, and is the one that showed it first.

Source: docs/protocol.md §5, docs/security.md "A stolen tunnel".
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable

import structlog

from kohakuriver.backends import kind_of
from kohakuriver.errors import NotAllowedError
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.task_book import TaskBook
from kohakuriver.tunnel.accept import Peer

__all__ = ["TunnelGuard"]

log = structlog.get_logger("kohakuriver.tunnel")


class TunnelGuard:
    """Judges tunnel clients by what they show.

    Args:
        book: has the tasks with their tokens.
        comes_from: whether a peer is where a task runs; may raise KohakuRiverError where that can't be said now.
        tell: called with (container id, sentence without a full stop, address) where a good token is in wrong hands.
    """

    def __init__(
        self,
        book: TaskBook,
        comes_from: Callable[[TaskRecord, Peer], Awaitable[bool]],
        tell: Callable[[str, str, str], None],
    ) -> None:
        self._book = book
        self._comes_from = comes_from
        self._tell = tell

    async def check(self, container: str, token: str, client: str, peer: Peer) -> str:
        """What tells this client from others, "" where nothing does. Raises NotAllowedError.

        Args:
            client: the id that it made for itself, "" where it said none.
        """
        task = self._task(container, token)
        if not await self._is_there(task, peer):
            self._refuse(task, peer, f"its tunnel's token was used from {peer.address}, where it does not run")
        self._task(container, token)  # it may have been replaced meanwhile
        who = hashlib.sha256(client.encode()).hexdigest() if client else ""
        if kind_of(task.backend).dialled:
            return who  # its token is in the machine's hands, over restarts of it and of the client
        if not who:
            raise NotAllowedError(f"a tunnel client of {container} must say who it is, in KohakuRiver-Client")
        if not task.tunnel_client:
            task.tunnel_client = who
            self._book.changed()
        elif task.tunnel_client != who:
            self._refuse(task, peer, f"a second tunnel client came from {peer.address} with its token")
        return who

    async def _is_there(self, task: TaskRecord, peer: Peer) -> bool:
        """Whether it comes from where the task is: by its door, where it has one."""
        if peer.door or task.has_door:
            return peer.door == task.container
        return await self._comes_from(task, peer)

    def _task(self, container: str, token: str) -> TaskRecord:
        task = self._book.get(container) if container in self._book else None
        if task is None or not task.tunnel_token or not hmac.compare_digest(task.tunnel_token.encode(), token.encode()):
            raise NotAllowedError(f"the token is not that of {container}")
        return task

    def _refuse(self, task: TaskRecord, peer: Peer, what: str) -> None:
        sentence = f"{what}, and was refused; a restart of the task makes that token worthless"
        log.warning("a tunnel client was refused", container=task.container, peer=peer.address, reason=what)
        self._tell(task.container, sentence, peer.address)
        raise NotAllowedError(f"the token of {task.container} is another client's")
