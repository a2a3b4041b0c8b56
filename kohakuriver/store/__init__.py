"""What a host remembers: nodes, tasks and tokens, in SQLite or PostgreSQL."""

from __future__ import annotations

from kohakuriver.store.database import Store, sqlite_url
from kohakuriver.store.models import Node, Task, Token

__all__ = ["Node", "Store", "Task", "Token", "sqlite_url"]
