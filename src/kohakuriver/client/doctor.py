"""Why a host, or a task on it, can't be reached from here: each step of the way by itself, with what to do about it.

`examine` goes along the way as a command does: settings, proxy, name, connection, TLS, HTTP, clock, versions, login,
WebSocket, full packets; and with a task its node, its state and its tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kohakuriver import tls
from kohakuriver.client.host import HostClient, Task
from kohakuriver.client.hosts import Hosts
from kohakuriver.config import Settings, path_segment
from kohakuriver.errors import (
    NOT_OUR_ANSWER,
    HostUnreachableError,
    KohakuRiverError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from kohakuriver.http_proxy import HttpProxy, connect_through, http_proxy
from kohakuriver.no_connection import reason
from kohakuriver.resolve import connected, resolving
from kohakuriver.text import json_of, one_line
from kohakuriver.tunnel.dial import open_session

__all__ = ["Finding", "examine"]

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 10.0
# A ticket and a certificate allow for less; a token's end is told by the host's clock.
MOST_SKEW = 30.0
SOON = 14 * 86400.0
MOST_NAMES = 8
"""Of a certificate, that are told."""
FULL = 6000
"""Bytes of a header by which a request takes several packets of full size."""

OF_TLS = "Check that the URL's scheme, name and port are those of the host."

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Finding:
    """One step: `ok`, or what is wrong and what to do about it. `exit_code` is what a command would end with for it.

    A step that is `ok` may have advice, too: what will be wrong soon, or only for some.
    """

    check: str
    ok: bool
    message: str
    advice: str = ""
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Wrong(Exception):
    """A step that failed."""

    def __init__(self, message: str, advice: str, exit_code: int = HostUnreachableError.exit_code) -> None:
        super().__init__(message)
        self.message, self.advice, self.exit_code = message, advice, exit_code


T = TypeVar("T")
Step = Callable[[], Awaitable["tuple[str, str]"]]


async def examine(settings: Settings, task: str | None, version: str) -> AsyncIterator[Finding]:
    """What is found, step by step. Where one fails that all that follows needs, it is the last.

    Args:
        version: this program's own.
    """
    way = _Way(settings, version)
    steps: list[tuple[str, Step, bool]] = [
        ("proxy", way.proxy, True),
        ("name", way.name, True),
        ("connection", way.connection, True),
        *([("tls", way.tls, True)] if way.secure else []),
        ("host", way.host, True),
        ("clock", way.clock, False),
        ("version", way.version, False),
        ("packets", way.packets, False),
        ("websocket", way.websocket, False),
        ("login", way.login, True),
        *([("task", lambda: way.task(task), True), ("node", way.node, True)] if task else []),
        *([("tunnel", way.tunnel, True)] if task else []),
    ]
    for check, step, needed in steps:
        finding = await _tried(check, step)
        yield finding
        if needed and not finding.ok:
            return


async def _tried(check: str, step: Step) -> Finding:
    try:
        message, advice = await step()
    except _Wrong as wrong:
        return Finding(check, False, wrong.message, wrong.advice, wrong.exit_code)
    except KohakuRiverError as error:
        message, _, advice = error.message.partition("; ")
        return Finding(check, False, message.rstrip("."), advice[:1].upper() + advice[1:], error.exit_code)
    return Finding(check, True, message, advice)


class _Way:
    """The way to a host, as far as it has been gone."""

    def __init__(self, settings: Settings, version: str) -> None:
        self._settings = settings
        self._own = version
        parts = urlsplit(settings.host)
        self.secure = parts.scheme == "https"
        self._name = parts.hostname or ""
        self._port = parts.port or _PORTS[parts.scheme]
        self._proxy: HttpProxy | None = None
        self._theirs = ""
        self._segment = 0
        self._headers: Mapping[str, str] = {}
        self._asked_at = self._took = 0.0
        self._task: Task | None = None

    # -- to the host -------------------------------------------------------------------------------------------

    async def proxy(self) -> tuple[str, str]:
        self._proxy = http_proxy(self._settings.host)
        if self._proxy is None:
            return f"none on the way to {self._settings.host}", ""
        shown = " with a name and a password" if self._proxy.credentials else ""
        return f"{self._proxy.url}{shown}", ""

    async def name(self) -> tuple[str, str]:
        who = (self._proxy.host, self._proxy.port) if self._proxy else (self._name, self._port)
        try:
            with resolving():
                found = await asyncio.get_running_loop().getaddrinfo(*who, type=socket.SOCK_STREAM)
        except OSError as error:
            what = "the proxy's name" if self._proxy else "the host's name"
            raise _Wrong(
                f"{what} {who[0]} has no address: {error.strerror or error}",
                f"Check the name in {'the proxy setting' if self._proxy else 'the URL'}, and this machine's DNS.",
            ) from error
        return f"{who[0]} is {', '.join(dict.fromkeys(str(each[4][0]) for each in found))}", ""

    async def connection(self) -> tuple[str, str]:
        began = time.monotonic()
        with await self._connected() as sock:
            took = time.monotonic() - began
            self._segment = _segment(sock)
        by = f", through {self._proxy.url}" if self._proxy else ""
        return f"{self._name} port {self._port} answers in {1000 * took:.1f} ms{by}", ""

    async def _connected(self) -> socket.socket:
        """A TCP connection to the host, by a tunnel of the proxy where there is one. Raises what is wrong.

        A proxy that is itself spoken to by TLS is as far as it goes: what lies behind it the requests show.
        """
        proxy = self._proxy
        if proxy is not None and not proxy.secure:
            return await _in_thread(lambda: connect_through(proxy, self._name, self._port, CONNECT_SECONDS))
        host, port = (self._name, self._port) if proxy is None else (proxy.host, proxy.port)
        try:
            return await _in_thread(lambda: connected(host, port, CONNECT_SECONDS))
        except OSError as error:
            raise _Wrong(f"{host} port {port} can't be reached: {reason(error)}", _why_not(error)) from error

    async def tls(self) -> tuple[str, str]:
        context = tls.client_context(self._settings.host, self._settings.ca_file)
        if context is None or (self._proxy is not None and self._proxy.secure):
            return "not looked at by itself: the proxy is spoken to by TLS, too", ""
        sock = await self._connected()
        try:
            secured: ssl.SSLSocket = await _in_thread(lambda: context.wrap_socket(sock, server_hostname=self._name))
        except (OSError, ValueError) as error:
            sock.close()
            what, _, advice = (tls.reason(error) or str(error)).partition("; ")
            if tls.is_for_another(error):
                what = f"its certificate is for {await self._certified()}, and not for {self._name}"
            raise _Wrong(what, f"{advice[:1].upper()}{advice[1:]}." if advice else OF_TLS) from error
        with secured:
            certificate, spoken = secured.getpeercert() or {}, secured.version()
        until = ssl.cert_time_to_seconds(str(certificate.get("notAfter")))
        days = (until - time.time()) / 86400
        soon = "It ends soon: its administrator must renew it." if until - time.time() < SOON else ""
        return f"{spoken}, the certificate is trusted and good for {days:.0f} days", soon

    async def _certified(self) -> str:
        """The names that the host's certificate has, for people to read."""
        context = tls.client_context(self._settings.host, self._settings.ca_file)
        assert context is not None
        context.check_hostname = False
        try:
            sock = await self._connected()
            with await _in_thread(lambda: context.wrap_socket(sock, server_hostname=self._name)) as secured:
                names: Any = (secured.getpeercert() or {}).get("subjectAltName", ())
        except (OSError, ValueError, _Wrong):
            return "another name"
        told = [one_line(name) for _, name in names[:MOST_NAMES]]
        return ", ".join(told) + (" and more" if len(names) > MOST_NAMES else "") if told else "no name at all"

    async def host(self) -> tuple[str, str]:
        answer, found = await self._get("/health"), None
        with contextlib.suppress(ValueError):  # a page of something else
            found = json_of(answer)
        if not isinstance(found, dict) or "version" not in found:
            raise _Wrong(f"what answers at {self._settings.host} is no KohakuRiver host", "Check the host's URL.")
        self._theirs = str(found["version"])
        return f"a KohakuRiver host answers at {self._settings.host} in {1000 * self._took:.1f} ms", ""

    async def clock(self) -> tuple[str, str]:
        told = self._headers.get("date")
        if told is None:
            return "the host does not tell its time", ""
        with contextlib.suppress(ValueError, TypeError):
            # It tells whole seconds, at some moment of the request.
            skew = self._asked_at + self._took / 2 - (email.utils.parsedate_to_datetime(told).timestamp() + 0.5)
            if abs(skew) <= MOST_SKEW:
                apart = "no more than 2 s" if abs(skew) <= 2 else f"{abs(skew):.0f} s"
                return f"{apart} apart from the host's", ""
            which = "ahead of" if skew > 0 else "behind"
            raise _Wrong(
                f"this machine's clock is {abs(skew):.0f} s {which} the host's",
                "Set the one that is wrong (NTP): certificates and tokens are judged by it.",
                KohakuRiverError.exit_code,
            )
        return "the host's time makes no sense", ""

    async def version(self) -> tuple[str, str]:
        if self._theirs == self._own:
            return f"{self._own} here and at the host", ""
        return (
            f"{self._own} here, {self._theirs} at the host",
            "They work together as far as both can; update the older one.",
        )

    async def packets(self) -> tuple[str, str]:
        """A path that loses packets of full size, and tells nobody, lets through all but what matters."""
        advice = (
            "Packets of full size seem to be lost on the way: a VPN or tunnel with a smaller MTU, and a firewall that "
            "drops ICMP. Try a smaller MTU on this machine's interface, 1280 for example."
        )
        try:
            body = await self._get("/openapi.json", {"X-Padding": "x" * FULL})
        except HostUnreachableError as error:
            if error.code == NOT_OUR_ANSWER:  # something between takes no such request, so it has come there
                return f"not known: {error.message}", ""
            raise _Wrong("a small request is answered and a large one is not", advice) from error
        segment = f", {self._segment} bytes a packet" if self._segment else ""
        return f"{FULL} bytes there and {len(body)} back in {1000 * self._took:.1f} ms{segment}", ""

    async def websocket(self) -> tuple[str, str]:
        """By a task that can't be: the refusal is the host's own where the upgrade has come through."""
        try:
            await self._session("0", "1")
        except HostUnreachableError as error:
            dropped = error.code in ("upgrade_required", NOT_OUR_ANSWER)
            if error.status and not dropped:  # the host itself says what is wrong with it
                return "upgrades come through", ""
            raise _Wrong(
                "a proxy on the way lets no WebSocket upgrades through" if dropped else error.message.rstrip("."),
                "A reverse proxy must pass on the headers Upgrade and Connection; one between here and the host must "
                "let CONNECT through. HTTPS gets through most.",
            ) from error
        except KohakuRiverError:
            pass
        return "upgrades come through", ""

    async def login(self) -> tuple[str, str]:
        if not self._settings.token:
            raise _Wrong(
                f"there is no token for {self._settings.host}",
                "Log in with `kohakuriver auth login`.",
                UnauthenticatedError.exit_code,
            )
        async with self._client() as client:
            who = await client.whoami()
        ends = who.token.expires_at
        return f"{who.user} ({who.role}), by the token {who.token.name or who.token.id}", (
            f"It ends at {ends}." if ends else ""
        )

    # -- to a task ---------------------------------------------------------------------------------------------

    async def task(self, name: str) -> tuple[str, str]:
        async with self._client() as client:
            found = self._task = await client.task(name)
        if found.status != "running":
            why = f": {found.message}" if found.message else ""
            raise _Wrong(
                f"task {found.name} is {found.status}{why}",
                f"`kohakuriver vps restart {found.name}` starts it, `… logs {found.name}` has what it said.",
                UnavailableError.exit_code,
            )
        return f"{found.name} ({found.task_id}) is running on {found.node}", ""

    async def node(self) -> tuple[str, str]:
        assert self._task is not None
        async with self._client() as client:
            nodes = {node.name: node for node in await client.nodes()}
        node = nodes.get(self._task.node)
        if node is None:
            raise _Wrong(f"the host knows no node {self._task.node}", "Ask its administrator.", NotFoundError.exit_code)
        if node.status != "online":
            why = f": {node.reason}" if node.reason else ""
            raise _Wrong(
                f"node {node.name} is {node.status}{why}",
                "Its runner must run, reach the host, and be reached by it: ask its administrator.",
                UnavailableError.exit_code,
            )
        return f"{node.name} is online, version {node.version}", ""

    async def tunnel(self) -> tuple[str, str]:
        """A session as a forward has it, to a port that nobody need listen on."""
        assert self._task is not None
        began = time.monotonic()
        await self._session(str(self._task.task_id), "1")
        took = time.monotonic() - began
        how = "its tunnel is connected" if self._task.tunnel else "its node dials it, without a tunnel client"
        return f"{how}; a session opens in {1000 * took:.0f} ms", ""

    # -- asking ------------------------------------------------------------------------------------------------

    def _client(self) -> HostClient:
        return HostClient(self._settings)

    async def _session(self, task: str, port: str) -> None:
        path = f"/ws/forward/{path_segment(task)}/{port}?proto=tcp&ports={port}"
        link = await Hosts(replace(self._settings, other_hosts=())).reach(path, open_session)
        link.close()

    async def _get(self, path: str, headers: Mapping[str, str] | None = None) -> bytes:
        """The body of an answer. Raises KohakuRiverError for one that is none, and where it is late."""
        async with self._client() as client:
            self._asked_at = time.time()
            began = time.monotonic()
            try:
                self._headers, body = await asyncio.wait_for(client.raw(path, headers or {}), ANSWER_SECONDS)
            except asyncio.TimeoutError as error:
                raise HostUnreachableError(
                    f"{self._settings.host} did not answer within {ANSWER_SECONDS:g} s."
                ) from error
            self._took = time.monotonic() - began
        return body


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, work)


def _segment(sock: socket.socket) -> int:
    """How much of what is sent goes into one packet, 0 where the system does not tell."""
    with contextlib.suppress(AttributeError, OSError):
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    return 0


def _why_not(error: OSError) -> str:
    """What to do about a connection that was not made."""
    if isinstance(error, ConnectionRefusedError):
        return "Nothing listens there: check that the host runs, and the port in its URL."
    if isinstance(error, TimeoutError):
        return "Nothing answers: check that the machine is on, and that no firewall is between; a VPN may be needed."
    return "Check this machine's network; a VPN may be needed."
