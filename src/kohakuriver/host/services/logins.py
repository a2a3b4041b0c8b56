"""How browsers come in and go: by a token, or by a link whose code is good once, and out again."""

from __future__ import annotations

import base64
import secrets
from pathlib import Path
from typing import Literal, NoReturn

import structlog

from kohakuriver.config import NAME_IN_BROWSERS, write_private
from kohakuriver.errors import NotAllowedError, UnauthenticatedError
from kohakuriver.host.schemas import LoginLink, iso_time
from kohakuriver.host.services.credentials import Caller, Credentials, new_token
from kohakuriver.host.services.grants import Grants
from kohakuriver.store import Browsers, Opened, Token
from kohakuriver.store.accounts import digest
from kohakuriver.store.browsers import CameIn

__all__ = ["Logins", "name_in_browsers"]

log = structlog.get_logger("kohakuriver.host")

USED = "This link has been used, or is older than a minute; `kohakuriver open` opens a new one."


def name_in_browsers(path: Path) -> str:
    """The name in a file, which is made where it is not there: 128 random bits, readable by its owner alone."""
    name = path.read_text("utf-8").strip() if path.exists() else ""
    if not NAME_IN_BROWSERS.fullmatch(name):
        name = f"kr-{base64.b32encode(secrets.token_bytes(16)).decode().rstrip('=').lower()}.localhost"
        write_private(path, name + "\n")
    return name


class Logins:
    """Who is logged in with a browser. A cookie is the secret of one, as the browser has it.

    `name` is what browsers on this machine call the host; it is told in login links alone.
    """

    def __init__(self, credentials: Credentials, browsers: Browsers, grants: Grants, name: str) -> None:
        self.name = name
        self._credentials = credentials
        self._browsers = browsers
        self._grants = grants
        self._audit = grants.audit

    async def visitor(self, cookie: str) -> tuple[Caller, Token]:
        """Whose browser this is; it stays logged in for another while. Raises UnauthenticatedError."""
        caller, browser = await self._credentials.visitor(cookie)
        await self.used(browser)
        return caller, browser

    async def used(self, browser: Token) -> None:
        """A browser asks for something now, so it stays logged in for another while."""
        await self._browsers.used(browser)

    async def log_in(self, token: str, before: str | None) -> tuple[str, Token]:
        """The cookie of a browser that comes in with a token, in the place of the one that it has had.

        Raises what `Credentials.caller` raises, and UnavailableError (429) where that can't be written down.
        """
        _, shown = await self._credentials.caller(token)
        self._audit.need_room(shown.name)
        cookie = new_token("browser")
        return cookie, await self._came_in(await self._browsers.add(cookie, shown.digest, before), "token")

    async def link(self, token: Token) -> LoginLink:
        """What lets a browser in as the owner of a token. Raises NotAllowedError for a browser.

        One that could, would let itself in again whenever its time is up.
        """
        if token.kind != "user":
            raise NotAllowedError("A browser can't make links that log in another one; use a token.", code="no_token")
        code = secrets.token_urlsafe(24)
        until = await self._browsers.add_code(code, token.digest)
        self._audit.write("login_link_made")
        return LoginLink(path=f"/login?code={code}", name=self.name, expires_at=iso_time(until))

    async def opened_by(self, code: str) -> Opened:
        """What a code leads to; nothing becomes of it by that. Raises UnauthenticatedError."""
        async with self._credentials.looking():
            found = await self._browsers.opened_by(code)
        if found is None:
            await self._refuse_code()
        return found

    async def enter(self, code: str, before: str | None) -> tuple[str, Token]:
        """The cookie of a browser that comes in by a link. Raises UnauthenticatedError."""
        cookie = new_token("browser")
        async with self._credentials.looking():
            came, put_out = await self._browsers.enter(code, cookie, before)
        if put_out is not None:
            log.warning("a login link was used twice: who came in first is out", user=put_out.name, browser=put_out.id)
            self._audit.write("login_link_used_twice", user=put_out.name, token=put_out.id)
            await self._grants.check()
        if came is None:
            await self._refuse_code()
        if before is not None and came.browser.digest == digest(before):  # that login goes on
            cookie = before
        return cookie, await self._came_in(came, "link")

    async def enter_by(self, identity: str, before: str | None) -> tuple[str, Token]:
        """The cookie of a browser that comes in by an identity. Raises UnauthenticatedError."""
        cookie = new_token("browser")
        return cookie, await self._came_in(await self._browsers.add_of(identity, cookie, before), "oidc")

    async def log_out(self, cookie: str) -> Token | None:
        """End what a browser was let in for, and what it has open; which browser that was, None where it was out."""
        browser = await self._browsers.end(cookie)
        await self._went(browser)
        return browser

    def came_in_by(self, opened: Opened, cookie: str | None) -> bool:
        """Whether it is this very browser that a link has let in."""
        return bool(opened.used_by) and cookie is not None and digest(cookie) == opened.used_by

    async def _came_in(self, came: CameIn, by: Literal["token", "link", "oidc"]) -> Token:
        browser = came.browser
        self._audit.write("browser_logged_in", user=browser.name, token=browser.id, via="browser", by=by)
        log.info("browser logged in", user=browser.name, id=browser.id, by=by)
        await self._went(came.before)
        return browser

    async def _went(self, browser: Token | None) -> None:
        """It was logged out, where it was one: what it has open ends."""
        if browser is not None:
            self._audit.write("browser_logged_out", user=browser.name, token=browser.id, via="browser")
            await self._grants.check()
            log.info("browser logged out", user=browser.name, id=browser.id)

    async def _refuse_code(self) -> NoReturn:
        """Raises UnauthenticatedError, or UnavailableError "too_many_failures" (429)."""
        error = UnauthenticatedError(USED, code="link_used")
        await self._credentials.refuse(error)
        raise error
