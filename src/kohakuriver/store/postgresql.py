"""A PostgreSQL server that several hosts may share.

An event loop in a thread of its own asks it: rows become objects there, and no answer that is large, late or never
comes holds up what users send. A question has a time by which it must be answered; then the connection that it is on
is hung up, because a server that is stopped answers no request to cancel either.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import psycopg
import structlog
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from kohakuriver.store import schema
from kohakuriver.store.news import CHANNEL, EVERYTHING, News, tell
from kohakuriver.store.transactions import HOSTS, SilentError

__all__ = ["ANSWER_SECONDS", "CONNECTIONS", "Line", "PostgresServer"]

CONNECTIONS = 8
"""How many a host has for what users ask. One more is for nodes, and one to hear of other hosts."""

ANSWER_SECONDS = 5.0
"""How long a transaction may take, and how long a connection may take to be made."""

LOOK_SECONDS = 2.0
"""How often a host looks whether its line is still there, and whether it is the one that cares for all."""

AGAIN_SECONDS = 0.5
"""How long after it lost its line a host tries to have another."""

_CARE = 0x6B73
"""First key of the lock of the host that cares for all; the second is 0."""

_AGAIN = {"40001", "40P01"}
"""Codes of PostgreSQL for a transaction that came into the way of another: done again, it gets through."""

_DEFAULTS = {
    "connect_timeout": int(ANSWER_SECONDS),
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # ms
    "application_name": "kohakuriver",
    # A host that stands still must not keep others from rows; one that is cut off must not count as alive for long.
    "options": "-c idle_in_transaction_session_timeout=30s -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 "
    "-c tcp_keepalives_count=3",
}
"""How a connection is made, but for what the database's URL says itself."""

LAST_ANSWER_SECONDS = 1.0
"""How long what is under way may take when everything ends."""

T = TypeVar("T")

log = structlog.get_logger("kohakuriver.store")

Connection = psycopg.AsyncConnection[Any]


class PostgresServer:
    """See `Database`. `host` is the number of this host, which no other one that lives has."""

    shared = True

    def __init__(self, url: URL) -> None:
        self.host = 1 + secrets.randbelow(2**31 - 1)
        more = {name: value for name, value in _DEFAULTS.items() if name not in url.query}
        self._engine = create_async_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=CONNECTIONS + 1,
            max_overflow=0,
            connect_args=more,
        )
        self.engine = self._engine.sync_engine
        self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        _, arguments = self.engine.dialect.create_connect_args(url)
        self.line = Line({**arguments, **more}, self.host)
        self._few = asyncio.Semaphore(CONNECTIONS)
        self._open: dict[asyncio.Task[Any], Connection] = {}
        self._late: set[asyncio.Task[Any]] = set()  # nobody waits for these any more
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="store", daemon=True)
        self._thread.start()

    async def prepare(self) -> None:
        await self._in_thread(self._prepare())

    async def _prepare(self) -> None:
        async with self._reader.connect() as connection:
            if await connection.run_sync(schema.is_current):
                return
        async with self._engine.begin() as connection:
            await connection.run_sync(schema.bring_up)

    async def run(self, work: Callable[[Session], T], *, write: bool, ahead: bool) -> T:
        return await self._in_thread(self._in_time(work, write, ahead))

    async def _in_thread(self, question: Coroutine[Any, Any, T]) -> T:
        asked = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(question, self._loop))
        asked.add_done_callback(_heard)
        return await asyncio.shield(asked)  # who asked may go: what was begun is done

    async def _in_time(self, work: Callable[[Session], T], write: bool, ahead: bool) -> T:
        asked = asyncio.ensure_future(self._until_through(work, write, ahead))
        asked.add_done_callback(_heard)
        done, _ = await asyncio.wait({asked}, timeout=ANSWER_SECONDS)
        if done:
            return asked.result()
        self._late.add(asked)
        asked.add_done_callback(self._late.discard)
        if asked in self._open:
            hang_up(self._open[asked])
        else:
            asked.cancel()
        raise SilentError(f"does not answer within {ANSWER_SECONDS:g} s")

    async def _until_through(self, work: Callable[[Session], T], write: bool, ahead: bool) -> T:
        """The answer. A connection may have ended since it was used last; then a new one is asked, once."""
        async with contextlib.nullcontext() if ahead else self._few:
            try:
                return await self._once(work, write)
            except DBAPIError as error:
                if asyncio.current_task() in self._late:
                    raise
                if not error.connection_invalidated and getattr(error.orig, "sqlstate", None) not in _AGAIN:
                    raise
            return await self._once(work, write)

    async def _once(self, work: Callable[[Session], T], write: bool) -> T:
        task = asyncio.current_task()
        assert task is not None
        async with AsyncSession(self._engine if write else self._reader, expire_on_commit=False) as session:
            raw = await (await session.connection()).get_raw_connection()
            driver: Any = raw.driver_connection
            self._open[task] = driver
            try:
                answer = await session.run_sync(work)
                if write:
                    await session.run_sync(tell, self.host)
                await _commit(session)
                return answer
            finally:
                del self._open[task]

    async def close(self) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._in_thread(self._end()), ANSWER_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
            self._loop.close()

    async def _end(self) -> None:
        """Let go of every connection; what is asked just now has a moment to be through with."""
        if under_way := set(self._open):
            await asyncio.wait(under_way, timeout=LAST_ANSWER_SECONDS)
        for connection in self._open.values():
            hang_up(connection)
        await self._engine.dispose()


