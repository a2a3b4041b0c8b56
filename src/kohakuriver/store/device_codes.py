"""Command lines that wait for a token, which somebody in a browser may let them have.

In shape this is RFC 8628: the command line has a long code, and shows its user a short one to type into a page.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from kohakuriver.errors import UnauthenticatedError, UnavailableError
from kohakuriver.store.accounts import Accounts, check_good, digest
from kohakuriver.store.database import Store
from kohakuriver.store.identities import identity_behind
from kohakuriver.store.models import DeviceCode, Token

__all__ = ["CODE_SECONDS", "DeviceCodes", "Given", "Waiting"]

CODE_SECONDS = 600.0
"""How long both codes are good."""

MOST_OF_ONE = 20
"""Command lines of one address that wait at a time."""

MOST = 1000
"""Those of all addresses together."""

REFUSED = "no"
LONGEST_LABEL = 63


class Waiting(NamedTuple):
    """A command line that waits: from which address it asked, what it calls its machine, and when it did so."""

    id: str
    source: str
    machine: str
    created_at: float
    expires_at: float


class Given(NamedTuple):
    """What became of a command line: "waiting", "refused", "gone" for a code that is not known, or "given"."""

    what: str
    token: Token | None = None


class DeviceCodes:
    """The command lines that wait. Every method may raise KohakuRiverError when the database fails."""

    def __init__(self, store: Store, accounts: Accounts, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._accounts = accounts
        self._clock = clock

    async def add(self, code: str, typed: str, *, origin: str, source: str, machine: str) -> float:
        """Have a command line wait; until when, in seconds since the epoch.

        Raises UnavailableError "too_many_logins" (429) where as many do as may.
        """
        now = self._clock()

        def work(session: Session) -> float:
            session.execute(delete(DeviceCode).where(DeviceCode.expires_at <= now))
            count = select(func.count()).select_from(DeviceCode)
            of_one = session.scalar(count.where(DeviceCode.origin == origin)) or 0
            if of_one >= MOST_OF_ONE or (session.scalar(count) or 0) >= MOST:
                raise UnavailableError(
                    "Too many command lines wait to be logged in here; finish one of them, or give a token.",
                    code="too_many_logins",
                    status=429,
                )
            key = digest(code)
            session.add(
                DeviceCode(
                    digest=key,
                    typed=digest(typed),
                    origin=origin,
                    source=source,
                    machine=machine,
                    created_at=now,
                    expires_at=now + CODE_SECONDS,
                    browser="",
                )
            )
            return now + CODE_SECONDS

        return await self._store.write(work)

    async def typed(self, typed: str) -> Waiting | None:
        """The command line that shows this code and has no answer yet; None where there is none."""
        query = select(DeviceCode).where(DeviceCode.typed == digest(typed), DeviceCode.browser == "")

        def work(session: Session) -> Waiting | None:
            found = session.scalars(query.where(DeviceCode.expires_at > self._clock())).one_or_none()
            return None if found is None else _waiting(found)

        return await self._store.read(work)

    async def answer(self, typed: str, asked: str, browser: Token, *, allow: bool) -> Waiting | None:
        """Let the command line with that code and the id `asked` have a token of whose `browser` this is, or refuse it.

        None where there is none that still waits: an answer is given once.
        """
        query = select(DeviceCode).where(DeviceCode.typed == digest(typed), DeviceCode.browser == "")

        def work(session: Session) -> Waiting | None:
            still = query.where(DeviceCode.expires_at > self._clock())
            found = session.scalars(still.with_for_update()).one_or_none()
            if found is None or _waiting(found).id != asked:
                return None
            found.browser = browser.digest if allow else REFUSED
            return _waiting(found)

        return await self._store.write(work)

    async def take(self, code: str, secret: str) -> Given:
        """What was answered. Where that was yes, `secret` is a token from now on, and the code is used up.

        Raises "over_limit" where the user has as many tokens as they may.
        """
        if not await self._store.read(lambda session: self._is_answered(session, code)):
            return Given("waiting")
        return await self._store.write(lambda session: self._take(session, code, secret))

    def _is_answered(self, session: Session, code: str) -> bool:
        """Whether there is more to do than to wait: most who ask have no answer yet, and cost one look."""
        found = session.get(DeviceCode, digest(code))
        return found is None or bool(found.browser) or found.expires_at <= self._clock()

    def _take(self, session: Session, code: str, secret: str) -> Given:
        now = self._clock()
        found = session.get(DeviceCode, digest(code), with_for_update=True, populate_existing=True)
        if found is None:
            return Given("gone")
        session.delete(found)
        if found.expires_at <= now:
            return Given("gone")
        try:
            browser = check_good(session, found.browser, now)
        except UnauthenticatedError:
            return Given("refused")
        self._accounts.make_room_for_token(session, browser.name)
        token = Token(
            digest=digest(secret),
            kind="user",
            name=browser.name,
            label=_free_label(session, browser.name, found.machine),
            created_at=now,
            expires_at=browser.ends_at,
            ends_at=browser.ends_at,
            parent=identity_behind(session, browser),
        )
        session.add(token)
        return Given("given", token)


def _waiting(found: DeviceCode) -> Waiting:
    return Waiting(found.digest[:12], found.source, found.machine, found.created_at, found.expires_at)


def _free_label(session: Session, user: str, machine: str) -> str:
    """What the user's new token is called: as the machine, with a number behind it where there is such a one."""
    theirs = select(Token.label).where(Token.kind == "user", Token.name == user, Token.revoked_at.is_(None))
    taken = set(session.scalars(theirs))
    number, label = 1, machine
    while label in taken:
        number += 1
        label = f"{machine[: LONGEST_LABEL - len(str(number)) - 1]}-{number}"
    return label
