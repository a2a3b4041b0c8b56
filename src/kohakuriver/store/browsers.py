"""Browsers that are logged in, and the codes of links that let one in.

A browser is a row among the tokens, so it is listed, expires and is revoked as they are, and what it opens hangs on it
as what a token opens hangs on that. It ends with the token, or the identity, that let it in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import NamedTuple

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from kohakuriver.errors import UnauthenticatedError
from kohakuriver.store.accounts import check_good, digest, forget_bad_tokens, revoke
from kohakuriver.store.database import Store
from kohakuriver.store.models import SEEN_SECONDS, Identity, LoginCode, Token, User
from kohakuriver.store.news import note

__all__ = ["CODE_SECONDS", "IDLE_SECONDS", "LONGEST_SECONDS", "SEEN_SECONDS", "Browsers", "CameIn", "Opened"]

IDLE_SECONDS = 12 * 3600.0
"""A browser that has asked for nothing so long is logged out."""

LONGEST_SECONDS = 7 * 86400.0
"""After so long it is logged out in any case."""

RENEW_SECONDS = 60.0
"""How often at most it is written down that a browser is used: most requests are to write nothing."""

CODE_SECONDS = 60.0
"""How long a code is good."""

MOST_BROWSERS = 50
"""Of one user; of more, the one that will be logged out first anyway."""

MOST_CODES = 50
"""Of one token; of more, the oldest goes."""


class Opened(NamedTuple):
    """What a code leads to: the user's name, and the browser that has come in with it already, "" for none."""

    user: str
    used_by: str


class CameIn(NamedTuple):
    """A browser that is logged in now, and as what it was `before`, None where it was not."""

    browser: Token
    before: Token | None


