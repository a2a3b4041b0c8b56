"""Which kind of database a test runs on. `tests/unit/conftest.py` runs some on each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

KINDS = ("sqlite", "postgresql")

_made: Callable[[], str] | None = None
_known: dict[Path, str] = {}


def use(make: Callable[[], str] | None) -> None:
    """From now on new databases are made by `make`, None for SQLite."""
    global _made
    _made = make
    _known.clear()


def database_url(directory: Path) -> str:
    """Of a database that belongs to a directory: a file in it, or a database of its own."""
    if _made is None:
        return f"sqlite:///{directory / 'host.db'}"
    if directory not in _known:
        _known[directory] = _made()
    return _known[directory]
