"""Who logs in at an OpenID provider: which user that is, by what the provider calls its `sub` and by nothing else.

Names and e-mail addresses change hands; a subject at an issuer never does (OpenID Connect Core 1.0, section 2).
"""

from __future__ import annotations

import contextlib
import re
import time
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from kohakuriver.errors import NotFoundError, UsageError
from kohakuriver.store.accounts import revoke
from kohakuriver.store.database import Store
from kohakuriver.store.models import Identity, Token, User
from kohakuriver.store.news import note

__all__ = ["Came", "Identities", "identity_behind"]

LONGEST_NAME = 50
TRIES = 100
_RESERVED = ("anonymous",)


class Came(NamedTuple):
    """Who came in: the user's name and role, the identity's digest, and what of the user this login has changed."""

    user: str
    role: str
    identity: str
    is_new: bool
    role_changed: bool


class Identities:
    """Whose subjects at issuers are which users. Every method may raise KohakuRiverError when the database fails."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def enter(self, issuer: str, subject: str, wanted: str, role: str) -> Came:
        """The user who is `subject` at `issuer`; at the first login one is made, called `wanted` or much like it.

        A user of that name who is there already is another one and stays so. `role` is given to users that a login
        has made; those whom an admin has bound keep theirs.
        """
        key = Identity.digest_of(issuer, subject)

        def work(session: Session) -> Came:
            found = session.get(Identity, key, with_for_update=True, populate_existing=True)
            user = None if found is None else session.get(User, found.user, with_for_update=True)
            if found is None or user is None:
                user = User(name=_free_name(session, wanted), role=role, created_at=self._clock(), limits={})
                session.add(user)
                if found is None:  # of two first logins at once the second fails here, and finds this one then
                    session.add(Identity(digest=key, issuer=issuer, subject=subject, user=user.name, made=True))
                else:
                    found.user, found.made = user.name, True
                return Came(user.name, role, key, True, False)
            changed = found.made and user.role != role
            if changed:
                user.role = role
                note(session, rights=True)
            return Came(user.name, user.role, key, False, changed)

        for _ in range(TRIES):
            with contextlib.suppress(IntegrityError):  # first logins at the same time, of one subject or with one name
                return await self._store.write(work)
        return await self._store.write(work)

    async def leave(self, issuer: str, subject: str) -> str | None:
        """Log out what came in as that subject, who may not any more; the user's name, None for nobody's subject."""
        key = Identity.digest_of(issuer, subject)

        def work(session: Session) -> str | None:
            found = session.get(Identity, key, with_for_update=True, populate_existing=True)
            _log_out(session, key, self._clock())
            return None if found is None else found.user

        return await self._store.write(work)

    async def link(self, issuer: str, subject: str, name: str) -> None:
        """Have the subject log in as the user `name`, and no other subject of that issuer any more.

        Raises NotFoundError for a user who is not there, UsageError "name_taken" for another user's subject.
        """
        key = Identity.digest_of(issuer, subject)

        def work(session: Session) -> None:
            _need_user(session, name)
            found = session.get(Identity, key, with_for_update=True, populate_existing=True)
            if found is not None and found.user != name:
                raise UsageError(
                    f"{subject!r} logs in as {found.user}; `kohakuriver user unlink {found.user}` first, or remove "
                    "that user.",
                    code="name_taken",
                )
            self._unlink(session, issuer, name, besides=key)
            session.merge(Identity(digest=key, issuer=issuer, subject=subject, user=name, made=False))

        await self._store.write(work)

    async def unlink(self, issuer: str, name: str) -> None:
        """Take that back; browsers that came in so are logged out. Raises NotFoundError where there is nothing."""

        def work(session: Session) -> None:
            _need_user(session, name)
            if not self._unlink(session, issuer, name):
                raise NotFoundError(f"{name} is bound to nobody at {issuer}; `kohakuriver user list` shows who is.")

        await self._store.write(work)

    def _unlink(self, session: Session, issuer: str, name: str, besides: str = "") -> int:
        theirs = select(Identity).where(Identity.user == name, Identity.issuer == issuer, Identity.digest != besides)
        found = list(session.scalars(theirs.with_for_update()))
        for identity in found:
            _log_out(session, identity.digest, self._clock())
            session.delete(identity)
        return len(found)

    async def subjects(self) -> dict[str, str]:
        """As whom users are known at a provider, by their names."""
        found = await self._store.read(lambda session: list(session.scalars(select(Identity))))
        return {identity.user: identity.subject for identity in found}

    async def behind(self, token: Token) -> str | None:
        """The digest of the identity that a token, or a browser, hangs on; None for one that hangs on none."""
        return await self._store.read(lambda session: identity_behind(session, token))


def identity_behind(session: Session, token: Token) -> str | None:
    """`Identities.behind`: a browser may have come in by a link of a token that another one has made."""
    above: Token | None = token
    while above is not None and above.parent is not None:
        if session.get(Identity, above.parent) is not None:
            return above.parent
        above = session.get(Token, above.parent)
    return None


def _log_out(session: Session, identity: str, now: float) -> None:
    for token in session.scalars(select(Token).where(Token.parent == identity, Token.revoked_at.is_(None))):
        revoke(session, token, now)


def _need_user(session: Session, name: str) -> None:
    if session.get(User, name, with_for_update={"read": True}, populate_existing=True) is None:
        raise NotFoundError(
            f"There is no user {name!r}; `kohakuriver user list` shows admins the users that there are."
        )


def _free_name(session: Session, wanted: str) -> str:
    """`wanted` as a user's name, with a number behind it where that is somebody's. Raises UsageError."""
    plain = unicodedata.normalize("NFKD", wanted).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9._-]+", "-", plain).lstrip("._-")[:LONGEST_NAME].rstrip("._-") or "user"
    for number in range(1, TRIES):
        name = plain if number == 1 else f"{plain}-{number}"
        if name not in _RESERVED and session.get(User, name) is None:
            return name
    raise UsageError(f"There are {TRIES} users called {plain!r} already; have an admin make one and bind it.")
