"""The straight path of a forward: its streams go to the task's node itself, and no more through the host.

The session through the host is there first, and stays: it is the line by which the straight path is asked for, by which
its right to be is kept, and over which the streams go on when it fails. Sources: docs/protocol.md §4, "The straight
path"; docs/guide/forward.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from kohakuriver.client.events import Event
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError, UnavailableError, UsageError
from kohakuriver.http_proxy import http_proxy
from kohakuriver.runtime import cancel_all
from kohakuriver.tls import client_context, is_this_machine
from kohakuriver.tunnel.backoff import Backoff
from kohakuriver.tunnel.closing import Closing
from kohakuriver.tunnel.dial import Server, open_session
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import PING, SESSION_ID, STRAIGHT, CloseCode, StraightOffer, straight_greeting
from kohakuriver.tunnel.user_endpoint import UserEndpoint

__all__ = ["PathChoice", "PathTaken", "Silence", "StraightPath", "checked_url"]

PathChoice = Literal["auto", "direct", "host"]
"""Which path a forward takes: the straight one where it can be had, that one or none at its begin, never."""

NO_STRAIGHT = "no_direct_path"
ANSWER_SECONDS = 10.0
"""How long the node may take to say where it is."""
DIAL_SECONDS = 5.0
"""How long connecting to it may take."""
FIRST_AGAIN, LOST_AGAIN, LONGEST_AGAIN = 30.0, 1.0, 600.0
"""Seconds, of which a random part is waited before it is tried again: after it never was there, after it was lost."""
SOON_FOR, SOON_DIAL, AS_BEFORE = 300.0, 1.5, 4.0
"""For so many seconds after it was lost it is tried again soon: connecting may take so long then, or so many times what
it took before. A packet that was dropped is sent again after a second, so that no more than that is waited for one."""
SHORT, MOST_SHORT, LONGEST_SHORT = 2.0, 5, 60.0
"""One that is lost within so many seconds may only seem to lead somewhere: so often in a row that counts as chance, and
then it is waited longer each time, so many seconds at most."""
IN_USE = 0.25
"""Seconds between two looks at whether anything passes, where it is to be tried again."""

HELD = 1.0
"""Seconds that datagrams may wait at most until those before them have arrived by the other path."""

LOOK, QUIET, PATIENCE = 0.1, 0.4, 0.9
"""Seconds between two looks at whether the node answers; without a byte of it after which it is asked; to answer."""
QUESTIONS = 2
"""How often it is asked after the last that it was sent: bytes that come after the first may be late, and no answer."""


@dataclass(frozen=True)
class PathTaken(Event):
    """The connections go on over another path, `direct` or `host`, or that `host` is the one, for a reason."""

    event: ClassVar[str] = "path"
    task: str
    path: Literal["direct", "host"]
    reason: str
    connections: int


def checked_url(url: str, hosts: Sequence[str]) -> str:
    """The address of a node's straight path, where users of `hosts` (their URLs) may go there by any of them.

    Raises UnavailableError: for what is no address, for plain HTTP where a host speaks TLS, and for what is on the
    node's loopback while a host is not on this machine.
    """
    over_tls = any(host.startswith("https://") for host in hosts)
    if not url.startswith("wss://") and (over_tls or not url.startswith("ws://")):
        raise _none("its node does not serve TLS, as the host does")
    if not _is_address(url):
        raise _none("its node names an address that is none")
    if _on_this_machine(url) and not all(map(_on_this_machine, hosts)):
        raise _none("its node can only be reached on its own machine")
    return url


def _is_address(url: str) -> bool:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # as of brackets that are not closed, or a port of 99999
        return False


def _on_this_machine(url: str) -> bool:
    from urllib.parse import urlsplit

    return is_this_machine(urlsplit(url).hostname or "")


def _none(why: str) -> UnavailableError:
    return UnavailableError(why, code=NO_STRAIGHT)


class StraightPath:
    """Takes an endpoint's streams to the straight path while that works.

    `ready` says whether they may leave the host's link now. `tell` is called with what happens.
    """

    def __init__(
        self,
        endpoint: UserEndpoint,
        task: str,
        settings: Settings,
        *,
        ready: Callable[[], bool] = lambda: True,
        tell: Callable[[Event], None],
    ) -> None:
        self._endpoint = endpoint
        self._task = task
        self._settings = settings
        self._ready = ready
        self._tell = tell
        self._keeping: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._lost: asyncio.Future[str] | None = None
        self._first: asyncio.Future[str] | None = None  # how the first try went
        self.link: Link | None = None  # the straight one, while it carries
        self.closing: Closing | None = None  # how the last one ended that did
        self.reason = "it is not tried yet"  # why it does not
        self._took = 0.0  # seconds that connecting to it has taken
        endpoint.on_straight = self._answered

    async def first(self) -> None:
        """Wait until it carries. Raises UnavailableError where the first try showed that it can't be had."""
        assert self._first is not None
        if reason := await asyncio.shield(self._first):
            raise UnavailableError(f"The direct path to task {self._task} can't be had: {reason}.", code=NO_STRAIGHT)

    def begin(self, line: Link) -> None:
        """There is a session through the host, by this link: try to go past it from now on."""
        if self._keeping is not None:
            self._keeping.cancel()
        self.link = None
        loop = asyncio.get_running_loop()
        self._first = self._first or loop.create_future()
        self._keeping = loop.create_task(self._keep(line))

    async def close(self) -> None:
        """Try no more."""
        if self._keeping is not None:
            await cancel_all([self._keeping])

    def gone(self, reason: str) -> None:
        """The straight link, which carried, is gone: the host's does from now on, where it is there."""
        self.closing = None if self.link is None else self.link.closing
        self.link, self.reason = None, reason
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(reason)
        line = self._endpoint.line
        if line is not None and not line.closing.state:  # else it goes, too, and the next one is on its way
            self._endpoint.attach(line)
            if self._endpoint.kept is not None:
                self._endpoint.kept.doubt.ask()
            # Of a runner that ends, what the host has through it ends, too: how that goes on is the news.
            if self.closing is None or self.closing.code != CloseCode.GOING_AWAY:
                self._say("host", reason)

    def give_up(self, reason: str) -> None:
        """The straight link leads nowhere any more; nothing is changed while there is no other."""
        if self.link is not None and self._endpoint.line is not None:
            self.gone(reason)

    def _say(self, path: Literal["direct", "host"], reason: str) -> None:
        kept = self._endpoint.kept
        self._tell(PathTaken(self._task, path, reason, 0 if kept is None else len(kept.streams)))

    # -- the straight path, again and again ------------------------------------------------------------------------

    async def _keep(self, line: Link) -> None:
        again = Again()
        while True:
            passed = self._passed()
            try:
                link = await self._open(line, soon=again.soon)
            except KohakuRiverError as error:
                if line.closing.state:  # nobody was asked; the next session begins anew
                    self._tried("the session through the host has gone")
                    return
                self._refused(_clause(error))
                again.refused()
            else:
                began = time.monotonic()
                self.reason = await self._carry(link, line)
                again.lost(time.monotonic() - began)
            await asyncio.sleep(again.pause())
            # Nobody gains by another path while nothing passes; and what is asked for it, the host takes for use.
            while self._passed() == passed:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(IN_USE)

    def _passed(self) -> tuple[int, int, int]:
        """Grows with whatever local programs do."""
        totals = self._endpoint.totals
        return totals.opened, totals.bytes_sent, totals.bytes_received

    def _refused(self, reason: str) -> None:
        if reason != self.reason:
            self.reason = reason
            self._say("host", reason)
        self._tried(reason)

    def _tried(self, reason: str) -> None:
        if self._first is not None and not self._first.done():
            self._first.set_result(reason)

    async def _open(self, line: Link, *, soon: bool) -> Link:
        """A link to the node itself; `soon`, or not at all. Raises KohakuRiverError."""
        if line.version < 2:
            raise _none("the task's tunnel client speaks version 1 alone")
        offer = StraightOffer.parse(await self._ask(line))
        if offer is None:
            raise _none("its node answers what this version does not understand")
        if offer.refusal:
            raise _none(offer.refusal)
        url = checked_url(offer.url, self._settings.hosts)
        try:
            trusted = client_context(url, self._settings.ca_file)
        except UsageError as error:
            raise _none(error.message) from error
        if http_proxy(url) is not None:
            raise _none("an HTTP proxy stands before its node")
        timeout = min(DIAL_SECONDS, max(SOON_DIAL, AS_BEFORE * self._took)) if soon else DIAL_SECONDS
        server = Server(url, offer.shown.hex(), trusted, timeout=timeout, peer="node")
        began = time.monotonic()
        link = await open_session(server, greeting=straight_greeting(offer.proof))
        self._took = time.monotonic() - began
        return link

    async def _ask(self, line: Link, *, urgent: bool = True) -> bytes:
        while not self._ready():  # noqa: ASYNC110  # streams tell nobody that they have been opened
            await asyncio.sleep(LOOK)
        self._answer = asyncio.get_running_loop().create_future()
        line.send_message(STRAIGHT, SESSION_ID, urgent=urgent)
        try:
            return await asyncio.wait_for(self._answer, ANSWER_SECONDS)
        except asyncio.TimeoutError:
            raise _none("its node is of a version that has none") from None

    def _answered(self, payload: bytes) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(payload)

    async def _settled(self, line: Link) -> None:
        """Wait until no datagram is on its way to the node over `line`, where it would be lost. Not for long."""
        if any(listening.proto == "udp" for listening in self._endpoint.listening):
            with contextlib.suppress(asyncio.TimeoutError):
                # What was sent before has arrived when the answer comes.
                await asyncio.wait_for(self._ask(line, urgent=False), HELD)

    async def _carry(self, link: Link, line: Link) -> str:
        """Have the streams go over `link`, until it fails; why it did."""
        with self._endpoint.holding_datagrams():
            try:
                await self._settled(line)
            except BaseException:
                link.abort()
                raise
            if line not in (self._endpoint.link, self._endpoint.line) or link.version < 2:
                link.close(reason="the session that it is for has gone")
                return "the session through the host was another one by then"
            self._lost = asyncio.get_running_loop().create_future()
            self.link = link
            self._endpoint.attach(link, line=line)
        self.reason = ""
        self._say("direct", "")
        self._tried("")
        return await self._watch(link, self._lost)

    async def _watch(self, link: Link, lost: asyncio.Future[str]) -> str:
        """Wait until the link is lost, or the node does not answer though something was sent."""
        silence = Silence(link)
        while not lost.done():
            await asyncio.wait({lost}, timeout=LOOK)
            if not lost.done() and silence.look():
                self.give_up("its node does not answer")
                silence = Silence(link)  # there may be nothing to go back to yet
        return lost.result()


