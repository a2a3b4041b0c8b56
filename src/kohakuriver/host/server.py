"""The host as a program: state, sockets, serving, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from kohakuriver import runtime as loops
from kohakuriver.changes import Changes
from kohakuriver.host.app import create_app
from kohakuriver.host.apps.serving import AppServer, where_in
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
from kohakuriver.limits import Limits, from_environment
from kohakuriver.quotas import Quotas
from kohakuriver.runtime import raise_file_limit
from kohakuriver.ssh_proxy.server import SshProxy
from kohakuriver.store import (
    Accounts,
    Browsers,
    DeviceCodes,
    Groups,
    Identities,
    SessionCounts,
    Store,
    apps_key,
    sqlite_url,
)
from kohakuriver.store.links import Links as StoredLinks
from kohakuriver.tls import ServerCertificate, client_context
from kohakuriver.tunnel.accept import serve_ws
from kohakuriver.web.app import bind, bind_with_loopback, print_event, server_certificate, socket_url, warn_if_in_clear
from kohakuriver.web.background import in_background
from kohakuriver.web.logging import configure_logging
from kohakuriver.web.measuring import Measures, measures_at
from kohakuriver.web.origin import Guard
from kohakuriver.web.server import Server, stop_at_end_of_stdin

__all__ = ["HostOptions", "main", "serve"]

log = structlog.get_logger("kohakuriver.host")


@dataclass(frozen=True)
class HostOptions:
    """How a host runs. `port` and `ssh_port` 0 are any free one; `database` None is a SQLite file in `state_dir`.

    `apps_domain` is what is behind the names of apps, and `public_url` where browsers find the host.
    `allowed_hosts` and `allowed_origins` are as `Guard` takes them. With `user_mounts` others than admins may mount
    directories of nodes.
    `ca_file` is what runners' certificates are checked by, None the system's authorities; `audit_log` None is a file in
    `state_dir`. Its measures are read at `metrics`, as `metrics_address` takes it. `drain` is for how many seconds
    sessions may stay when it ends, so that they move to another host;
    before that it takes new ones for `drain_notice` seconds, while it is not ready, so that a balancer sees that.
    With `exit_with_stdin` it ends when its stdin does, as a child of `up` should.

    `oidc_issuer` and what begins like it are the OpenID provider at which people log in, and who may come in: as
    `Provider` and `Rules` take them. `oidc_ca_file` is what its certificate is checked by.
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
    public_url: str | None = None
    user_mounts: bool = False
    heartbeat_seconds: float = 5.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    ca_file: Path | None = None
    audit_log: Path | None = None
    metrics: str | None = None
    drain: int = 0
    drain_notice: int = 0
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


def serve(options: HostOptions) -> int:
    """Run a host until SIGTERM or SIGINT; the exit code. Raises KohakuRiverError when it can't start."""
    configure_logging(options.log_level, options.log_format)
    raise_file_limit()
    return loops.run(main(options))


async def main(options: HostOptions) -> int:
    """What `serve` runs on an event loop."""
    options.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    perimeter = Perimeter.of(options)
    with contextlib.ExitStack() as stack:
        stack.callback(perimeter.measures.close)
        socks = [stack.enter_context(sock) for sock in bind_with_loopback(options.bind, options.port)]
        ssh_sock = stack.enter_context(bind(options.bind, options.ssh_port))
        store = await Store.open(options.database or sqlite_url(options.state_dir / "host.db"))
        return await _run(options, socks, ssh_sock, store, perimeter)


async def _run(
    options: HostOptions, socks: list[socket.socket], ssh_sock: socket.socket, store: Store, perimeter: Perimeter
) -> int:
    runners = RunnerClient(perimeter.trusted)
    try:
        accounts = Accounts(store, defaults=Quotas.by_default(perimeter.limits))
        credentials = Credentials(
            accounts,
            allow_anonymous=options.allow_anonymous,
            audit=perimeter.audit,
            failures=Failures(rate=perimeter.limits.max_failures),
        )
        for path in await credentials.load_or_make(options.state_dir):
            log.info("made a token", file=str(path))
        if options.allow_anonymous:
            log.warning(
                "ANONYMOUS ACCESS IS ON: anybody who reaches this port can open forwards, terminals and SSH "
                "connections to every task"
            )
        warn_if_in_clear(socks[0], perimeter.certificate)
        return await _serve(options, socks, ssh_sock, store, accounts, runners, credentials, perimeter)
    finally:
        await runners.close()
        await store.close()
        await asyncio.to_thread(perimeter.audit.close)


