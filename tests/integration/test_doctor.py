"""`kohakuriver doctor`: set-ups that are broken in one place each, and what it says of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.cli.pki import Authority
from tests.support.network.proxies import tinyproxy
from tests.support.up import Cluster, Service

HERE = "127.0.0.1"
CHAIN = ["proxy", "name", "connection", "host", "clock", "version", "packets", "websocket", "login"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.token = (cluster.directory / "state" / "admin-token").read_text().strip()  # type: ignore[attr-defined]
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def service(cluster: Cluster) -> Service:
    return cluster.service()


def looked(cluster: Cluster, *arguments: str, **environment: str) -> tuple[int, dict[str, Any], dict[str, Any] | None]:
    """The exit code, all that was found by its check, and the one thing that is wrong."""
    done = cluster.run("doctor", "--json", *arguments, **environment)
    told = json.loads(done.stdout)
    wrong = [each for each in told["findings"] if not each["ok"]]
    assert len(wrong) <= 1, wrong
    assert told["ok"] == (not wrong) == (done.returncode == 0)
    return done.returncode, {each["check"]: each for each in told["findings"]}, wrong[0] if wrong else None


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **fields: str) -> bool:
    """Answer a request in the host's place."""
    request.send_response(status)
    for name, value in {**fields, "Content-Length": str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)
    return True


def passed_through(request: BaseHTTPRequestHandler) -> bool:
    """Answer in the host's words: the request has come through."""
    return answer(request, 404, json.dumps({"error": "not_found", "message": "There is no task 0."}).encode())


@contextlib.contextmanager
def in_front(
    target: int, changed: Callable[[BaseHTTPRequestHandler], bool] = lambda _: False, **dates: float
) -> Iterator[int]:
    """The port of an HTTP proxy before a host, which passes no upgrades on; `changed` may answer in its place."""

    class Passes(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if changed(self):
                return
            left_out = ("connection", "upgrade", "host")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
            behind = http.client.HTTPConnection(HERE, target, timeout=60)
            behind.request("GET", self.path, headers=headers)
            came = behind.getresponse()
            body = came.read()
            self.send_response_only(came.status)
            told = came.getheader("Date")
            if told is not None:
                self.send_header("Date", formatdate(parsedate_to_datetime(told).timestamp() + dates.get("late", 0.0)))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            behind.close()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((HERE, 0), Passes) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def at(cluster: Cluster, port: int, scheme: str = "http") -> dict[str, str]:
    """The environment of somebody who reaches the cluster's host by this port."""
    return {"KOHAKURIVER_HOST": f"{scheme}://{HERE}:{port}", "KOHAKURIVER_TOKEN": cluster.token}  # type: ignore[attr-defined]


def host_port(cluster: Cluster) -> int:
    return int(cluster.ready["host_url"].rpartition(":")[2])


def test_a_way_that_is_open_is_ok_step_by_step_to_the_tasks_tunnel(cluster: Cluster, service: Service) -> None:
    code, found, _ = looked(cluster, service.task)
    assert (code, list(found)) == (0, [*CHAIN, "task", "node", "tunnel"])
    done = cluster.run("doctor", service.task)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * len(found)


def test_a_clock_is_compared_no_more_finely_than_the_host_tells_it(cluster: Cluster) -> None:
    _, found, _ = looked(cluster)
    assert found["clock"]["message"] == "no more than 2 s apart from the host's"


def test_a_host_that_does_not_run_is_told_with_the_port_that_nobody_listens_on(cluster: Cluster) -> None:
    with socket.socket() as sock:
        sock.bind((HERE, 0))
        code, found, wrong = looked(cluster, **at(cluster, sock.getsockname()[1]))
    assert wrong is not None
    assert (code, list(found)[-1]) == (7, "connection")
    assert "Connection refused" in wrong["message"]
    assert "Nothing listens there" in wrong["advice"]


def test_a_name_that_is_none_is_told_before_anything_is_dialled(cluster: Cluster) -> None:
    code, found, wrong = looked(cluster, KOHAKURIVER_HOST="http://no-such-host.invalid:8000", KOHAKURIVER_TOKEN="t")
    assert wrong is not None
    assert (code, list(found)) == (7, ["proxy", "name"])
    assert "no-such-host.invalid has no address" in wrong["message"]


def test_a_name_that_none_can_be_is_told_as_one_that_is_none(cluster: Cluster) -> None:
    code, found, wrong = looked(cluster, KOHAKURIVER_HOST="http://a..b:8000", KOHAKURIVER_TOKEN="t")
    assert wrong is not None
    assert (code, list(found)) == (7, ["proxy", "name"])
    assert wrong["message"].endswith("a..b has no address: this can't be the name of a machine")


def test_a_page_of_something_else_is_told_as_no_host(cluster: Cluster) -> None:
    with in_front(host_port(cluster), lambda request: answer(request, 200, b"<html>")) as port:
        code, _, wrong = looked(cluster, **at(cluster, port))
    assert wrong is not None
    assert (code, wrong["check"]) == (7, "host")
    assert "is no KohakuRiver host" in wrong["message"]


def test_a_redirect_in_front_is_named_with_where_it_leads(cluster: Cluster) -> None:
    def redirected(request: BaseHTTPRequestHandler) -> bool:
        return answer(request, 308, Location=f"https://river.example.org{request.path}")

    with in_front(host_port(cluster), redirected) as port:
        code, _, wrong = looked(cluster, **at(cluster, port))
    assert wrong is not None
    assert (code, wrong["check"]) == (7, "host")
    assert "redirects to 'https://river.example.org/health'" in wrong["message"]
    assert "its URL is https://river.example.org" in wrong["advice"]


def test_a_proxy_that_drops_the_upgrade_is_told_and_what_it_has_to_pass_on(cluster: Cluster) -> None:
    with in_front(host_port(cluster)) as port:
        code, found, wrong = looked(cluster, **at(cluster, port))
    assert wrong is not None
    assert (code, wrong["check"]) == (7, "websocket")
    assert "Upgrade and Connection" in wrong["advice"]
    assert found["login"]["ok"]


def test_a_clock_that_is_wrong_is_told_with_by_how_much(cluster: Cluster) -> None:
    def upgraded(request: BaseHTTPRequestHandler) -> bool:
        return "Upgrade" in request.headers and passed_through(request)

    with in_front(host_port(cluster), upgraded, late=600.0) as port:
        code, _, wrong = looked(cluster, **at(cluster, port))
    assert wrong is not None
    assert (code, wrong["check"]) == (1, "clock")
    assert "s behind the host's" in wrong["message"]
    assert 590 < int(wrong["message"].split(" s ")[0].rpartition(" ")[2]) < 610


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("authority", "not signed by an authority"),
        ("name", "its certificate is for other.example.org, and not for 127.0.0.1"),
        ("plain", "http://"),
    ],
)
def test_tls_that_does_not_stand_is_told_with_its_reason(
    cluster: Cluster, tmp_path: Path, fault: str, words: str
) -> None:
    authority = Authority(tmp_path / "ca")
    made = authority.issue(["other.example.org" if fault == "name" else HERE], 1)
    trusted = {} if fault == "authority" else {"KOHAKURIVER_CA_FILE": str(authority.cert)}
    with in_front(host_port(cluster)) as port, socket.create_server((HERE, 0)) as listener:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.cert, made.key)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
                        secured.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        there = port if fault == "plain" else listener.getsockname()[1]
        code, _, wrong = looked(cluster, **at(cluster, there, "https"), **trusted)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert wrong is not None
    assert (code, wrong["check"]) == (7, "tls")
    assert words in wrong["message"] + wrong["advice"]


