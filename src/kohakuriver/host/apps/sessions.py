"""Sessions of browsers to ports of tasks, each the user's end of a tunnel right here: a click costs a stream.

A session hangs on the browser's login, as a forward's does on its token: it ends when that right does. It outlives the
link to the runner, with its streams, and is kept for a while when nobody uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import NamedTuple
from urllib.parse import quote
from weakref import WeakValueDictionary

import structlog

from kohakuriver.asking import Asker, asking
from kohakuriver.errors import KohakuRiverError, NotAllowedError, NotFoundError
from kohakuriver.limits import Limits
from kohakuriver.rates import TokenBucket
from kohakuriver.runtime import cancel_all, file_limit
from kohakuriver.session.carried import Carrier, Passed, Route, at_runner
from kohakuriver.session.pace import BURST_SECONDS, PacedReads
from kohakuriver.tunnel.backoff import Backoff
from kohakuriver.tunnel.dial import open_session
from kohakuriver.tunnel.endpoint import Share
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.opener import KeptStreams
from kohakuriver.tunnel.ports import GOES_ON, ports_query
from kohakuriver.tunnel.protocol import SESSION_ENDED, CloseCode, ErrorText
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.user_endpoint import UserEndpoint

__all__ = ["AppSession", "Key", "Sessions"]

log = structlog.get_logger("kohakuriver.host")

KEEP_SECONDS = 60.0
"""How long a session without a connection is kept."""

BUDGET = 16 << 20
"""Bytes that one session may hold for browsers that don't read: here they wait in the host, and not with the user."""

OF_USER, OF_ALL = 64 << 20, 256 << 20
"""The same of all sessions of a user, and of all users."""

MOST_CONNECTIONS = 2000
"""Of browsers that are open to services by one user's sessions, links included; with all users' they may have half of
the files that this program may open, and one user's a quarter of that. Each takes one here, and none where it leads."""

HOLD = 120
"""How many seconds streams wait for a runner that is away, and, where this host is gone, in vain for another link."""

PATIENCE = 5.0
"""How many seconds new requests wait for it, before they are told."""

RETRY_FIRST, RETRY_CAP = 0.2, 2.0
"""Ceilings of the pauses, in seconds, between tries to take up a session whose link was lost."""

NOT_RUNNING = "task_not_running"


class Key(NamedTuple):
    """Whose session it is: the digest of the browser's login, and the port that it reaches."""

    browser: str
    task_id: int
    port: int


Authorize = Callable[[Key], Awaitable["tuple[str, Route]"]]


class _Endpoint(UserEndpoint):
    """One that reads no faster than `rate` bytes a second, 0 for any rate."""

    def __init__(self, rate: int, share: Share, on_detach: Callable[[str], None]) -> None:
        config = EndpointConfig(budget=BUDGET, max_window=BUDGET)
        super().__init__(config=config, kept=KeptStreams(HOLD), share=share, on_detach=on_detach)
        self._pace = PacedReads(rate) if rate else None

    def attach(self, link: Link, *, line: Link | None = None) -> None:
        if self._pace is not None:
            self._pace.begin(link)
        super().attach(link, line=line)

    def link_received(self, link: Link, start: int, stop: int) -> int:
        consumed = super().link_received(link, start, stop)
        if self._pace is not None:
            self._pace.took(link, consumed - start)
        return consumed


class _Pace:
    """What all connections of one session may send, `rate` bytes a second."""

    def __init__(self, rate: int) -> None:
        self._bucket = TokenBucket(rate, rate * BURST_SECONDS, time.monotonic())

    def took(self, size: int) -> float:
        return self._bucket.take(size, time.monotonic())


class Places:
    """How many connections of browsers may be open to services, of those that are counted `within` others, too."""

    def __init__(self, most: int, within: Places | None = None) -> None:
        self._left = most
        self._within = within

    def enter(self) -> bool:
        """Take a place, if there is one."""
        if not self._left or (self._within is not None and not self._within.enter()):
            return False
        self._left -= 1
        return True

    def leave(self) -> None:
        """Give it back."""
        self._left += 1
        if self._within is not None:
            self._within.leave()


