"""A host in the test's own process, and runners that do as the test says: what tests of the HTTP API run on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from kohakuriver.changes import Changes
from kohakuriver.host.app import create_app, goes_ahead
from kohakuriver.host.apps.serving import AppServer, Where
from kohakuriver.host.cookies import credential_of
from kohakuriver.host.parts import Services
from kohakuriver.host.services.access import Access
from kohakuriver.host.services.audit import AuditLog
from kohakuriver.host.services.authorize import Forwards
from kohakuriver.host.services.credentials import Credentials
from kohakuriver.host.services.device_logins import DeviceLogins
from kohakuriver.host.services.failures import Failures
from kohakuriver.host.services.feed import Feed
from kohakuriver.host.services.grants import Grants
from kohakuriver.host.services.groups import GroupsOfUsers
from kohakuriver.host.services.hosts import Hosts, Readiness
from kohakuriver.host.services.links import AppLinks
from kohakuriver.host.services.logins import Logins
from kohakuriver.host.services.logs import Logs
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.host.services.oidc import OidcLogins, Rules
from kohakuriver.host.services.oidc_provider import Provider
from kohakuriver.host.services.open_sessions import OpenSessions
from kohakuriver.host.services.people import People
from kohakuriver.host.services.reach import Reach
from kohakuriver.host.services.requests import Requests
from kohakuriver.host.services.runner_client import RunnerClient
from kohakuriver.host.services.tasks import Tasks
from kohakuriver.host.services.terminal_proxy import TerminalProxy
from kohakuriver.host.services.tunnel_proxy import TunnelProxy
from kohakuriver.host.services.volumes import UserVolumes
from kohakuriver.limits import Limits
from kohakuriver.proxies import Proxies
from kohakuriver.quotas import Offer, Quotas
from kohakuriver.runtime import cancel_all
from kohakuriver.session import ticket
from kohakuriver.store import (
    Accounts,
    Agents,
    Browsers,
    DeviceCodes,
    Groups,
    Identities,
    SessionCounts,
    Store,
    Volumes,
    apps_key,
    sqlite_url,
)
from kohakuriver.store.links import Links as StoredLinks
from kohakuriver.tls import ServerCertificate
from kohakuriver.tunnel.accept import TunnelRoute, serve_ws
from kohakuriver.tunnel.protocol import TUNNEL_V2
from kohakuriver.web.origin import Guard
from tests.support.databases import database_url
from tests.support.serving import serving

HEARTBEAT_SECONDS = 5.0


async def websocket_status(url: str, headers: dict[str, str]) -> int:
    """What who asks for a WebSocket is answered with."""
    try:
        async with connect(url, additional_headers=headers, subprotocols=[TUNNEL_V2], proxy=None):  # type: ignore[list-item]
            return 101
    except InvalidStatus as error:
        return error.response.status_code


class Clock:
    """The host's idea of the time, in seconds since the epoch."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class FakeRunner:
    """A node that answers the host as told, and remembers what it was asked: (method, path, body).

    `answers` are its answers to these paths, or to all requests of a method.
    """

    def __init__(self, host: HostUnderTest, name: str, *, user_processes: bool = True) -> None:
        self.host = host
        self.name = name
        self.user_processes = user_processes
        self.url = ""
        self.key = b""
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.tasks: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, tuple[int, dict[str, Any]]] = {}
        self.held = asyncio.Event()
        self.held.set()
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self._answer, methods=["GET", "POST", "DELETE"])

    async def _answer(self, request: Request, path: str) -> Response:
        content = await request.body()
        body = await request.json() if content else {}
        ticket.check(self.key, request.headers["authorization"].split()[1], node=self.name, scope="control")
        self.asked.append((request.method, f"/{path}", body))
        await self.held.wait()
        for told in (f"/{path}", request.method):
            if told in self.answers:
                status, answer = self.answers[told]
                return JSONResponse(answer, status)
        return JSONResponse(self._obey(request.method, path, body))

    def _obey(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        parts = path.split("/")
        if path == "api/node":
            return {"version": "1"}
        if method == "DELETE":
            return self.tasks.pop(parts[2]) if parts[1] == "tasks" else {}
        if len(parts) == 4:
            return self.change(parts[2], status={"stop": "stopped", "restart": "running"}[parts[3]], tunnel=False)
        self.tasks[body["container"]] = {"task_id": body["task_id"], "status": "running", "tunnel": False}
        return self.change(body["container"])

    def change(self, container: str, **values: Any) -> dict[str, Any]:
        """Change a task as it would by itself; the next heartbeat tells."""
        self.tasks[container] |= {**values, "revision": time.time_ns()}
        return self.tasks[container]

    async def register(
        self, *, instance: str = "", backends: tuple[str, ...] = ("process", "docker"), offer: Offer | None = None
    ) -> httpx.Response:
        body: dict[str, Any] = {
            "name": self.name,
            "url": self.url,
            "backends": backends,
            "version": "1",
            "instance": instance,
        }
        body |= {"offer": asdict(replace(offer or Offer(), user_processes=self.user_processes))}
        answer = await self.host.node.post("/api/nodes/register", json=body)
        if answer.status_code == 200:
            self.key = base64.b64decode(answer.json()["ticket_key"])
        return answer

    async def beat(self, **more: Any) -> httpx.Response:
        """Send one heartbeat."""
        body = {"tasks": list(self.tasks.values()), "traffic": {"sessions": 1}, **more}
        return await self.host.node.post(f"/api/nodes/{self.name}/heartbeat", json=body)


class HostUnderTest:
    """A host on a real socket. `user` (an admin), `node` and `nobody` are clients with and without a token."""

    def __init__(
        self,
        store: Store,
        accounts: Accounts,
        credentials: Credentials,
        clock: Clock,
        audit: AuditLog,
        limits: Limits,
        oidc: tuple[Provider, Rules] | None,
        key: bytes,
        where: Where | None,
        tls: bool,
        proxies: Proxies,
    ) -> None:
        self.public = None if where is None or where.public is None else where.public.geturl()
        self.store = store
        self.credentials = credentials
        self.audit = audit
        self.clock = clock
        self.stack = contextlib.AsyncExitStack()
        changes = self.changes = Changes[int]()
        self.runners = RunnerClient(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        self.nodes = Nodes(
            store,
            Reach(self.runners),
            heartbeat_seconds=HEARTBEAT_SECONDS,
            on_change=changes.notify,
            audit=audit,
            clock=clock,
        )
        self.tasks = Tasks(store, accounts, self.nodes, self.runners, changes, audit=audit, clock=clock)
        self.requests = Requests(rate=limits.max_requests, most=limits.max_under_way, audit=audit)
        self.revoked: list[tuple[str, ...]] = []
        self.counts = SessionCounts(store)
        self.grants = Grants(accounts, requests=self.requests, audit=audit, revoke=self._revoke, counts=self.counts)
        self.agents = Agents(store, accounts, clock=clock)
        self.hosts = Hosts(store, self.grants, self.nodes, changes, self.agents, clock=clock)
        self.readiness = Readiness(store)
        access = Access(store, accounts)
        self.forwards = Forwards(credentials, access, self.grants, store, self.nodes, self.tasks)
        self.proxy = TunnelProxy(
            authorize=self.forwards.authorize,
            authorize_terminal=self.forwards.authorize_terminal,
            credential=credential_of,
        )
        self.terminals = TerminalProxy(authorize=self.forwards.authorize_terminal, credential=credential_of)
        self.identities = Identities(store, clock=clock)
        self.people = People(accounts, self.identities, self.grants, clock=clock)
        self.logins = Logins(
            credentials, Browsers(store, clock=clock), self.grants, "kr-abcdefghijklmnopqrstuvwxyz.localhost"
        )
        self.devices = DeviceLogins(DeviceCodes(store, accounts, clock=clock), credentials, audit)
        self.oidc = oidc and OidcLogins(*oidc, self.identities, self.logins, credentials, self.grants, clock=clock)
        self.logs = Logs(self.grants, self.nodes, self.runners)
        trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.app_server = AppServer(
            key,
            where or Where(),
            store=store,
            credentials=credentials,
            logins=self.logins,
            forwards=self.forwards,
            trusted=trusted,
            limits=limits,
            tls=tls,
            proxies=proxies,
            clock=clock,
        )
        self.tasks.variables = self.app_server.apps.addresses.variables
        self.sessions = OpenSessions(self.grants)
        self.feed = Feed(store, accounts, self.tasks, self.nodes, self.sessions, changes)
        self.guard = Guard(elsewhere=self.app_server.owns, names=where.names if where else ())
        self.app = create_app(
            Services(
                credentials,
                access,
                self.people,
                GroupsOfUsers(Groups(store, clock=clock), self.grants),
                self.nodes,
                self.tasks,
                self.forwards,
                self.requests,
                audit,
                self.logs,
                self.logins,
                self.devices,
                self.oidc,
                self.app_server.apps,
                AppLinks(StoredLinks(store, clock=clock), self.app_server.apps, self.grants, clock=clock),
                self.sessions,
                self.feed,
                self.readiness,
                UserVolumes(Volumes(store, clock=clock), self.nodes, self.runners, audit),
            ),
            self.guard,
            proxies,
        )
        self.app.state.shares_name = bool(where and where.shares_name)
        self.proxies = proxies
        self.url = ""
        self.admin_token = ""
        self.node: httpx.AsyncClient
        self.user: httpx.AsyncClient
        self.nobody: httpx.AsyncClient

    async def _revoke(self, *of: str) -> None:
        self.revoked.append(of)

    @property
    def tunnel_routes(self) -> list[TunnelRoute]:
        """All its WebSocket paths."""
        return [*self.proxy.routes(), *self.terminals.routes()]

    def client(self, token: str | None) -> httpx.AsyncClient:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # Certificates are not needed here, and loading them would take most of a test's time.
        client = httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False, timeout=60, verify=False)
        self.stack.push_async_callback(client.aclose)
        return client

    async def person(self, name: str, role: str = "user", **token: Any) -> tuple[httpx.AsyncClient, str]:
        """A new user's client and token; `token` is about the latter, as the API takes it."""
        assert (await self.user.post("/api/users", json={"name": name, "role": role})).status_code == 201
        secret = await self.token(user=name, name="first", **token)
        return self.client(secret), secret

    async def token(self, **body: Any) -> str:
        """A new token, made by an admin."""
        answer = await self.user.post("/api/tokens", json=body)
        assert answer.status_code == 201, answer.text
        secret: str = answer.json()["token"]
        return secret

    async def runner(
        self,
        name: str = "n1",
        *,
        backends: tuple[str, ...] = ("process", "docker"),
        offer: Offer | None = None,
        user_processes: bool = True,
    ) -> FakeRunner:
        """A registered node that serves."""
        runner = FakeRunner(self, name, user_processes=user_processes)
        runner.url = await self.stack.enter_async_context(serving(runner.app))
        assert (await runner.register(backends=backends, offer=offer)).status_code == 200
        return runner

    async def create(self, **body: Any) -> dict[str, Any]:
        """A task, made through the API: a process where no image is given."""
        how = {} if "image" in body else {"backend": "process"}
        answer = await self.user.post("/api/tasks", json={**how, **body})
        assert answer.status_code == 201, answer.text
        task: dict[str, Any] = answer.json()
        return task


async def _begin(directory: Path) -> None:
    """The tables and the first tokens: to make them takes longer than most tests."""
    if not _new:
        made = Path(tempfile.mkdtemp(dir=Path.home()))
        store = await Store.open(sqlite_url(made / "host.db"))
        await Credentials(Accounts(store, defaults=Quotas())).load_or_make(made)
        await store.close()
        _new.extend(made.iterdir())
    if not (directory / "host.db").exists():
        for path in _new:
            shutil.copy2(path, directory)


_new: list[Path] = []


@contextlib.asynccontextmanager
async def a_host(
    directory: Path,
    *,
    allow_anonymous: bool = False,
    limits: Limits | None = None,
    oidc: tuple[Provider, Rules] | None = None,
    where: Where | None = None,
    certificate: ServerCertificate | None = None,
    proxies: Sequence[str] = (),
) -> AsyncIterator[HostUnderTest]:
    """A host with its state in `directory`, perhaps with an OpenID provider; `where` browsers find it and its apps.

    It believes `proxies`.

    On SQLite a new one begins with a copy of what the first of this process made.
    """
    url = database_url(directory)
    if url == sqlite_url(directory / "host.db"):
        await _begin(directory)
    store = await Store.open(url)
    clock = Clock()
    limits = limits or Limits(max_requests=0)
    accounts = Accounts(store, defaults=Quotas.by_default(limits), clock=clock)
    audit = AuditLog(directory / "audit.jsonl", most=limits.max_audit)
    failures = Failures(rate=limits.max_failures)
    credentials = Credentials(accounts, allow_anonymous=allow_anonymous, audit=audit, failures=failures, clock=clock)
    await credentials.load_or_make(directory)
    tls = certificate is not None
    key = await apps_key(store)
    host = HostUnderTest(store, accounts, credentials, clock, audit, limits, oidc, key, where, tls, Proxies(proxies))
    async with host.stack:
        host.stack.callback(audit.close)
        host.stack.push_async_callback(store.close)
        host.stack.push_async_callback(host.runners.close)
        beside = (host.tasks.run(), host.feed.run(), host.app_server.run(host.changes))
        running = [asyncio.ensure_future(each) for each in beside]
        host.stack.push_async_callback(cancel_all, running)
        ws = serve_ws(host.tunnel_routes, host.guard, proxies=host.proxies)
        host.url = await host.stack.enter_async_context(
            serving(host.app, ws, host.app_server.front, certificate, goes_ahead)
        )
        host.stack.push_async_callback(host.app_server.close)
        host.admin_token = (directory / "admin-token").read_text().strip()
        host.user = host.client(host.admin_token)
        host.node = host.client((directory / "node-token").read_text().strip())
        host.nobody = host.client(None)
        yield host
