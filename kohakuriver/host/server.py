"""The host as a program: state, sockets, serving, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from kohakuriver import loops
from kohakuriver.errors import UsageError
from kohakuriver.host.access import Access
from kohakuriver.host.app import Services, create_app
from kohakuriver.host.credentials import Credentials
from kohakuriver.host.forwards import Forwards
from kohakuriver.host.grants import Grants
from kohakuriver.host.nodes import Nodes
from kohakuriver.host.people import People
from kohakuriver.host.runner_client import RunnerClient
from kohakuriver.host.tasks import Changes, Tasks
from kohakuriver.host.terminal_proxy import TerminalProxy
from kohakuriver.host.tunnel_proxy import TunnelProxy
from kohakuriver.ssh_proxy import SshProxy
from kohakuriver.store import Accounts, Store, sqlite_url
from kohakuriver.tunnel.guard import Guard
from kohakuriver.tunnel.server import serve_ws
from kohakuriver.web import Server, bind, configure_logging, print_ready, socket_url, stop_at_end_of_stdin

__all__ = ["HostOptions", "main", "serve"]

log = structlog.get_logger("kohakuriver.host")


@dataclass(frozen=True)
class HostOptions:
    """How a host runs. `port` and `ssh_port` 0 are any free one; `database` None is a SQLite file in `state_dir`.

    `allowed_hosts` and `allowed_origins` are as `Guard` takes them. With `user_mounts` others than admins may mount
    directories of nodes.
    With `exit_with_stdin` it ends when its stdin does, as a child of `up` should.
    """

    state_dir: Path
    bind: str = "0.0.0.0"
    port: int = 8000
    ssh_port: int = 8002
    database: str | None = None
    allow_anonymous: bool = False
    allowed_hosts: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    user_mounts: bool = False
    heartbeat_seconds: float = 5.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    json: bool = False
    log_level: str = "info"
    exit_with_stdin: bool = False


def serve(options: HostOptions) -> int:
    """Run a host until SIGTERM or SIGINT; the exit code. Raises KohakuRiverError when it can't start."""
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together.")
    configure_logging(options.log_level)
    return loops.run(main(options))


async def main(options: HostOptions) -> int:
    """What `serve` runs on an event loop."""
    options.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(bind(options.bind, options.port))
        ssh_sock = stack.enter_context(bind(options.bind, options.ssh_port))
        store = await Store.open(options.database or sqlite_url(options.state_dir / "host.db"))
        await _run(options, sock, ssh_sock, store)
    return 0


async def _run(options: HostOptions, sock: socket.socket, ssh_sock: socket.socket, store: Store) -> None:
    runners = RunnerClient()
    try:
        credentials = Credentials(Accounts(store), allow_anonymous=options.allow_anonymous)
        for path in await credentials.load_or_make(options.state_dir):
            log.info("made a token", file=str(path))
        if options.allow_anonymous:
            log.warning("ANONYMOUS ACCESS IS ON: anybody who reaches this port can open forwards to every task")
        await _serve(options, sock, ssh_sock, store, runners, credentials)
    finally:
        await runners.close()
        await store.close()


async def _serve(
    options: HostOptions,
    sock: socket.socket,
    ssh_sock: socket.socket,
    store: Store,
    runners: RunnerClient,
    credentials: Credentials,
) -> None:
    changes = Changes()
    nodes = Nodes(store, heartbeat_seconds=options.heartbeat_seconds, on_change=changes.notify)
    tasks = Tasks(store, nodes, runners, changes, user_mounts=options.user_mounts)
    accounts = Accounts(store)
    access, grants = Access(store, accounts), Grants(accounts)
    forwards = Forwards(credentials, access, grants, store, nodes, tasks)
    proxy = TunnelProxy(authorize=forwards.authorize)
    terminals = TerminalProxy(authorize=forwards.authorize_terminal)
    ssh_proxy = SshProxy(
        ssh_sock,
        authorize=forwards.authorize_ssh,
        keyholders=forwards.keyholder,
        check_user=credentials.caller,
        host_key=options.state_dir / "ssh_host_ed25519_key",
    )
    guard = Guard(hosts=options.allowed_hosts, origins=options.allowed_origins)
    url = socket_url(sock, "https" if options.tls_cert else "http")
    ssh_address = socket_url(ssh_sock).removeprefix("http://")

    async def ready() -> None:
        if options.exit_with_stdin:
            stop_at_end_of_stdin(server)
        ssh_proxy.start()
        sentence = f"The host is ready at {url}, its SSH proxy at {ssh_address}"
        print_ready(options.json, sentence, url=url, ssh_proxy=ssh_address)

    async def stop() -> None:
        await ssh_proxy.close()
        await terminals.close()
        await proxy.close()

    server = Server(
        create_app(Services(credentials, access, People(accounts, grants), nodes, tasks), guard),
        ws=serve_ws([*proxy.routes(), *terminals.routes()], guard),
        on_ready=ready,
        on_stop=stop,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
    )
    checking = asyncio.get_running_loop().create_task(grants.run())
    try:
        await server.serve([sock])
    finally:
        await loops.cancel_all([checking])
