"""`kohakuriver open`, of the host and of a task's port, and `forward --web`, with real programs at both ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.processes import eventually
from tests.support.up import TIMEOUT, Cluster, connect

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = f"{self.headers['Host']} {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open(sys.argv[1], "w") as fifo:
    fifo.write(str(server.server_port))
server.serve_forever()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.run("forward", "--stop", "--all")
    cluster.close()


def served(cluster: Cluster, name: str) -> int:
    """The port of a new task that serves HTTP."""
    fifo = cluster.directory / f"{name}.fifo"
    os.mkfifo(fifo)
    command = [sys.executable, "-c", SERVER, str(fifo)]
    cluster.succeed("vps", "create", "--name", name, "--backend", "process", "--", *command)
    return int(fifo.read_text())


@pytest.fixture(scope="module")
def port(cluster: Cluster) -> int:
    return served(cluster, "page")


def got(url: str, cookie: str = "") -> tuple[int, str, str]:
    """The status, the body and the Set-Cookie of an address on this machine; no name is looked up."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=TIMEOUT)
    try:
        path = parts._replace(scheme="", netloc="").geturl()
        connection.request("GET", path, headers={"Host": parts.netloc, "Cookie": cookie})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.getheader("Set-Cookie", "")
    finally:
        connection.close()


def entered(link: str) -> str:
    """The cookie of whoever follows the link."""
    status, _, cookie = got(link)
    assert status == 303
    return cookie.partition(";")[0]


def test_print_gives_the_link_alone_and_it_lets_in(cluster: Cluster, port: int) -> None:
    program = cluster.start("open", "--print", "page", str(port))
    link = program.line("")
    origin = link.partition("/.kohakuriver/")[0]
    assert origin.startswith(f"http://page-{port}.localhost:")
    assert got(origin + "/")[0] == 403
    assert got(origin + "/x?y", entered(link)) == (200, f"localhost:{port} /x?y", "")
    assert got(link)[0] == 403
    assert program.stop() == 0
    assert program.rest() == []


def test_the_browser_is_started_with_the_link(cluster: Cluster, port: int, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    os.mkfifo(seen)
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}\n')
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    program = cluster.start("open", "page", str(port), "--preserve-host", BROWSER=f"{browser} %s")
    line = program.line("Serving")
    url = line.split()[1]
    assert line == f"Serving {url} -> page:{port}; Ctrl-C ends it."
    link = seen.read_text().strip()
    assert link.startswith(f"{url}.kohakuriver/login?code=")
    assert got(url, entered(link)) == (200, f"{urlsplit(url).netloc} /", "")
    assert program.stop() == 0


def test_where_there_is_no_browser_the_link_is_told(cluster: Cluster, port: int) -> None:
    program = cluster.start("open", "page", str(port), BROWSER="/nonexistent/browser %s", PATH="/nonexistent")
    assert "/.kohakuriver/login?code=" in program.line("No browser could be started here.", err=True)
    assert program.stop() == 0


def test_no_browser_for_text_takes_the_terminal_and_over_ssh_the_way_to_a_real_one_is_told(
    cluster: Cluster, port: int, tmp_path: Path
) -> None:
    started, browser = tmp_path / "started", tmp_path / "w3m"
    browser.write_text(f"#!/bin/sh\ntouch {started}\n")
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    without = {"BROWSER": "", "DISPLAY": "", "WAYLAND_DISPLAY": "", "TERM": "xterm", "PATH": str(tmp_path)}
    told = cluster.run("open", **without, SSH_CONNECTION="").stderr
    assert re.search(r"here\. Open this within a minute, it is good once: http://kr-\w+\.localhost:\d+/login\?", told)
    program = cluster.start("open", "page", str(port), **without, SSH_CONNECTION="10.0.0.1 5000 10.0.0.2 22")
    line = program.line("No browser could be started here.", err=True)
    [local] = re.findall(r"`ssh -L (\d+):localhost:\1`", line)
    assert f"within a minute, it is good once: http://page-{port}.localhost:{local}/.kohakuriver/login?code=" in line
    assert program.stop() == 0
    assert not started.exists()


