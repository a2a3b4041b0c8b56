"""What unit tests share."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import databases
from tests.support.host_only import HostUnderTest, a_host
from tests.support.postgres import Postgres

ON_EACH_DATABASE = {
    "test_agents",
    "test_authorize",
    "test_browser",
    "test_host_api",
    "test_nodes",
    "test_people",
    "test_schema",
    "test_store",
}
"""Modules whose tests run on each kind of database, but for those marked `sqlite_only`."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A database for each kind."""
    module = metafunc.module.__name__.rpartition(".")[2]
    if module in ON_EACH_DATABASE:
        only = metafunc.definition.get_closest_marker("sqlite_only") is not None
        metafunc.parametrize("_database", databases.KINDS[:1] if only else databases.KINDS, indirect=True)


@pytest.fixture(autouse=True)
def _database(request: pytest.FixtureRequest) -> Iterator[None]:
    if getattr(request, "param", "sqlite") == "sqlite":
        yield
        return
    server: Postgres = request.getfixturevalue("postgres")
    with server.lent_database() as lend:
        databases.use(lend)
        yield
        databases.use(None)


@pytest.fixture
def on_host(run: Callable[[Coroutine[Any, Any, None]], None], tmp_path: Path) -> Callable[..., None]:
    """Run a check with a host of its own; what is said besides is for `a_host`."""

    def go(check: Callable[[HostUnderTest], Coroutine[Any, Any, None]], **how: Any) -> None:
        async def main() -> None:
            async with a_host(tmp_path, **how) as host:
                await check(host)

        run(main())

    return go


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A TCP port of 127.0.0.1 that something else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A TCP port of 127.0.0.1 that is bound, so that nobody else can get it, and on which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]
