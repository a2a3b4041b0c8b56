"""What host and runner have in common as HTTP programs: error answers, sockets, what they say at their start.

Both serve HTTP and tunnel WebSockets on one port through uvicorn. Sources: docs/protocol.md §4, docs/architecture.md.
"""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable, Coroutine, Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kohakuriver import tracing
from kohakuriver.asking import Asker, asking, peer_name
from kohakuriver.descriptors import as_far_as_it_goes
from kohakuriver.errors import KohakuRiverError, LocalAddressError, NotAllowedError, UsageError
from kohakuriver.proxies import Proxies
from kohakuriver.resolve import resolving
from kohakuriver.tls import ServerCertificate
from kohakuriver.tunnel.bearer import bearer_token
from kohakuriver.web.origin import Guard

__all__ = [
    "Checked",
    "bearer",
    "bind",
    "bind_with_loopback",
    "new_app",
    "print_event",
    "server_certificate",
    "services_of",
    "socket_url",
    "warn_if_in_clear",
]

log = structlog.get_logger("kohakuriver")


HEALTH = ("/health", "/health/live", "/health/ready")
"""What tells strangers whether a program is well."""


class GuardMiddleware:
    """Lets through what the guard takes, and a balancer's question how we are.

    Balancers ask by HTTP/1.0, without a Host header. No browser does: it sends one with every request.
    """

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            hosts, origins = headers.getlist("host"), headers.getlist("origin")
            try:
                nameless = scope["http_version"] == "1.0" and not (hosts or origins)
                if not nameless or scope["path"] not in HEALTH:
                    self._guard.check(hosts, origins, (scope["server"] or (None,))[0])
            except NotAllowedError as error:
                await JSONResponse(error.to_json(), status_code=error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
_HEADERS_OF_TLS = {**_HEADERS, "Strict-Transport-Security": "max-age=31536000"}


class AnswerMiddleware:
    """Adds to every answer what browsers and caches should know: tokens and tasks are nothing to keep.

    An answer that may be kept says so itself.

    Sources: RFC 9111 section 5.2.2.5, RFC 6797 section 7.2 (over TLS alone).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _HEADERS_OF_TLS if scope.get("scheme") == "https" else _HEADERS

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = MutableHeaders(scope=message)
                for name, value in headers.items():
                    told.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, add)


class AskerMiddleware:
    """Says who asks, to whatever a request leads to: whoever it was that a proxy of `proxies` asks for."""

    def __init__(self, app: ASGIApp, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = tracing.id_in(headers.get(tracing.REQUEST_ID), headers.get(tracing.TRACEPARENT))
        tracing.begin(request_id)  # for what is logged of a failure behind us, too: each request has a task of its own
        claims, peer = headers.getlist("x-forwarded-for"), scope["client"]
        believed = isinstance(peer, tuple) and self._proxies.trusts(peer[0])
        if believed:
            tls = self._proxies.tls(peer[0], headers.getlist("x-forwarded-proto"))
            scheme = scope["scheme"] if tls is None else "https" if tls else "http"
            scope = {**scope, "client": self._proxies.client(peer, claims), "scheme": scheme}
        known = {"request_id": request_id}
        asker = Asker(peer_name(scope["client"]), f"{scope['method']} {scope['path']}", known)
        if claims and not believed:
            asker.known["forwarded_for"] = ", ".join(claims)
        with asking(asker):
            await self._app(scope, receive, send)


def new_app(
    title: str,
    version: str,
    *,
    guard: Guard | None = None,
    documented: bool = False,
    on_error: Callable[[KohakuRiverError], None] | None = None,
    services: object = None,
    routers: Iterable[APIRouter] = (),
    proxies: Proxies | None = None,
) -> FastAPI:
    """An application whose every error answer is `{"error": code, "message": sentence}`.

    `guard` says which Host and Origin headers it takes; without it, all. `documented`: with an OpenAPI description.
    The routes of `routers` get `services` from `services_of`.
    `on_error` is told of the errors of ours that are answered. `proxies` says whose word of where a request comes from
    counts; without it, nobody's.
    """
    described = "/openapi.json" if documented else None
    # A path with a slash too many is none: a redirect would name the scheme and the name that the request came with,
    # and before us there may be a proxy that has others.
    app = FastAPI(
        title=title, version=version, openapi_url=described, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    if guard is not None:
        app.add_middleware(GuardMiddleware, guard=guard)
    app.add_middleware(AnswerMiddleware)
    app.add_middleware(AskerMiddleware, proxies=proxies or Proxies())

    @app.exception_handler(KohakuRiverError)
    async def failed(_request: Request, error: KohakuRiverError) -> JSONResponse:
        if on_error is not None:
            on_error(error)
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
        told = error.to_json() | tracing.told(error.status)
        return JSONResponse(told, status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": "bad_request", "message": _sentence(error)}, status_code=400)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404 and request.url.path.startswith("/ws/"):
            return _upgrade_required(request)
        codes = {404: "no_such_path", 405: "method_not_allowed"}
        message = f"There is no {request.method} {request.url.path} here; check the URL, and the version of both sides."
        if error.status_code == 400:  # FastAPI says so of what it can't take apart
            message = "The request's body can't be read; send JSON, in UTF-8, not too deep and with no endless number."
        return JSONResponse(
            {"error": codes.get(error.status_code, "bad_request"), "message": message}, status_code=error.status_code
        )

    @app.exception_handler(Exception)
    async def broken(request: Request, _error: Exception) -> JSONResponse:
        message = f"The {title} failed at {request.method} {request.url.path}; its log says why."
        return JSONResponse({"error": "failed", "message": message, **tracing.told(500)}, status_code=500)

    app.state.services = services
    for router in routers:
        app.router.routes.extend(router.routes)  # as they are: `include_router` would work out each of them once more
    return app


def services_of(request: Request) -> Any:
    """What the routes of the request's application work with."""
    return request.app.state.services


async def services_here(request: Request) -> Any:
    """`services_of` as what a route depends on: for one that is not asynchronous FastAPI wakes a thread each time."""
    return services_of(request)


class Checked(APIRoute):
    """A route that looks at the request's credential before any of its body is read.

    `most_values` is how many values a body may have. Of a list of half a million that are of the wrong kind pydantic
    makes as many errors, before we tell of the first: seconds in which no stream passes through here, and a gigabyte.
    """

    most_values: ClassVar[int] = 20_000

    @staticmethod
    async def check(request: Request) -> Callable[[], object] | None:
        """Raises KohakuRiverError for a request that may not go on; what it finds out it leaves in `request.state`.

        What it gives, if anything, is called at the end of the request.
        """
        raise NotImplementedError

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer, check, has_body = super().get_route_handler(), type(self).check, self.body_field is not None

        async def checked(request: Request) -> Response:
            end = await check(request)
            try:
                if has_body and _has_more_than(self.most_values, await _json(request)):
                    raise UsageError(
                        f"A request's body may have at most {self.most_values} values, as words of a command are.",
                        code="too_large",
                        status=413,
                    )
                return await answer(request)
            finally:
                if end is not None:
                    end()

        return checked


async def _json(request: Request) -> object:
    """A request's body; None where it can't be read, or its peer has gone meanwhile, which FastAPI says."""
    try:
        return await request.json()
    except (ValueError, RecursionError, ClientDisconnect):
        return None


def _has_more_than(most: int, data: object) -> bool:
    """Whether there are more values in `data`, and in what is in it. It looks no further than that."""
    inside: list[object] = [data]
    while inside:
        each = inside.pop()
        if isinstance(each, dict | list):
            most -= len(each)
            if most < 0:
                return True
            inside.extend(each.values() if isinstance(each, dict) else each)
    return False


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


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A TCP socket that is bound but does not listen yet; port 0 is any free one. Raises LocalAddressError.

    Those that are `shared` may have one address together, and each gets a part of its connections (socket(7),
    SO_REUSEPORT).
    """
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
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise LocalAddressError(f"{host}:{port} can't be listened on: {error.strerror}.") from error
    return sock


_OTHER_LOOPBACK = {"127.0.0.1": "::1", "0.0.0.0": "::1", "::1": "127.0.0.1"}
_BIND_TRIES = 10


def bind_with_loopback(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Like `bind`, and the same port of the loopback address that is not in it, where this machine has that.

    Browsers take a name under localhost for both. Who had the other one would be sent what is meant for us.
    """
    for tries_left in reversed(range(_BIND_TRIES)):
        first = bind(host, port, shared=shared)
        address, bound = first.getsockname()[:2]
        try:
            other = _OTHER_LOOPBACK.get(address)
            return [first] if other is None else [first, bind(other, bound, shared=shared)]
        except LocalAddressError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno != errno.EADDRINUSE:
                return [first]  # there is no such address here, for nobody
            first.close()
            if port or not tries_left:
                raise
        except BaseException:
            first.close()
            raise
    raise AssertionError  # the last try returns or raises


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


def print_event(event: str, as_json: bool, sentence: str, **fields: Any) -> None:
    """One line on stdout: that a program serves now ("ready"), or what else whoever started it waits for.

    Where it can't be written, as on a full disk, the program serves all the same.
    """
    with as_far_as_it_goes():
        print(json.dumps({"event": event, **fields}) if as_json else sentence, flush=True)