def test_no_link_leads_to_a_task_that_there_is_not(cluster: Cluster) -> None:
    for how in ((), ("--at-host",), ("--at-host", "--print")):
        done = cluster.run("open", "nosuch", "8888", *how)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("Error: There is no task 'nosuch'")


def test_web_gives_each_tcp_port_an_address_beside_its_forward(cluster: Cluster, port: int) -> None:
    ports = [f"0:{port}", "0:9/udp", "0:7"]
    program = cluster.start("forward", "page", *ports, "--web", "--json")
    listening = program.event("listening")
    first, second = program.event("served"), program.event("served")
    assert [event["remote_port"] for event in (first, second)] == [port, 7]
    assert first["url"] == f"http://page-{port}.localhost:{urlsplit(first['url']).port}/"
    assert urlsplit(first["url"]).port == urlsplit(second["url"]).port
    assert got(first["url"], entered(first["link"])) == (200, f"localhost:{port} /", "")
    status, body, _ = got(second["url"], entered(second["link"]))
    assert (status, "Nothing listens on port 7 of task page." in body) == (502, True)
    connect(listening["local_port"]).close()
    assert program.stop() == 0


def test_addresses_go_on_in_the_background_and_its_log_has_no_link(cluster: Cluster, port: int) -> None:
    done = cluster.run("forward", "page", f"0:{port}", "--web", "--detach", "--json")
    assert done.returncode == 0, done.stderr
    events = {event["event"]: event for event in map(json.loads, done.stdout.splitlines())}
    served, detached = events["served"], events["detached"]
    assert got(served["url"], entered(served["link"])) == (200, f"localhost:{port} /", "")
    log = Path(detached["log"]).read_text()
    assert served["url"] in log
    assert "code=" not in log
    cluster.succeed("forward", "--stop", detached["id"])


def test_a_task_whose_name_is_no_label_is_called_by_its_id(cluster: Cluster) -> None:
    port = served(cluster, "a_page.two")
    number = json.loads(cluster.succeed("vps", "status", "a_page.two", "--json"))["task_id"]
    program = cluster.start("open", "a_page.two", str(port), "--json")
    event = program.event("served")
    assert event["url"].startswith(f"http://{number}-{port}.localhost:")
    assert got(event["url"], entered(event["link"]))[0] == 200
    assert program.stop() == 0


def test_a_task_that_was_stopped_is_told_and_works_again_when_it_is_back(cluster: Cluster) -> None:
    port = served(cluster, "stopped")
    program = cluster.start("open", "stopped", str(port), "--json")
    event = program.event("served")
    cookie = entered(event["link"])
    assert got(event["url"], cookie)[0] == 200
    cluster.succeed("vps", "stop", "stopped")
    status, body, _ = got(event["url"], cookie)
    assert status == 503
    assert "task stopped" in body.lower()
    assert program.stop() == 0


def test_the_local_port_can_be_chosen_and_one_that_is_taken_is_told(cluster: Cluster, port: int) -> None:
    program = cluster.start("open", "page", str(port), "--json")
    taken = urlsplit(program.event("served")["url"]).port
    second = cluster.start("open", "page", str(port), "--local-port", str(taken))
    line = second.line("Error", err=True)
    assert f"127.0.0.1:{taken} is already in use" in line
    assert line.endswith("; choose another one, or leave --local-port out for any free one.")
    assert second.ended() == 6
    assert program.stop() == 0
    third = cluster.start("open", "page", str(port), "--local-port", str(taken), "--json")
    assert urlsplit(third.event("served")["url"]).port == taken
    assert third.stop() == 0


def test_it_ends_with_the_task(cluster: Cluster) -> None:
    port = served(cluster, "removed")
    program = cluster.start("open", "removed", str(port), "--json")
    program.event("served")
    cluster.succeed("vps", "rm", "removed")
    eventually(lambda: program.process.poll() is not None)
    assert program.ended() == 3