class _Leg:
    """A session while it is on one link: what is entered among the host's sessions, and written down."""

    def __init__(self, session: AppSession, carrier: Carrier[_Leg], route: Route) -> None:
        self._session = session
        self._sent, self._received = session.counts()
        self.carried = carrier.carry(self, route)
        self.link: Link | None = None

    def passed(self) -> Passed:
        sent, received = self._session.counts()
        return sent - self._sent, received - self._received

    def cut(self, code: int, reason: str) -> None:
        self._session.cut(code, reason)


class AppSession:
    """One browser's way to one port; `endpoint` is there once it has been opened."""

    endpoint: UserEndpoint

    def __init__(self, sessions: Sessions, key: Key, asked: Asker) -> None:
        rate = sessions.limits.max_rate
        self.key = key
        self.over = False
        self.used_at = time.monotonic()
        self.trouble: str | None = None
        self.pace = _Pace(rate) if rate else None
        self.places: Places | None = None
        self.preserve_host = False
        self.keep_prefix = False
        self._sessions = sessions
        self._asked = asked
        self._rate = rate
        self._leg: _Leg | None = None
        self._again: asyncio.Task[None] | None = None

    def counts(self) -> Passed:
        """Bytes so far: to the task, to the browser."""
        return self.endpoint.totals.bytes_sent, self.endpoint.totals.bytes_received

    async def open(self, *, again: bool = False) -> None:
        """Open it at the task's runner. Raises KohakuRiverError."""
        with asking(replace(self._asked, known=dict(self._asked.known))):
            user, route = await self._sessions.authorize(self.key)
            if not again:
                self.endpoint = _Endpoint(self._rate, self._sessions.share_of(user), self._detached)
                self.places = self._sessions.places_of(user)
            if not again:  # one that is open is told of changes
                self.preserve_host, self.keep_prefix = route.preserve_host, route.keep_prefix
            leg = _Leg(self, self._sessions.carrier, route)
            query = f"proto=tcp&{ports_query([self.key.port])}" + (f"&{GOES_ON}" if again else "")
            path = f"/ws/forward/{quote(route.container, safe='')}/{self.key.port}?{query}"
            with leg.carried, at_runner(route):
                link = await open_session(route.runner(path, self._sessions.trusted))
        if self.over:  # it was ended meanwhile
            link.abort()
            leg.carried.over()
            raise NotAllowedError("This session has ended.", code="ended")
        self._begin(leg, link, again=again)

    def _begin(self, leg: _Leg, link: Link, *, again: bool) -> None:
        leg.link = link
        self._leg, self.trouble = leg, None
        resumed = {"resumed": True} if again else {}
        about = {"proto": "tcp", "port": self.key.port, "ports": str(self.key.port), "version": link.version}
        leg.carried.begin(self._asked.source, **about, **resumed)
        self.endpoint.attach(link)
        leg.carried.hang_on_right()

    def cut(self, code: int, reason: str) -> None:
        """End it, and all connections that use it, because this host wants it."""
        if self.over:
            return
        self.over = True
        self._sessions.forget(self)
        if self._again is not None:
            self._again.cancel()
        self._sessions.put_out(self.endpoint)
        link = self.endpoint.link
        self.endpoint.end_waiting(ErrorText("ECONNRESET", reason))
        if link is not None:
            (link.fail if code == CloseCode.POLICY else link.close)(code, reason)

    def shut_down(self, reason: str) -> None:
        """End it. No other link will come for its streams, so nothing is to wait for one."""
        if self._leg is not None:
            self._leg.carried.end("host", CloseCode.NORMAL, reason)
        self.cut(CloseCode.NORMAL, reason)

    async def close(self) -> None:
        """End it: nobody has used it for a while."""
        self.over = True
        self._sessions.forget(self)
        if self._leg is not None:
            self._leg.carried.end("user", CloseCode.NORMAL, "nobody uses it any more")
        await self.endpoint.close()

    def _detached(self, reason: str) -> None:
        leg, self._leg = self._leg, None
        if leg is None or leg.link is None:
            return
        closing = leg.link.closing
        leg.carried.end("node", closing.code, reason)
        leg.carried.over()
        if self.over:
            return
        if closing.code in SESSION_ENDED:
            self.cut(CloseCode.NORMAL, reason)
        else:
            self._again = asyncio.get_running_loop().create_task(self._reopen())

    async def _reopen(self) -> None:
        """Open the session again until one stands; what it is for may be over by then."""
        backoff = Backoff(RETRY_FIRST, RETRY_CAP)
        lost_at = time.monotonic()
        while not self.over:
            try:
                await self.open(again=True)
                return
            except KohakuRiverError as error:
                ends = isinstance(error, (NotFoundError, NotAllowedError)) or error.code == NOT_RUNNING
                away = time.monotonic() - lost_at
                if ends or away > HOLD:
                    self.cut(CloseCode.POLICY, error.message)
                    return
                if away > PATIENCE:
                    self.trouble = error.message
            backoff.ended(None)
            await asyncio.sleep(backoff.pause())


