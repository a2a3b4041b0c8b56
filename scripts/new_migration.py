"""scripts/new_migration.py NUMBER WHAT…: write the next step of the tables, from what the models have that steps lack.

Look through it, then set HEAD and BEFORE in src/kohakuriver/store/schema.py. CONTRIBUTING.md says what a step may do.
"""

from __future__ import annotations

import sys

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

from kohakuriver.store.schema import PLACE


def main(number: str, *what: str) -> None:
    """Compare the models with tables in memory that have gone all steps so far, and write down the difference."""
    config = Config()
    config.set_main_option("script_location", str(PLACE).replace("%", "%%"))
    config.set_main_option("file_template", "r%%(rev)s_%%(slug)s")
    with create_engine("sqlite://").begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        command.revision(config, " ".join(what), autogenerate=True, rev_id=number)


if __name__ == "__main__":
    main(*sys.argv[1:])
