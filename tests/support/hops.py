"""The four hops in one process, over real sockets: what tests of the data path run on.

Host and runner are served by uvicorn as in their programs, without the HTTP API and its database; the tunnel client
is the static binary (``rust``) or the Python one (``python``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

from kohakuriver.cli.pki import Authority
from kohakuriver.errors import KohakuRiverError, NotAllowedError, NotFoundError, UnauthenticatedError
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.grants import Grants
from kohakuriver.host.services.tunnel_proxy import TunnelProxy, straight_tells
from kohakuriver.limits import Limits
from kohakuriver.quotas import Quotas
from kohakuriver.relay.direct import DirectTarget
from kohakuriver.relay.straight import Straights
from kohakuriver.relay.tunnel_server import TunnelServer
from kohakuriver.runtime import cancel_all
from kohakuriver.session.carried import Route
from kohakuriver.session.ticket import Ticket
from kohakuriver.store import Accounts, Task
from kohakuriver.tls import ServerCertificate, client_context
from kohakuriver.tunnel.accept import Peer, TunnelRoute, serve_ws
from kohakuriver.tunnel.client import TunnelClient
from kohakuriver.tunnel.dial import Server, open_session
from kohakuriver.tunnel.own_token import OwnToken
from kohakuriver.tunnel.protocol import MARK, TUNNEL_V2
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from kohakuriver.web.app import new_app
from tests.support.serving import a_server

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = "kohakuriver-vps-1"
CLIENTS = ("rust", "python")


def binary() -> Path:
    """The static tunnel client: the installed one, else the crate's own build."""
    for path in (
        os.environ.get("KOHAKURIVER_TUNNEL_CLIENT"),
        ROOT / "src/kohakuriver/bin/tunnel-client",
        ROOT / "src/kohakuriver-tunnel/target/release/tunnel-client",
    ):
        if path and Path(path).exists():
            return Path(path)
    raise FileNotFoundError("the tunnel client is not built: run `make build`")


_NO_APP = new_app("hops", "1")


@contextlib.asynccontextmanager
async def served(routes: list[TunnelRoute], certificate: ServerCertificate | None = None) -> AsyncIterator[int]:
    """Serve ``routes``, and nothing else, on a free loopback port, which is yielded."""
    async with a_server(_NO_APP, serve_ws(routes), certificate) as (server, sock):
        server.config.timeout_graceful_shutdown = 1
        yield sock.getsockname()[1]


# Where the SSH server of every task here listens.
SSH_PORT = 2222


class Security:
    """Certificates of host and runner, and how they are checked."""

    def __init__(self, directory: Path) -> None:
        made = Authority(directory).issue(["127.0.0.1"], 1)
        self.served = ServerCertificate(made.cert, made.key)
        self.trusted = client_context("https:", directory / "ca.pem")


# What `chain` serves with: None for plain HTTP. A test that wants TLS on both hops sets it.
security: Security | None = None


