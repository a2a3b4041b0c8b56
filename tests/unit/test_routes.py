"""Who gets in where: every path and method of host and runner, tried with every kind of credential, right and wrong.

The table of tries is made from the programs' own routes. A route that no rule here speaks of fails the test.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jwt
import pytest
from fastapi import FastAPI

from kohakuriver.host.agents.api import agents_api
from kohakuriver.host.agents.entry import AgentEntry
from kohakuriver.host.agents.node import AgentNode
from kohakuriver.host.services.oidc import EVERYBODY, Rules
from kohakuriver.host.services.oidc_provider import Provider
from kohakuriver.limits import Limits
from kohakuriver.relay.open_ports import OpenPorts
from kohakuriver.relay.tunnel_server import TunnelServer
from kohakuriver.runner import app as runner_app
from kohakuriver.runner.services.registration import NodeIdentity, Registration
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.runner.services.task_book import TaskBook
from kohakuriver.runner.services.tasks import TaskManager
from kohakuriver.runner.services.terminal import TerminalServer
from kohakuriver.runner.services.tunnel_guard import TunnelGuard
from kohakuriver.session import ticket
from kohakuriver.tunnel.accept import Peer, TunnelRoute, serve_ws
from kohakuriver.tunnel.protocol import CLIENT_HEADER
from kohakuriver.web.app import new_app
from kohakuriver.web.origin import Guard
from tests.support.browser import Browser, link_of
from tests.support.host_only import HostUnderTest, a_host, websocket_status
from tests.support.serving import serving

Run = Callable[[Coroutine[Any, Any, None]], None]
Route = tuple[str, str]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")

# What a rule is: what the credentials that it names are answered with. Whatever a rule does not name is refused with
# 401: no credential, and one that was never good for anything here. "in" is any answer but 401 and 403.
Rule = dict[str, str]
OPEN: Rule = {}
ALL_USERS = ("admin", "owner", "shared", "stranger")
NOBODY: Rule = {}  # 401 for all: what opens it is no credential
BY_USERS: Rule = dict.fromkeys(ALL_USERS, "in")
BY_ADMINS: Rule = BY_USERS | dict.fromkeys(("owner", "shared", "stranger"), "403")
BY_WHO_MAY_USE: Rule = BY_USERS | {"stranger": "403"}
BY_OWNERS: Rule = BY_USERS | {"stranger": "403", "shared": "403"}
# Of the host's pages: only a form of its own changes something, whatever credential comes along.
BY_OWN_PAGES: Rule = {"own page": "in"}
# Whoever is not logged in with a browser is sent to do that, and then it is asked whose the task is.
BY_VISITORS: Rule = {"stranger's browser": "403"}
NO_BROWSER: Rule = {f"{who}'s browser": "403" for who in ALL_USERS}
BY_TOKENS: Rule = BY_USERS | NO_BROWSER
BY_NODES: Rule = {"node": "in", "this node": "in", "other node": "403"}

HOST_RULES: dict[Route, Rule] = {
    ("GET", "/health"): OPEN,
    ("GET", "/health/live"): OPEN,
    ("GET", "/health/ready"): OPEN,
    ("GET", "/"): OPEN,
    ("GET", "/plain"): OPEN,
    ("GET", "/assets/{name}"): OPEN,
    ("GET", "/login"): OPEN,
    ("POST", "/login"): BY_OWN_PAGES,
    ("POST", "/logout"): BY_OWN_PAGES,
    ("POST", "/login/oidc"): BY_OWN_PAGES,
    ("GET", "/login/oidc/back"): NOBODY,
    ("GET", "/device"): OPEN,
    ("POST", "/device"): BY_OWN_PAGES,
    ("POST", "/api/auth/device"): OPEN,
    ("POST", "/api/auth/device/token"): OPEN,
    ("GET", "/open/{task}/{port}"): BY_VISITORS,
    ("GET", "/enter-app"): OPEN,
    ("GET", "/openapi.json"): OPEN,
    ("GET", "/docs"): OPEN,
    ("GET", "/api/auth"): BY_USERS,
    ("POST", "/api/auth/link"): BY_TOKENS,
    ("GET", "/api/users"): BY_ADMINS,
    ("POST", "/api/users"): BY_ADMINS,
    ("DELETE", "/api/users/{name}"): BY_ADMINS,
    ("PUT", "/api/users/{name}/oidc"): BY_ADMINS,
    ("DELETE", "/api/users/{name}/oidc"): BY_ADMINS,
    ("GET", "/api/users/{name}/limits"): BY_ADMINS,
    ("PATCH", "/api/users/{name}/limits"): BY_ADMINS,
    ("GET", "/api/groups"): BY_USERS,
    ("POST", "/api/groups"): BY_ADMINS,
    ("PATCH", "/api/groups/{group}"): BY_ADMINS,
    ("DELETE", "/api/groups/{group}"): BY_ADMINS,
    ("GET", "/api/tokens"): BY_USERS,
    ("POST", "/api/tokens"): BY_USERS,
    ("DELETE", "/api/tokens/{token}"): BY_USERS,
    ("GET", "/api/volumes"): BY_USERS,
    ("DELETE", "/api/volumes/{name}"): BY_USERS,
    ("GET", "/api/audit"): BY_ADMINS,
    ("GET", "/api/sessions"): BY_USERS,
    ("GET", "/api/events"): BY_USERS,
    ("GET", "/api/nodes"): BY_USERS,
    ("POST", "/api/nodes/register"): BY_NODES,
    ("POST", "/api/nodes/{name}/heartbeat"): BY_NODES,
    ("POST", "/api/nodes/{name}/cordon"): BY_ADMINS,
    ("POST", "/api/nodes/{name}/uncordon"): BY_ADMINS,
    ("DELETE", "/api/nodes/{name}"): BY_ADMINS,
    ("GET", "/api/tasks"): BY_USERS,
    ("POST", "/api/tasks"): BY_USERS,
    ("POST", "/api/tasks/adopt"): BY_ADMINS,
    ("GET", "/api/tasks/{task}"): BY_WHO_MAY_USE,
    ("GET", "/api/status/{task}"): BY_WHO_MAY_USE,
    ("GET", "/api/tasks/{task}/wait"): BY_WHO_MAY_USE,
    ("POST", "/api/tasks/{task}/ssh-pass"): BY_WHO_MAY_USE | NO_BROWSER,
    ("GET", "/api/tasks/{task}/agent"): BY_OWNERS,
    ("GET", "/api/tasks/{task}/answers"): BY_WHO_MAY_USE,
    ("GET", "/api/tasks/{task}/logs"): BY_WHO_MAY_USE,
    ("GET", "/api/tasks/{task}/ports"): BY_WHO_MAY_USE,
    ("POST", "/api/tasks/{task}/stop"): BY_OWNERS,
    ("POST", "/api/tasks/{task}/restart"): BY_OWNERS,
    ("POST", "/api/tasks/{task}/extend"): BY_OWNERS,
    ("POST", "/api/tasks/{task}/web"): BY_OWNERS,
    ("DELETE", "/api/tasks/{task}"): BY_OWNERS,
    ("POST", "/api/tasks/{task}/shares"): BY_OWNERS,
    ("DELETE", "/api/tasks/{task}/shares/{user}"): BY_OWNERS,
    ("POST", "/api/tasks/{task}/links"): BY_OWNERS,
    ("GET", "/api/tasks/{task}/links"): BY_OWNERS,
    ("DELETE", "/api/tasks/{task}/links/{link}"): BY_OWNERS,
    ("WS", "/ws/forward/{task_id}/{port}"): BY_WHO_MAY_USE,
    ("WS", "/ws/task/{task_id}/terminal"): BY_WHO_MAY_USE,
}

CONTROL: Rule = {"control": "in", "control of another container": "403", "forward": "403", "terminal": "403"}
CONTROL_OF_NONE: Rule = CONTROL | {"control of another container": "in"}
NO_TOKEN_OF_THIS_CONTAINER = (
    *("garbage", "user", "node", "container of another", "control", "forward", "forward of another container"),
    *("terminal", "terminal of another container", "another key", "another node", "expired", "too long", "used"),
)

RUNNER_RULES: dict[Route, Rule] = {
    ("GET", "/health"): OPEN,
    ("GET", "/api/node"): CONTROL_OF_NONE,
    ("GET", "/api/tasks"): CONTROL_OF_NONE,
    ("POST", "/api/tasks"): CONTROL,
    ("POST", "/api/tasks/adopt"): CONTROL,
    ("GET", "/api/tasks/{container}"): CONTROL,
    ("GET", "/api/tasks/{container}/agent"): CONTROL,
    ("GET", "/api/tasks/{container}/answers"): CONTROL,
    ("GET", "/api/tasks/{container}/logs"): CONTROL,
    ("GET", "/api/tasks/{container}/ports"): CONTROL,
    ("POST", "/api/tasks/{container}/stop"): CONTROL,
    ("POST", "/api/tasks/{container}/restart"): CONTROL,
    ("POST", "/api/tasks/{container}/extend"): CONTROL,
    ("POST", "/api/tasks/{container}/revoke"): CONTROL,
    ("POST", "/api/tasks/{container}/token"): CONTROL,
    ("DELETE", "/api/tasks/{container}"): CONTROL,
    ("DELETE", "/api/volumes/{volume}"): dict.fromkeys(CONTROL_OF_NONE, "403"),  # a ticket names the volume
    ("WS", "/ws/forward/{container}/{port}"): {
        "forward": "in",
        "forward of another container": "403",
        **dict.fromkeys(("control", "control of another container"), "403"),
        **dict.fromkeys(("terminal", "terminal of another container"), "403"),
    },
    ("WS", "/ws/straight/{container}"): {},  # only what a session was given just now
    ("WS", "/ws/task/{id}/terminal"): {
        "terminal": "in",
        "terminal of another container": "403",
        **dict.fromkeys(("control", "control of another container"), "403"),
        **dict.fromkeys(("forward", "forward of another container"), "403"),
    },
    ("WS", "/ws/tunnel/{container_id}"): {
        **dict.fromkeys((*NO_TOKEN_OF_THIS_CONTAINER, "control of another container"), "403"),
        "container": "in",
    },
}
AGENT_RULES: dict[Route, Rule] = {
    ("WS", "/ws/agent"): BY_USERS | {"agent": "in"},
    ("GET", "/agents/api/node"): CONTROL_OF_NONE,
    ("GET", "/agents/api/tasks/{container}/ports"): CONTROL,
    ("GET", "/agents/api/tasks/{container}/logs"): CONTROL,
    ("GET", "/agents/api/tasks/{container}/agent"): CONTROL,
    ("POST", "/agents/api/tasks/{container}/stop"): CONTROL,
    ("POST", "/agents/api/tasks/{container}/extend"): CONTROL,
    ("POST", "/agents/api/tasks/{container}/revoke"): CONTROL,
    ("POST", "/agents/api/tasks/{container}/token"): CONTROL,
    ("DELETE", "/agents/api/tasks/{container}"): CONTROL,
    ("WS", "/agents/ws/forward/{container}/{port}"): RUNNER_RULES["WS", "/ws/forward/{container}/{port}"],
    ("WS", "/agents/ws/task/{task_id}/terminal"): OPEN,  # refused whoever asks: an agent has no such terminals
}
SCOPES: dict[Route, ticket.Scope] = {
    ("WS", "/agents/ws/forward/{container}/{port}"): "forward",
    ("WS", "/ws/forward/{container}/{port}"): "forward",
    ("WS", "/ws/task/{id}/terminal"): "terminal",
}
# Tickets for another node are for something else, whatever that is.
for _route, _rule in (RUNNER_RULES | AGENT_RULES).items():
    if _rule and _route != ("WS", "/ws/agent"):  # which takes none
        _rule["another node"] = "403"

# What must be sent along for a request to be judged at all.
BODIES: dict[Route, Any] = {
    ("POST", "/api/nodes/register"): {"name": "n1", "url": "http://n1:1", "backends": []},
    ("POST", "/api/nodes/{name}/heartbeat"): {},
    ("POST", "/api/users"): {"name": "new"},
    ("PUT", "/api/users/{name}/oidc"): {"subject": "248289761001"},
    ("PATCH", "/api/users/{name}/limits"): {"tasks": 1},
    ("POST", "/api/groups"): {"name": "lab"},
    ("PATCH", "/api/groups/{group}"): {"add": ["shared"]},
    ("POST", "/api/tokens"): {"name": "new"},
    ("POST", "/api/tasks/adopt"): {"address": "127.0.0.1"},
    ("POST", "/api/tasks/{task}/shares"): {"user": "shared"},
    ("POST", "/api/tasks/{task}/extend"): {"seconds": 60},
    ("POST", "/api/tasks/{task}/web"): {"preserve_host": True},
    ("POST", "/api/tasks/{task}/links"): {"port": 80},
}
RUNNER_BODIES: dict[Route, Any] = {
    ("POST", "/api/tasks"): {"task_id": 1, "container": "c1", "backend": "process"},
    ("POST", "/api/tasks/adopt"): {"task_id": 1, "container": "c1", "backend": "address"},
    ("POST", "/api/tasks/{container}/extend"): {"seconds": 60},
    ("POST", "/api/tasks/{container}/revoke"): {"user": "ann", "reason": "the task is not shared any more"},
}
AGENT_BODIES: dict[Route, Any] = {
    ("POST", "/agents/api/tasks/{container}/revoke"): {"user": "ann", "reason": "the task is not shared any more"},
}
FILLED_IN = {
    "volume": "kohakuriver-volume-" + 32 * "0",
    "task": "web",
    "task_id": "web",
    "port": "80",
    "name": "n1",
    "user": "shared",
    "token": "none-such",
}
FILLED_IN |= {"group": "lab", "link": "none-such", "container": "c1", "container_id": "c1", "id": "1"}


def http_routes(routes: Iterable[Any]) -> Iterator[Route]:
    """(method, path) of an application's routes, also of those of routers that it includes."""
    for route in routes:
        if hasattr(route, "effective_candidates"):
            yield from http_routes(route.effective_candidates())
        elif hasattr(route, "methods"):
            yield from ((method, route.path) for method in route.methods if method != "HEAD")
        else:
            raise AssertionError(f"{route} is a kind of route that no test tries")


