"""The four hops in one process, over real sockets: what tests of the data path run on.

Host and runner are served by uvicorn as in their programs, without the HTTP API and its database; the tunnel client
is the static binary (``rust``) or the Python one (``python``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvicorn

from kohakuriver.errors import NotFoundError, UnauthenticatedError
from kohakuriver.host.tunnel_proxy import ForwardTarget, TunnelProxy
from kohakuriver.runner.tunnel_server import TunnelServer
from kohakuriver.tunnel.client import TunnelClient
from kohakuriver.tunnel.endpoint import EndpointConfig, UserEndpoint
from kohakuriver.tunnel.handshake import open_session
from kohakuriver.tunnel.protocol import TUNNEL_V2
from kohakuriver.tunnel.server import TunnelRoute, serve_ws
from kohakuriver.tunnel.ticket import Ticket

ROOT = Path(__file__).resolve().parents[1]
CONTAINER = "kohakuriver-vps-1"
CLIENTS = ("rust", "python")


def binary() -> Path:
    """The static tunnel client: the installed one, else the crate's own build."""
    for path in (
        os.environ.get("KOHAKURIVER_TUNNEL_CLIENT"),
        ROOT / "kohakuriver/bin/tunnel-client",
        ROOT / "kohakuriver-tunnel/target/release/tunnel-client",
    ):
        if path and Path(path).exists():
            return Path(path)
    raise FileNotFoundError("the tunnel client is not built: run `make build`")


async def _no_app(scope: object, receive: object, send: Callable[[dict[str, object]], object]) -> None:
    raise AssertionError("only WebSockets are served here")


@contextlib.asynccontextmanager
async def served(routes: list[TunnelRoute]) -> AsyncIterator[int]:
    """Serve ``routes`` on a free loopback port, which is yielded."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(_no_app, ws=serve_ws(routes), lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[sock])
    try:
        yield sock.getsockname()[1]
    finally:
        await server.shutdown(sockets=[sock])


class Chain:
    """One host, one runner, and what a test attaches to them."""

    def __init__(self) -> None:
        self.changes: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
        self.addresses: dict[str, str] = {}
        self.server = TunnelServer(
            allow_anonymous=True,
            check_tunnel_token=lambda container, token: token == f"token of {container}",
            check_ticket=self._check_ticket,
            address_of=self.addresses.get,
            on_tunnel_change=lambda container, connected: self.changes.put_nowait((container, connected)),
        )
        self.proxy = TunnelProxy(authorize=self._authorize)
        self.runner_port = 0
        self.host_port = 0
        self.stack = contextlib.AsyncExitStack()
        self.errors: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
        self.detached: asyncio.Queue[str] = asyncio.Queue()

    @staticmethod
    def _check_ticket(ticket: str) -> Ticket:
        kind, container = ticket.split(" ", 1)
        if kind != "ticket":
            raise UnauthenticatedError("no such ticket")
        return Ticket("node", "forward", "id", 0.0, 1, container, "me", None)

    async def _authorize(self, token: str | None, task: str, port: int, proto: str) -> ForwardTarget:
        if task == "missing":
            raise NotFoundError("no such task: missing")
        container = CONTAINER if task == "1" else task
        return ForwardTarget(f"ws://127.0.0.1:{self.runner_port}", container, f"ticket {container}")

    @property
    def runner_url(self) -> str:
        return f"http://127.0.0.1:{self.runner_port}"

    async def tunnel(self, kind: str, container: str = CONTAINER) -> asyncio.Task[int] | asyncio.subprocess.Process:
        """Start a tunnel client and wait until its tunnel is up."""
        client: asyncio.Task[int] | asyncio.subprocess.Process
        if kind == "python":
            twin = TunnelClient(self.runner_url, container, token=f"token of {container}")
            client = asyncio.ensure_future(twin.serve())
            self.stack.push_async_callback(_cancelled, client)
        else:
            client = await asyncio.create_subprocess_exec(
                str(binary()), "--runner-url", self.runner_url, "--container-id", container, "--log-level", "warn"
            )
            self.stack.push_async_callback(_killed, client)
        while await self.changes.get() != (container, True):
            pass
        return client

    async def user(self, *, task: str = "1", config: EndpointConfig | None = None, version: int = 2) -> UserEndpoint:
        """One user's session, through the host."""
        endpoint = UserEndpoint(
            config=config,
            on_stream_error=lambda port, text: self.errors.put_nowait((port, text)),
            on_detach=self.detached.put_nowait,
        )
        await self.attach(endpoint, task=task, version=version)
        self.stack.push_async_callback(endpoint.close)
        return endpoint

    async def attach(self, endpoint: UserEndpoint, *, task: str = "1", version: int = 2) -> None:
        url = f"ws://127.0.0.1:{self.host_port}/ws/forward/{task}/1"
        endpoint.attach(await open_session(url, subprotocols=(TUNNEL_V2,) if version == 2 else ()))


async def _cancelled(task: asyncio.Task[int]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _killed(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@contextlib.asynccontextmanager
async def chain() -> AsyncIterator[Chain]:
    """Host and runner, each on a free port; all that was started on them ends with them."""
    hops = Chain()
    async with hops.stack as stack:
        hops.runner_port = await stack.enter_async_context(served(hops.server.routes()))
        stack.push_async_callback(hops.server.close)
        hops.host_port = await stack.enter_async_context(served(hops.proxy.routes()))
        stack.push_async_callback(hops.proxy.close)
        yield hops


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


@contextlib.asynccontextmanager
async def service(handler: Handler) -> AsyncIterator[int]:
    """A TCP service "in the container": its port."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0, backlog=2048)  # type: ignore[arg-type]
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, and end when the other side has."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    writer.close()