def test_another_version_at_the_host_is_told_and_stops_nothing(cluster: Cluster) -> None:
    def older(request: BaseHTTPRequestHandler) -> bool:
        told = json.dumps({"status": "ok", "version": "0.1.0"}).encode()
        return request.path == "/health" and answer(request, 200, told)

    with in_front(host_port(cluster), older) as port:
        _, found, wrong = looked(cluster, **at(cluster, port))
    assert wrong is not None
    assert wrong["check"] == "websocket"  # as that proxy passes none on
    assert found["version"]["ok"]
    assert found["version"]["message"].endswith(" here, 0.1.0 at the host")
    assert "update the older one" in found["version"]["advice"]


def test_a_path_on_which_large_requests_are_lost_is_told_with_what_to_try(cluster: Cluster) -> None:
    def lost(request: BaseHTTPRequestHandler) -> bool:
        if "Upgrade" in request.headers:
            return passed_through(request)
        request.close_connection = True
        return len(request.headers.as_bytes()) > 4000

    with in_front(host_port(cluster), lost) as port:
        code, found, wrong = looked(cluster, **at(cluster, port))
    assert wrong is not None
    assert (code, wrong["check"]) == (7, "packets")
    assert "a smaller MTU" in wrong["advice"]
    assert found["login"]["ok"]


def test_a_proxy_that_wants_a_password_or_lets_nobody_through_is_told(cluster: Cluster, tmp_path: Path) -> None:
    with tinyproxy(tmp_path, "BasicAuth me secret") as proxy:
        code, _, wrong = looked(cluster, KOHAKURIVER_PROXY=f"http://{HERE}:{proxy.port}")
        assert wrong is not None
        assert (code, wrong["check"]) == (7, "connection")
        assert "wants a name and a password" in wrong["message"]
        code, found, _ = looked(cluster, KOHAKURIVER_PROXY=f"http://me:secret@{HERE}:{proxy.port}")
        assert code == 0
        assert "secret" not in json.dumps(found)
    with tinyproxy(tmp_path, "ConnectPort 443") as proxy:
        code, _, wrong = looked(cluster, KOHAKURIVER_PROXY=f"http://{HERE}:{proxy.port}")
        assert wrong is not None
        assert (code, wrong["check"]) == (7, "connection")
        assert "does not let connections" in wrong["message"]


def test_a_token_that_is_none_is_told_and_what_to_do(cluster: Cluster) -> None:
    code, _, wrong = looked(cluster, "--token", "krt_wrong")
    assert wrong is not None
    assert (code, wrong["check"]) == (5, "login")


def test_a_task_that_was_stopped_and_one_that_is_none_are_told(cluster: Cluster) -> None:
    cluster.succeed("vps", "create", "--name=idle", "--backend=process", "--", "sleep", "infinity")
    cluster.succeed("vps", "stop", "idle")
    code, _, wrong = looked(cluster, "idle")
    assert wrong is not None
    assert (code, wrong["check"]) == (4, "task")
    assert "vps restart idle" in wrong["advice"]
    code, _, wrong = looked(cluster, "nobody")
    assert wrong is not None
    assert (code, wrong["check"]) == (3, "task")
