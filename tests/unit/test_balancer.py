"""HAProxy's part in docs/guide/cluster.md and in deploy/compose, by what it does and not by what it says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from tests.support.processes import eventually
from tests.support.two_hosts import ROOT, compose_config, guide_config, haproxy

ANEW = httpx.Limits(max_keepalive_connections=0)  # each request on a connection of its own
configs = pytest.mark.parametrize("config", [guide_config, compose_config])


class Dying:
    """Two hosts that are ready, and die of every request on `/die`; `asked` is what came, `told` for whom it was."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.told: list[str | None] = []
        self.servers: dict[str, str] = {}

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if request.path == "/die":
            self.asked.append(request.command)
            request.close_connection = True
            return
        self.told.append(request.headers.get("X-Forwarded-For"))
        request.send_response(200)
        request.send_header("Content-Length", "0")
        request.end_headers()


def handler(dying: Dying) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            dying.handle(self)

        do_POST = do_DELETE = do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextlib.contextmanager
def behind(config: Callable[[], str], directory: Path) -> Iterator[tuple[Dying, httpx.Client]]:
    with contextlib.ExitStack() as stack:
        dying = Dying()
        for name in ("a", "b"):
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler(dying))
            stack.callback(server.server_close)
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
            dying.servers[name] = f"127.0.0.1:{server.server_port}"
        url = stack.enter_context(haproxy(config(), dying.servers, directory))
        client = stack.enter_context(httpx.Client(base_url=url, trust_env=False, limits=ANEW))
        eventually(lambda: client.get("/").status_code == 200)
        yield dying, client


@configs
def test_what_changes_things_is_sent_once_and_what_reads_again(config: Callable[[], str], tmp_path: Path) -> None:
    with behind(config, tmp_path) as (dying, client):
        for method in ("POST", "DELETE", "PUT"):
            assert client.request(method, "/die").status_code == 502
        assert dying.asked == ["POST", "DELETE", "PUT"]
        dying.asked.clear()
        assert client.get("/die").status_code == 502
        assert len(dying.asked) > 1
        assert set(dying.asked) == {"GET"}


@configs
def test_hosts_are_told_who_asks(config: Callable[[], str], tmp_path: Path) -> None:
    with behind(config, tmp_path) as (dying, client):
        dying.told.clear()
        assert client.post("/").status_code == 200
        assert "127.0.0.1" in dying.told


def test_hosts_of_the_compose_file_believe_the_balancers_address_which_no_other_container_gets() -> None:
    text = (ROOT / "deploy/compose/compose.yaml").read_text("utf-8")
    text = re.sub(r"\$\{KOHAKURIVER_NETWORK:-([^}]*)\}", r"\1", text)
    trusted, at, subnet, others = (
        re.findall(rf"{name}[=:] ?(\S+)", text) for name in ("--trusted-proxy", "ipv4_address", "subnet", "ip_range")
    )
    assert trusted == at
    assert ip_address(at[0]) in ip_network(subnet[0])
    assert ip_address(at[0]) not in ip_network(others[0])
