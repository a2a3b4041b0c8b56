"""An agent where nobody can connect to: in a network from which one can only go out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import kohakuriver
from tests.support.agents import Lab, lab_at
from tests.support.echoing import Traffic
from tests.support.network.outwards import Inside, missing, only_outwards
from tests.support.processes import PATIENCE, eventually

# A service that echoes and a web page beside it, on ports of all addresses.
SERVICES = """
import http.server, socketserver, threading
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(1 << 18):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"inside")
web = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Page)
threading.Thread(target=web.serve_forever, daemon=True).start()
echo = Server(("0.0.0.0", 0), Echo)
print("web", web.server_address[1], flush=True)
print("port", echo.server_address[1], flush=True)
echo.serve_forever()
"""


class ToThisMachine(httpx.HTTPTransport):
    """Finds every name under localhost here, as browsers do."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        here, kept = request.url.copy_with(host="127.0.0.1"), (request.headers, request.stream)
        sent = httpx.Request(request.method, here, headers=kept[0], stream=kept[1], extensions=request.extensions)
        return super().handle_request(sent)


@pytest.fixture(scope="module")
def inside() -> Iterator[Inside]:
    if lacks := missing():
        pytest.skip(f"needs {lacks}")
    with only_outwards() as inside:
        yield inside


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, inside: Inside) -> Iterator[Lab]:
    with lab_at(tmp_path_factory.mktemp("outwards"), "0.0.0.0", under=inside.under) as lab:
        lab.seen_from_agents = f"http://{inside.outside}:{lab.url.rpartition(':')[2]}"
        lab.launch(
            [
                *(sys.executable, "-m", "kohakuriver", "agent", "--name=cell", "--ssh", "--"),
                sys.executable,
                "-c",
                SERVICES,
            ],
            **lab.of("ann"),
        )
        lab.connected("cell")
        yield lab


def printed(lab: Lab, word: str) -> int:
    def port() -> int | None:
        lines = lab.agents[0].printed.splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(f"{word} ")), None)

    return eventually(port)


def page(lab: Lab, link: str) -> str:
    """What a browser shows that was given a link to a port of the task."""
    with httpx.Client(transport=ToThisMachine(), follow_redirects=True, timeout=PATIENCE, trust_env=False) as browser:
        first = browser.get(link)
        site = f"http://{first.url.netloc.decode()}"
        form = {"code": httpx.URL(link).fragment}  # a script of that page sends it
        entered = browser.post(first.url, data=form, headers={"Origin": site, "Sec-Fetch-Site": "same-origin"})
        return entered.text


def test_every_way_into_a_task_works_while_its_host_is_restarted(lab: Lab, inside: Inside) -> None:
    echo, web = printed(lab, "port"), printed(lab, "web")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((inside.address, echo), timeout=PATIENCE)
    made = lab.run("vps", "share", "cell", "--link", str(web), "--json", **lab.of("ann"))
    link = json.loads(made.stdout)["url"]
    with kohakuriver.forward_sync("cell", echo, host=lab.url, token=lab.tokens["ann"]) as forward:
        flows = [Traffic(forward.local_port, size) for size in (64, 4096, 1 << 20)]
        terminal = subprocess.Popen(
            [sys.executable, "-m", "kohakuriver", "connect", "cell", "--", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**lab.environment, **lab.of("ann")},
        )
        assert terminal.stdin is not None
        assert terminal.stdout is not None
        try:
            for round_ in range(2):
                assert all(flow.goes_on() for flow in flows), [flow.broken for flow in flows]
                terminal.stdin.write(b"line %d\n" % round_)
                terminal.stdin.flush()
                assert terminal.stdout.readline() == b"line %d\n" % round_
                over_ssh = lab.run("vps", "connect", "cell", "-i", str(lab.key), "hostname -I", **lab.of("ann"))
                assert over_ssh.stdout.split() == [inside.address], over_ssh.stderr
                assert page(lab, link) == "inside"
                told = json.loads(lab.run("vps", "ports", "cell", "--json", **lab.of("ann")).stdout)
                assert {echo, web} <= {each["port"] for each in told["ports"]}
                if round_ == 0:
                    lab.host.stop()
                    lab.start_host()
                    lab.connected("cell")
            terminal.stdin.close()
            assert terminal.wait(PATIENCE) == 0
        finally:
            terminal.kill()
            terminal.wait()
            terminal.stdout.close()
            for flow in flows:
                flow.end()
    assert [flow.broken for flow in flows] == [None, None, None]


def test_an_agent_goes_out_through_a_proxy_or_a_login_node(lab: Lab, inside: Inside, tmp_path: Path) -> None:
    """Both stand where the agent itself can't go: its firewall forbids the host's port."""
    from tests.support.network.proxies import tinyproxy

    port = lab.url.rpartition(":")[2]
    wall = (*inside.under, "iptables", "-w")
    rule = ("OUTPUT", "-p", "tcp", "-d", inside.outside, "--dport", port, "-j", "REJECT")
    login = tmp_path / "bin" / "ssh"
    login.parent.mkdir()
    # In the place of ssh to a login node: `-W HOST:PORT` from outside of the namespace.
    login.write_text(f"#!/bin/sh\nexec nsenter --net=/proc/{os.getpid()}/ns/net {sys.executable} {tmp_path}/w.py $4\n")
    login.chmod(0o755)
    (tmp_path / "w.py").write_text(W)
    with tinyproxy(tmp_path, f"Listen {inside.outside}", f"ConnectPort {port}") as proxy:
        subprocess.run([*wall, "-I", *rule], check=True)
        try:
            named = {"HTTP_PROXY": f"http://{inside.outside}:{proxy.port}"}
            lab.echoing("by-proxy", **named)
            path = f"{login.parent}:{os.environ['PATH']}"
            lab.echoing("by-login", "--via=login.node", PATH=path)
        finally:
            subprocess.run([*wall, "-D", *rule], check=True)


W = """
import socket, sys, threading, os
host, port = sys.argv[1].rsplit(":", 1)
sock = socket.create_connection((host, int(port)))
def up():
    while data := os.read(0, 65536):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := sock.recv(65536):
    os.write(1, data)
"""
