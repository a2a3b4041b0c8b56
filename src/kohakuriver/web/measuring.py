"""Whether a program measures itself: one that is not asked to does not load what it would need for that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.tunnel.accept import TunnelRoute

if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client.core import Metric

    from kohakuriver.web.server import Server

__all__ = ["Look", "Measures", "Refresh", "counted_up", "measures_at", "metrics_address"]

Look = Callable[[], "Iterable[Metric]"]
Refresh = Callable[[], Awaitable[None]]


class Measures:
    """What a program calls of its measures. This one measures nothing; that of `metrics.py` does."""

    url: str | None = None
    """Where they are read, None where nobody can."""

    def show(self, look: Look) -> None:
        """Have what `look` gives among the measures."""

    def ask_database(self, refresh: Refresh) -> None:
        """Call `refresh` before each look; it may raise KohakuRiverError where the database fails."""

    def opened(self, kind: str, seconds: float, error: KohakuRiverError | None, *, resumed: bool = False) -> None:
        """A session of that kind was opened, or refused by an error, in so many seconds."""

    def route(self, kind: str, route: TunnelRoute) -> TunnelRoute:
        """The same route, with its openings measured."""
        return route

    def requests(self, app: FastAPI) -> FastAPI:
        """The same application, with its answers measured; before it serves."""
        return app

    def begin(self, server: Server) -> None:
        """Serve the measures beside what `server` serves, and look at its event loop."""

    def close(self) -> None:
        """Let go of the address."""


def metrics_address(given: str) -> tuple[str, int]:
    """The address and port of `--metrics`: "9464" is a port on loopback, "[::1]:9464" or "10.0.0.1:9464" has both.

    Raises UsageError.
    """
    address, _, port = given.rpartition(":")
    if not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise UsageError(f"--metrics {given!r} has no port; give one, as 9464, or with an address, as 10.0.0.1:9464.")
    return address.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def counted_up(given: str, number: int) -> str:
    """The address of `--metrics` for a worker of that number: as many ports on, where it is not any free one.

    Raises UsageError.
    """
    address, port = metrics_address(given)
    if port and port + number > 65535:
        raise UsageError(f"--metrics {given!r} has no port for each worker behind it; give a lower one.")
    return f"[{address}]:{port + number if port else 0}"


def measures_at(given: str | None, program: str) -> Measures:
    """Those of a program, "host" or "runner", to be read at what `--metrics` gave.

    Raises UsageError or LocalAddressError.
    """
    if given is None:
        return Measures()
    from kohakuriver.web.app import bind
    from kohakuriver.web.metrics import Metrics

    return Metrics(program, bind(*metrics_address(given)))
