"""What host and runner have in common as HTTP programs: error answers, sockets, serving, a quiet end.

Both serve HTTP and tunnel WebSockets on one port through uvicorn. Sources: docs/protocol.md §4, docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any, cast

import structlog
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from kohakuriver.errors import KohakuRiverError, LocalAddressError, NotAllowedError, UsageError
from kohakuriver.limits import Limits
from kohakuriver.resolve import resolving
from kohakuriver.tls import ServerCertificate
from kohakuriver.tunnel.bearer import bearer_token
from kohakuriver.tunnel.protocol import CloseCode
from kohakuriver.web.listener import Acceptor
from kohakuriver.web.origin import Guard
from kohakuriver.web.request_limits import guarded
from kohakuriver.web.waiting_room import WaitingRoom

__all__ = [
    "Server",
    "bearer",
    "bind",
    "new_app",
    "print_ready",
    "server_certificate",
    "socket_url",
    "stop_at_end_of_stdin",
    "warn_if_in_clear",
]

log = structlog.get_logger("kohakuriver")

DRAIN_SECONDS = 5


class GuardMiddleware:
    """Lets through what the guard takes."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            try:
                self._guard.check(headers.getlist("host"), headers.getlist("origin"), (scope["server"] or (None,))[0])
            except NotAllowedError as error:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": int(CloseCode.POLICY)})
                else:
                    await JSONResponse(error.to_json(), status_code=error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def new_app(title: str, version: str, *, guard: Guard | None = None, documented: bool = False) -> FastAPI:
    """An application whose every error answer is `{"error": code, "message": sentence}`.

    `guard` says which Host and Origin headers it takes; without it, all. `documented`: with an OpenAPI description.
    """
    described = "/openapi.json" if documented else None
    app = FastAPI(title=title, version=version, openapi_url=described, docs_url=None, redoc_url=None)
    if guard is not None:
        app.add_middleware(GuardMiddleware, guard=guard)

    @app.exception_handler(KohakuRiverError)
    async def failed(_request: Request, error: KohakuRiverError) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(error.to_json(), status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": "bad_request", "message": _sentence(error)}, status_code=400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404 and request.url.path.startswith("/ws/"):
            return _upgrade_required(request)
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


def _upgrade_required(request: Request) -> JSONResponse:
    """The answer to a plain request for what only a WebSocket may ask for (RFC 9110 section 15.5.22)."""
    message = (
        f"{request.method} {request.url.path} came without a WebSocket upgrade; if a WebSocket was meant, a proxy "
        "on the way dropped it, and must pass on the headers Upgrade and Connection."
    )
    headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
    return JSONResponse({"error": "upgrade_required", "message": message}, status_code=426, headers=headers)


def _sentence(error: RequestValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    what = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"The request's {place!r} is invalid: {what}." if place else f"The request is invalid: {what}."


def bearer(request: Request) -> str | None:
    """The credential of a request, or None. Raises what `bearer_token` raises."""
    return bearer_token(request.headers.getlist("authorization"))


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that is bound but does not listen yet; port 0 is any free one. Raises LocalAddressError."""
    try:
        with resolving():
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


def server_certificate(cert: Path | None, key: Path | None) -> ServerCertificate | None:
    """The certificate of `--tls-cert` and `--tls-key`; None without. Raises UsageError when they are no good."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise UsageError("--tls-cert and --tls-key go together.")
    return ServerCertificate(cert, key, lambda sentence, bad: (log.error if bad else log.info)(sentence))


def warn_if_in_clear(sock: socket.socket, certificate: ServerCertificate | None) -> None:
    """Say that a program which other machines can reach speaks plain HTTP."""
    if certificate is None and not ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback:
        log.warning("this port speaks plain HTTP to other machines: give --tls-cert and --tls-key, or use a VPN")


def print_ready(as_json: bool, sentence: str, **fields: Any) -> None:
    """The one line on stdout that says that a program serves now."""
    print(json.dumps({"event": "ready", **fields}) if as_json else sentence, flush=True)


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
        certificate: ServerCertificate | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._room = WaitingRoom(self._limits.max_waiting)
        super().__init__(_config(app, ws, self._limits, self._room))
        self._certificate = certificate
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
            if self._certificate is not None:
                self._certificate.look()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT begin a drain that ends with exit code 0, where uvicorn would raise them again.

        SIGHUP has the certificate read again. To a program that was started from a terminal it says that this is gone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGHUP") and not _on_terminal():
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._read_again)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _read_again(self, _number: int, _frame: FrameType | None) -> None:
        if self._certificate is not None:
            self._loop.call_soon_threadsafe(self._certificate.reload)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # the sockets are ours to listen on: uvicorn sets no time for a TLS handshake
        tls = None if self._certificate is None else self._certificate.context
        for sock in sockets or []:
            self._listen(self.config, sock, tls)
        await self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._on_stop()
        await super().shutdown(sockets)

    async def add_listener(self, sock: socket.socket, app: FastAPI, ws: type[asyncio.Protocol]) -> None:
        """Serve another application on one more bound socket, without TLS, until the end. Raises OSError."""
        config = _config(app, ws, self._limits, self._room)
        config.load()
        self._listen(config, sock, None)

    def _listen(self, config: uvicorn.Config, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        def new_protocol() -> asyncio.Protocol:
            make: Any = config.http_protocol_class
            protocol: asyncio.Protocol = make(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )
            return protocol

        acceptor = Acceptor(
            sock, new_protocol, tls=tls, handshake_timeout=self._limits.handshake_timeout, room=self._room
        )
        self.servers.append(cast(asyncio.Server, acceptor))


def _on_terminal() -> bool:
    try:
        return os.isatty(0)
    except OSError:
        return False


def _config(app: FastAPI, ws: type[asyncio.Protocol], limits: Limits, room: WaitingRoom) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        ws=ws,
        http=guarded(limits, room),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
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
