"""What the kinds of databases have in common for those who ask them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from sqlalchemy import Engine
from sqlalchemy.orm import Session

__all__ = ["HOSTS", "Database", "SilentError"]

HOSTS = 0x6B72
"""First key of PostgreSQL's advisory locks that say which hosts live; a host's number is the second."""

T = TypeVar("T")


class SilentError(Exception):
    """The database has not answered in time."""


class Database(Protocol):
    """A place that transactions are done in.

    `engine` is SQLAlchemy's. Other hosts may work on the same database where `shared`.
    """

    engine: Engine
    shared: bool

    async def prepare(self) -> None:
        """Make its tables those that this installation works with. Raises UsageError where that can't be."""

    async def run(self, work: Callable[[Session], T], *, write: bool, ahead: bool) -> T:
        """What `work` returns, called outside of the event loop's thread, in one transaction.

        One that does not `write` sees everything as of one moment. What is `ahead` doesn't wait for what is not.
        Raises what SQLAlchemy raises, or SilentError.
        """

    async def close(self) -> None:
        """Let go of every connection."""
