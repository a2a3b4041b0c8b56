"""The database behind a host: opened once, asked from the event loop, answered beside it.

Rows come back detached and complete: reading one never touches the database, changing one changes nothing there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

import structlog
from sqlalchemy import delete, func, select, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.orm import Session

from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotFoundError, UsageError
from kohakuriver.store.models import ACTIVE, Meta, Node, Share, Task, TaskKey, Token
from kohakuriver.store.news import note
from kohakuriver.store.transactions import Database, SilentError

if TYPE_CHECKING:
    from kohakuriver.store.postgresql import PostgresServer

__all__ = ["Store", "ahead_of_users", "gpus_in_use", "is_shared", "sqlite_url"]

CHECK_SECONDS = 2.0
"""How soon the database has to answer when it is asked whether it does."""

T = TypeVar("T")

log = structlog.get_logger("kohakuriver.store")


_of_node: ContextVar[bool] = ContextVar("of_node", default=False)


def ahead_of_users() -> Callable[[], object]:
    """Have what the task that runs now asks of the database not wait for what users have asked.

    That is so until what this gives is called. It is for heartbeats: a node is offline only when it is silent.
    """
    before = _of_node.set(True)
    return lambda: _of_node.reset(before)


def sqlite_url(path: Path) -> str:
    """The database URL of a SQLite file."""
    return f"sqlite:///{path}"


Reports = Mapping[int, dict[str, Any]]
"""Columns of tasks as their node has them, by the tasks' ids."""


class Heard(NamedTuple):
    """What came of what a node said: ids of tasks that changed, and of tasks that were removed and it still has."""

    changed: list[int]
    remove: list[int]


class Told(NamedTuple):
    """What a node said of its tasks, at the time `now`; see `Store.hear_node`."""

    reports: Reports
    others: Set[int]
    quiet: float
    now: float

    def __contains__(self, task_id: object) -> bool:
        return task_id in self.reports or task_id in self.others

    def news_of(self, task: Task) -> dict[str, Any]:
        """Columns of the task that may be other ones now; none where nothing newer is said of it."""
        if task.task_id in self.others:
            return {}
        report = self.reports.get(task.task_id)
        if report is not None:
            return report if report["revision"] >= task.revision else {}
        lost = {"status": "lost", "tunnel": False, "message": f"node {task.node} knows nothing of it any more"}
        return lost if task.changed_at < self.quiet else {}


