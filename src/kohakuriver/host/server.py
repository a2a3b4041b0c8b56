"""The host as a program: state, sockets, serving, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog

from kohakuriver import __version__, tracing
from kohakuriver import runtime as loops
from kohakuriver.changes import Changes
from kohakuriver.config import advertise_url
from kohakuriver.errors import UsageError
from kohakuriver.host.agents.api import agents_api
from kohakuriver.host.agents.entry import AgentEntry
from kohakuriver.host.agents.node import PREFIX, AgentNode, advertised_at
from kohakuriver.host.app import create_app, goes_ahead
from kohakuriver.host.apps.serving import AppServer, Where, where_in
from kohakuriver.host.cookies import credential_of
from kohakuriver.host.oidc_options import provider_of, rules_of
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
from kohakuriver.host.services.host_key import shared_host_keys
from kohakuriver.host.services.hosts import Hosts, Readiness
from kohakuriver.host.services.links import AppLinks
from kohakuriver.host.services.logins import Logins, name_in_browsers
from kohakuriver.host.services.logs import Logs
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.host.services.oidc import OidcLogins
from kohakuriver.host.services.open_sessions import OpenSessions
from kohakuriver.host.services.people import People
from kohakuriver.host.services.reach import Reach
from kohakuriver.host.services.requests import Requests
from kohakuriver.host.services.runner_client import RunnerClient
from kohakuriver.host.services.tasks import Tasks
from kohakuriver.host.services.terminal_proxy import TerminalProxy
from kohakuriver.host.services.tunnel_proxy import TunnelProxy, straight_tells
from kohakuriver.host.services.volumes import UserVolumes
from kohakuriver.host.workers import Ready, serve_together
from kohakuriver.limits import Limits, from_environment
from kohakuriver.proxies import Proxies
from kohakuriver.quotas import Quotas
from kohakuriver.runtime import raise_file_limit
from kohakuriver.ssh_proxy.server import SshProxy
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
    is_shared,
    sqlite_url,
)
from kohakuriver.store.links import Links as StoredLinks
from kohakuriver.tls import ServerCertificate, client_context
from kohakuriver.tunnel.accept import UpgradeRequest, serve_ws
from kohakuriver.web.app import (
    bind,
    bind_with_loopback,
    new_app,
    print_event,
    server_certificate,
    socket_url,
    warn_if_in_clear,
)
from kohakuriver.web.background import in_background
from kohakuriver.web.logging import configure_logging
from kohakuriver.web.measuring import Measures, counted_up, measures_at
from kohakuriver.web.origin import Guard
from kohakuriver.web.server import Server, stop_at_end_of_stdin

__all__ = ["HostOptions", "main", "serve"]

log = structlog.get_logger("kohakuriver.host")


_ANONYMOUS = (
    "ANONYMOUS ACCESS IS ON: anybody who reaches this port can open forwards, terminals and SSH connections to every "
    "task"
)


@dataclass(frozen=True)
class HostOptions:
    """How a host runs.

    Args:
        port, ssh_port: TCP ports; 0 is any free one.
        database: its URL; None is a SQLite file in `state_dir`.
        allowed_hosts, allowed_origins: as `Guard` takes them.
        apps_domain: the domain in which tasks' ports have names.
        apps_url: where they are all, in the place of that; `apps_port` is another port for it to listen on.
        trusted_proxies: networks of proxies whose X-Forwarded-For and -Proto count, as `Proxies` takes them.
        ssh_proxy_protocol: what comes from these to the SSH port begins with a PROXY header.
        ssh_algorithms: what the jump host offers, by name.
        public_url: where browsers find this host. If it begins with https://, only cookies that TLS protects count.
        advertise_url: where the other hosts on the database find this one, for agents' tasks.
        user_mounts: others than admins may mount directories of nodes.
        ca_file: what runners' certificates are checked by; None is the system's authorities.
        audit_log: a file; None is one in `state_dir`.
        metrics: where its measures are read, as `metrics_address` takes it.
        drain_notice: seconds. A host that is told to end first says for so long that it is not ready, and serves on.
        drain: seconds. Then its sessions have so long to move to another host.
        workers: processes that serve together, each a host of its own to the others; more than one needs PostgreSQL.
        worker: which of them this one is.
        exit_with_stdin: it ends when its stdin does, as a child of `up` should.
        oidc_issuer: the OpenID provider at which people log in; None is no such login. The other `oidc_` options are as
            `Provider` and `Rules` take them. `oidc_ca_file` is what the provider's certificate is checked by.
    """

    state_dir: Path
    bind: str = "0.0.0.0"
    port: int = 8000
    ssh_port: int = 8002
    database: str | None = None
    allow_anonymous: bool = False
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    apps_domain: str | None = None
    apps_url: str | None = None
    apps_port: int | None = None
    public_url: str | None = None
    advertise_url: str | None = None
    trusted_proxies: Sequence[str] = ()
    ssh_proxy_protocol: bool = False
    ssh_algorithms: str = "all"
    user_mounts: bool = False
    heartbeat_seconds: float = 5.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    ca_file: Path | None = None
    audit_log: Path | None = None
    metrics: str | None = None
    drain: int = 0
    drain_notice: int = 0
    workers: int = 1
    worker: int = 0
    json: bool = False
    log_level: str = "info"
    log_format: str = "text"
    exit_with_stdin: bool = False
    oidc_issuer: str | None = None
    oidc_client_id: str | None = None
    oidc_client_secret_file: Path | None = None
    oidc_allowed_groups: Sequence[str] = ()
    oidc_allowed_domains: Sequence[str] = ()
    oidc_admin_groups: Sequence[str] = ()
    oidc_group_claim: str = "groups"
    oidc_scopes: Sequence[str] = ()
    oidc_ca_file: Path | None = None


@dataclass(frozen=True)
class Perimeter:
    """What stands between the host and everybody else. `trusted` is how runners that serve TLS are checked."""

    certificate: ServerCertificate | None
    trusted: ssl.SSLContext
    limits: Limits
    audit: AuditLog
    measures: Measures

    @classmethod
    def of(cls, options: HostOptions) -> Perimeter:
        """As the options and the environment have it. Raises UsageError or LocalAddressError."""
        trusted = client_context("https:", options.ca_file)
        assert trusted is not None
        limits = from_environment()
        audit = AuditLog(options.audit_log or options.state_dir / "audit.jsonl", most=limits.max_audit)
        certificate = server_certificate(options.tls_cert, options.tls_key)
        return cls(certificate, trusted, limits, audit, measures_at(options.metrics, "host"))

    @property
    def names(self) -> list[str]:
        """What this host is called by its certificate."""
        return [] if self.certificate is None else self.certificate.names


class Doors:
    """The sockets that a host, or a worker of one, listens on; closed at the end of a `with` block.

    The last one for HTTP is `own`: what comes there is for this process and no other worker. So is `inner`, which is on
    loopback and without TLS, where a certificate would have no name.
    """

    def __init__(self, http: list[socket.socket], ssh: socket.socket, own: socket.socket, inner: socket.socket) -> None:
        self.http, self.ssh, self.own, self.inner = http, ssh, own, inner

    @classmethod
    def of(cls, options: HostOptions, port: int, ssh_port: int) -> Doors:
        """Bound, and not listening yet. Raises LocalAddressError."""
        shared = options.workers > 1
        with contextlib.ExitStack() as stack:
            http = [stack.enter_context(sock) for sock in bind_with_loopback(options.bind, port, shared=shared)]
            if options.apps_port is not None:
                more = bind_with_loopback(options.bind, options.apps_port, shared=shared)
                http += [stack.enter_context(sock) for sock in more]
            if shared:
                http.append(stack.enter_context(bind(options.bind, 0)))
            inner = stack.enter_context(bind("127.0.0.1", 0))
            doors = cls(http, bind(options.bind, ssh_port, shared=shared), http[-1 if shared else 0], inner)
            stack.pop_all()
        return doors

    @property
    def ports(self) -> tuple[int, int]:
        """Of HTTP, and of SSH."""
        return self.http[0].getsockname()[1], self.ssh.getsockname()[1]

    def close(self) -> None:
        """Nobody is let in by this process any more."""
        for sock in (*self.http, self.ssh, self.inner):
            sock.close()

    def __enter__(self) -> Doors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def given_url(options: HostOptions, doors: Doors) -> str:
    """Where others are told to find this host, "" where nothing is said of it. Raises UsageError."""
    given = options.advertise_url
    return advertise_url(given, doors.own.getsockname()[1]) if given else ""


def advertised(options: HostOptions, doors: Doors) -> str:
    """Where other hosts on a database that they can share find this one, "" where they can't. Raises UsageError."""
    scheme = "https" if options.tls_cert else "http"
    unspecified = ip_address(doors.own.getsockname()[0]).is_unspecified
    given = given_url(options, doors)
    if options.workers == 1:
        return given or ("" if unspecified else socket_url(doors.own, scheme))
    if given:
        told = urlsplit(given)
        if told.scheme != scheme:
            raise UsageError(
                f"--advertise-url must begin with {scheme}:// here: each worker is reached at a port of its own, which "
                f"serves {'TLS' if options.tls_cert else 'no TLS'}."
            )
        name = f"[{told.hostname}]" if ":" in (told.hostname or "") else told.hostname
        return f"{scheme}://{name}:{doors.own.getsockname()[1]}"
    # The others are most likely on this machine, for which a certificate has no name.
    return socket_url(doors.inner) if unspecified else socket_url(doors.own, scheme)


