"""The database behind a host: opened once, asked from the event loop, answered in a thread.

Rows come back detached and complete: reading one never touches the database, changing one changes nothing there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotFoundError, UsageError
from kohakuriver.store.models import ACTIVE, Base, Meta, Node, Share, Task, TaskKey, Token

__all__ = ["SCHEMA_VERSION", "Store", "ahead_of_users", "gpus_in_use", "sqlite_url"]

SCHEMA_VERSION = 11
"""Counts up with every change of the tables. An older database is brought up to it, a newer one is refused."""

_APPS_KEY = "apps_key"

CHECK_SECONDS = 2.0
"""How soon the database has to answer when it is asked whether it does."""

_POSTGRESQL_THREADS = 4

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

    Every method may raise KohakuRiverError when the database fails.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._question: asyncio.Future[int] | None = None
        self._writing = sessionmaker(engine, expire_on_commit=False)
        self._reading = sessionmaker(_for_reading(engine), expire_on_commit=False)
        # SQLite has one writer at a time: one thread queues what would otherwise wait for locks.
        threads = 1 if engine.dialect.name == "sqlite" else _POSTGRESQL_THREADS
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="store")
        # A database in memory is one connection's alone.
        own = engine.dialect.name != "sqlite" or bool(engine.url.database and engine.url.database != ":memory:")
        self._node_thread = ThreadPoolExecutor(1, thread_name_prefix="store-nodes") if own else self._threads

    @classmethod
    async def open(cls, url: str) -> Store:
        """The store at a database URL, its tables made when they are not there.

        Raises UsageError when the URL is invalid or names a database that this installation has no driver for.
        """
        try:
            _check_driver(make_url(url))
            engine = create_engine(make_url(url), pool_pre_ping=not url.startswith("sqlite"))
        except (ArgumentError, NoSuchModuleError) as error:
            raise UsageError(f"The database {_without_password(url)!r} can't be used: {error}.") from error
        except ModuleNotFoundError as error:
            raise UsageError(f"The database needs the Python package {error.name!r}; install it first.") from error
        if engine.dialect.name == "sqlite":
            _make_private(engine.url.database)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        store = cls(engine)
        try:
            await store._run_in_thread(store._create_tables)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Let go of every connection to the database."""
        for threads in (self._threads, self._node_thread):
            await asyncio.get_running_loop().run_in_executor(None, threads.shutdown)
        self._engine.dispose()

    def _create_tables(self) -> None:
        with self._engine.begin() as connection:
            found = _version(connection) if inspect(connection).has_table(Meta.__tablename__) else 0
            if found > SCHEMA_VERSION:
                raise UsageError(
                    f"The database has tables of version {found}, and this kohakuriver knows up to version "
                    f"{SCHEMA_VERSION}; use the kohakuriver that made it, or another database."
                )
            if found == SCHEMA_VERSION:
                return
            Base.metadata.create_all(connection)
            if found:
                _upgrade(connection, found)
        with self._writing.begin() as session:
            session.merge(Meta(key="schema", value=str(SCHEMA_VERSION)))
            if session.get(Meta, _APPS_KEY) is None:
                session.add(Meta(key=_APPS_KEY, value=secrets.token_hex(32)))

    async def _run_in_thread(self, work: Callable[[], T]) -> T:
        try:
            threads = self._node_thread if _of_node.get() else self._threads
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except IntegrityError:
            raise  # a clash with a constraint: the caller knows which, and what to say
        except DataError as error:  # PostgreSQL holds no text with a NUL, say, nor looks for one
            raise UsageError(f"The database can't hold what was given: {_reason(error)}.") from error
        except DBAPIError as error:
            if isinstance(error, OperationalError) and self._engine.dialect.name != "sqlite":
                log.error("the database is down", reason=_reason(error))
                raise HostUnreachableError(
                    "The host's database is down; its administrator finds the reason in the host's log.",
                    code="database_down",
                    status=503,
                ) from error
            raise KohakuRiverError(f"The database failed: {_reason(error)}.", code="database") from error

    async def read(self, work: Callable[[Session], T]) -> T:
        """What `work` returns, called in a thread with a session that changes nothing.

        All that it reads is from one moment, whatever other hosts on the same database write meanwhile.
        """
        return await self._run_in_thread(partial(_transaction, self._reading, work))

    async def write(self, work: Callable[[Session], T]) -> T:
        """What `work` returns, called in a thread with a session, in one transaction."""
        return await self._run_in_thread(partial(_transaction, self._writing, work))

    async def check(self) -> None:
        """Raises HostUnreachableError "database_down" (503) unless the database answers soon.

        However many ask meanwhile, one question is under way.
        """
        question = self._question
        if question is None or question.done():
            question = self._question = asyncio.ensure_future(self.read(_version))
        await asyncio.wait({question}, timeout=CHECK_SECONDS)
        error = question.exception() if question.done() else None
        if not question.done():
            why = f"does not answer within {CHECK_SECONDS:g} s; see whether it is overloaded or locked"
            raise HostUnreachableError(f"The host's database {why}.", code="database_down", status=503)
        if error is not None:
            text = error.message if isinstance(error, KohakuRiverError) else "The host's database can't be read."
            raise HostUnreachableError(text, code="database_down", status=503) from error

    # Nodes

    async def apps_key(self) -> bytes:
        """What all hosts of this database sign with what they give browsers at the addresses of apps."""
        found = await self.read(lambda session: session.get_one(Meta, _APPS_KEY))
        return bytes.fromhex(found.value)

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
                    _forget_task(session, task.task_id)
                session.flush()
                session.execute(delete(Node).where(Node.name == name))
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
            return _hear_tasks(session, tasks, Told(reports, others, quiet, node.last_seen))

        return await self.write(work)

    async def active_tasks_by_node(self) -> dict[str, int]:
        """How many tasks each node is starting or running; a node with none is not in it."""
        query = (
            select(Task.node, func.count()).where(Task.removed.is_(False), Task.status.in_(ACTIVE)).group_by(Task.node)
        )
        return await self.read(lambda session: {row[0]: row[1] for row in session.execute(query)})

    async def tasks_by_status(self) -> dict[str, int]:
        """How many tasks have each status; one that none has is not in it."""
        query = select(Task.status, func.count()).where(Task.removed.is_(False)).group_by(Task.status)
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
            return task

        return await self.write(work)

    async def remove_task(self, task_id: int) -> None:
        """Hide a task and free its name, until `forget_tasks`."""
        await self.change_task(task_id, {"removed": True, "name": None})
        await self.write(lambda session: session.execute(delete(Share).where(Share.task_id == task_id)))

    async def forget_tasks(self, task_ids: Iterable[int]) -> None:
        """Delete the rows."""

        def work(session: Session) -> None:
            for task_id in task_ids:
                _forget_task(session, task_id)

        await self.write(work)


