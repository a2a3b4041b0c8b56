"""How a command line is logged in by a browser: it waits, its user types a code into a page, sees who asks, confirms.

In shape this is RFC 8628. What is given is a token like all others, named after the machine, that ends with the
browser's last day; its secret goes to the command line alone. The weakness of the shape is that somebody else may have
begun it, and has a user type their code: so the page says what is confirmed, codes are short-lived and good once, and
no link has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

import structlog

from kohakuriver.asking import asker
from kohakuriver.changes import Changes
from kohakuriver.errors import NotAllowedError, UnauthenticatedError, UsageError
from kohakuriver.host.schemas import DeviceAsked
from kohakuriver.host.services.audit import Audit
from kohakuriver.host.services.credentials import Credentials, new_token
from kohakuriver.store import DeviceCodes, Token
from kohakuriver.store.accounts import digest
from kohakuriver.store.device_codes import CODE_SECONDS, Waiting

__all__ = ["DeviceLogins"]

log = structlog.get_logger("kohakuriver.host")

HOLD_SECONDS = 25.0
"""How long a command line's question is held before it is told to ask again."""

LOOK_SECONDS = 5.0
"""How often it is looked meanwhile what another host on the same database was told."""

PAGE = "/device"

_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
"""Of what a code is made that is typed: no vowels, for no words, and nothing that looks like another."""

_WRONG = "No command line waits with this code: it has run out, was answered, or is mistyped; run the command again."


class DeviceLogins:
    """The command lines that wait to be logged in."""

    def __init__(self, codes: DeviceCodes, credentials: Credentials, audit: Audit) -> None:
        self._codes = codes
        self._credentials = credentials
        self._audit = audit
        self._changes = Changes[str]()
        self._held: set[str] = set()
        self._closed = False

    def close(self) -> None:
        """Let go of the command lines that wait: the next host that runs knows them, too."""
        self._closed = True
        self._changes.notify_all()

    async def ask(self, machine: str) -> DeviceAsked:
        """What a new command line has. Raises UnavailableError "too_many_logins" (429)."""
        code, typed = secrets.token_urlsafe(32), "".join(secrets.choice(_LETTERS) for _ in range(8))
        source = asker().source.rpartition(":")[0] or "?"
        if proxied := asker().known.get("forwarded_for"):
            source = f"{source}, which says that it is a proxy and asks for {proxied}"
        await self._codes.add(code, typed, origin=asker().origin, source=source[:300], machine=machine)
        return DeviceAsked(
            device_code=code,
            user_code=f"{typed[:4]}-{typed[4:]}",
            verification_path=PAGE,
            expires_in=CODE_SECONDS,
        )

    async def take(self, code: str) -> tuple[Token, str]:
        """The token, and its secret, of a command line whose user has confirmed: once.

        Raises UsageError "authorization_pending" after some seconds without an answer, "slow_down" where it asks
        twice at a time; UnauthenticatedError "expired_token"; NotAllowedError "access_denied".
        """
        key = digest(code)
        if key in self._held:
            raise UsageError("This command line asks already; wait for that answer.", code="slow_down")
        self._held.add(key)
        try:
            with self._changes.watch(key) as changed:
                return await self._answer(code, changed)
        finally:
            self._held.discard(key)

    async def _answer(self, code: str, changed: asyncio.Event) -> tuple[Token, str]:
        until = asyncio.get_running_loop().time() + HOLD_SECONDS
        secret = new_token("user")
        while True:
            changed.clear()
            what, token = await self._codes.take(code, secret)
            if token is not None:
                self._audit.write("token_made", of_user=token.name, of_token=token.id, label=token.label, by="device")
                log.info("token made", id=token.id, kind=token.kind, owner=token.name, by="a browser's confirmation")
                return token, secret
            if what == "refused":
                raise NotAllowedError("This login was refused in the browser.", code="access_denied", status=400)
            if what == "gone":
                error = UnauthenticatedError(
                    "Nobody has confirmed this login within ten minutes; run the command again.",
                    code="expired_token",
                    status=400,
                )
                await self._credentials.refuse(error)
                raise error
            left = until - asyncio.get_running_loop().time()
            if left <= 0 or self._closed:
                raise UsageError("Nobody has confirmed this login yet; ask again.", code="authorization_pending")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), min(left, LOOK_SECONDS))

    async def typed(self, text: str) -> tuple[str, Waiting]:
        """The code that a user has typed, as it is kept, and whose it is. Raises UnauthenticatedError."""
        typed = "".join(each for each in text.upper() if each in _LETTERS)
        async with self._credentials.looking():
            found = await self._codes.typed(typed) if len(typed) == 8 else None
        if found is None:
            raise await self._wrong()
        return typed, found

    async def answer(self, typed: str, asked: str, browser: Token, *, allow: bool) -> Waiting:
        """Let a command line have a token of whose `browser` this is, or not. Raises UnauthenticatedError."""
        async with self._credentials.looking():
            found = await self._codes.answer(typed, asked, browser, allow=allow)
        if found is None:
            raise await self._wrong()
        event = "device_login_confirmed" if allow else "device_login_refused"
        self._audit.write(event, machine=found.machine, source=found.source)
        log.info("command line logged in" if allow else "command line refused", user=browser.name, source=found.source)
        self._changes.notify([each for each in self._changes.watched() if each.startswith(found.id)])
        return found

    async def _wrong(self) -> UnauthenticatedError:
        """The error for a code that is none; guesses are answered ever later."""
        error = UnauthenticatedError(_WRONG, code="no_such_code")
        await self._credentials.refuse(error)
        return error