class Store:
    """Nodes and tasks, and a way to the other tables.

    Every method may raise KohakuRiverError when the database fails. Large because each method is one thing that is
    asked of these tables, in a transaction of its own.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._question: asyncio.Future[str | None] | None = None
        self._down = False

    @classmethod
    async def open(cls, url: str) -> Store:
        """The store at a database URL, its tables made when they are not there.

        Raises UsageError when the URL is invalid or names a database that this installation has no driver for.
        """
        store = cls(_database(url))
        try:
            await store._within(store._database.prepare())
        except BaseException:
            await store.close()
            raise
        return store

    @property
    def server(self) -> PostgresServer | None:
        """The database where other hosts may work on it, too, else None."""
        return cast("PostgresServer", self._database) if self._database.shared else None

    async def close(self) -> None:
        """Let go of every connection to the database."""
        await self._database.close()

    async def _within(self, answer: Awaitable[T]) -> T:
        """An answer of the database; what it fails with in words of ours."""
        try:
            answered = await answer
        except IntegrityError:
            raise  # a clash with a constraint: the caller knows which, and what to say
        except DataError as error:  # PostgreSQL holds no text with a NUL, say, nor looks for one
            raise UsageError(f"The database can't hold what was given: {_reason(error)}.") from error
        except DBAPIError as error:
            if isinstance(error, (OperationalError, InterfaceError)) and self._database.engine.dialect.name != "sqlite":
                self._is_down(_reason(error), error)
            raise KohakuRiverError(f"The database failed: {_reason(error)}.", code="database") from error
        except SQLAlchemyError as error:  # a row went while it was written, say
            raise KohakuRiverError(f"The database failed: {error}.", code="database") from error
        except SilentError as error:
            self._is_down(str(error), error)
        if self._down:
            self._down = False
            log.info("the database answers again")
        return answered

    def _is_down(self, reason: str, error: Exception) -> NoReturn:
        if not self._down:
            log.error("the database is down", reason=reason)
        self._down = True
        raise HostUnreachableError(
            "The host's database is down; its administrator finds the reason in the host's log.",
            code="database_down",
            status=503,
        ) from error

    async def read(self, work: Callable[[Session], T]) -> T:
        """What `work` returns, called in another thread with a session that changes nothing.

        All that it reads is from one moment, whatever other hosts on the same database write meanwhile.
        """
        return await self._within(self._database.run(work, write=False, ahead=_of_node.get()))

    async def write(self, work: Callable[[Session], T]) -> T:
        """What `work` returns, called in another thread with a session, in one transaction."""
        return await self._within(self._database.run(work, write=True, ahead=_of_node.get()))

    async def check(self) -> None:
        """Raises HostUnreachableError "database_down" (503) unless the database answers soon.

        However many ask meanwhile, one question is under way.
        """
        question = self._question
        if question is None or question.done():
            question = self._question = asyncio.ensure_future(self.read(_look))
        await asyncio.wait({question}, timeout=CHECK_SECONDS)
        error = question.exception() if question.done() else None
        if not question.done():
            why = f"does not answer within {CHECK_SECONDS:g} s; see whether it is overloaded or locked"
            raise HostUnreachableError(f"The host's database {why}.", code="database_down", status=503)
        if error is not None:
            text = error.message if isinstance(error, KohakuRiverError) else "The host's database can't be read."
            raise HostUnreachableError(text, code="database_down", status=503) from error

    # Nodes

    async def nodes(self) -> list[Node]:
        """All nodes, by name."""
        return await self.read(lambda session: list(session.scalars(select(Node).order_by(Node.name))))

    async def node(self, name: str) -> Node | None:
        """The node of that name, or None."""
        return await self.read(lambda session: session.get(Node, name))

    async def put_node(self, name: str, values: Mapping[str, Any], ticket_key: bytes) -> Node:
        """Make or renew a node; the same runner, told by its `instance`, keeps the ticket key that the node has.

        Another machine that comes with the node's name must not learn what opens the runner that had it before. The
        node's tasks' tunnels count as gone until it says otherwise. A task at an address has none that could go.
        """

        def work(session: Session) -> Node:
            node = session.get(Node, name)
            if node is None:
                node = Node(name=name, ticket_key=ticket_key)
                session.add(node)
            elif node.instance != values.get("instance", node.instance):
                node.ticket_key = ticket_key
            for key, value in values.items():
                setattr(node, key, value)
            session.execute(update(Task).where(Task.node == name, Task.address.is_(None)).values(tunnel=False))
            note(session, nodes=[name])
            return node

        return await self.write(work)

    async def change_node(self, name: str, values: Mapping[str, Any]) -> Node | None:
        """Set columns of a node; None when there is none of that name."""

        def work(session: Session) -> Node | None:
            node = session.get(Node, name)
            for column, value in values.items() if node is not None else ():
                setattr(node, column, value)
            return node

        return await self.write(work)

    async def remove_node(self, name: str, *, force: bool) -> list[Task]:
        """Delete a node that has no tasks, or with `force` its tasks too; the tasks that it has, or had."""

        def work(session: Session) -> list[Task]:
            on_it = list(session.scalars(select(Task).where(Task.node == name).order_by(Task.created_at)))
            tasks = [task for task in on_it if not task.removed]
            if force or not tasks:
                for task in on_it:
                    forget_task(session, task.task_id)
                session.flush()
                session.execute(delete(Node).where(Node.name == name))
                note(session, tasks=[task.task_id for task in tasks])
            return tasks

        return await self.write(work)

    async def hear_node(
        self, name: str, values: Mapping[str, Any], reports: Reports, *, others: Set[int], quiet: float
    ) -> Heard:
        """Write down what a node says: columns of its own, and of its tasks, each with its `revision`.

        `others` are ids of tasks that are there too and are told of another time: what is known of their traffic stays.
        A task that the node does not name is lost, unless it changed after `quiet`, in seconds since the epoch: then
        what the node says may be from before. Raises NotFoundError for a node that is not there.
        """

        def work(session: Session) -> Heard:
            node = session.get(Node, name)
            if node is None:
                raise NotFoundError(f"There is no node {name!r}; register first.")
            node.hear(values, others)
            tasks = session.scalars(select(Task).where(Task.node == name))
            heard = _hear_tasks(session, tasks, Told(reports, others, quiet, node.last_seen))
            note(session, tasks=heard.changed)
            return heard

        return await self.write(work)

    async def active_tasks_by_node(self) -> dict[str, int]:
        """How many tasks each node is starting or running; a node with none is not in it."""
        query = (
            select(Task.node, func.count()).where(Task.removed.is_(False), Task.status.in_(ACTIVE)).group_by(Task.node)
        )
        return await self.read(lambda session: {row[0]: row[1] for row in session.execute(query)})

    async def gpus_in_use(self, now: float) -> dict[str, set[str]]:
        """The numbers of the GPUs, by their nodes, that tasks have; `now` is in seconds since the epoch."""
        return await self.read(lambda session: gpus_in_use(session, now))

    # Tasks

    async def add_task(self, task: Task, check: Callable[[Session], object] = lambda _session: None) -> None:
        """Keep a new task, once `check`, in the same transaction, has raised nothing.

        Raises KohakuRiverError "name_taken" (409) when another one has its name.
        """

        def work(session: Session) -> None:
            check(session)
            session.add(task)
            session.flush()
            session.add_all(task.looked_up())

        try:
            await self.write(work)
        except IntegrityError as error:
            raise KohakuRiverError(
                f"There is a task named {task.name!r} already; choose another name or remove that task first.",
                code="name_taken",
                status=409,
            ) from error

    async def stamps(self, task_ids: Iterable[int]) -> dict[int, tuple[float, Node]]:
        """When each of these tasks last changed, in seconds since the epoch, and its node; none for a removed one."""
        query = select(Task.task_id, Task.changed_at, Node).join(Node, Node.name == Task.node)
        wanted = query.where(Task.removed.is_(False), Task.task_id.in_(list(task_ids)))
        return await self.read(lambda session: {row[0]: (row[1], row[2]) for row in session.execute(wanted)})

    async def orders(self, task_ids: Iterable[int]) -> dict[int, dict[str, Any]]:
        """What was ordered of each of these tasks, as `change_order` sets it; nothing of those that are gone."""
        query = select(Task.task_id, Task.spec).where(Task.task_id.in_(list(task_ids)))
        return await self.read(lambda session: {row[0]: row[1] for row in session.execute(query)})

    async def task_and_node(self, reference: str) -> tuple[Task, Node]:
        """The task with that id or name, and its node. Raises NotFoundError."""

        def work(session: Session) -> tuple[Task, Node] | None:
            task = find_task(session, reference)
            return None if task is None else (task, session.get_one(Node, task.node))

        found = await self.read(work)
        if found is None:
            raise no_such_task(reference)
        return found

    async def tasks_and_nodes(self) -> list[tuple[Task, Node]]:
        """All tasks that were not removed, oldest first, each with its node."""
        query = select(Task, Node).join(Node, Node.name == Task.node).where(Task.removed.is_(False))
        ordered = query.order_by(Task.created_at, Task.task_id)
        return await self.read(lambda session: [(row[0], row[1]) for row in session.execute(ordered)])

    async def lets_in(self, key: str) -> bool:
        """Whether a public key, as its type and base64, is one of some task's `ssh_keys`: one look-up by an index."""
        query = (
            select(TaskKey.task_id)
            .join(Task, Task.task_id == TaskKey.task_id)
            .where(TaskKey.digest == TaskKey.digest_of(key), Task.removed.is_(False))
            .limit(1)
        )
        return await self.read(lambda session: session.scalar(query) is not None)

    async def change_task(self, task_id: int, values: Mapping[str, Any]) -> Task | None:
        """Set columns of a task; None when it is gone. A `revision` older than the row's leaves the row as it is."""

        def work(session: Session) -> Task | None:
            task = session.get(Task, task_id)
            if task is not None and values.get("revision", task.revision) >= task.revision:
                task.change(dict(values), time.time())
                note(session, tasks=[task_id])
            return task

        return await self.write(work)

    async def change_order(self, task_id: int, values: Mapping[str, Any]) -> Task | None:
        """Set what was ordered of a task, fields of a TaskOrder that have no column here; None when it is gone."""

        def work(session: Session) -> Task | None:
            task = session.get(Task, task_id)
            if task is not None:
                task.change({"spec": {**task.spec, **values}}, time.time())
                note(session, tasks=[task_id])
            return task

        return await self.write(work)

    async def remove_task(self, task_id: int) -> None:
        """Hide a task and free its name, until `forget_tasks`."""
        await self.change_task(task_id, {"removed": True, "name": None})
        await self.write(lambda session: _end_rights(session, task_id))

    async def forget_tasks(self, task_ids: Iterable[int]) -> None:
        """Delete the rows."""

        forgotten = list(task_ids)

        def work(session: Session) -> None:
            for task_id in forgotten:
                forget_task(session, task_id)
            note(session, tasks=forgotten)

        await self.write(work)