async def _serve(
    options: HostOptions,
    socks: list[socket.socket],
    ssh_sock: socket.socket,
    store: Store,
    accounts: Accounts,
    runners: RunnerClient,
    credentials: Credentials,
    perimeter: Perimeter,
) -> int:
    changes = Changes[int]()
    nodes = Nodes(
        store,
        Reach(runners),
        heartbeat_seconds=options.heartbeat_seconds,
        on_change=changes.notify,
        audit=perimeter.audit,
    )
    tasks = Tasks(store, accounts, nodes, runners, changes, user_mounts=options.user_mounts, audit=perimeter.audit)
    access = Access(store, accounts)
    limits, measures = perimeter.limits, perimeter.measures
    requests = Requests(rate=limits.max_requests, most=limits.max_under_way)

    async def revoke(node: str, container: str, user: str, reason: str) -> None:
        found = await store.node(node)
        if found is not None:
            await runners.revoke(found, container, user, reason)

    counts = SessionCounts(store)
    grants = Grants(accounts, requests=requests, audit=perimeter.audit, revoke=revoke, counts=counts)
    hosts = Hosts(store, grants, nodes, changes)
    readiness = Readiness(store)
    forwards = Forwards(credentials, access, grants, store, nodes, tasks, straight_tells(limits))
    proxy = TunnelProxy(
        authorize=forwards.authorize,
        authorize_terminal=forwards.authorize_terminal,
        credential=credential_of,
        coming_back=nodes.coming_back,
        trusted=perimeter.trusted,
        limits=perimeter.limits,
    )
    terminals = TerminalProxy(
        authorize=forwards.authorize_terminal, credential=credential_of, trusted=perimeter.trusted, limits=limits
    )
    ssh_proxy = SshProxy(
        ssh_sock,
        authorize=forwards.authorize_ssh,
        keyholders=forwards.keyholder,
        check_user=credentials.caller,
        host_keys=await shared_host_keys(store, options.state_dir),
        trusted=perimeter.trusted,
        limits=perimeter.limits,
        opened=lambda seconds, error: measures.opened("ssh", seconds, error),
    )
    carriers = {"forward": proxy, "terminal": terminals, "ssh": ssh_proxy}
    logins = Logins(credentials, Browsers(store), grants, name_in_browsers(options.state_dir / "browser-name"))
    devices = DeviceLogins(DeviceCodes(store, accounts), credentials, perimeter.audit)
    identities = Identities(store)
    oidc = None
    if provider := provider_of(options):
        oidc = OidcLogins(provider, rules_of(options), identities, logins, credentials, grants)
    where = where_in(options.apps_domain, options.public_url, perimeter.names, socks[0].getsockname()[1])
    app_server = AppServer(
        await apps_key(store),
        where,
        store=store,
        credentials=credentials,
        logins=logins,
        forwards=forwards,
        trusted=perimeter.trusted,
        limits=limits,
        tls=perimeter.certificate is not None,
    )
    guard = Guard(
        names=[*perimeter.names, *where.names],
        hosts=options.allowed_hosts,
        origins=options.allowed_origins,
        elsewhere=app_server.owns,
    )
    logs = Logs(grants, nodes, runners)
    sessions = OpenSessions(grants)
    feed = Feed(store, accounts, tasks, nodes, sessions, changes)
    url = socket_url(socks[0], "https" if options.tls_cert else "http")
    ssh_address = socket_url(ssh_sock).removeprefix("http://")

    async def ready() -> None:
        if options.exit_with_stdin:
            stop_at_end_of_stdin(server)
        ssh_proxy.start()
        sentence = f"The host is ready at {url}, its SSH proxy at {ssh_address}"
        _show(measures, carriers, nodes, store)
        measures.begin(server)
        loops.freeze_heap()
        said = {"metrics": measures.url} if measures.url else {}
        print_event("ready", options.json, sentence, url=url, ssh_proxy=ssh_address, **said)

    async def leave() -> None:
        readiness.leaving = True
        if options.drain_notice:
            log.info("this host says that it is about to end", seconds=options.drain_notice)
            await asyncio.sleep(options.drain_notice)

    async def stop() -> None:
        await ssh_proxy.stop_listening()
        left = in_background(counts.leave(), "telling other hosts that this one ends")
        if options.drain:
            await proxy.drain(options.drain)
        await ssh_proxy.close()
        await terminals.close()
        logs.close()
        devices.close()
        await app_server.close()
        feed.close()
        await proxy.close()
        await left

    services = Services(
        credentials,
        access,
        People(accounts, identities, grants),
        GroupsOfUsers(Groups(store), grants),
        nodes,
        tasks,
        forwards,
        requests,
        perimeter.audit,
        logs,
        logins,
        devices,
        oidc,
        app_server.apps,
        AppLinks(StoredLinks(store), app_server.apps, grants),
        sessions,
        feed,
        readiness,
    )
    ways = [
        (kind, route) for kind, carrier in (("forward", proxy), ("terminal", terminals)) for route in carrier.routes()
    ]
    server = Server(
        measures.requests(create_app(services, guard)),
        ws=serve_ws([measures.route(*way) for way in ways], guard, max_message=limits.max_message),
        on_ready=ready,
        on_leave=leave,
        on_stop=stop,
        certificate=perimeter.certificate,
        limits=perimeter.limits,
        front=app_server.front,
    )
    beside = [
        server.keep(grants.run(), "checking the rights of sessions"),
        server.keep(counts.run(), "counting sessions for other hosts"),
        server.keep(hosts.run(), "listening to other hosts"),
        server.keep(hosts.care(), "deleting what has run out"),
        server.keep(tasks.run(), "looking what tasks that are waited for have changed"),
        server.keep(feed.run(), "telling what changes"),
        server.keep(nodes.run(), "looking whether nodes can be reached"),
        server.keep(perimeter.audit.run(), "counting what the audit log leaves out"),
    ]
    try:
        await server.serve(socks)
    finally:
        await loops.cancel_all(beside)
        if oidc is not None:
            await oidc.close()
    return server.exit_code


def _show(measures: Measures, carriers: Mapping[str, Any], nodes: Nodes, store: Store) -> None:
    """Have what the host counts itself among its measures, where somebody may read them."""
    if measures.url is None:
        return
    from kohakuriver.host.services.measures import HostMeasures

    own = HostMeasures(carriers, nodes, store)
    measures.show(own.look)
    measures.ask_database(own.refresh)
