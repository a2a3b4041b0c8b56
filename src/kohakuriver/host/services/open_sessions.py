"""The sessions that are open on this host now, and how fast each is: for those who may know.

A rate is that since somebody last looked, and of at least half a second. What nobody looks at is counted nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from kohakuriver.host.schemas import SessionView, iso_time
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.grants import Grants, UnderWay

__all__ = ["OpenSession", "OpenSessions"]

SHORTEST_SECONDS = 0.5


@dataclass(frozen=True)
class OpenSession:
    """One of them; `rates` are bytes a second, to the container and to the user, as of `looked_at` (monotonic)."""

    session: UnderWay
    began_at: float
    looked_at: float
    passed: tuple[int, int]
    rates: tuple[int, int]

    @property
    def id(self) -> str:
        """What it is called in the audit log."""
        return str(self.session.about["session"])

    @property
    def task_id(self) -> int:
        """The task that it goes to."""
        task_id: int = self.session.about["task"]
        return task_id

    def may_be_seen_by(self, caller: Caller) -> bool:
        """Whether the caller may know of it: an admin, whose it is, and whose the task is."""
        return caller.is_admin or caller.name in (self.session.about["user"], self.session.owner)

    def view(self, caller: Caller) -> SessionView:
        """As the caller may see it: where other users come from is told to admins alone."""
        about = self.session.about
        open_to = caller.is_admin or caller.name == about["user"]
        return SessionView(
            id=self.id,
            user=about["user"],
            task_id=self.task_id,
            task=about["name"],
            node=about["node"],
            proto=about.get("proto") or "?",
            port=about.get("port"),
            via=about.get("via"),
            source=about.get("from") if open_to else None,
            began_at=iso_time(self.began_at),
            bytes_to_container=self.session.passed[0],
            bytes_to_user=self.session.passed[1],
            to_container_per_second=self.rates[0],
            to_user_per_second=self.rates[1],
        )


class OpenSessions:
    """Looks at all of them at once, for however many want to know."""

    def __init__(self, grants: Grants, *, clock: Callable[[], float] = time.time) -> None:
        self._grants = grants
        self._clock = clock
        self._seen: dict[str, OpenSession] = {}

    def look(self) -> list[OpenSession]:
        """All that are open, the newest first."""
        before, now = self._seen, time.monotonic()
        found = [self._measured(session, before, now) for session in self._grants.under_way()]
        self._seen = {session.id: session for session in found}
        return sorted(found, key=lambda session: session.session.seconds)

    def of(self, caller: Caller) -> list[SessionView]:
        """Those that the caller may know of, the newest first."""
        return [session.view(caller) for session in self.look() if session.may_be_seen_by(caller)]

    def _measured(self, session: UnderWay, seen: dict[str, OpenSession], now: float) -> OpenSession:
        before = seen.get(session.about["session"])
        if before is None:
            began_at = self._clock() - session.seconds
            before = OpenSession(session, began_at, now - session.seconds, (0, 0), (0, 0))
        passed = now - before.looked_at
        if passed < SHORTEST_SECONDS:
            return OpenSession(session, before.began_at, before.looked_at, before.passed, before.rates)
        to_container, to_user = (
            round((new - old) / passed) for new, old in zip(session.passed, before.passed, strict=True)
        )
        return OpenSession(session, before.began_at, now, session.passed, (to_container, to_user))