def forget_task(session: Session, task_id: int) -> None:
    """Delete a task, and the rights that others have to it."""
    if task := session.get(Task, task_id):
        session.delete(task)
    _end_rights(session, task_id)


def _end_rights(session: Session, task_id: int) -> None:
    """Nobody may use the task by a share or a link any more."""
    session.execute(delete(Share).where(Share.task_id == task_id))
    session.execute(delete(Token).where(Token.kind == "link", Token.task_id == task_id))


def _hear_tasks(session: Session, tasks: Iterable[Task], told: Told) -> Heard:
    heard = Heard([], [])
    for task in tasks:
        if task.removed and task.task_id not in told:
            session.delete(task)
        elif task.removed:
            heard.remove.append(task.task_id)
        elif (news := told.news_of(task)) and task.change(news, told.now):
            heard.changed.append(task.task_id)
    return heard


def gpus_in_use(session: Session, now: float, *, besides: int | None = None) -> dict[str, set[str]]:
    """The numbers of the GPUs, by their nodes, that tasks have, without that whose id is `besides`.

    `now` is in seconds since the epoch. A task that was removed has what it has until its node has ended it.
    """
    active = Task.status.in_(ACTIVE) | (Task.claimed_until > now)
    taken: dict[str, set[str]] = {}
    for task_id, node, spec in session.execute(select(Task.task_id, Task.node, Task.spec).where(active)):
        if task_id != besides and spec.get("gpu_ids"):
            taken.setdefault(node, set()).update(spec["gpu_ids"])
    return taken


