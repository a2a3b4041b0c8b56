"""Who may come in by OpenID Connect, as which user, and how that begins and ends.

What is asked of the provider is oidc_provider.py's. Sources: docs/guide/openid.md; docs/security.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import structlog

from kohakuriver.asking import asker
from kohakuriver.errors import NotAllowedError, UnauthenticatedError, UsageError
from kohakuriver.host.services.credentials import Credentials
from kohakuriver.host.services.grants import Grants
from kohakuriver.host.services.logins import Logins
from kohakuriver.store import Identities, Token

if TYPE_CHECKING:
    from kohakuriver.host.services.oidc_provider import Provider, Try

__all__ = ["EVERYBODY", "OidcLogins", "Rules"]

log = structlog.get_logger("kohakuriver.host")

TRY_SECONDS = 600.0
"""How long somebody may take to log in at the provider."""

EVERYBODY = "*"
"""The group in which everybody is whom the provider knows."""


@dataclass(frozen=True)
class Rules:
    """Who may come in: whoever is in one of `groups`, and has a verified e-mail address in one of `domains`.

    An empty one of the two asks for nothing. Who is in one of `admins` may come in by that and is an admin. `claim` is
    the name of the claim that has the groups.
    """

    groups: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    admins: frozenset[str] = frozenset()
    claim: str = "groups"

    def __post_init__(self) -> None:
        """Raises UsageError where nobody says who may come in: at a public provider that would be the world."""
        if not self.groups and not self.domains:
            raise UsageError(
                "--oidc-issuer needs to know who may come in: give --oidc-allowed-group, with '*' for everybody whom "
                "the provider knows, or --oidc-allowed-domain."
            )

    @property
    def needed(self) -> set[str]:
        """The claims by which it is judged, and the one that names somebody."""
        by_group = bool(self.admins or self.groups - {EVERYBODY})
        mail = {"email", "email_verified"} if self.domains else set()
        return {"preferred_username"} | mail | ({self.claim} if by_group else set())

    def role(self, claims: Mapping[str, Any]) -> str:
        """The role of somebody with these claims. Raises NotAllowedError "oidc_not_allowed"."""
        told = claims.get(self.claim)
        named = [told] if isinstance(told, str) else told if isinstance(told, list) else []
        theirs = {each for each in named if isinstance(each, str)}
        is_admin = bool(theirs & self.admins)
        if self.groups and EVERYBODY not in self.groups and not (is_admin or theirs & self.groups):
            raise _refusal("is in no group that this host lets in")
        if self.domains:
            self._check_mail(claims)
        return "admin" if is_admin else "user"

    def _check_mail(self, claims: Mapping[str, Any]) -> None:
        address = claims.get("email")
        name, at, domain = address.partition("@") if isinstance(address, str) else ("", "", "")
        if not name or not at or domain.lower() not in self.domains:
            raise _refusal("has no e-mail address in a domain that this host lets in")
        if claims.get("email_verified") is not True:
            raise _refusal("has an e-mail address that the provider has not verified")


def _refusal(why: str) -> NotAllowedError:
    return NotAllowedError(
        f"You are logged in at the provider, but that account {why}; ask this host's administrator.",
        code="oidc_not_allowed",
    )


class OidcLogins:
    """The way in by one provider. What a browser keeps meanwhile is `kept`, a cookie's value."""

    def __init__(
        self,
        provider: Provider,
        rules: Rules,
        identities: Identities,
        logins: Logins,
        credentials: Credentials,
        grants: Grants,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._provider = provider
        self._rules = rules
        self._identities = identities
        self._logins = logins
        self._credentials = credentials
        self._grants = grants
        self._audit = grants.audit
        self._clock = clock

    @property
    def name(self) -> str:
        """As what the page knows the provider."""
        return self._provider.name

    async def begin(self, redirect_uri: str, place: str) -> tuple[str, str]:
        """(where the browser goes, what it keeps). `place` is where the way in leads, a path of this host.

        Raises UnavailableError where the provider can't be asked.
        """
        from kohakuriver.host.services.oidc_provider import Try

        login = Try()
        url = await self._provider.login_url(login, redirect_uri)
        return url, ".".join((f"{int(self._clock())}", login.state, login.nonce, login.verifier, quote(place, "")))

    async def finish(
        self, login: Try, redirect_uri: str, answer: Mapping[str, str], before: str | None
    ) -> tuple[str, Token]:
        """(the browser's cookie, the browser) of who came back from the provider with this `answer`.

        Raises UnauthenticatedError, NotAllowedError "oidc_not_allowed", or UnavailableError.
        """
        try:
            claims = await self._provider.claims(login, redirect_uri, answer, self._rules.needed)
        except UnauthenticatedError as error:
            await self._credentials.refuse(error)
            raise
        issuer, subject = self._provider.issuer, claims["sub"]
        asker().known["subject"] = subject
        try:
            role = self._rules.role(claims)
        except NotAllowedError:
            await self._put_out(issuer, subject)
            raise
        came = await self._identities.enter(issuer, subject, _wanted_name(claims), role)
        if came.is_new:
            log.info("user added", user=came.user, role=came.role, by="OpenID Connect")
            self._audit.write("user_added", of_user=came.user, role=came.role)
        if came.role_changed:
            log.info("user has another role", user=came.user, role=came.role)
            self._audit.write("user_role_changed", of_user=came.user, role=came.role)
            await self._grants.check()
        self._audit.need_room(came.user)
        cookie, browser = await self._logins.enter_by(came.identity, before)
        return cookie, browser

    def begun(self, kept: str | None, state: str | None) -> tuple[Try, str]:
        """The login that a browser has begun here and that this is the answer to, and the place where it leads.

        Raises UnauthenticatedError.
        """
        from kohakuriver.host.services.oidc_provider import Try

        began, *rest = (kept or "").split(".", 4)
        if len(rest) != 4 or not all(rest[:3]) or state != rest[0]:
            raise UnauthenticatedError(
                "This browser has begun no such login here, or another one since; log in once more.",
                code="oidc_refused",
            )
        since = self._clock() - int(began[:12]) if began.isascii() and began.isdigit() else TRY_SECONDS
        if not -TRY_SECONDS < since < TRY_SECONDS:
            raise UnauthenticatedError("This login took too long; log in once more.", code="oidc_refused")
        return Try(*rest[:3]), unquote(rest[3])

    async def _put_out(self, issuer: str, subject: str) -> None:
        """Whoever may not come in any more is not in any more, either."""
        user = await self._identities.leave(issuer, subject)
        if user is not None:
            asker().known["user"] = user
            await self._grants.check()

    async def logout_url(self, browser: Token, back: str) -> str | None:
        """Where a browser that came in here can log out of the provider, too; None for one that did not."""
        if browser.parent is None or await self._identities.behind(browser) != browser.parent:
            return None
        return await self._provider.logout_url(back)

    async def link(self, name: str, subject: str) -> None:
        """Have a subject log in as a user. Raises NotFoundError, UsageError "name_taken"."""
        await self._identities.link(self._provider.issuer, subject, name)
        self._audit.write("user_linked", of_user=name, subject=subject)
        await self._grants.check()

    async def unlink(self, name: str) -> None:
        """Take that back. Raises NotFoundError."""
        await self._identities.unlink(self._provider.issuer, name)
        self._audit.write("user_unlinked", of_user=name)
        await self._grants.check()

    async def close(self) -> None:
        """Let go of the connections to the provider."""
        await self._provider.close()


def _wanted_name(claims: Mapping[str, Any]) -> str:
    """What somebody would like to be called."""
    for name in ("preferred_username", "email", "name"):
        value = claims.get(name)
        if isinstance(value, str) and (wanted := value.partition("@")[0].strip()):
            return wanted
    return "user"
