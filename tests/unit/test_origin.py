"""Which Host and Origin headers are taken, and that host and runner ask on every path."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from kohakuriver.errors import NotAllowedError
from kohakuriver.web.origin import Guard
from tests.support.hops import dial
from tests.support.host_only import a_host

Run = Callable[[Coroutine[Any, Any, None]], None]
LOOPBACK = "127.0.0.1"
LAN = "192.0.2.1"


def taken(guard: Guard, host: str | None, origin: str | None = None, local: str | None = LOOPBACK) -> bool:
    try:
        guard.check([] if host is None else [host], [] if origin is None else [origin], local)
    except NotAllowedError:
        return False
    return True


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:8000", "LOCALHOST:8000", "localhost.:8000", "app.localhost", "127.0.0.1:8000"),
        *("127.1.2.3", "[::1]:8000", "192.0.2.7:8000", socket.gethostname()),
    ],
)
def test_loopback_names_addresses_and_the_machines_own_name_are_taken_over_loopback(host: str) -> None:
    assert taken(Guard(), host)


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", None),
        *(
            "evil.example@localhost",
            "localhost/evil",
            "localhost:99999",
            "local host",
            "[::1",
            "localhost#",
            "löcalhost",
        ),
    ],
)
def test_a_name_that_somebody_had_resolve_to_loopback_is_refused(host: str | None) -> None:
    assert not taken(Guard(), host)
    for local in ("::1", "::ffff:127.0.0.1"):
        assert not taken(Guard(), host, local=local)


def test_two_host_headers_are_refused() -> None:
    with pytest.raises(NotAllowedError):
        Guard().check(["localhost", "evil.example"], [], LOOPBACK)


def test_any_name_will_do_from_other_machines_until_names_are_given() -> None:
    assert taken(Guard(), "cluster.example", local=LAN)
    guard = Guard(hosts=["cluster.example"])
    assert taken(guard, "cluster.example", local=LAN)
    assert taken(guard, "Cluster.Example:8000")
    assert not taken(guard, "evil.example", local=LAN)
    assert taken(Guard(hosts=["*"]), "evil.example")


def test_the_advertised_name_is_taken_also_over_loopback() -> None:
    assert taken(Guard(names=["node.example"]), "node.example:8001")


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost", "http://localhost"),
        ("localhost", "https://localhost:443"),
    ],
)
def test_our_own_pages_are_taken(host: str, origin: str) -> None:
    assert taken(Guard(), host, origin)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://evil.example"),
        ("localhost:8000", "http://localhost:3000"),
        ("localhost:8000", "http://localhost"),
        ("localhost:8000", "http://127.0.0.1:8000"),
        ("localhost:8000", "null"),
        ("localhost:8000", ""),
        ("localhost:8000", "file://"),
        ("localhost:8000", "http://["),
        ("localhost:8000", "chrome-extension://localhost:8000"),
        ("localhost:8000", "http://localhost:8000@evil.example"),
    ],
)
def test_pages_of_others_are_refused(host: str, origin: str) -> None:
    assert not taken(Guard(), host, origin)


def test_a_page_whose_name_was_rebound_to_us_is_refused_on_every_address() -> None:
    assert not taken(Guard(), "evil.example:8000", "http://evil.example:8000", local=LAN)


def test_sites_that_were_named_are_taken() -> None:
    guard = Guard(origins=["https://portal.example/"])
    assert taken(guard, "localhost:8000", "https://portal.example")
    assert not taken(guard, "localhost:8000", "http://portal.example")
    assert not taken(guard, "localhost:8000", "https://portal.example.evil.example")


async def status_of(url: str, *request: bytes) -> int:
    """Of the answer to a request that has these lines alone."""
    async with dial(int(url.rpartition(":")[2])) as (reader, writer):
        writer.write(b"\r\n".join(request) + b"\r\n\r\n")
        return int((await reader.readline()).split()[1])


def test_a_balancer_that_names_no_host_hears_how_the_host_is_and_nothing_else(run: Run, tmp_path: Path) -> None:
    """As HTTP/1.0 does, and no browser: a page gets nowhere by it."""

    async def check() -> None:
        async with a_host(tmp_path) as host:
            for path in (b"/health", b"/health/live", b"/health/ready"):
                assert await status_of(host.url, b"GET %s HTTP/1.0" % path) == 200
                assert await status_of(host.url, b"GET %s HTTP/1.1" % path, b"Host: evil.example") == 403
                assert await status_of(host.url, b"GET %s HTTP/1.0" % path, b"Origin: http://evil.example") == 403
                assert await status_of(host.url, b"GET %s HTTP/1.1" % path) == 403
            for path in (b"/", b"/docs", b"/login", b"/api/tasks", b"/health/", b"/health/../docs"):
                assert await status_of(host.url, b"GET %s HTTP/1.0" % path) == 403

    run(check())


async def websocket_status(url: str, **headers: str) -> int:
    try:
        async with connect(url, additional_headers=headers, proxy=None):
            return 101
    except InvalidStatus as error:
        return error.response.status_code


def test_the_host_asks_for_name_and_origin_before_it_looks_at_a_token(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path, allow_anonymous=True) as host:
            await host.runner()
            await host.create(name="web")
            for path in ("/health", "/api/tasks", "/docs", "/nothing"):
                answer = await host.user.get(path, headers={"Host": "evil.example"})
                assert (answer.status_code, answer.json()["error"]) == (403, "host_not_allowed")
                answer = await host.user.get(path, headers={"Origin": "http://evil.example"})
                assert (answer.status_code, answer.json()["error"]) == (403, "origin_not_allowed")
            url = host.url.replace("http", "ws")
            for path in ("/ws/forward/web/80", "/ws/nothing"):
                assert await websocket_status(url + path, Origin="http://evil.example") == 403
            own = await host.user.get("/api/tasks", headers={"Origin": host.url})
            assert own.status_code == 200
            # With our own page's origin, or a program's none, the same handshake is taken: v1 needs no token here.
            assert await websocket_status(f"{url}/ws/forward/web/80", Origin=host.url) == 101
            assert await websocket_status(f"{url}/ws/forward/web/80") == 101

    run(check())


@pytest.mark.parametrize("path", ["/health", "/api/tasks"])
def test_a_request_without_a_host_header_is_refused_over_loopback(run: Run, tmp_path: Path, path: str) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            async with dial(int(host.url.rpartition(":")[2])) as (reader, writer):
                writer.write(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
                assert (await reader.readline()).split()[1] in (b"400", b"403")

    run(check())