def _transaction(sessions: sessionmaker[Session], work: Callable[[Session], T]) -> T:
    with sessions.begin() as session:
        return work(session)


def _forget_task(session: Session, task_id: int) -> None:
    if task := session.get(Task, task_id):
        session.delete(task)
    session.execute(delete(Share).where(Share.task_id == task_id))


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


def _check_driver(url: URL) -> None:
    dialect = url.get_dialect()
    if dialect.is_async:
        raise UsageError(
            f"The database driver {dialect.driver} is for asynchronous programs; write {dialect.name}:// without it."
        )


def _make_private(path: str | None) -> None:
    """Let only this user read the file at `path`, and what SQLite has beside it: the nodes' ticket keys are in there.

    SQLite itself makes files as the umask has it, and those beside the first like that.
    """
    if not path or path == ":memory:" or path.startswith("file:"):
        return
    # Only a new file is opened: to close one that is there would let go of all locks that this process has on it.
    with contextlib.suppress(OSError):  # SQLite says what is wrong with it
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    for name in (path, f"{path}-wal", f"{path}-shm"):
        with contextlib.suppress(OSError):
            Path(name).chmod(0o600)


def _for_reading(engine: Engine) -> Engine:
    """The same database and connections, in transactions that see it as it was when they began."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(**{_BEGIN: "BEGIN"})
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


_BEGIN = "kohakuriver_begin"


def _begin_sqlite(connection: Connection) -> None:
    # Who is going to write waits for the lock first. To ask for it after reading would fail, without a wait, where
    # somebody else wrote in between.
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN IMMEDIATE"))


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver would begin no transaction before the first change
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _version(connection: Connection | Session) -> int:
    """Of which version the tables are that the database has."""
    found = connection.scalar(select(Meta.value).where(Meta.key == "schema"))
    return int(found) if found is not None else 0


def _upgrade(connection: Connection, found: int) -> None:
    """Bring tables of the version `found` up to ours: columns that are missing, then what their rows should say."""
    inspector = inspect(connection)
    for table in Base.metadata.sorted_tables:
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                _add_column(connection, column)
    if found < 3:
        # The one node token of version 1 was good for every node.
        connection.execute(update(Token).where(Token.kind == "node").values(name="*"))
    if found < 8:
        for task_id, ssh_keys in connection.execute(select(Task.task_id, Task.ssh_keys)).all():
            for key in Task(task_id=task_id, ssh_keys=ssh_keys or []).looked_up():
                connection.execute(insert(TaskKey).values(digest=key.digest, task_id=task_id))


def _add_column(connection: Connection, column: Column[Any]) -> None:
    """Add a column. Rows that are there get the default that new ones get; without one the column may be empty."""
    quote = connection.dialect.identifier_preparer.quote
    kind = column.type.compile(connection.dialect)
    connection.execute(text(f"ALTER TABLE {quote(column.table.name)} ADD COLUMN {quote(column.name)} {kind}"))
    default: Any = column.default
    if default is not None:
        value = default.arg(None) if default.is_callable else default.arg
        connection.execute(update(column.table).values({column: value}))


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def _reason(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split()).rstrip(".?")