class Browsers:
    """Who is logged in with a browser. Every method may raise KohakuRiverError when the database fails.

    A login comes in the place of the one whose secret, `before`, the browser has shown.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def add(self, secret: str, token: str, before: str | None = None) -> CameIn:
        """Have `secret` stand for a browser that was let in by the token with the digest `token`.

        Raises UnauthenticatedError where that is no good any more.
        """
        return await self._store.write(lambda session: self._add(session, secret, token, before))

    async def add_of(self, identity: str, secret: str, before: str | None = None) -> CameIn:
        """Have `secret` stand for a browser that was let in by the identity with the digest `identity`.

        Raises UnauthenticatedError where that is nobody's any more.
        """

        def work(session: Session) -> CameIn:
            # The lock makes whoever unbinds it wait, and then finds this browser.
            found = session.get(Identity, identity, with_for_update={"read": True}, populate_existing=True)
            if found is None or session.get(User, found.user) is None:
                raise UnauthenticatedError("The user of this login was removed; log in again.")
            return self._let_in(session, secret, before, (found.user, identity, None))

        return await self._store.write(work)

    def _add(self, session: Session, secret: str, token: str, before: str | None) -> CameIn:
        parent = check_good(session, token, self._clock(), kind="user")
        return self._let_in(session, secret, before, (parent.name, parent.digest, parent.expires_at))

    def _let_in(self, session: Session, secret: str, before: str | None, by: tuple[str, str, float | None]) -> CameIn:
        """`by` what: its user's name, its digest, and until when it is good."""
        user, parent, until = by
        now = self._clock()
        forget_bad_tokens(session, "browser", user, now)
        ended = None if before is None else self._end(session, before, heir=(user, digest(secret)))
        self._make_room(session, user, now)
        ends_at = min(now + LONGEST_SECONDS, until or now + LONGEST_SECONDS)
        key = digest(secret)
        browser = Token(
            digest=key,
            kind="browser",
            name=user,
            label=f"browser-{datetime.fromtimestamp(now, timezone.utc):%Y-%m-%d}-{key[:4]}",
            created_at=now,
            expires_at=min(now + IDLE_SECONDS, ends_at),
            parent=parent,
            ends_at=ends_at,
        )
        session.add(browser)
        return CameIn(browser, ended)

    def _going_on(self, session: Session, token: str, before: str | None, now: float) -> CameIn | None:
        """The login that a browser has by the same token, which another link is no reason to end with all that is open.

        None where it has none, or a new one lasts for half of LONGEST_SECONDS more. Raises UnauthenticatedError.
        """
        parent = check_good(session, token, now, kind="user")
        found = None if before is None else session.get(Token, digest(before), with_for_update=True)
        if found is None or found.kind != "browser" or found.parent != token or not found.is_good(now):
            return None
        ends_at = found.ends_at or 0.0
        if min(now + LONGEST_SECONDS, parent.expires_at or now + LONGEST_SECONDS) - ends_at > LONGEST_SECONDS / 2:
            return None
        found.expires_at = min(now + IDLE_SECONDS, ends_at)
        return CameIn(found, None)

    def _make_room(self, session: Session, user: str, now: float) -> None:
        theirs = select(Token).where(Token.kind == "browser", Token.name == user, Token.revoked_at.is_(None))
        newest = theirs.order_by(Token.expires_at.desc(), Token.digest)
        for browser in session.scalars(newest.offset(MOST_BROWSERS - 1)):
            browser.revoked_at = now
            note(session, rights=True)

    async def used(self, browser: Token) -> None:
        """It asks for something now, so it stays for another while."""
        expires_at = min(self._clock() + IDLE_SECONDS, browser.ends_at or 0.0)
        if browser.expires_at is None or expires_at - browser.expires_at < RENEW_SECONDS:
            return
        row = update(Token).where(Token.digest == browser.digest, Token.revoked_at.is_(None))
        await self._store.write(lambda session: session.execute(row.values(expires_at=expires_at)))

    async def end(self, secret: str) -> Token | None:
        """Log a browser out: which it was, None where it is not logged in."""
        return await self._store.write(lambda session: self._end(session, secret))

    def _end(self, session: Session, secret: str, heir: tuple[str, str] = ("", "")) -> Token | None:
        """Log it out. `heir` is what comes in its place: the user, and a digest.

        Where that is the same user, what sessions of this one have left in tasks hangs on that. It does not where this
        one was no good any more: whoever had it last may have been another.
        """
        now = self._clock()
        browser = session.get(Token, digest(secret), with_for_update=True, populate_existing=True)
        if browser is None or browser.kind != "browser" or browser.revoked_at is not None:
            return None
        user, key = heir
        if user == browser.name and browser.is_good(now):
            # Those before it name the new one themselves: each is forgotten in its own time.
            mine = update(Token).where((Token.digest == browser.digest) | (Token.heir == browser.digest))
            session.execute(mine.values(heir=key))
        revoke(session, browser, now)
        return browser

    async def add_code(self, code: str, token: str) -> float:
        """Have `code` let one browser in, once, for the token with that digest; until when, in seconds since the epoch.

        Codes that are worth nothing any more are forgotten.
        """
        now = self._clock()

        def work(session: Session) -> None:
            session.execute(delete(LoginCode).where(LoginCode.expires_at < now - SEEN_SECONDS))
            known = select(LoginCode).where(LoginCode.token == token)
            for old in session.scalars(known.order_by(LoginCode.expires_at.desc()).offset(MOST_CODES - 1)):
                session.delete(old)
            session.add(LoginCode(digest=digest(code), token=token, expires_at=now + CODE_SECONDS, used_by=""))

        await self._store.write(work)
        return now + CODE_SECONDS

    async def opened_by(self, code: str) -> Opened | None:
        """What a code leads to; None for one that is not known, or has run out and was not used."""

        def work(session: Session) -> Opened | None:
            found = session.get(LoginCode, digest(code))
            token = None if found is None else session.get(Token, found.token)
            if found is None or token is None or (not found.used_by and found.expires_at <= self._clock()):
                return None
            return Opened(token.name, found.used_by)

        return await self._store.read(work)

    async def enter(self, code: str, secret: str, before: str | None = None) -> tuple[CameIn | None, Token | None]:
        """Let a browser in by a code: (the browser that `secret` now stands for, one that was put out).

        One that the code's token has let in before keeps its secret, `before`, while enough of its time is left.

        A code that is used again has been seen by somebody: who came in with it is out, and nobody comes in. Both are
        None for a code that is not good. Raises UnauthenticatedError where the token behind it is not.
        """

        def work(session: Session) -> tuple[CameIn | None, Token | None]:
            now = self._clock()
            found = session.get(LoginCode, digest(code), with_for_update=True, populate_existing=True)
            if found is None:
                return None, None
            if found.used_by:
                first = session.get(Token, found.used_by) if now <= found.expires_at + SEEN_SECONDS else None
                if first is None or not first.is_good(now):
                    return None, None
                revoke(session, first, now)
                return None, first
            if found.expires_at <= now:
                return None, None
            came = self._going_on(session, found.token, before, now) or self._add(session, secret, found.token, before)
            found.used_by = came.browser.digest
            return came, None

        return await self._store.write(work)