def serve(options: HostOptions) -> int:
    """Run a host until SIGTERM or SIGINT; the exit code. Raises KohakuRiverError when it can't start."""
    if options.apps_port is not None and options.apps_url is None:
        raise UsageError("--apps-port goes with --apps-url, which says how browsers get there.")
    configure_logging(options.log_level, options.log_format)
    tracing.serve("host")
    raise_file_limit()
    options.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as stack:
        doors = [stack.enter_context(Doors.of(options, options.port, options.ssh_port))]
        # Each worker has sockets of its own, so that connections spread evenly. They stay open here: what waits to be
        # accepted by a worker that has ended is there for the one that takes its place.
        doors += [stack.enter_context(Doors.of(options, *doors[0].ports)) for _ in range(1, options.workers)]
        if options.workers > 1:
            return _serve_together(options, doors, stack.close)
        return loops.run(main(options, doors[0], lambda said: _print_ready(options, [said])))


def _serve_together(options: HostOptions, doors: list[Doors], close: Callable[[], None]) -> int:
    if not is_shared(options.database):
        raise UsageError(
            "--workers needs a database that several processes can share; give one of PostgreSQL by --database."
        )

    advertised(options, doors[0])

    def serve_one(number: int, ready: Callable[[Ready], None]) -> int:
        metrics = None if options.metrics is None else counted_up(options.metrics, number)
        for others in (*doors[:number], *doors[number + 1 :]):
            others.close()
        changed = replace(options, metrics=metrics, exit_with_stdin=True, worker=number)
        return loops.run(main(changed, doors[number], ready))

    return serve_together(options.workers, serve_one, lambda said: _print_ready(options, said), close)


