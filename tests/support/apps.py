"""A host and a runner that serve apps in the test's own process, and a browser as far as both see of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
from websockets.asyncio.client import ClientConnection, connect

from kohakuriver.relay.direct import DirectTarget
from kohakuriver.relay.tunnel_server import TunnelServer
from kohakuriver.session import ticket
from kohakuriver.tunnel.accept import serve_ws
from kohakuriver.tunnel.protocol import MARK
from tests.support.host_only import FakeRunner, HostUnderTest, a_host
from tests.support.peers.cuttable import Relay, relay
from tests.support.serving import serving

__all__ = ["Stage", "Surfer", "apps", "unchecked"]


async def _no_tunnels(*_: object) -> str:
    raise AssertionError("the runner dials the services itself here")


class Surfer:
    """A browser: it keeps cookies by hosts and paths, follows redirections, and sends forms that send themselves.

    A cookie with SameSite=Lax does not go with what a page of another site posts.
    """

    def __init__(self, host: HostUnderTest) -> None:
        self.host = host
        self.main = host.public or f"http://{host.logins.name}:{urlsplit(host.url).port}"
        self.jar: dict[str, dict[str, str]] = {}
        self.been: list[str] = []
        self._http: dict[str, httpx.AsyncClient] = {}

    def connections(self, url: str) -> httpx.AsyncClient:
        """Those to the host of a URL: they are no other's."""
        netloc = urlsplit(url).netloc
        if netloc not in self._http:
            self._http[netloc] = self.host.client(None)
        return self._http[netloc]

    def cookies(self, url: str) -> dict[str, str]:
        """Those that the host of a URL gets: where it has some of a path that the URL is under, these."""
        places = self._jars(url)
        return self.jar.setdefault(max(places, key=len) if places else urlsplit(url).hostname or "", {})

    def _jars(self, url: str) -> list[str]:
        parts = urlsplit(url)
        here = f"{parts.hostname}{parts.path}/"
        return [place for place in self.jar if here.startswith(f"{place.rstrip('/')}/")]

    async def ask(
        self,
        url: str,
        method: str = "GET",
        *,
        site: str | None = "none",
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> httpx.Response:
        """One answer. `site` is what the browser says of the page that asks; a GET is somebody who goes there."""
        parts = urlsplit(url)
        sent = {"Host": parts.netloc, "Accept": "text/html"}
        sent |= (
            {} if site is None else {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        )
        sent |= headers or {}
        kept = {name: value for place in self._jars(url) for name, value in self.jar[place].items()}
        cookies = {} if method == "POST" and site == "cross-site" else kept
        if cookies and "Cookie" not in sent:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        http = self.connections(url)
        answer = await http.request(method, path, headers=sent, **more)
        http.cookies.clear()
        self.been.append(f"{method} {url}")
        for set_cookie in answer.headers.get_list("set-cookie"):
            name, _, value = set_cookie.partition(";")[0].partition("=")
            under = re.search(r";\s*Path=(/[^;]*)", set_cookie, re.IGNORECASE)
            place = f"{parts.hostname}{under[1] if under else ''}".rstrip("/")
            jar = self.jar.setdefault(place, {})
            jar[name] = value.strip('"')
            if not jar[name] or "Max-Age=0" in set_cookie:
                del jar[name]
        return answer

    async def go(self, url: str, *, site: str = "none", until: str = "") -> httpx.Response:
        """Where a link leads in the end; or the answer with which it would go on to a URL with `until` in it."""
        answer = await self.ask(url, site=site)
        for _ in range(12):
            form = re.search(r'<form method="post" action="([^"]*)">\s*<input[^>]* value="([^"]*)">', answer.text)
            there = answer.headers.get("location") or (form and "<script>" in answer.text and unescape(form[1]))
            if not there or (until and until in urljoin(url, there)):
                return answer
            before, url = url, urljoin(url, there)
            same = urlsplit(before).netloc == urlsplit(url).netloc
            if site != "none":  # what a person has asked for stays that, wherever it leads
                site = "same-origin" if same and site == "same-origin" else "cross-site"
            if form is None or answer.is_redirect:
                answer = await self.ask(url, site=site)
                continue
            site = "same-origin" if same else "cross-site"
            answer = await self.ask(url, "POST", site=site, data={"code": unescape(form[2])})
        raise AssertionError(f"it goes on for ever: {self.been}")

    async def log_in(self, token: str) -> None:
        answer = await self.fill_in(token)
        assert answer.status_code == 303, answer.text

    async def fill_in(self, token: str, **fields: str) -> httpx.Response:
        """Send the form of the page that asks for a token; `fields` are those that are not seen."""
        headers, data = {"Origin": self.main}, {"token": token, **fields}
        return await self.ask(f"{self.main}/login", "POST", site="same-origin", headers=headers, data=data)


def unchecked() -> ssl.SSLContext:
    """TLS that asks for no certificate: whose it is, other tests look at."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@dataclass
class Stage:
    """A host with a node, whose runner dials what listens on this machine; the host reaches it by `link`."""

    host: HostUnderTest
    runner: FakeRunner
    server: TunnelServer
    link: Relay
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """Where the host listens."""
        port = urlsplit(self.host.url).port
        assert port
        return port

    def app(self, task: dict[str, Any], port: int) -> str:
        """The origin of an app; where it is under a prefix, with that."""
        main = f"{self.host.logins.name}:{self.port}"
        address = self.host.app_server.apps.addresses.of(task["task_id"], task["name"], port, main)
        assert address
        return address.place.base

    async def surfer(self, token: str | None = None) -> Surfer:
        """A browser that is logged in, as an admin where no token is given."""
        surfer = Surfer(self.host)
        await surfer.log_in(token or self.host.admin_token)
        return surfer

    @contextlib.asynccontextmanager
    async def websocket(self, surfer: Surfer, url: str, **headers: str) -> AsyncIterator[ClientConnection]:
        """A WebSocket that a page of that address opens."""
        parts = urlsplit(url)
        fields = {"Host": parts.netloc, "Origin": f"{parts.scheme}://{parts.netloc}"} | headers
        if surfer.cookies(url):
            fields["Cookie"] = "; ".join(f"{name}={value}" for name, value in surfer.cookies(url).items())
        uri = f"{parts.scheme.replace('http', 'ws')}://{parts.netloc}{parts.path}"
        at: dict[str, Any] = {"host": "127.0.0.1", "port": self.port}
        if parts.scheme == "https":
            at["ssl"] = unchecked()
        origin = fields.pop("Origin")
        del fields["Host"]
        async with connect(uri, additional_headers=fields, origin=origin or None, proxy=None, **at) as opened:  # type: ignore[arg-type]
            yield opened


@contextlib.asynccontextmanager
async def apps(directory: Path, **how: Any) -> AsyncIterator[Stage]:
    """All of that; `how` is as `a_host` takes it."""
    async with a_host(directory, **how) as host:
        runner = FakeRunner(host, "n1")
        server = TunnelServer(
            allow_anonymous=False,
            check_tunnel=_no_tunnels,
            check_ticket=lambda shown: ticket.check(runner.key, shown, node="n1", scope="forward"),
            check_terminal_ticket=lambda shown: ticket.check(runner.key, shown, node="n1", scope="terminal"),
            target_of=lambda _: DirectTarget("127.0.0.1"),
            mark=lambda user, container: hashlib.sha256(f"{user} {container}".encode()).digest()[:MARK],
            on_tunnel_change=lambda container, connected: None,
            on_trouble=lambda container, sentence, _: None,
        )
        url = await host.stack.enter_async_context(serving(runner.app, serve_ws(server.routes())))
        host.stack.push_async_callback(server.close)
        link = await host.stack.enter_async_context(relay(lambda: int(url.rpartition(":")[2])))
        runner.url = f"http://127.0.0.1:{link.port}"
        assert (await runner.register()).status_code == 200
        checking = asyncio.ensure_future(host.grants.run())
        try:
            yield Stage(host, runner, server, link)
        finally:
            checking.cancel()
