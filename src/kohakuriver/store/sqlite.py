"""A SQLite file: a thread asks it, because that blocks."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session, sessionmaker

from kohakuriver.errors import KohakuRiverError
from kohakuriver.store import schema

__all__ = ["SqliteFile"]

T = TypeVar("T")

_BEGIN = "kohakuriver_begin"


class SqliteFile:
    """See `Database`. SQLite has one writer at a time: one thread queues what would otherwise wait for locks."""

    shared = False

    def __init__(self, url: URL) -> None:
        self.engine = create_engine(url)
        _make_private(url.database)
        event.listen(self.engine, "connect", _set_up)
        event.listen(self.engine, "begin", _begin)
        self._reader = self.engine.execution_options(**{_BEGIN: "BEGIN"})
        self._writing = sessionmaker(self.engine, expire_on_commit=False)
        self._reading = sessionmaker(self._reader, expire_on_commit=False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        # A database in memory is one connection's alone.
        own = bool(url.database and url.database != ":memory:")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="store-nodes") if own else self._thread

    async def prepare(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, _prepare, self.engine, self._reader)

    async def run(self, work: Callable[[Session], T], *, write: bool, ahead: bool) -> T:
        thread = self._ahead if ahead else self._thread
        sessions = self._writing if write else self._reading
        return await asyncio.get_running_loop().run_in_executor(thread, partial(_transaction, sessions, work))

    async def close(self) -> None:
        for thread in (self._thread, self._ahead):
            await asyncio.get_running_loop().run_in_executor(None, thread.shutdown)
        self.engine.dispose()


def _transaction(sessions: sessionmaker[Session], work: Callable[[Session], T]) -> T:
    with sessions.begin() as session:
        return work(session)


def _prepare(engine: Engine, reader: Engine) -> None:
    with reader.begin() as connection:
        if schema.is_current(connection):
            return
    with engine.connect() as connection:
        # A step may make a table anew, and the old one goes: that must not take with it what refers to its rows.
        driver: Any = connection.connection.driver_connection
        driver.execute("PRAGMA foreign_keys=OFF")
        try:
            with connection.begin():
                schema.bring_up(connection)
                if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").all():
                    raise KohakuRiverError(f"The database's tables can't be brought up to date: {broken[0]}.")
        finally:
            driver.execute("PRAGMA foreign_keys=ON")


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


def _begin(connection: Connection) -> None:
    # Who is going to write waits for the lock first. To ask for it after reading would fail, without a wait, where
    # somebody else wrote in between.
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN IMMEDIATE"))


def _set_up(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver would begin no transaction before the first change
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