def logged_in(link: str) -> str:
    """As whom a link logs a browser in that it is opened with."""
    parts = urlsplit(link)
    said = {"Host": parts.netloc, "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=TIMEOUT)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}", headers=said)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 303
        cookie = answer.getheader("Set-Cookie", "").partition(";")[0]
        connection.request("GET", "/api/auth", headers={"Host": parts.netloc, "Cookie": cookie})
        user: str = json.loads(connection.getresponse().read())["user"]
        return user
    finally:
        connection.close()


def test_open_without_a_task_logs_a_browser_in_to_the_host_and_ends(cluster: Cluster, tmp_path: Path) -> None:
    port = urlsplit(cluster.ready["host_url"]).port
    link = cluster.succeed("open", "--print").strip()
    assert re.match(rf"http://kr-[a-z2-7]{{26}}\.localhost:{port}/login\?code=", link)
    assert logged_in(link) == "admin"
    told = json.loads(cluster.succeed("open", "--json"))
    assert set(told) == {"url", "expires_at"}
    assert urlsplit(told["url"]).hostname == urlsplit(link).hostname
    assert logged_in(told["url"]) == "admin"
    seen, browser = tmp_path / "seen", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}\n')
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    done = cluster.run("open", BROWSER=f"{browser} %s")
    assert (done.returncode, done.stdout) == (0, "Logging a browser in.\n")
    assert logged_in(seen.read_text().strip()) == "admin"
    listed = json.loads(cluster.succeed("token", "list", "--json"))["tokens"]
    assert [token["kind"] for token in listed].count("browser") == 3


def through(link: str) -> tuple[str, str]:
    """The origin that the link of `vps share` leads to, and the cookie that its page gets for it."""
    parts = urlsplit(link)
    origin = f"{parts.scheme}://{parts.netloc}"
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=TIMEOUT)
    try:
        sent = {"Host": parts.netloc, "Origin": origin, "Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", parts.path, f"code={parts.fragment}", sent)
        return origin, connection.getresponse().getheader("Set-Cookie", "").partition(";")[0]
    finally:
        connection.close()


def test_a_link_to_a_port_is_made_listed_and_taken_back(cluster: Cluster, port: int) -> None:
    made = json.loads(cluster.succeed("vps", "share", "page", "--link", str(port), "--expires", "1h", "--json"))
    origin, cookie = through(made["url"])
    assert got(origin + "/x", cookie) == (200, f"localhost:{port} /x", "")
    told = cluster.run("vps", "share", "page", "--link", str(port))
    assert told.stdout.startswith(origin)
    [first, second] = json.loads(cluster.succeed("vps", "share", "page", "--list", "--json"))["links"]
    assert [first["port"], second["port"]] == [port, port]
    assert first["expires_at"]
    assert not second["expires_at"]
    assert made["id"] in cluster.succeed("vps", "share", "page", "--list")
    said = cluster.succeed("vps", "unshare", "page", "--link", made["id"])
    assert said == f"The link {made['id']} to port {port} opens nothing any more.\n"
    assert got(origin + "/x", cookie)[0] == 401
    assert through(made["url"])[1] == ""
    origin, cookie = through(told.stdout.strip())
    assert got(origin + "/x", cookie)[0] == 200
    for wrong in (("--expires", "1h"), ("ann", "--link", str(port)), ("--link", str(port), "--list")):
        assert cluster.run("vps", "share", "page", *wrong).returncode == 2


def test_services_are_told_the_browsers_address_as_the_owner_says(cluster: Cluster, port: int) -> None:
    link = cluster.succeed("vps", "share", "page", "--link", str(port)).strip()
    try:
        said = cluster.succeed("vps", "web", "page", "--preserve-host")
        assert (
            said
            == "Services of task page are told the address that the browser has, as browsers open them from now on.\n"
        )
        origin, cookie = through(link)
        assert got(origin + "/", cookie) == (200, f"{urlsplit(origin).netloc} /", "")
        assert "the address that the browser has" in cluster.succeed("vps", "status", "page")
    finally:
        changed = json.loads(cluster.succeed("vps", "web", "page", "--no-preserve-host", "--json"))
    assert changed["preserve_host"] is False


def test_up_prints_a_link_that_logs_in(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        assert logged_in(cluster.ready["browser"]) == "admin"
    finally:
        cluster.close()
