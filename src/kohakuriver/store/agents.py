"""Tasks that are whatever dialled in: made, found again and moved to the host that has the agent's link.

An agent is known by an id that it made at random when it started; the task has the digest of that as its `engine_name`.
Source: docs/protocol.md "Agents".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from kohakuriver.errors import KohakuRiverError, NotAllowedError, UnauthenticatedError, UnavailableError
from kohakuriver.store.accounts import Accounts
from kohakuriver.store.database import Store, forget_task
from kohakuriver.store.models import ACTIVE, Node, Task, Token, User
from kohakuriver.store.news import note
from kohakuriver.task import next_revision

__all__ = ["BACKEND", "KEPT_SECONDS", "LOST_SECONDS", "NODE_PREFIX", "Agents", "Coming", "Taken"]

BACKEND = "agent"

NODE_PREFIX = "@"
"""What the names of hosts begin with among the nodes, as no runner's may."""

KEPT_SECONDS = 86_400.0
"""For so long a task that has ended is shown with its exit code."""

LOST_SECONDS = 30 * 86_400.0
"""For so long one that is lost may come back, and one that was removed is told so when it does."""


class Coming(NamedTuple):
    """An agent that dials in: what it shows, and what it wants to be.

    `token` is the digest of its credential, `client` of its own id. `name` is what its task is to be called, "" for any
    name, `task_id` what it is by now as the agent knows. `order` makes a new task of an id.
    """

    token: str
    client: str
    name: str
    task_id: int | None
    order: Callable[[int], Task]


class Taken(NamedTuple):
    """Its task, the node that it was at before, and whether it is new."""

    task: Task
    before: str
    made: bool


