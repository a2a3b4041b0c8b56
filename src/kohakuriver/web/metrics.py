"""What a program measures of itself, for Prometheus: openings, requests, its event loop, and what its parts count.

It is read on an address of its own and holds no user's, task's or token's name: labels come from sets that don't grow.
Sources: the Prometheus exposition formats, and its advice on names (https://prometheus.io/docs/practices/naming/).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kohakuriver import __version__
from kohakuriver.errors import KohakuRiverError
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest, serve_ws
from kohakuriver.web.app import socket_url
from kohakuriver.web.measuring import Look, Measures, Refresh
from kohakuriver.web.server import Server

__all__ = ["Metrics", "counter", "gauge"]

PREFIX = "kohakuriver"

LAG_SECONDS = 0.5
"""How often it is looked how late the event loop is."""

REFRESH_SECONDS = 2.0
"""So long a look at the database may take while somebody reads the measures; after it they say that it is down."""

MOST_RESULTS = 100
"""An error's code may come from another program; more different ones than this are counted as "other"."""

Values = Iterable[tuple[tuple[str, ...], float]]
"""Values, each with those of its labels before it."""

OPENINGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LAGS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


def gauge(name: str, what: str, values: Values, labels: tuple[str, ...] = ()) -> Metric:
    """A measure that goes up and down, by the values of its labels."""
    family = GaugeMetricFamily(f"{PREFIX}_{name}", what, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


def counter(name: str, what: str, values: Values, labels: tuple[str, ...] = ()) -> Metric:
    """A measure that only goes up while the program runs, by the values of its labels."""
    family = CounterMetricFamily(f"{PREFIX}_{name}", what, labels=labels)
    for of, value in values:
        family.add_metric(of, value)
    return family


class _Looking(Collector):
    """What parts of the program count by themselves, looked at when somebody reads."""

    def __init__(self, look: Look) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        return self._look()


class Metrics(Measures):
    """The measures of one program, "host" or "runner", to be read on `sock`, a bound one."""

    def __init__(self, program: str, sock: socket.socket) -> None:
        self.url = f"{socket_url(sock)}/metrics"
        self._sock = sock
        self._registry = registry = CollectorRegistry()
        self._refresh: Refresh | None = None
        self._results: set[str] = set()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        Info(f"{PREFIX}_build", "Which program this is.", registry=registry).info(
            {"program": program, "version": __version__}
        )
        self._openings = Histogram(
            f"{PREFIX}_opening_seconds",
            "How long sessions took to open, or to be refused; resumed are those that go on after another.",
            ("kind", "result", "resumed"),
            buckets=OPENINGS,
            registry=registry,
        )
        self._requests = Histogram(
            f"{PREFIX}_http_request_seconds",
            "How long requests of the HTTP API took.",
            ("method", "route", "status"),
            buckets=OPENINGS,
            registry=registry,
        )
        self._lag = Histogram(
            f"{PREFIX}_event_loop_lag_seconds", "How late the event loop was.", buckets=LAGS, registry=registry
        )

    def show(self, look: Look) -> None:
        self._registry.register(_Looking(look))

    def ask_database(self, refresh: Refresh) -> None:
        self._refresh = refresh
        what = "Whether the database answered when this was read."
        self._database = Gauge(f"{PREFIX}_database_up", what, registry=self._registry)

    def opened(self, kind: str, seconds: float, error: KohakuRiverError | None, *, resumed: bool = False) -> None:
        self._openings.labels(kind, self._result(error), "true" if resumed else "false").observe(seconds)

    def _result(self, error: KohakuRiverError | None) -> str:
        if error is None:
            return "ok"
        if len(self._results) < MOST_RESULTS:
            self._results.add(error.code)
        return error.code if error.code in self._results else "other"

    def route(self, kind: str, route: TunnelRoute) -> TunnelRoute:
        async def answer(request: UpgradeRequest, *parts: str) -> object:
            began, refused = time.perf_counter(), None
            try:
                said = await route.answer(request, *parts)
                refused = said if isinstance(said, KohakuRiverError) else None
                return said
            except KohakuRiverError as error:
                refused = error
                raise
            finally:
                self.opened(kind, time.perf_counter() - began, refused, resumed=request.goes_on)

        return TunnelRoute(route.path, answer)

    def requests(self, app: FastAPI) -> FastAPI:
        app.add_middleware(_Measured, requests=self._requests)
        return app

    def begin(self, server: Server) -> None:
        server.add_listener(self._sock, self._app(), serve_ws([]))
        server.keep(self._look_at_loop(), "looking how late the event loop is")

    def close(self) -> None:
        self._sock.close()

    async def _look_at_loop(self) -> None:
        while True:
            due = time.perf_counter() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._lag.observe(max(0.0, time.perf_counter() - due))

    def _app(self) -> FastAPI:
        """What is served to those who read the measures: /metrics, and nothing else."""
        app = FastAPI(title="metrics", openapi_url=None, docs_url=None, redoc_url=None)

        @app.get("/metrics")
        async def read(request: Request) -> Response:
            await self._ask()
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
            return Response(encode(self._registry), headers={"Content-Type": content_type})

        return app

    async def _ask(self) -> None:
        if self._refresh is None:
            return
        self._database.set(0)
        with contextlib.suppress(KohakuRiverError, asyncio.TimeoutError):
            await asyncio.wait_for(self._refresh(), REFRESH_SECONDS)
            self._database.set(1)


class _Measured:
    """Measures each request by its route's own path, which has no names of tasks or users in it."""

    def __init__(self, app: ASGIApp, requests: Histogram) -> None:
        self._app = app
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            labels = (method, _path_of(scope.get("route")), f"{status // 100}xx")
            self._requests.labels(*labels).observe(time.perf_counter() - began)


_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def _path_of(route: Any) -> str:
    """ "/api/tasks/{task}"; "other" where there is no such route."""
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "other"