def find_task(session: Session, reference: str) -> Task | None:
    """The task that a user means by an id or a name."""
    by_id = reference.isascii() and reference.isdigit() and len(reference) < 19
    condition = Task.task_id == int(reference) if by_id else Task.name == reference
    return session.scalars(select(Task).where(condition, Task.removed.is_(False))).one_or_none()


def no_such_task(reference: str) -> NotFoundError:
    """The error for a task that is not there."""
    return NotFoundError(f"There is no task {reference!r}; `kohakuriver vps list` shows the tasks that there are.")


def is_shared(url: str | None) -> bool:
    """Whether several processes can use the database at a URL together, and hear by it what each of them does."""
    return url is not None and not url.startswith("sqlite")


def _database(url: str) -> Database:
    """The database at a URL, not asked yet. Raises UsageError."""
    try:
        made = make_url(url)
        return _of_kind(made)
    except ArgumentError as error:
        raise _of_no_kind(_without_password(url)) from error
    except ModuleNotFoundError as error:
        raise UsageError(
            f"The database needs the Python package {error.name!r}; `pip install 'kohakuriver[postgresql]'` has it."
        ) from error


def _of_kind(url: URL) -> Database:
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        from kohakuriver.store.sqlite import SqliteFile

        return SqliteFile(url)
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        from kohakuriver.store.postgresql import PostgresServer

        return PostgresServer(url)
    raise _of_no_kind(url.render_as_string(hide_password=True))


def _of_no_kind(url: str) -> UsageError:
    return UsageError(
        f"The database {url!r} can't be used: it must be sqlite:///FILE or postgresql://USER:PASSWORD@MACHINE/NAME."
    )


def _look(session: Session) -> str | None:
    """Something that needs the database itself to answer."""
    return session.scalar(select(Meta.value).limit(1))


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def _reason(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split()).rstrip(".?")