async def _commit(session: AsyncSession) -> None:
    """Commit. Where the connection ends meanwhile nobody knows whether that happened: it is not done again."""
    try:
        await session.commit()
    except DBAPIError as error:
        error.connection_invalidated = False
        raise


class Line:
    """A host's own connection, by which it hears of others and they know that it lives.

    PostgreSQL ends the locks of a connection with it: that a host died is known at once, however it died, and the next
    one cares for all. `leads` says that this one does.
    """

    def __init__(self, arguments: dict[str, Any], host: int) -> None:
        self._arguments = arguments
        self._host = host
        self.leads = False

    async def run(self, heard: Callable[[News], None]) -> None:
        """Have `heard` called with what other hosts tell, until cancelled."""
        trouble = ""
        while True:
            try:
                await self._listen(heard)
            except (psycopg.Error, OSError) as error:
                reason = " ".join(str(error).split())
                if reason != trouble:
                    log.warning("other hosts are not heard, so changes come seconds late", reason=reason)
                trouble = reason
            finally:
                self.leads = False
            await asyncio.sleep(AGAIN_SECONDS)

    async def _listen(self, heard: Callable[[News], None]) -> None:
        connection = await psycopg.AsyncConnection.connect(**self._arguments, autocommit=True)
        try:
            await _ask(connection, "SELECT pg_advisory_lock(%s, %s)", HOSTS, self._host)
            await _ask(connection, f"LISTEN {CHANNEL}")
            heard(EVERYTHING)  # something may have been told while nobody heard it
            while True:
                if self.leads:
                    await _ask(connection, "SELECT 1")
                else:
                    self.leads = await _ask(connection, "SELECT pg_try_advisory_lock(%s, 0)", _CARE)
                async for notification in connection.notifies(timeout=LOOK_SECONDS):
                    host, news = News.unpacked(notification.payload)
                    if host != self._host:
                        heard(news)
        finally:
            hang_up(connection)
            await connection.close()


async def _ask(connection: Connection, question: str, *values: int) -> Any:
    """The one value that is the answer, None where there is none. Raises OperationalError where it does not come."""
    asked = asyncio.ensure_future(connection.execute(question.encode(), values or None))
    try:
        await asyncio.wait({asked}, timeout=ANSWER_SECONDS)
    finally:
        if not asked.done():
            hang_up(connection)
    cursor = await asked
    row = await cursor.fetchone() if cursor.description else None
    return None if row is None else row[0]


def hang_up(connection: Connection) -> None:
    """End a connection at once, whatever is under way on it: who waits for an answer then gets an error."""
    with contextlib.suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.pgconn.socket)) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def _heard(question: asyncio.Future[Any]) -> None:
    """Who asked may be gone: that a question failed is no news then."""
    if not question.cancelled():
        question.exception()
