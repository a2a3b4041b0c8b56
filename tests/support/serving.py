"""The server of host and runner in the test's own process, on a free loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI

from kohakuriver.tls import ServerCertificate
from kohakuriver.tunnel.accept import serve_ws
from kohakuriver.web.app import bind, socket_url
from kohakuriver.web.server import Front, Server

__all__ = ["a_server", "serving"]


async def _nothing() -> None:
    pass


@contextlib.asynccontextmanager
async def a_server(
    app: FastAPI,
    ws: type[asyncio.Protocol] | None = None,
    certificate: ServerCertificate | None = None,
    front: Front | None = None,
    ahead: Callable[[str], bool] = lambda path: False,
) -> AsyncIterator[tuple[Server, socket.socket]]:
    """Serve an application until the end of the block: the server, and its socket. Signals stay whose they are."""
    sock = bind("127.0.0.1", 0)
    server = Server(
        app,
        ws=ws or serve_ws([]),
        on_ready=_nothing,
        on_stop=_nothing,
        certificate=certificate,
        front=front,
        ahead=ahead,
    )
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup([sock])
    try:
        yield server, sock
    finally:
        await server.shutdown()


@contextlib.asynccontextmanager
async def serving(
    app: FastAPI,
    ws: type[asyncio.Protocol] | None = None,
    front: Front | None = None,
    certificate: ServerCertificate | None = None,
    ahead: Callable[[str], bool] = lambda path: False,
) -> AsyncIterator[str]:
    """Serve an application; its URL."""
    async with a_server(app, ws, certificate, front, ahead) as (_, sock):
        yield socket_url(sock, "http" if certificate is None else "https")
