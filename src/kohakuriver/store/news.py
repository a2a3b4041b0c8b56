"""What hosts on one database tell each other: that something has changed, never what it is now.

A transaction notes what it changes, and when it is committed PostgreSQL has every host hear of it. Who hears looks it
up. A host that missed something finds it by its own look, every few seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

__all__ = ["CHANNEL", "EVERYTHING", "News", "note", "tell"]

CHANNEL = "kohakuriver"
"""The name that PostgreSQL's LISTEN and NOTIFY know it by."""

LONGEST = 7900
"""Bytes of a notification; PostgreSQL takes fewer than 8000."""

_NOTED = "news"


@dataclass(frozen=True)
class News:
    """`rights` of somebody have ended; the `tasks` with these ids have changed, the `nodes` of these names come back.

    With `all` anything may have changed.
    """

    rights: bool = False
    tasks: frozenset[int] = frozenset()
    nodes: frozenset[str] = frozenset()
    all: bool = False

    def __or__(self, other: News) -> News:
        return News(
            self.rights or other.rights, self.tasks | other.tasks, self.nodes | other.nodes, self.all or other.all
        )

    def packed(self, host: int) -> str:
        """As the host of that number tells it."""
        text = json.dumps([host, self.rights, sorted(self.tasks), sorted(self.nodes), self.all])
        return text if len(text) <= LONGEST else EVERYTHING.packed(host)

    @classmethod
    def unpacked(cls, text: str) -> tuple[int, News]:
        """Who tells, and what. Of a host of another version, which tells it in another way: 0, and everything."""
        try:
            host, rights, tasks, nodes, everything = json.loads(text)
            return int(host), cls(bool(rights), frozenset(map(int, tasks)), frozenset(nodes), bool(everything))
        except (ValueError, TypeError):
            return 0, EVERYTHING


EVERYTHING = News(all=True)


def note(session: Session, *, rights: bool = False, tasks: Iterable[int] = (), nodes: Iterable[str] = ()) -> None:
    """The transaction under way changes this."""
    session.info[_NOTED] = session.info.get(_NOTED, News()) | News(rights, frozenset(tasks), frozenset(nodes))


def tell(session: Session, host: int) -> None:
    """Have all hosts hear what was noted, once this is committed."""
    noted: News | None = session.info.pop(_NOTED, None)
    if noted is not None and noted != News():
        session.execute(select(func.pg_notify(CHANNEL, noted.packed(host))))