class Again:
    """When it is tried again: soon for a while after it was lost, else after pauses that grow."""

    def __init__(self) -> None:
        self._pauses = Backoff(FIRST_AGAIN, LONGEST_AGAIN)
        self._short = 0
        self._soon_until = -math.inf

    def refused(self) -> None:
        """It could not be had."""
        self._pauses.ended(None)

    def lost(self, carried: float) -> None:
        """It carried for so many seconds."""
        self._short = 0 if carried >= SHORT else self._short + 1
        soon = self._short <= MOST_SHORT
        self._pauses = Backoff(LOST_AGAIN, LONGEST_AGAIN if soon else LONGEST_SHORT)
        self._pauses.failures = 1 if soon else self._short - MOST_SHORT + 1
        self._soon_until = time.monotonic() + SOON_FOR if soon else -math.inf

    @property
    def soon(self) -> bool:
        """Whether it may be back any moment."""
        return time.monotonic() < self._soon_until

    def pause(self) -> float:
        """Seconds until then."""
        return self._pauses.pause(LOST_AGAIN if self.soon else math.inf)


def _clause(error: KohakuRiverError) -> str:
    return error.message.rstrip(".")


class Silence:
    """Whether a link leads anywhere: the other side soon sends something after it was sent something, or was asked.

    The last bytes that came need not be the answer to the last that were sent. So the other side is asked once nothing
    comes any more.
    """

    def __init__(self, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock
        self._looked_at = clock()
        self._sent = link.out.given
        self._questions = QUESTIONS
        self._begin(self._looked_at)

    def _begin(self, now: float) -> None:
        self._received = self._link.watch.received
        self._since = now
        self._asked_at: float | None = None

    def look(self) -> bool:
        """Whether nothing came for too long. Asks the other side on the way there."""
        now, before = self._clock(), self._looked_at
        self._looked_at = now
        self._see_what_was_sent(now)
        if self._link.watch.received != self._received or now - before > QUIET:  # else it may be us who were asleep
            self._begin(now)
        elif self._asked_at is not None:
            return now - self._asked_at >= PATIENCE
        elif self._questions and now - self._since >= QUIET:
            self._asked_at = now
            self._questions -= 1
            self._link.send_message(PING, SESSION_ID, urgent=True)
            self._sent = self._link.out.given  # which is no news
        return False

    def _see_what_was_sent(self, now: float) -> None:
        if self._link.out.given == self._sent:
            return
        if not self._questions:  # nothing was to be waited for
            self._since = now
        self._sent, self._questions = self._link.out.given, QUESTIONS