def _print_ready(options: HostOptions, workers: list[Ready]) -> None:
    """Say that this host serves, of all whose words these are."""
    url, ssh_proxy = workers[0]["url"], workers[0]["ssh_proxy"]
    sentence = f"The host is ready at {url}, its SSH proxy at {ssh_proxy}"
    said: dict[str, Any] = {}
    metrics = [word["metrics"] for word in workers if word["metrics"]]
    if metrics:
        said["metrics"] = metrics[0] if options.workers == 1 else metrics
    if options.workers > 1:
        sentence += f", with {options.workers} workers"
        said["workers"] = options.workers
    print_event("ready", options.json, sentence, url=url, ssh_proxy=ssh_proxy, **said)


async def main(options: HostOptions, doors: Doors, ready: Callable[[Ready], None]) -> int:
    """What `serve` runs on an event loop; `ready` is called once it serves."""
    perimeter = Perimeter.of(options)
    with contextlib.ExitStack() as stack:
        stack.callback(perimeter.measures.close)
        store = await Store.open(options.database or sqlite_url(options.state_dir / "host.db"))
        runners = RunnerClient(perimeter.trusted)
        try:
            host = Host(options, doors, store, runners, perimeter, ready)
            await host.begin()
            return await host.run()
        finally:
            await runners.close()
            await store.close()
            await asyncio.to_thread(perimeter.audit.close)


