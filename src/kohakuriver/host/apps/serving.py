"""Apps as a part of the host's program: made of its other parts, put in front of its listeners, and ended."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult

from kohakuriver.changes import Changes
from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.gateway.names import authority
from kohakuriver.host.apps.addresses import Addresses, domain_in, url_in
from kohakuriver.host.apps.apps import Apps
from kohakuriver.host.apps.front import Front
from kohakuriver.host.apps.gate import AppGate
from kohakuriver.host.apps.sessions import Sessions
from kohakuriver.host.apps.signed import Signed
from kohakuriver.host.services.authorize import Forwards, told_by
from kohakuriver.host.services.credentials import Credentials
from kohakuriver.host.services.logins import Logins
from kohakuriver.limits import Limits
from kohakuriver.proxies import Proxies
from kohakuriver.store import Store
from kohakuriver.store.apps import AppCodes
from kohakuriver.web.request_limits import GuardedHttp
from kohakuriver.web.waiting_room import WaitingRoom

__all__ = ["AppServer", "Where", "where_in"]

LOOK_SECONDS = 0.2


class Where:
    """Where browsers find the host and its apps: None of all where nothing was set up.

    Apps are at names in `domain`, or all of them at `shared`.
    """

    def __init__(
        self, domain: str | None = None, public: SplitResult | None = None, shared: SplitResult | None = None
    ) -> None:
        self.domain = domain
        self.public = public
        self.shared = shared

    @property
    def shares_name(self) -> bool:
        """Whether apps are at another port of the host's own name: browsers have one set of cookies for both."""
        if self.shared is None or self.public is None:
            return False
        return self.shared.hostname == self.public.hostname

    @property
    def names(self) -> Sequence[str]:
        """What browsers call the host."""
        return () if self.public is None or not self.public.hostname else (self.public.hostname,)


def where_in(
    domain: str | None, public: str | None, certificate: Sequence[str], port: int, apps_url: str | None = None
) -> Where:
    """What was said of that; the name of a certificate says where the host is, too. Raises UsageError.

    Args:
        certificate: the names in it.
        port: the one that the host listens on.
    """
    if domain is not None and apps_url is not None:
        raise UsageError("Give --apps-domain, with which each app has an origin of its own, or --apps-url, not both.")
    found = None if public is None else url_in(public)
    if domain is None and apps_url is None:
        return Where(None, found)
    domain = None if domain is None else domain_in(domain)
    shared = None if apps_url is None else url_in(apps_url, "--apps-url https://apps.example.org")
    found = found or _public_by(certificate, port, domain or "", shared and shared.hostname)
    if found is None:
        option = "--apps-url" if domain is None else "--apps-domain"
        raise UsageError(f"{option} needs the host's own address: give --public-url https://NAME.")
    return Where(domain, found, shared)


def _public_by(certificate: Sequence[str], port: int, domain: str, shared: str | None) -> SplitResult | None:
    """Where a host is by the names of its certificate; None where these say nothing.

    Its apps are at names in the `domain`, or all at the name `shared`, which may be the host's own.
    """
    names = [name for name in certificate if name[:1].isalpha() and not f".{name}".endswith(f".{domain or '.'}")]
    name = next((name for name in names if name != shared), names[0] if names else None)
    return None if name is None else url_in(f"https://{authority(name, port, 'https')}")


class AppServer:
    """All of it. `tls` says whether the host serves TLS, `trusted` how runners that do are checked, `proxies` whose
    word of where a browser is counts."""

    def __init__(
        self,
        key: bytes,
        where: Where,
        *,
        store: Store,
        credentials: Credentials,
        logins: Logins,
        forwards: Forwards,
        trusted: ssl.SSLContext,
        limits: Limits,
        tls: bool,
        proxies: Proxies | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        addresses = Addresses(key, logins.name, tls=tls, domain=where.domain, public=where.public, shared=where.shared)
        signed = Signed(key, clock=clock)
        self.apps = Apps(addresses, signed, AppCodes(store, clock=clock), credentials, logins, forwards)
        self._gate = AppGate(
            addresses, signed, self.apps.redeem, self.apps.opened_by, self.apps.used, proxies or Proxies()
        )
        self.sessions = self._gate.sessions = Sessions(
            authorize=self.apps.authorize, put_out=self._gate.put_out, trusted=trusted, limits=limits
        )
        self.owns = addresses.owns
        self._store = store

    def front(self, http: Callable[[], GuardedHttp], room: WaitingRoom, limits: Limits) -> Front:
        """What a connection to the host begins with."""
        return Front(self.owns, self._gate.visit, http, room, limits)

    async def run(self, changes: Changes[int]) -> None:
        """Have sessions that are open go by what is said of their tasks' services meanwhile, until cancelled.

        A browser's session is kept for a while, so whoever changes that and tries again would see nothing of it.
        """
        with changes.watch_all() as changed:
            while True:
                await changed.wait()
                await asyncio.sleep(LOOK_SECONDS)  # one look for many changes, and for sessions that just begin
                changed.clear()
                if tasks := self.sessions.tasks:
                    try:
                        orders = await self._store.orders(tasks)
                        self.sessions.tell({task_id: told_by(order) for task_id, order in orders.items()})
                    except KohakuRiverError:  # the database fails, as every request says that needs it
                        changed.set()

    async def close(self) -> None:
        """End all sessions and connections."""
        await self._gate.close()
