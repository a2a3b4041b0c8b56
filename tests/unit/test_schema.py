"""The tables and the steps by which a database comes to them, on each kind of database."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect, text

from kohakuriver.errors import UsageError
from kohakuriver.store import Store, schema
from kohakuriver.store.models import Base
from tests.support import databases
from tests.support.databases import database_url
from tests.support.postgres import Postgres

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without tables, of the kind that is tested."""
    if databases.database_url(tmp_path).startswith("sqlite"):
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.empty_database()


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def described(connection: Connection) -> dict[str, Any]:
    """All that there is of tables, in an order of its own."""
    look = inspect(connection)
    return {
        table: {
            "columns": [(c["name"], repr(c["type"]), c["nullable"], c["default"]) for c in look.get_columns(table)],
            "key": look.get_pk_constraint(table)["constrained_columns"],
            "foreign": sorted(map(repr, look.get_foreign_keys(table))),
            "unique": sorted(str(each["column_names"]) for each in look.get_unique_constraints(table)),
            "indexes": sorted(repr((each["name"], each["column_names"])) for each in look.get_indexes(table)),
        }
        for table in sorted(look.get_table_names())
    }


def test_a_new_database_has_the_very_tables_that_all_steps_together_make(tmp_path: Path, empty: str) -> None:
    with connected(empty) as connection:
        schema.migrate(connection)
        by_steps = described(connection)
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        assert schema.is_current(connection)
    asyncio.run(_opened(database_url(tmp_path)))
    with connected(database_url(tmp_path)) as connection:
        assert described(connection) == by_steps
        assert connection.execute(text("SELECT * FROM meta")).all() == [("good_for", f"{schema.BEFORE} {schema.HEAD}")]


async def _opened(url: str) -> None:
    await (await Store.open(url)).close()


@pytest.mark.sqlite_only
def test_the_last_step_and_the_one_before_are_those_that_the_code_names() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.PLACE))
    steps = ScriptDirectory.from_config(config)
    (head,) = steps.get_heads()
    assert (head, steps.get_revision(head).down_revision) == (schema.HEAD, schema.BEFORE)


LATER = """
import sqlalchemy as sa
from alembic import op
revision = "{name}"
down_revision = "{before}"

def upgrade():
    with op.batch_alter_table("nodes") as table:
        table.add_column(sa.Column("room_{name}", sa.String(16), nullable=False, server_default="attic"))
        table.alter_column("version", type_=sa.String(80))
"""


def later_steps(directory: Path, *names: str) -> Path:
    """The steps of a kohakuriver that is to come, which has some more."""
    place = directory / "later"
    shutil.copytree(schema.PLACE, place, ignore=shutil.ignore_patterns("__pycache__"))
    before = schema.HEAD
    for name in names:
        (place / "versions" / f"{name}.py").write_text(LATER.format(name=name, before=before))
        before = name
    return place


async def _with_a_node(url: str) -> None:
    store = await Store.open(url)
    await store.put_node("n1", {"url": "http://n:1", "last_seen": 1.0}, b"key")
    await store.close()


async def _works(url: str) -> None:
    store = await Store.open(url)
    try:
        await store.put_node("n2", {"url": "http://n:2", "last_seen": 1.0}, b"key")
        assert [(node.name, node.url) for node in await store.nodes()] == [("n1", "http://n:1"), ("n2", "http://n:2")]
    finally:
        await store.close()


def test_a_host_goes_on_beside_tables_of_the_next_version_and_refuses_those_of_one_after_that(
    run: Run, tmp_path: Path, empty: str
) -> None:
    url = empty
    run(_with_a_node(url))
    with connected(url) as connection:
        schema.migrate(connection, later_steps(tmp_path / "next", "0002_test"))
        assert [row[0] for row in connection.execute(text("SELECT room_0002_test FROM nodes"))] == ["attic"]
    run(_works(url))
    with connected(url) as connection:
        schema.migrate(connection, later_steps(tmp_path / "after", "0002_test", "0003_test"))
    with pytest.raises(UsageError, match=r"tables of version 0003_test, and this kohakuriver knows up to version \d+;"):
        run(_works(url))


@pytest.mark.sqlite_only
def test_a_table_that_is_made_anew_keeps_what_refers_to_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's way of changing a column: the old table is dropped, and with it went all rows that refer to it."""
    url = database_url(tmp_path)
    run(_with_a_node(url))
    task = "INSERT INTO task_keys VALUES ('d', 1)"
    columns = "task_id, node, backend, container, owner, creator, status, tunnel, ssh_keys, spec, claimed_until, "
    with closing(sqlite3.connect(tmp_path / "host.db")) as file, file:
        file.execute(
            f"INSERT INTO tasks ({columns} adopted, revision, removed, created_at, changed_at) "
            "VALUES (1, 'n1', 'process', 'c', 'ann', 'ann', 'running', 0, '[]', '{}', 0, 0, 0, 0, 0, 0)"
        )
        file.execute(task)
    monkeypatch.setattr(schema.bring_up, "__defaults__", (later_steps(tmp_path / "next", "0002_test"),))
    monkeypatch.setattr(schema, "HEAD", "0002_test")
    run(_opened(url))
    with closing(sqlite3.connect(tmp_path / "host.db")) as file:
        assert file.execute("SELECT node, digest, room_0002_test FROM tasks, task_keys, nodes").fetchall() == [
            ("n1", "d", "attic")
        ]


def test_hosts_that_start_at_the_same_time_make_the_tables_once(run: Run, empty: str) -> None:
    async def check() -> None:
        stores = await asyncio.gather(*(Store.open(empty) for _ in range(4)))
        assert await stores[0].nodes() == []
        for store in stores:
            await store.close()

    run(check())


@pytest.mark.sqlite_only
def test_tables_of_before_the_first_release_are_refused_rather_than_misread(run: Run, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "host.db")) as file, file:
        file.execute("CREATE TABLE meta (key VARCHAR, value TEXT)")
    with pytest.raises(UsageError, match="before its first release; use another database"):
        run(_opened(database_url(tmp_path)))


@pytest.mark.sqlite_only
def test_a_host_whose_tables_are_current_or_new_never_loads_alembic(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\nfrom kohakuriver.store import Store\n"
        f"async def main():\n    await (await Store.open({database_url(tmp_path)!r})).close()\n"
        "for _ in range(2):\n    asyncio.run(main())\nsys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
