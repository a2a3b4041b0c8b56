"""What host and runner have in common as HTTP programs: error answers, sockets, serving, a quiet end.

Both serve HTTP and tunnel WebSockets on one port through uvicorn. Sources: docs/protocol.md §4, docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kohakuriver.errors import KohakuRiverError, LocalAddressError, UnauthenticatedError

__all__ = ["Server", "bearer", "bind", "configure_logging", "new_app", "print_ready", "socket_url"]

log = structlog.get_logger("kohakuriver")

BACKLOG = 2048
"""Connections that may wait to be accepted; a burst of 500 simultaneous connects must fit."""

ACCEPTED_AT_ONCE = 64
"""Connections that are accepted before others get their turn; the standard library's loop takes it from the backlog."""

DRAIN_SECONDS = 5


def new_app(title: str, version: str) -> FastAPI:
    """An application whose every error answer is `{"error": code, "message": sentence}`."""
    app = FastAPI(title=title, version=version)

    @app.exception_handler(KohakuRiverError)
    async def failed(_request: Request, error: KohakuRiverError) -> JSONResponse:
        return JSONResponse(error.to_json(), status_code=error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": "bad_request", "message": _sentence(error)}, status_code=400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(
            {"error": codes.get(error.status_code, "bad_request"), "message": message}, status_code=error.status_code
        )

    @app.exception_handler(Exception)
    async def broken(request: Request, _error: Exception) -> JSONResponse:
        message = f"The {title} failed at {request.method} {request.url.path}; its log says why."
        return JSONResponse({"error": "failed", "message": message}, status_code=500)

    return app


def _sentence(error: RequestValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    what = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"The request's {place!r} makes no sense: {what}." if place else f"The request makes no sense: {what}."


def bearer(request: Request) -> str | None:
    """The credential of a request, or None. Raises UnauthenticatedError for an Authorization of another scheme."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "bearer" or not value.strip():
        raise UnauthenticatedError("The Authorization header must be `Bearer <token>`.")
    return value.strip()


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that is bound but does not listen yet; port 0 is any free one. Raises LocalAddressError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise LocalAddressError(f"{host!r} is no address that this machine can listen on: {error.strerror}.") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise LocalAddressError(f"{host}:{port} can't be listened on: {error.strerror}.") from error
    return sock


def socket_url(sock: socket.socket, scheme: str = "http") -> str:
    """How this machine itself reaches a bound socket."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if sock.family == socket.AF_INET else "::1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def print_ready(as_json: bool, sentence: str, **fields: Any) -> None:
    """The one line on stdout that says that a program serves now."""
    print(json.dumps({"event": "ready", **fields}) if as_json else sentence, flush=True)


def configure_logging(level: str = "info") -> None:
    """Log to stderr, one line an event; what the libraries log joins in from warnings up."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


class Server(uvicorn.Server):
    """uvicorn, with `on_ready` once it listens, `on_stop` before it drains, and listeners that come and go.

    `on_stop` ends what never ends by itself (tunnels, sessions); after it only HTTP answers that are under way are
    waited for.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        ws: type[asyncio.Protocol],
        on_ready: Callable[[], Awaitable[None]],
        on_stop: Callable[[], Awaitable[None]],
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        super().__init__(_config(app, ws, ssl_certfile=tls_cert, ssl_keyfile=tls_key))
        self._on_ready = on_ready
        self._on_stop = on_stop
        self._end = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """Begin the end, as SIGTERM does. May be called from a signal handler or another thread."""
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._end.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.stop()

    async def main_loop(self) -> None:
        """Wait for the end; uvicorn would look for it ten times a second."""
        seconds = 0
        while not await self.on_tick(10 * seconds):
            seconds += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._end.wait(), 1)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT begin a drain that ends with exit code 0, where uvicorn would raise them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or []:
            sock.listen(BACKLOG)
        await self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._on_stop()
        await super().shutdown(sockets)

    async def add_listener(self, sock: socket.socket, app: FastAPI, ws: type[asyncio.Protocol]) -> None:
        """Serve another application on one more bound socket, until the end. Raises OSError."""
        config = _config(app, ws)
        config.load()

        def new_protocol() -> asyncio.Protocol:
            make: Any = config.http_protocol_class
            protocol: asyncio.Protocol = make(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return protocol

        loop = asyncio.get_running_loop()
        self.servers.append(await loop.create_server(new_protocol, sock=sock, backlog=ACCEPTED_AT_ONCE))
        sock.listen(BACKLOG)


def _config(app: FastAPI, ws: type[asyncio.Protocol], **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ws=ws,
        http="httptools",
        lifespan="off",
        log_config=None,
        access_log=False,
        backlog=ACCEPTED_AT_ONCE,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        **more,
    )


def stop_at_end_of_stdin(server: Server) -> None:
    """Stop `server` when stdin ends: how a child notices that whoever started it was killed."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has ended before stdin did
            server.stop()

    threading.Thread(target=wait, name="stdin", daemon=True).start()