class Sessions:
    """All sessions of browsers to apps.

    Args:
        authorize: whose session → where it goes, with its right to go on. Raises KohakuRiverError.
        put_out: ends the connections that use an endpoint.
        limits: what a session may take.
        trusted: how runners that serve TLS are checked; None for the system's authorities.
    """

    def __init__(
        self,
        *,
        authorize: Authorize,
        put_out: Callable[[UserEndpoint], None],
        trusted: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.authorize = authorize
        self.put_out = put_out
        self.trusted = trusted
        self.limits = limits or Limits()
        self.carrier: Carrier[_Leg] = Carrier(self.limits)
        self._open: dict[Key, AppSession] = {}
        self._opening: dict[Key, tuple[AppSession, asyncio.Task[AppSession]]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._all = Share(OF_ALL)
        self._shares: WeakValueDictionary[str, Share] = WeakValueDictionary()
        self._places_of_all = Places(file_limit() // 2)
        self._places: WeakValueDictionary[str, Places] = WeakValueDictionary()

    def get(self, key: Key) -> AppSession | None:
        """The session that is open."""
        session = self._open.get(key)
        if session is not None:
            session.used_at = time.monotonic()
        return session

    async def opened(self, key: Key, asked: Asker) -> AppSession:
        """The session, opened where it is not; several that ask at once get the same. Raises KohakuRiverError."""
        found = self.get(key)
        if found is not None:
            return found
        opening = self._opening.get(key)
        if opening is None:
            session = AppSession(self, key, asked)
            task = asyncio.get_running_loop().create_task(self._make(session))
            opening = self._opening[key] = session, task
            task.add_done_callback(lambda done: self._opened(key, done))
        return await asyncio.shield(opening[1])

    async def _make(self, session: AppSession) -> AppSession:
        await session.open()
        if session.over:
            raise NotAllowedError("This session has ended.", code="ended")
        self._open[session.key] = session
        return session

    def _opened(self, key: Key, task: asyncio.Task[AppSession]) -> None:
        self._opening.pop(key, None)
        if not task.cancelled():
            task.exception()  # who asked for it has it, or has gone

    @property
    def tasks(self) -> set[int]:
        """The ids of those to which a session is open, or is being opened."""
        return {key.task_id for key in (*self._open, *self._opening)}

    def tell(self, told: Mapping[int, tuple[bool, bool]]) -> None:
        """Have requests of sessions go by this from now on: `preserve_host` and `keep_prefix`, by tasks' ids."""
        for session in (*self._open.values(), *(session for session, _ in self._opening.values())):
            if session.key.task_id in told:
                session.preserve_host, session.keep_prefix = told[session.key.task_id]

    def share_of(self, user: str) -> Share:
        """What the streams of a user may hold, in all sessions together."""
        share = self._shares.get(user)
        if share is None:
            share = self._shares[user] = Share(OF_USER, self._all)
        return share

    def places_of(self, user: str) -> Places:
        """Those of a user, in all sessions together."""
        places = self._places.get(user)
        if places is None:
            most = min(MOST_CONNECTIONS, file_limit() // 8)
            places = self._places[user] = Places(most, self._places_of_all)
        return places

    def forget(self, session: AppSession) -> None:
        """A session has ended."""
        if self._open.get(session.key) is session:
            del self._open[session.key]

    def close_unused(self, used: set[UserEndpoint]) -> None:
        """End the sessions that none of the endpoints in use is of, and none was for a while."""
        now = time.monotonic()
        for session in list(self._open.values()):
            if session.endpoint in used:
                session.used_at = now
            elif now - session.used_at > KEEP_SECONDS:
                closing = asyncio.get_running_loop().create_task(session.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """End every session."""
        await cancel_all([task for _, task in self._opening.values()])
        for session in list(self._open.values()):
            session.shut_down("the host is shutting down")
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._closing)
