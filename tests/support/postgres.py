"""A real PostgreSQL server, and databases on it that cost little to make."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import PATIENCE, eventually

TEMPLATE = "tables"


class Postgres:
    """A server of PostgreSQL on a loopback port of its own. As root it is run by `nobody`: it refuses to be root's."""

    def __init__(self, directory: Path) -> None:
        if os.environ.get("CI") != "true":
            pytest.importorskip("psycopg")
        places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda place: int(place.parent.name))
        if not places and os.environ.get("CI") != "true":
            pytest.skip("PostgreSQL is not installed: run scripts/system-packages test")
        self._programs = places[-1]
        self._as_owner = ["setpriv", "--reuid=nobody", "--clear-groups"] if os.geteuid() == 0 else []
        self._data = directory / "data"
        self._log = directory / "postgres.log"
        self._data.mkdir(mode=0o700)
        if self._as_owner:
            shutil.chown(directory, "nobody")
            shutil.chown(self._data, "nobody")
        self._run("initdb", "-A", "trust", "-U", "river", "-N", "--no-instructions", "-D", str(self._data))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self._has_template = False
        self._free: list[str] = []
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run([*self._as_owner, self._programs / program, *arguments], check=True, capture_output=True)

    @property
    def pid(self) -> int:
        """Of the server that runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        """Of the database that every server has."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://river@127.0.0.1:{self.port}/{database}"

    @contextlib.contextmanager
    def lent_database(self) -> Iterator[Callable[[], str]]:
        """Makes databases as `new_database` does, which are emptied for the next test at the end of the block.

        A new one takes a tenth of a second, and 8 MB of disk.
        """
        lent = []

        def lend() -> str:
            lent.append(self._free.pop() if self._free else self.new_database())
            return lent[-1]

        yield lend
        for url in lent:
            self._empty(url)
            self._free.append(url)

    def _empty(self, url: str) -> None:
        """Delete what a test has left, connections that it did not close too."""
        from kohakuriver.store.models import Base

        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        tables = [table.name for table in reversed(Base.metadata.sorted_tables) if table.name != "meta"]
        deletes = "; ".join(f'DELETE FROM "{name}"' for name in tables)
        self.ask(f"{others} AND pid <> pg_backend_pid(); {deletes}; DELETE FROM meta WHERE key <> 'good_for'", url)

    def new_database(self) -> str:
        """The URL of a database with our tables and nothing in them."""
        if not self._has_template:
            self.ask(f"CREATE DATABASE {TEMPLATE}")
            self._make_tables()
            self._has_template = True
        return self.url_of(self._made(f"TEMPLATE {TEMPLATE}"))

    def empty_database(self) -> str:
        """The URL of a database without tables."""
        return self.url_of(self._made(""))

    def _made(self, how: str) -> str:
        name = f"of_test_{next(self._numbers)}"
        self.ask(f"CREATE DATABASE {name} {how}")
        return name

    def _make_tables(self) -> None:
        from sqlalchemy import create_engine

        from kohakuriver.store import schema

        engine = create_engine(self.url_of(TEMPLATE).replace("://", "+psycopg://"))
        with engine.begin() as connection:
            schema.bring_up(connection)
        engine.dispose()

    def ask(self, question: str, url: str | None = None) -> list[Any]:
        """The rows that answer a question to a database, by default to that which every server has."""
        import psycopg

        with psycopg.connect(url or self.url, autocommit=True) as connection:
            cursor = connection.execute(question.encode())
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        command = [*self._as_owner, str(self._programs / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        options += ["-c", "max_connections=300"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(self._is_ready)

    def _is_ready(self) -> bool:
        said = self._log.read_text()
        assert self._process is not None
        assert self._process.poll() is None, said
        return "database system is ready to accept connections" in said

    def end(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stop it; SIGINT is a fast shutdown, which waits for no client, SIGQUIT leaves things as they are."""
        process, self._process = self._process, None
        if process is not None:
            self._log.write_text("")
            with process:
                process.send_signal(number)
                process.wait(PATIENCE)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Meanwhile no process of the server runs: the kernel takes connections for it, and nothing is answered."""
        import psutil

        assert self._process is not None
        server = psutil.Process(self._process.pid)
        all_of_it = [server, *server.children(recursive=True)]
        for process in all_of_it:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in all_of_it:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()


@contextlib.contextmanager
def a_server() -> Iterator[Postgres]:
    """A server, until the block ends."""
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are root's alone, and made so again by each start
        server = Postgres(Path(directory))
        try:
            yield server
        finally:
            server.end(signal.SIGQUIT)  # what it has is thrown away
