"""What the host knows of apps: their addresses, who may come in, and how their sessions are opened."""

from __future__ import annotations

import secrets
from typing import NoReturn

from kohakuriver.asking import asker
from kohakuriver.errors import UnauthenticatedError
from kohakuriver.host.apps.addresses import Address, Addresses
from kohakuriver.host.apps.sessions import Key
from kohakuriver.host.apps.signed import Signed
from kohakuriver.host.services.authorize import Forwards
from kohakuriver.host.services.credentials import Credentials
from kohakuriver.host.services.logins import Logins
from kohakuriver.session.carried import Route
from kohakuriver.store import Task, Token
from kohakuriver.store.apps import AppCodes, Ticket

__all__ = ["Apps"]

CODE_USED = "This way in was used already, or took longer than half a minute; open the address anew."


class Apps:
    """The ports of tasks that browsers open at this host."""

    def __init__(
        self,
        addresses: Addresses,
        signed: Signed,
        codes: AppCodes,
        credentials: Credentials,
        logins: Logins,
        forwards: Forwards,
    ) -> None:
        self.addresses = addresses
        self.signed = signed
        self._codes = codes
        self._credentials = credentials
        self._logins = logins
        self._forwards = forwards

    def reached_from(self, host: str) -> bool:
        """Whether a browser that is at the host by what `Host` says gets to addresses of apps."""
        return self.addresses.of(0, None, 1, host) is not None

    def address(self, task: Task, port: int, host: str) -> Address | None:
        """The address of a task's port, for a browser that is at the host by what `Host` says; None where there is
        none for it."""
        return self.addresses.of(task.task_id, task.name, port, host)

    def begin(self, address: Address) -> str:
        """The URL by which a browser that is at the host goes to an app."""
        return f"{address.place.base}/.kohakuriver/begin?ticket={self.signed.begin(address.key)}"

    async def code(self, browser: Token, task: Task, address: Address, state: str) -> str:
        """What lets a browser in at an address, once; whoever asks has checked that it may."""
        code = secrets.token_urlsafe(32)
        await self._codes.add(code, Ticket(browser.digest, task.task_id, address.port), address.key, state)
        return code

    async def redeem(self, code: str, address: Address, state: str) -> Ticket:
        """What a code stands for. Raises UnauthenticatedError, or UnavailableError "too_many_failures" (429)."""
        async with self._credentials.looking():
            ticket = await self._codes.take(code, address.key, state)
        if ticket is None:
            await self._refuse()
        return ticket

    async def _refuse(self) -> NoReturn:
        error = UnauthenticatedError(CODE_USED, code="link_used")
        await self._credentials.refuse(error)
        raise error

    async def authorize(self, key: Key) -> tuple[str, Route]:
        """Whose session it is, and where it goes. Raises as `Forwards.authorize` does."""
        caller, browser = await self._credentials.logged_in(key.browser)
        if browser.kind == "link" and (browser.task_id, browser.port) != (key.task_id, key.port):
            raise UnauthenticatedError("This link opens another port.", code="link_used")
        if browser.kind == "browser":
            await self._logins.used(browser)
        asker().known["via"] = browser.kind
        return caller.name, await self._forwards.authorize_app(caller, key.task_id, key.port)

    async def used(self, browser: str) -> None:
        """A browser's login is used now. Raises UnauthenticatedError where it is none any more."""
        found = (await self._credentials.logged_in(browser))[1]
        if found.kind == "browser":
            await self._logins.used(found)

    async def opened_by(self, secret: str, address: Address) -> Ticket:
        """What a link opens at an address. Raises UnauthenticatedError, or UnavailableError "too_many_failures"."""
        link = await self._credentials.link(secret)
        here = link.task_id is not None and address.tag == self.addresses.tag(link.task_id, address.port)
        if link.task_id is None or not here or address.port != link.port:
            raise UnauthenticatedError("This link opens another address.", code="link_used")
        return Ticket(link.digest, link.task_id, address.port)

    def link_at(self, task: Task, port: int, host: str, secret: str) -> str | None:
        """The URL of a link, for whoever asks the host by what `Host` says; None where no browser gets there."""
        on = host.rpartition("]")[2].partition(":")[2]
        there = f"{self._logins.name}:{on}" if on else self._logins.name
        address = self.addresses.of(task.task_id, task.name, port, there)
        return None if address is None else f"{address.place.base}/.kohakuriver/link#{secret}"