def routes_of(app: FastAPI, tunnel_routes: Iterable[TunnelRoute]) -> set[Route]:
    """Every route of a program."""
    return {*http_routes(app.routes), *(("WS", route.path) for route in tunnel_routes)}


def filled_in(path: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda name: FILLED_IN[name[1]], path)


async def answer_that_goes_on(client: httpx.AsyncClient, path: str, secret: str | dict[str, str] | None) -> str:
    """The same of an answer of which no more than its head is read, and that it is one."""
    shown = {"Authorization": f"Bearer {secret}"} if isinstance(secret, str) else secret or {}
    async with client.stream("GET", path, headers=shown) as reply:
        if reply.status_code == 200:
            assert await anext(reply.aiter_lines())
        return str(reply.status_code) if reply.status_code in (401, 403) else "in"


async def answer(client: httpx.AsyncClient, route: Route, body: Any, secret: str | dict[str, str] | None) -> str:
    """What a try is answered with: "401", "403", or "in" for whatever else. A `secret` may be a request's headers."""
    method, path = route
    if path == "/api/events":  # which goes on for as long as somebody listens
        return await answer_that_goes_on(client, filled_in(path), secret)
    shown = {"Authorization": f"Bearer {secret}"} if isinstance(secret, str) else secret or {}
    headers = {CLIENT_HEADER: "c", **shown}
    if method == "WS":
        headers.pop("Host", None)  # there is one already
        if headers.get("Sec-Fetch-Site") == "same-origin":
            headers["Origin"] = f"{client.base_url}".rstrip("/")
        status = await websocket_status(
            f"{client.base_url}".replace("http", "ws").rstrip("/") + filled_in(path), headers
        )
    else:
        query = {"timeout": 0} if path.endswith("/wait") else None
        reply = await client.request(method, filled_in(path), json=body, headers=headers, params=query)
        status = reply.status_code
        if status in (401, 403) and path.startswith("/api/"):
            assert set(reply.json()) == {"error", "message"}
    assert status != 500
    return str(status) if status in (401, 403) else "in"