class Host:
    """The parts of one host, and how they hear of one another. `begin`, then `run`."""

    def __init__(
        self,
        options: HostOptions,
        doors: Doors,
        store: Store,
        runners: RunnerClient,
        perimeter: Perimeter,
        ready: Callable[[Ready], None],
    ) -> None:
        self._options, self._perimeter, self._measures = options, perimeter, perimeter.measures
        self._doors, self._socks, self._ssh_sock = doors, doors.http, doors.ssh
        self._tell_ready = ready
        self._store, self._runners = store, runners
        self._proxies = Proxies(options.trusted_proxies)
        limits, audit = perimeter.limits, perimeter.audit
        self._accounts = Accounts(store, defaults=Quotas.by_default(limits))
        self._credentials = Credentials(
            self._accounts,
            allow_anonymous=options.allow_anonymous,
            audit=audit,
            failures=Failures(rate=limits.max_failures),
        )
        self._changes = Changes[int]()
        self._nodes = Nodes(
            store,
            Reach(runners),
            heartbeat_seconds=options.heartbeat_seconds,
            on_change=self._changes.notify,
            audit=audit,
        )
        # Where the name that browsers use is of https, they come over TLS, be it to a proxy before this host.
        self._by_tls = (options.public_url or "").lower().startswith("https://")
        self._tasks = Tasks(
            store, self._accounts, self._nodes, runners, self._changes, user_mounts=options.user_mounts, audit=audit
        )
        self._access = Access(store, self._accounts)
        self._requests = Requests(rate=limits.max_requests, most=limits.max_under_way, audit=audit)
        self._counts = SessionCounts(store)
        self._grants = Grants(
            self._accounts, requests=self._requests, audit=audit, revoke=self._revoke, counts=self._counts
        )
        self._forwards = Forwards(
            self._credentials,
            self._access,
            self._grants,
            store,
            self._nodes,
            self._tasks,
            straight_tells(limits),
            url_of=runners.url_of,
        )
        self._agents = Agents(store, self._accounts)
        self._hosts = Hosts(store, self._grants, self._nodes, self._changes, self._agents)
        self._readiness = Readiness(store)
        self._logs = Logs(self._grants, self._nodes, runners)
        self._sessions = OpenSessions(self._grants)
        self._feed = Feed(store, self._accounts, self._tasks, self._nodes, self._sessions, self._changes)
        self._make_logins()
        self._make_proxies()

    def _make_logins(self) -> None:
        """The ways in for browsers, and for command lines by a browser."""
        name = name_in_browsers(self._options.state_dir / "browser-name")
        self._logins = Logins(self._credentials, Browsers(self._store), self._grants, name)
        codes = DeviceCodes(self._store, self._accounts)
        self._devices = DeviceLogins(codes, self._credentials, self._perimeter.audit)
        self._identities = Identities(self._store)
        self._oidc: OidcLogins | None = None
        if provider := provider_of(self._options):
            rules = rules_of(self._options)
            self._oidc = OidcLogins(provider, rules, self._identities, self._logins, self._credentials, self._grants)

    def _make_proxies(self) -> None:
        """What carries forwards and terminals."""
        trusted, limits = self._perimeter.trusted, self._perimeter.limits
        self._proxy = TunnelProxy(
            authorize=self._forwards.authorize,
            authorize_terminal=self._forwards.authorize_terminal,
            credential=self._credential_of,
            coming_back=self._nodes.coming_back,
            doubt=self._nodes.doubt,
            trusted=trusted,
            limits=limits,
        )
        self._terminals = TerminalProxy(
            authorize=self._forwards.authorize_terminal, credential=self._credential_of, trusted=trusted, limits=limits
        )

    def _credential_of(self, request: UpgradeRequest) -> str | None:
        return credential_of(request, by_tls=self._by_tls, shares_name=self._where.shares_name)

    async def begin(self) -> None:
        """What needs the database. Raises KohakuRiverError, OSError or ValueError where the host can't start."""
        options, perimeter = self._options, self._perimeter
        for path in await self._credentials.load_or_make(options.state_dir):
            log.info("made a token", file=str(path))
        if options.allow_anonymous:
            log.warning(_ANONYMOUS)
        warn_if_in_clear(self._socks[0], perimeter.certificate)
        self._ssh_proxy = SshProxy(
            self._ssh_sock,
            authorize=self._forwards.authorize_ssh,
            keyholders=self._forwards.keyholder,
            check_user=self._credentials.caller,
            host_keys=await shared_host_keys(self._store, options.state_dir),
            trusted=perimeter.trusted,
            limits=perimeter.limits,
            opened=lambda seconds, error: self._measures.opened("ssh", seconds, error),
            balancers=self._proxies if options.ssh_proxy_protocol else None,
            algorithms=options.ssh_algorithms,
        )
        await self._make_agents()
        port = self._socks[0].getsockname()[1]
        where = self._where = where_in(options.apps_domain, options.public_url, perimeter.names, port, options.apps_url)
        self._app_server = AppServer(
            await apps_key(self._store),
            where,
            store=self._store,
            credentials=self._credentials,
            logins=self._logins,
            forwards=self._forwards,
            trusted=perimeter.trusted,
            limits=perimeter.limits,
            tls=perimeter.certificate is not None,
            proxies=self._proxies,
        )
        self._tasks.variables = self._app_server.apps.addresses.variables
        self._server = self._serving(where)

    @property
    def _advertised(self) -> str:
        """Where other hosts on the database find this one, "" where there are none, or they can't."""
        told = given_url if self._store.server is None else advertised
        return told(self._options, self._doors)

    async def _make_agents(self) -> None:
        """This host as a node, for tasks that dial in."""
        options, audit = self._options, self._perimeter.audit
        directory = options.state_dir / f"worker-{options.worker}" if options.worker else options.state_dir
        directory.mkdir(exist_ok=True, mode=0o700)
        self._agent_node = AgentNode(
            directory,
            self._store,
            self._agents,
            self._nodes,
            limits=self._perimeter.limits,
            mark_key=await apps_key(self._store),
            audit=audit,
            told=self._changes.notify,
            heartbeat_seconds=options.heartbeat_seconds,
            advertised=advertised_at(self._advertised),
        )
        self._agent_entry = AgentEntry(
            self._agent_node, self._agents, self._credentials, self._requests, self._nodes, audit
        )

    async def _open_agents(self) -> None:
        """Serve what is asked about agents' tasks on a socket for this host itself, and for its workers."""
        sock = self._doors.inner
        services = self._services()
        app = new_app("host", __version__, services=services, routers=(agents_api,))
        ws = serve_ws(self._agent_node.routes(), max_message=self._perimeter.limits.max_message)
        self._server.add_listener(sock, app, ws)
        url = self._runners.own[self._agent_node.name] = socket_url(sock) + PREFIX
        await self._agent_node.open(url)

    def _serving(self, where: Where) -> Server:
        options, perimeter = self._options, self._perimeter
        guard = Guard(
            names=[*perimeter.names, *where.names, urlsplit(self._advertised).hostname or ""],
            hosts=options.allowed_hosts,
            origins=options.allowed_origins,
            elsewhere=self._app_server.owns,
        )
        measure = self._measures.route
        routes = [
            *(measure("forward", route) for route in self._proxy.routes()),
            *(measure("terminal", route) for route in self._terminals.routes()),
            *self._agent_entry.routes(),
            *(self._agent_node.routes() if self._advertised else ()),
        ]
        app = create_app(self._services(), guard, self._proxies, with_agents=bool(self._advertised))
        app.state.by_tls, app.state.shares_name = self._by_tls, where.shares_name
        return Server(
            self._measures.requests(app),
            ws=serve_ws(routes, guard, max_message=perimeter.limits.max_message, proxies=self._proxies),
            on_ready=self._ready,
            on_leave=self._leave,
            on_stop=self._stop,
            certificate=perimeter.certificate,
            limits=perimeter.limits,
            front=self._app_server.front,
            ahead=goes_ahead,
        )

    def _services(self) -> Services:
        return Services(
            credentials=self._credentials,
            access=self._access,
            people=People(self._accounts, self._identities, self._grants),
            groups=GroupsOfUsers(Groups(self._store), self._grants),
            nodes=self._nodes,
            tasks=self._tasks,
            forwards=self._forwards,
            requests=self._requests,
            audit=self._perimeter.audit,
            logs=self._logs,
            logins=self._logins,
            devices=self._devices,
            oidc=self._oidc,
            apps=self._app_server.apps,
            links=AppLinks(StoredLinks(self._store), self._app_server.apps, self._grants),
            sessions=self._sessions,
            feed=self._feed,
            readiness=self._readiness,
            agents=self._agent_node,
            volumes=UserVolumes(Volumes(self._store), self._nodes, self._runners, self._perimeter.audit),
        )

    async def run(self) -> int:
        """Serve until the end; the exit code."""
        keep = self._server.keep
        beside = [
            keep(self._grants.run(), "checking the rights of sessions"),
            keep(self._counts.run(), "counting sessions for other hosts"),
            keep(self._hosts.run(self._agent_node.heard), "listening to other hosts"),
            keep(self._hosts.care(), "deleting what has run out"),
            keep(self._tasks.run(), "looking what tasks that are waited for have changed"),
            keep(self._feed.run(), "telling what changes"),
            keep(self._app_server.run(self._changes), "looking what services are to be told"),
            keep(self._nodes.run(), "looking whether nodes can be reached"),
            keep(self._nodes.hearing.run(), "looking whether nodes can be heard"),
            keep(self._agent_node.run(), "looking after agents' tasks"),
            keep(self._perimeter.audit.run(), "counting what the audit log leaves out"),
        ]
        try:
            await self._server.serve(self._socks)
        finally:
            await loops.cancel_all(beside)
            if self._oidc is not None:
                await self._oidc.close()
        return self._server.exit_code

    async def _ready(self) -> None:
        if self._options.exit_with_stdin:
            stop_at_end_of_stdin(self._server)
        self._ssh_proxy.start()
        await self._open_agents()
        self._show_measures()
        url = socket_url(self._socks[0], "https" if self._options.tls_cert else "http")
        ssh_address = socket_url(self._ssh_sock).removeprefix("http://")
        loops.freeze_heap()
        self._tell_ready({"url": url, "ssh_proxy": ssh_address, "metrics": self._measures.url})

    def _show_measures(self) -> None:
        """Have what the host counts itself among its measures, where somebody may read them."""
        if self._measures.url is not None:
            from kohakuriver.host.services.measures import HostMeasures, Snapshots

            carriers: dict[str, Snapshots] = {
                "forward": self._proxy,
                "terminal": self._terminals,
                "ssh": self._ssh_proxy,
            }
            own = HostMeasures(carriers, self._agent_node, self._nodes, self._store)
            self._measures.show(own.look)
            self._measures.ask_database(own.refresh)
        self._measures.begin(self._server)

    async def _leave(self) -> None:
        self._readiness.leaving = True
        if seconds := self._options.drain_notice:
            log.info("this host says that it is about to end", seconds=seconds)
            await asyncio.sleep(seconds)

    async def _stop(self) -> None:
        await self._ssh_proxy.stop_listening()
        left = in_background(self._counts.leave(), "telling other hosts that this one ends")
        await self._agent_node.close()  # first: where the sessions go to that leave now, agents are to be
        if self._options.drain:
            await self._server.unless_hurried(self._proxy.drain(self._options.drain))
        await self._ssh_proxy.close()
        await self._terminals.close()
        self._logs.close()
        self._devices.close()
        await self._app_server.close()
        self._feed.close()
        await self._proxy.close()
        await left

    async def _revoke(self, node: str, container: str, user: str, reason: str) -> None:
        """Have what a user left in a container end."""
        found = await self._store.node(node)
        if found is not None:
            await self._runners.revoke(found, container, user, reason)
