"""What Alembic runs for every command of its own: on the connection that it was given."""

from __future__ import annotations

from alembic import context

from kohakuriver.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes a column by making its table anew
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