class Chain:
    """One host, one runner, and what a test attaches to them; what users and the host dial is as ``security``."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.security = security
        self.changes: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
        self.addresses: dict[str, str] = {}
        self.troubles: list[tuple[str, str]] = []
        # Where users find the runner past the host; nobody does where there is a refusal.
        self.straights = Straights("", "this runner is not for users", lease=(limits or Limits()).lease)
        self.tells = straight_tells(limits or Limits())
        self.server = TunnelServer(
            allow_anonymous=True,
            check_tunnel=self._check_tunnel,
            check_ticket=self._check_ticket,
            check_terminal_ticket=self._check_ticket,
            target_of=lambda name: DirectTarget(self.addresses[name]) if name in self.addresses else None,
            mark=lambda user, container: hashlib.sha256(f"{user} {container}".encode()).digest()[:MARK],
            on_tunnel_change=lambda container, connected: self.changes.put_nowait((container, connected)),
            on_trouble=lambda container, sentence, _: self.troubles.append((container, sentence)),
            limits=limits,
            straights=self.straights,
        )
        self.audit = Lines()
        trusted = self.security.trusted if self.security else None
        self.proxy = TunnelProxy(
            authorize=self._authorize,
            authorize_terminal=lambda token, task, _: self._authorize(token, task, None, "tcp", None),
            trusted=trusted,
            limits=limits,
        )
        self.quotas = Quotas.by_default(limits or Limits())
        self.grants = Grants(cast(Accounts, None), audit=self.audit)
        self.runner_port = 0
        self.container_port = 0
        self.host_port = 0
        self.stack = contextlib.AsyncExitStack()
        # Where a hop finds the next: a port of 127.0.0.1, behind which a test may put a relay of its own.
        self.host_seen_by_user: Callable[[], int] = lambda: self.host_port
        self.runner_seen_by_host: Callable[[], int] = lambda: self.runner_port
        self.runner_seen_by_container: Callable[[], int] = lambda: self.container_port
        self.errors: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
        self.detached: asyncio.Queue[str] = asyncio.Queue()

    @staticmethod
    async def _check_tunnel(container: str, token: str, client: str, _: Peer) -> str:
        if token != f"token of {container}":
            raise NotAllowedError(f"the token is not that of {container}")
        return client

    def _check_ticket(self, ticket: str) -> Ticket:
        kind, container, user = ticket.split(" ")
        if kind != "ticket":
            raise UnauthenticatedError("no such ticket")
        return Ticket("node", "forward", "id", 0.0, 1, container, user, None, tells=self.tells)

    async def _authorize(
        self, token: str | None, task: str, port: int | None, proto: str, ports: frozenset[int] | None
    ) -> Route:
        if task == "missing":
            raise NotFoundError("no such task: missing")
        container = CONTAINER if task == "1" else task
        url = f"{self.scheme}://127.0.0.1:{self.runner_seen_by_host()}"
        grant = self.grants.open(
            Caller(token or "", "user", quotas=self.quotas), Task(task_id=1, node="node", container=container)
        )
        return Route(url, container, f"ticket {container} {token or 'me'}", grant, port=port or SSH_PORT)

    @property
    def scheme(self) -> str:
        return "wss" if self.security else "ws"

    @property
    def runner_url(self) -> str:
        return f"http://127.0.0.1:{self.runner_seen_by_container()}"

    async def tunnel(
        self, kind: str, container: str = CONTAINER, *, config: EndpointConfig | None = None, anonymous: bool = False
    ) -> asyncio.Task[int] | asyncio.subprocess.Process:
        """Start a tunnel client and wait until its tunnel is up.

        ``config`` is for the Python one, which shows a token unless it is ``anonymous``, as the other is.
        """
        token = None if anonymous else f"token of {container}"
        client: asyncio.Task[int] | asyncio.subprocess.Process
        if kind == "python":
            twin = TunnelClient(self.runner_url, container, token=OwnToken.of(token), config=config)
            client = asyncio.ensure_future(twin.serve())
            self.stack.push_async_callback(_cancelled, client)
        else:
            client = await asyncio.create_subprocess_exec(
                str(binary()), "--runner-url", self.runner_url, "--container-id", container, "--log-level", "warn"
            )
            self.stack.push_async_callback(_killed, client)
        await self.changed(container, True)
        return client

    async def changed(self, container: str, connected: bool) -> None:
        """Wait until this container's tunnel has come, or gone."""
        while await self.changes.get() != (container, connected):
            pass

    async def at_rest(self) -> None:
        """Wait until no hop knows of a stream any more."""
        await until(lambda: self.server.snapshot()["streams"] == 0)
        for session in self.server.hub.sessions:
            assert not session.table.items()
            assert not session.ended

    async def user(
        self,
        *,
        task: str = "1",
        config: EndpointConfig | None = None,
        version: int = 2,
        token: str | None = None,
        query: str = "",
    ) -> UserEndpoint:
        """One user's session, through the host; the token is the user's name too."""
        endpoint = UserEndpoint(
            config=config,
            on_stream_error=lambda port, text: self.errors.put_nowait((port, str(text))),
            on_detach=self.detached.put_nowait,
        )
        await self.attach(endpoint, task=task, version=version, token=token, query=query)
        self.stack.push_async_callback(endpoint.close)
        return endpoint

    async def attach(
        self,
        endpoint: UserEndpoint,
        *,
        task: str = "1",
        version: int = 2,
        token: str | None = None,
        query: str = "",
    ) -> None:
        url = f"{self.scheme}://127.0.0.1:{self.host_seen_by_user()}/ws/forward/{task}/1{query}"
        trusted = self.security.trusted if self.security else None
        subprotocols = (TUNNEL_V2,) if version == 2 else ()
        endpoint.attach(await open_session(Server(url, token, trusted), subprotocols=subprotocols))


class Lines:
    """An audit log that is kept in memory."""

    def __init__(self) -> None:
        self.written: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def write(self, event: str, **fields: Any) -> None:
        self.written.put_nowait({"event": event, **fields})

    def of_node(self, event: str, node: str, **fields: Any) -> None:
        self.write(event, node=node, **fields)

    def refused(self, error: KohakuRiverError, **fields: Any) -> None:
        self.write("refused", code=error.code, **fields)

    def need_room(self, user: str) -> None:
        pass


async def kill(client: asyncio.Task[int] | asyncio.subprocess.Process) -> None:
    """End a tunnel client as a crash would."""
    if isinstance(client, asyncio.Task):
        await _cancelled(client)
    else:
        await _killed(client)


async def _cancelled(task: asyncio.Task[int]) -> None:
    await cancel_all([task])


async def _killed(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@contextlib.asynccontextmanager
async def chain(limits: Limits | None = None) -> AsyncIterator[Chain]:
    """Host and runner, each on a free port; all that was started on them ends with them."""
    hops = Chain(limits)
    certificate = hops.security.served if hops.security else None
    async with hops.stack as stack:
        hops.container_port = await stack.enter_async_context(served(hops.server.routes()))
        hops.runner_port = await stack.enter_async_context(served(hops.server.routes(), certificate))
        stack.push_async_callback(hops.server.close)
        hops.host_port = await stack.enter_async_context(served(hops.proxy.routes(), certificate))
        stack.push_async_callback(hops.proxy.close)
        yield hops


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what nothing tells of when it happens; the test's own time-out ends a wait in vain."""
    while not holds():  # noqa: ASYNC110  # what it waits for has no event
        await asyncio.sleep(0.002)


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


@contextlib.asynccontextmanager
async def service(handler: Handler) -> AsyncIterator[int]:
    """A TCP service "in the container": its port. At the end it is gone, with the connections that it still has."""
    open_now: dict[asyncio.StreamWriter, asyncio.Task[object]] = {}

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_now[writer] = task
        try:
            result = handler(reader, writer)
            if asyncio.iscoroutine(result):
                await result
        except asyncio.CancelledError:  # by us, below: asyncio's own callback takes a cancelled handler for a failure
            writer.transport.abort()
        finally:
            del open_now[writer]

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=2048)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        left = list(open_now.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


@contextlib.asynccontextmanager
async def dial(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a local port; afterwards it is gone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.transport.set_write_buffer_limits(high=0)  # what is drained is with the kernel, and not lost at the end
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def asked(port: int, data: bytes) -> bytes:
    """What a service answers to ``data`` and end-of-file."""
    async with dial(port) as (reader, writer):
        writer.write(data)
        writer.write_eof()
        return await reader.read()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, and end when the other side has."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    writer.close()
