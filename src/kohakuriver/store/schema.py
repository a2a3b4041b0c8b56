"""The tables of a database, brought to what this installation works with: forwards, when a host starts.

Alembic has the steps (`migrations/`). It is imported only where there are steps to go: a database whose tables are
current is known by one look, and a new one gets its tables as the models have them, which is the same (a test says so).

A step keeps hosts of the version before at work, so that hosts on one database are upgraded one after the other; the
database says which versions that are.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Column, Connection, MetaData, String, Table, delete, func, insert, inspect, select

from kohakuriver.errors import UsageError
from kohakuriver.store.models import Base, Meta

__all__ = ["BEFORE", "GOOD_FOR", "HEAD", "PLACE", "bring_up", "is_current", "migrate"]

HEAD = "0003"
"""The last step of this installation."""

BEFORE: str | None = "0002"
"""The step whose hosts go on with these tables; None where there is none."""

PLACE = Path(__file__).parent / "migrations"

GOOD_FOR = "good_for"
"""In the table meta: the steps whose hosts can work with the tables as they are."""

_LOCK = 0x6B720001
"""Key of the advisory lock that a host has while it changes tables."""

_alembic = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))


def is_current(connection: Connection) -> bool:
    """Whether the tables are those that this installation makes."""
    return _step_of(connection) == HEAD


def bring_up(connection: Connection, place: Path = PLACE) -> None:
    """Bring the tables up to the last step in `place`, or make them; one host at a time does.

    Tables that a newer kohakuriver made stay as they are. Raises UsageError where this one can't work with them. All
    of it is one transaction, which the caller has begun.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    found = _step_of(connection)
    if found == HEAD:
        return
    if found is not None:
        _go_on(connection, found, place)
    elif inspect(connection).has_table(Meta.__tablename__):
        raise UsageError("The database has tables of a kohakuriver before its first release; use another database.")
    else:
        Base.metadata.create_all(connection)
        _alembic.create(connection)
        connection.execute(insert(_alembic).values(version_num=HEAD))
        _write_good_for(connection, HEAD, BEFORE)


def _go_on(connection: Connection, found: str, place: Path) -> None:
    """From the step `found`, which is another than ours."""
    good_for = connection.scalar(select(Meta.value).where(Meta.key == GOOD_FOR)) or ""
    if HEAD in good_for.split():
        return  # a host of the next version was here first
    migrate(connection, place)


def migrate(connection: Connection, place: Path = PLACE) -> None:
    """Go all steps that are left. Raises UsageError for tables that no step of ours leads to."""
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(place).replace("%", "%%"))
    config.attributes["connection"] = connection
    steps = ScriptDirectory.from_config(config)
    found = _step_of(connection)
    try:
        last = steps.get_revision("head")
        if found is not None:
            steps.get_revision(found)
    except CommandError as error:
        raise UsageError(
            f"The database has tables of version {found}, and this kohakuriver knows up to version {HEAD}; use the "
            "kohakuriver that made it, or another database."
        ) from error
    command.upgrade(config, "head")
    before = last.down_revision
    assert before is None or isinstance(before, str)  # one step follows another: there are no branches
    _write_good_for(connection, last.revision, before)


def _step_of(connection: Connection) -> str | None:
    """The last step that the tables have gone; None for a database without any."""
    if not inspect(connection).has_table(_alembic.name):
        return None
    return connection.scalar(select(_alembic.c.version_num))


def _write_good_for(connection: Connection, step: str, before: str | None) -> None:
    connection.execute(delete(Meta).where(Meta.key == GOOD_FOR))
    connection.execute(insert(Meta).values(key=GOOD_FOR, value=" ".join(filter(None, (before, step)))))