class Agents:
    """Every method may raise KohakuRiverError when the database fails."""

    def __init__(self, store: Store, accounts: Accounts, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._accounts = accounts
        self._clock = clock

    async def take(self, coming: Coming, node: str, new_id: int) -> Taken:
        """The task of an agent that came to the host that is `node`, made with the id `new_id` where it has none.

        An agent takes the name of a task of its user's that was another agent's and has none any more. Raises
        UnauthenticatedError or NotAllowedError for its credential, KohakuRiverError "name_taken" (409) or "agent_over"
        (410), UnavailableError "agent_replaced" (409), and "over_limit".
        """

        def work(session: Session) -> Taken:
            token = self._shown(session, coming)
            task = self._found(session, coming, token)
            if task is None:
                self._check_unused(token)
                task = self._left(session, coming, token)
            made = task is None
            if task is None:
                task = coming.order(new_id)
                task.owner = task.creator = token.name
                self._accounts.check_room(session, task, task.usage(self._clock()))
                session.add(task)
            if token.kind == BACKEND:
                token.task_id = task.task_id
            before, task.node = task.node, node
            task.engine_name = coming.client
            task.tunnel = True  # from now on nobody else may have its name
            task.revision = max(next_revision(), (task.revision or 0) + 1)
            session.flush()
            note(session, tasks=[task.task_id], nodes=[before] if before != node else [])
            return Taken(task, before, made)

        try:
            return await self._store.write(work)
        except IntegrityError as error:
            raise KohakuRiverError(
                f"There is a task named {coming.name!r} already; give another --name or remove that task first.",
                code="name_taken",
                status=409,
            ) from error

    def _shown(self, session: Session, coming: Coming) -> Token:
        """The agent's credential, which is good for whatever it is for. The locks let one agent use it at a time.

        And one of its user: a lock for reading, which `check_room` has to make one for writing, is a deadlock of two.
        """
        token = session.get(Token, coming.token, with_for_update=True, populate_existing=True)
        if token is None or session.get(User, token.name, with_for_update=True) is None:
            raise UnauthenticatedError("The user of this token was removed; ask the host's administrator.")
        if why := _no_good(token, self._clock()):
            sentence = f"{why}; make another one with `kohakuriver token create --agent`."
            raise UnauthenticatedError(sentence, code="token_ended")
        return token

    def _found(self, session: Session, coming: Coming, token: Token) -> Task | None:
        """The task that the agent has already; None where it has none, or none that this database knows of.

        One that was stopped has ended for good.
        """
        query = select(Task).where(Task.backend == BACKEND, Task.owner == token.name)
        known = Task.engine_name == coming.client if coming.task_id is None else Task.task_id == coming.task_id
        task = session.scalars(query.where(known)).first()
        if task is None:
            return None
        if task.engine_name == coming.client and (task.removed or task.status in ("stopped", "failed")):
            raise KohakuRiverError("This agent's task was stopped or removed.", code="agent_over", status=410)
        if task.engine_name != coming.client:
            raise UnavailableError(
                f"Another agent is task {task.name} now; end one of the two.", code="agent_replaced", status=409
            )
        if token.kind == BACKEND and token.task_id != task.task_id:
            raise _used(token)
        return task

    def _check_unused(self, token: Token) -> None:
        """Raises NotAllowedError where the credential makes no task any more."""
        if token.kind == BACKEND and token.task_id is not None:
            raise _used(token)

    def _left(self, session: Session, coming: Coming, token: Token) -> Task | None:
        """The user's task of that name whose agent is gone, for this one to be; None where there is none."""
        if not coming.name:
            return None
        query = select(Task).where(Task.backend == BACKEND, Task.owner == token.name, Task.name == coming.name)
        task = session.scalars(query.where(Task.removed.is_(False)).with_for_update()).first()
        if task is None or task.tunnel:
            return None  # a new one of that name is then refused by the database
        if task.status not in ACTIVE:
            self._accounts.check_room(session, task, coming.order(task.task_id).usage(self._clock()))
        # How the one before ended is not how this one has, which may ask again when it hears no answer.
        task.change({"status": "starting", "message": None, "exit_code": None}, self._clock())
        return task

    async def named(self, name: str, owner: str) -> Task | None:
        """The agent's task of that name and owner whose agent is connected."""
        query = select(Task).where(Task.name == name, Task.backend == BACKEND, Task.owner == owner)
        wanted = query.where(Task.tunnel.is_(True), Task.removed.is_(False))
        return await self._store.read(lambda session: session.scalars(wanted).first())

    async def of_node(self, node: str) -> dict[int, Task]:
        """The tasks that are at a host, by id; those that were removed, too."""
        query = select(Task).where(Task.node == node)
        return await self._store.read(lambda session: {task.task_id: task for task in session.scalars(query)})

    async def change(self, node: str, reports: Mapping[int, Mapping[str, Any]]) -> list[int]:
        """Write down what became of tasks, if they are still at this host; the ids of those that changed."""

        def work(session: Session) -> list[int]:
            changed = []
            for task_id, values in reports.items():
                task = session.get(Task, task_id)
                if task is not None and task.node == node and values["revision"] >= task.revision:
                    task.change(dict(values), self._clock())
                    changed.append(task_id)
            note(session, tasks=changed)
            return changed

        return await self._store.write(work)

    async def withdrawn(self, links: Iterable[tuple[int, str]]) -> dict[int, str]:
        """Of agents that are connected, tasks' ids and digests of credentials: whose right is gone, and why."""
        wanted = list(links)

        def work(session: Session) -> dict[int, str]:
            return {
                task_id: why
                for task_id, key in wanted
                if (why := _why_not(session, task_id, session.get(Token, key), self._clock()))
            }

        return await self._store.read(work)

    async def forget_the_gone(self) -> None:
        """Forget tasks that have ended long ago, hosts that are no more, and tokens of tasks that are none."""
        old, older = self._clock() - KEPT_SECONDS, self._clock() - LOST_SECONDS

        def work(session: Session) -> None:
            ended = Task.status.in_(("stopped", "failed")) & Task.removed.is_(False) & (Task.changed_at < old)
            lost = Task.status.not_in(ACTIVE) & (Task.changed_at < older)
            gone = select(Task.task_id).where(Task.backend == BACKEND, ended | lost)
            forgotten = list(session.scalars(gone))
            for task_id in forgotten:
                forget_task(session, task_id)
            session.flush()
            here = select(Task.node)
            dead = (Node.name.startswith(NODE_PREFIX), Node.last_seen < old, Node.name.not_in(here))
            session.execute(delete(Node).where(*dead))
            kept = select(Task.task_id)
            used = (Token.kind == BACKEND, Token.expires_at < old, Token.task_id.is_(None) | Token.task_id.not_in(kept))
            session.execute(delete(Token).where(*used))
            note(session, tasks=forgotten)

        await self._store.write(work)


def _no_good(token: Token, now: float) -> str:
    """Why a credential lets no agent in, "" where it does: one that has made its task lasts as long as that."""
    if token.revoked_at is not None:
        return "This token was revoked"
    lasts = token.kind == BACKEND and token.task_id is not None
    return "" if lasts or token.is_good(now) else "This token has expired"


def _why_not(session: Session, task_id: int, token: Token | None, now: float) -> str:
    task = session.get(Task, task_id)
    if token is None or session.get(User, token.name) is None:
        return "the user of its token was removed"
    if why := _no_good(token, now):
        return why[0].lower() + why[1:]
    return "" if task is None or task.owner == token.name else f"the task is not {token.name}'s any more"


def _used(token: Token) -> NotAllowedError:
    return NotAllowedError(
        f"Token {token.label} has made its task, and makes one only; make another one with `kohakuriver token create "
        "--agent`.",
        code="token_used",
    )