async def refused_without_a_rule(client: httpx.AsyncClient, rules: dict[Route, Rule]) -> None:
    """Methods that a path does not have do nothing for anybody; nor does a WebSocket where none is."""
    for path in {path for _, path in rules}:
        has = {method for method, other in rules if other == path} | {"HEAD"}
        for method in METHODS:
            if method not in has:
                reply = await client.request(method, filled_in(path))
                assert reply.status_code in (401, 404, 405, 426), (method, path)
        if "WS" not in has:
            url = f"{client.base_url}".replace("http", "ws").rstrip("/") + filled_in(path)
            assert await websocket_status(url, {}) in (403, 404)


OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}
OTHER_PAGES = {"sibling": {"Sec-Fetch-Site": "same-site"}, "stranger's page": {"Sec-Fetch-Site": "cross-site"}}


async def browser_of(host: HostUnderTest, token: str | None) -> dict[str, str]:
    """What a browser sends to this host, once it is logged in with a token."""
    browser = Browser(host)
    assert token is not None
    assert (await browser.log_in(token)).status_code == 303
    ((name, value),) = browser.cookies.items()
    return {"Host": browser.authority, "Cookie": f"{name}={value}"}


async def host_browsers(host: HostUnderTest, secrets: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Browsers that are logged in, have been, or say to be, each with a page of the host open, or another's."""
    found = {f"{who}'s browser": {**await browser_of(host, secrets[who]), **OWN_PAGE} for who in ALL_USERS}
    ours = found["owner's browser"]
    found |= {f"owner's browser from {where}": {**ours, **page} for where, page in OTHER_PAGES.items()}
    out = await browser_of(host, secrets["owner"])
    origin = {"Origin": f"http://{out['Host']}"}
    assert (await host.nobody.post("/logout", headers={**out, **origin})).status_code == 303
    found["browser that was logged out"] = {**out, **OWN_PAGE}
    cookie, _, value = ours["Cookie"].partition("=")
    found["a browser's cookie as a token"] = {"Authorization": f"Bearer {value}"}
    found["a token as a browser's cookie"] = {**ours, "Cookie": f"{cookie}={secrets['owner']}"}
    code = (await link_of(host.client(secrets["owner"]))).partition("code=")[2]
    found["a link's code as a token"] = {"Authorization": f"Bearer {code}"}
    found["a link's code as a browser's cookie"] = {**ours, "Cookie": f"{cookie}={code}"}
    return found


def expected_of(route: Route, rule: Rule, who: str, secret: str | dict[str, str] | None) -> str:
    """What a credential is answered with by a rule of the host."""
    if rule is OPEN:
        return "in"
    if rule is NOBODY:
        return "401"
    if rule is BY_VISITORS:
        return rule.get(who, "in")
    if rule is BY_OWN_PAGES:
        return "in" if isinstance(secret, dict) and OWN_PAGE.items() <= secret.items() else "403"
    user, _, from_where = who.partition("'s browser")
    if user == who or user not in ALL_USERS:
        return rule.get(who, "401")
    if rule is BY_NODES or route == ("WS", "/ws/forward/{task_id}/{port}"):  # there, a browser's login is nothing
        return "401"
    return "403" if from_where else rule.get(who, rule[user])


async def host_credentials(host: HostUnderTest, directory: Path) -> dict[str, str | dict[str, str] | None]:
    """One of each kind, by what it is. The task is the owner's."""
    secrets: dict[str, Any] = {"none": None, "garbage": "kr_garbage", "admin": host.admin_token}
    for name in ("owner", "shared", "stranger"):
        secrets[name] = (await host.person(name))[1]
    _, secrets["removed user"] = await host.person("removed")
    await host.user.delete("/api/users/removed")
    secrets["revoked"] = await host.token(user="owner", name="revoked")
    named = {token["name"]: token["id"] for token in (await host.user.get("/api/tokens?user=owner")).json()}
    assert (await host.user.delete(f"/api/tokens/{named['revoked']}")).status_code == 200
    secrets["expired"] = await host.token(user="owner", name="short", expires_in=5)
    secrets["node"] = (directory / "node-token").read_text().strip()
    secrets["this node"] = await host.token(node="n1", name="for n1")
    secrets["other node"] = await host.token(node="n2", name="for n2")
    secrets["ticket"] = ticket.issue(b"k" * 32, node="n1", scope="control")
    host.clock.now += 6
    runner = await host.runner()
    await runner.beat()
    owner = host.client(secrets["owner"])
    assert (await owner.post("/api/tasks", json={"name": "web", "backend": "process"})).status_code == 201
    assert (await owner.post("/api/tasks/web/shares", json={"user": "shared"})).status_code == 201
    return secrets | await host_browsers(host, secrets)


def no_provider() -> tuple[Provider, Rules]:
    """An OpenID provider that nobody asks here."""
    trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return Provider("https://id.invalid", "river", None, trusted=trusted), Rules(frozenset({EVERYBODY}))


# What only shows something leaves the host as it was, for the next: one host is enough for all of that.
SHOWING = [route for route in sorted(HOST_RULES) if route[0] == "GET"]
EACH_ON_A_HOST_OF_ITS_OWN = [[route] for route in sorted(HOST_RULES) if route not in SHOWING]


@pytest.mark.parametrize(
    "routes",
    [SHOWING, *EACH_ON_A_HOST_OF_ITS_OWN],
    ids=["GET", *(" ".join(each[0]) for each in EACH_ON_A_HOST_OF_ITS_OWN)],
)
def test_the_host_lets_in_whom_its_rule_names_and_nobody_else(run: Run, tmp_path: Path, routes: list[Route]) -> None:
    async def check() -> None:
        async with a_host(tmp_path, oidc=no_provider()) as host:
            secrets = await host_credentials(host, tmp_path)
            assert routes_of(host.app, host.tunnel_routes) == set(HOST_RULES)
            client = host.client(None)
            client.headers["Host"] = Browser(host).authority  # by another name nobody is shown a page
            for route in routes:
                expected = {who: expected_of(route, HOST_RULES[route], who, secrets[who]) for who in secrets}
                # Those who are refused first: what the others do may end the task.
                for who in sorted(secrets, key=lambda who: expected[who] == "in"):
                    got = await answer(client, route, BODIES.get(route), secrets[who])
                    assert (route, who, got) == (route, who, expected[who])

    run(check())


def test_the_host_does_nothing_for_methods_and_websockets_that_it_does_not_have(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await refused_without_a_rule(host.nobody, HOST_RULES)

    run(check())


class Tickets:
    """What a host signs for a node by its key; the tasks there are c1 and c2."""

    def __init__(self, key: bytes, node: str) -> None:
        self._key = key
        self._node = node

    def issue(self, scope: ticket.Scope, container: str, **changes: Any) -> str:
        values: dict[str, Any] = {"key": self._key, "node": self._node, "container": container}
        if scope != "control":
            values |= {"task": int(container[1:]), "user": "ann"}
        values |= changes
        return ticket.issue(values.pop("key"), scope=scope, **values)

    def of_each_kind(self, scope: ticket.Scope, use: Callable[[str, ticket.Scope], object]) -> dict[str, str]:
        """Right and wrong ones, by what they are; `scope` is that of those that are wrong by other things."""
        used = self.issue(scope, "c1")
        use(used, scope)
        now = int(time.time())
        claims = jwt.decode(self.issue(scope, "c1"), options={"verify_signature": False})
        changed = {"expired": {"iat": now - 100, "exp": now - 40}, "too long": {"exp": now + 600}}
        return {
            "control": self.issue("control", "c1"),
            "control of another container": self.issue("control", "c2"),
            "forward": self.issue("forward", "c1"),
            "forward of another container": self.issue("forward", "c2"),
            "terminal": self.issue("terminal", "c1"),
            "terminal of another container": self.issue("terminal", "c2"),
            "another key": self.issue(scope, "c1", key=b"o" * 32),
            "another node": self.issue(scope, "c1", node="n2"),
            "used": used,
            **{name: jwt.encode(claims | change, self._key, algorithm="HS256") for name, change in changed.items()},
        }


class RunnerUnderTest:
    """A runner's doors: its HTTP API and its tunnel server, with two tasks."""

    KEY = b"k" * 32

    def __init__(self, directory: Path) -> None:
        self.state = State(directory)
        self.state.ticket_key = self.KEY
        identity = NodeIdentity("n1", "http://127.0.0.1:1", "i", "http://127.0.0.1:1", "krn_token")
        self.registration = Registration(identity, self.state, heartbeat=dict, backends=dict, remove=self._remove)
        self.tasks = TaskManager(TaskBook(self.state, lambda: None))
        self.tunnels = TunnelServer(
            allow_anonymous=False,
            check_tunnel=TunnelGuard(self.tasks.book, self._comes_from, lambda *_: None).check,
            check_ticket=lambda secret: self.registration.check_ticket(secret, "forward"),
            check_terminal_ticket=lambda secret: self.registration.check_ticket(secret, "terminal"),
            target_of=self.tasks.target_of,
        )
        self.terminals = TerminalServer(
            allow_anonymous=False,
            check_ticket=lambda secret: self.registration.check_ticket(secret, "terminal"),
            exec_in=self.tasks.exec,
        )
        self.tunnel_routes = [*self.tunnels.routes(), *self.terminals.routes()]
        self.guard = Guard()
        ports = OpenPorts(self.tasks.book.get, self.tasks.sockets, self.tunnels.hub.tunnel_of)
        services = runner_app.Services(self.tasks, self.registration, "http://127.0.0.1:1", self.tunnels, ports)
        self.app = runner_app.create_app(services, self.guard)

    async def _remove(self, task_id: int) -> None:
        raise AssertionError

    @staticmethod
    async def _comes_from(task: TaskRecord, peer: Peer) -> bool:
        return peer.on_this_machine

    async def open(self) -> None:
        common: dict[str, Any] = {"backend": "process", "status": "running"}
        records = [TaskRecord(task_id=n, container=f"c{n}", tunnel_token=f"token{n}", **common) for n in (1, 2)]
        self.state.save_tasks(records)
        await self.tasks.open({})

    def credentials(self, scope: ticket.Scope) -> dict[str, str | None]:
        """Fresh ones of each kind, by what they are; `scope` is that of the tickets that are wrong by other things."""
        tickets = Tickets(self.KEY, "n1").of_each_kind(scope, self.registration.check_ticket)
        kinds = {"node": "krn_token", "container": "token1", "container of another": "token2"}
        return {"none": None, "garbage": "garbage", "user": "kr_token-of-a-user", **kinds, **tickets}


@contextlib.asynccontextmanager
async def a_runner(directory: Path) -> AsyncIterator[tuple[RunnerUnderTest, httpx.AsyncClient]]:
    runner = RunnerUnderTest(directory)
    await runner.open()
    async with serving(runner.app, serve_ws(runner.tunnel_routes, runner.guard)) as url:
        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as client:
            yield runner, client
        await runner.registration.close()


@pytest.mark.parametrize("route", sorted(RUNNER_RULES), ids=" ".join)
def test_the_runner_lets_in_whom_its_rule_names_and_nobody_else(run: Run, tmp_path: Path, route: Route) -> None:
    async def check() -> None:
        async with a_runner(tmp_path) as (runner, client):
            assert routes_of(runner.app, runner.tunnel_routes) == set(RUNNER_RULES)
            rule = RUNNER_RULES[route]
            scope = SCOPES.get(route, "control")
            secrets = runner.credentials(scope)
            expected = {who: "in" if rule is OPEN else rule.get(who, "401") for who in secrets}
            if rule is not OPEN and scope == "control" and route[0] != "WS":
                expected |= dict.fromkeys(("forward of another container", "terminal of another container"), "403")
            for who in sorted(secrets, key=lambda who: expected[who] == "in"):
                got = await answer(client, route, RUNNER_BODIES.get(route), secrets[who])
                assert (who, got) == (who, expected[who])

    run(check())


def test_the_runner_does_nothing_for_methods_and_websockets_that_it_does_not_have(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_runner(tmp_path) as (_, client):
            await refused_without_a_rule(client, RUNNER_RULES)

    run(check())


@contextlib.asynccontextmanager
async def agents_of(host: HostUnderTest, directory: Path) -> AsyncIterator[tuple[AgentNode, str]]:
    """What a host has for agents, and for other hosts' questions about them: its node, and the URL of all that."""
    limits, audit = Limits(max_requests=0), host.audit
    node = AgentNode(
        directory, host.store, host.agents, host.nodes,
        limits=limits, mark_key=b"m" * 32, audit=audit, told=lambda _: None, heartbeat_seconds=5,
    )  # fmt: skip
    entry = AgentEntry(node, host.agents, host.credentials, host.requests, host.nodes, audit, host.clock)
    await node.enter()
    app = new_app("host", "1", services=SimpleNamespace(agents=node), routers=(agents_api,))
    routes = [*entry.routes(), *node.routes()]
    assert routes_of(app, routes) == set(AGENT_RULES)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(node.close)
        yield node, await stack.enter_async_context(serving(app, serve_ws(routes)))


@pytest.mark.parametrize("route", sorted(AGENT_RULES), ids=" ".join)
def test_a_host_lets_in_agents_and_other_hosts_whom_its_rule_names_and_nobody_else(
    run: Run, tmp_path: Path, route: Route
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            secrets = await host_credentials(host, tmp_path)
            secrets["agent"] = await host.token(user="owner", agent=True)
            async with agents_of(host, tmp_path) as (node, url), httpx.AsyncClient(base_url=url) as client:
                stored = await host.store.node(node.name)
                assert stored is not None
                scope = SCOPES.get(route, "control")
                tickets = Tickets(stored.ticket_key, node.name).of_each_kind(scope, node.check_ticket)
                found = {**{who: secret for who, secret in secrets.items() if isinstance(secret, str)}, **tickets}
                rule = AGENT_RULES[route]
                expected = {who: "in" if rule is OPEN else rule.get(who, "401") for who in found}
                if rule is not OPEN and scope == "control" and route[1].startswith("/agents/api"):
                    expected |= dict.fromkeys(("forward of another container", "terminal of another container"), "403")
                # Those who are refused first: what the others do may end the task.
                for number, who in enumerate(sorted(found, key=lambda who: expected[who] == "in")):
                    shown = {"Authorization": f"Bearer {found[who]}", CLIENT_HEADER: f"{number:032x}"}
                    got = await answer(client, route, AGENT_BODIES.get(route), shown)
                    assert (who, got) == (who, expected[who])
                got = await answer(client, route, AGENT_BODIES.get(route), {CLIENT_HEADER: "0" * 32})
                assert got == ("in" if rule is OPEN else "401")

    run(check())
