"""How fast a port's own address is, beside the plain forward in the same process, and beside others' proxies.

    npm install --prefix /tmp/chp configurable-http-proxy
    python -m venv /tmp/jsp && /tmp/jsp/bin/pip install jupyter-server-proxy
    python -m bench.web --kohakuriver .venv/bin/kohakuriver --jupyter /tmp/jsp/bin/jupyter-server \\
        --proxy /tmp/chp/node_modules/.bin/configurable-http-proxy

All lead to one HTTP service, on Node.js, and are measured in turns: a download of so many megabytes over one
connection, small requests, one after another on each of a few connections that are kept, and messages of 32 bytes that
a WebSocket echoes, one after another. configurable-http-proxy ("chp") and jupyter-server-proxy ("jsp") stand right in
front of the service, without a tunnel, and in front of the plain forward ("chp+forward", "jsp+forward"), where they
have the same hops behind them as the address. "host" is the address that the host itself gives the port, with the
host's process in the place of the forward's. A figure is the median of the rounds, a ratio that of the ratios of runs
side by side, above 1 where ours is better.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from bench.contenders import Contender, KohakuRiver, free_port, ports_of, wait_for_port

SERVICE = """
const piece = Buffer.alloc(1 << 18);
const server = require("http").createServer((request, response) => {
  const left = {bytes: Number(request.url.slice(1)) || 0};
  if (!left.bytes) { response.end("some words of an answer"); return; }
  response.setHeader("Content-Length", left.bytes);
  const write = () => {
    while (left.bytes > 0) {
      const next = left.bytes < piece.length ? piece.subarray(0, left.bytes) : piece;
      left.bytes -= next.length;
      if (!response.write(next)) { response.once("drain", write); return; }
    }
    response.end();
  };
  write();
});
server.on("upgrade", (request, socket) => {
  const key = request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
  const accept = require("crypto").createHash("sha1").update(key).digest("base64");
  const head = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"];
  socket.write([...head, "Sec-WebSocket-Accept: " + accept, "", ""].join("\\r\\n"));
  let held = Buffer.alloc(0);
  socket.on("data", (data) => {
    held = Buffer.concat([held, data]);
    for (let size; held.length > 6 && held.length >= (size = 6 + (held[1] & 127)); held = held.subarray(size)) {
      const text = Buffer.from(held.subarray(6, size));
      for (let at = 0; at < text.length; at++) text[at] ^= held[2 + (at & 3)];
      socket.write(Buffer.concat([Buffer.from([held[0], text.length]), text]));
    }
  });
  socket.on("error", () => undefined);
});
server.keepAliveTimeout = 600000;
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
"""
NAVIGATES = {
    "Sec-Fetch-Site": "none",
    "Sec-Fetch-Mode": "navigate",
    "Sec-Fetch-Dest": "document",
    "Accept": "text/html",
}
HELD = 90_000_000
"""Bytes of an answer that jupyter-server-proxy passes on: it holds all of it, and refuses 100 MiB."""
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
MESSAGE = 32
NAVIGATES["Content-Type"] = "application/x-www-form-urlencoded"
FIELDS = "User-Agent: bench\r\nAccept: */*\r\nAccept-Encoding: gzip\r\nSec-Fetch-Site: same-origin"


@dataclass
class Way:
    """One way to the service: a local port, and what a request says to be let in; answers have `most` bytes."""

    name: str
    port: int
    host: str
    cookie: str = "a=b"
    prefix: str = ""
    most: int = 1 << 62

    def request(self, path: str) -> bytes:
        line, host = f"GET {self.prefix}{path} HTTP/1.1", f"Host: {self.host}"
        return "\r\n".join([line, host, f"Cookie: {self.cookie}", FIELDS, "", ""]).encode()

    def upgrade(self) -> bytes:
        origin = f"Origin: http://{self.host}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}"
        more = f"{origin}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        return self.request("/").removesuffix(b"\r\n") + more.encode()


class Web(Contender):
    """The service."""

    name = title = "service"

    def begin(self) -> None:
        [self.port] = ports_of(self.spawn("node", "-e", SERVICE, piped=True))


class Served(KohakuRiver):
    """A chain whose one forward serves the port's address, too."""

    def serve(self, port: int) -> list[Way]:
        forward = self.kohakuriver("forward", "bench", f"0:{port}", "--web", "--json")
        local = self.event(forward, "listening")["local_port"]
        served = self.event(forward, "served")
        link = urlsplit(served["link"])
        assert link.port
        connection = http.client.HTTPConnection("127.0.0.1", link.port)
        connection.request("GET", f"{link.path}?{link.query}", headers={"Host": link.netloc})
        cookie = str(connection.getresponse().getheader("Set-Cookie")).partition(";")[0]
        connection.close()
        return [Way("forward", local, "localhost"), Way("address", link.port, link.netloc, cookie), self.at_host(port)]

    def at_host(self, port: int) -> Way:
        """The host's own address of the port, for a browser that has come in by a link."""
        argv = [self.executable, "open", "bench", str(port), "--at-host", "--print"]
        url = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
        jar: dict[str, dict[str, str]] = {}
        form = None
        while True:
            parts = urlsplit(url)
            assert parts.port
            cookies = jar.setdefault(parts.netloc, {})
            sent = {"Host": parts.netloc, **NAVIGATES, "Cookie": "; ".join(map("=".join, cookies.items())) or "a=b"}
            connection = http.client.HTTPConnection("127.0.0.1", parts.port)
            path = f"{parts.path}?{parts.query}" if parts.query else parts.path
            connection.request("GET" if form is None else "POST", path, form, sent)
            answer = connection.getresponse()
            text = answer.read().decode()
            for field in answer.headers.get_all("Set-Cookie") or ():
                name, _, value = field.partition(";")[0].partition("=")
                cookies[name] = value
            connection.close()
            found = re.search(r'action="([^"]*)">\s*<input[^>]* name="code" value="([^"]*)"', text)
            there, form = answer.getheader("Location") or (found[1] if found else None), None
            if there is None:
                assert answer.status == 200, text
                app = next(name for name in cookies if "app" in name)
                return Way("host", parts.port, parts.netloc, f"{app}={cookies[app]}")
            if found:
                form = f"code={found[2]}"
            url = urljoin(url, there)


class HttpProxy(Contender):
    """configurable-http-proxy with one target."""

    name = title = "configurable-http-proxy"

    def run(self, executable: str, target: int) -> int:
        port, api = free_port(), free_port()
        where = ("--ip", "127.0.0.1", "--port", str(port), "--api-ip", "127.0.0.1", "--api-port", str(api))
        proxy = self.spawn(executable, *where, "--default-target", f"http://127.0.0.1:{target}", "--log-level", "error")
        wait_for_port(port, proxy)
        return port


class JupyterProxy(Contender):
    """A Jupyter server with jupyter-server-proxy, which lets everybody in."""

    name = title = "jupyter-server-proxy"

    def run(self, executable: str) -> int:
        port = free_port()
        let_in = ("--IdentityProvider.token=", "--ServerApp.allow_root=True", "--no-browser", "--log-level=ERROR")
        server = self.spawn(executable, "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", *let_in)
        wait_for_port(port, server, 60)
        return port


def download(way: Way, size: int) -> float:
    """MB/s of one download."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", way.port)) as connection:
        connection.sendall(way.request(f"/{size}"))
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(1 << 16)
        assert b" 200 " in head[:20], head
        left = size - len(head.partition(b"\r\n\r\n")[2])
        buffer = bytearray(1 << 20)
        while left:
            count = connection.recv_into(buffer)
            assert count, "it ended too early"
            left -= count
    return size / 1e6 / (time.perf_counter() - began)


def requests(way: Way, seconds: float, connections: int) -> float:
    """Small requests a second, over so many connections."""
    request, answers = way.request("/"), 0
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(connections):
            each = stack.enter_context(socket.create_connection(("127.0.0.1", way.port)))
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(each, selectors.EVENT_READ, each)
            each.sendall(request)
        began = time.perf_counter()
        parts: dict[int, bytes] = {}
        while (took := time.perf_counter() - began) < seconds:
            for key, _ in selector.select():
                data = parts.pop(key.fd, b"") + key.data.recv(1 << 16)
                assert data.startswith(b"HTTP/1.1 200"[: len(data)]), data
                if not data.endswith((b"some words of an answer", b"some words of an answer\r\n0\r\n\r\n")):
                    parts[key.fd] = data
                    continue
                answers += 1
                key.data.sendall(request)
    return answers / took


def round_trip(way: Way, seconds: float) -> float:
    """Messages a second that a WebSocket echoes, one after another."""
    message = bytes([0x81, 0x80 | MESSAGE, 0, 0, 0, 0]) + b"x" * MESSAGE
    with socket.create_connection(("127.0.0.1", way.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(way.upgrade())
        head = b""
        while b"\r\n\r\n" not in head:
            head += (more := connection.recv(1 << 16))
            assert more, head
        assert b" 101 " in head[:20], head
        answers, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            connection.sendall(message)
            left = MESSAGE + 2
            while left:
                count = len(connection.recv(left))
                assert count, "it ended too early"
                left -= count
            answers += 1
    return answers / took


def others(
    arguments: argparse.Namespace, service: int, forward: int, proxy: HttpProxy, jupyter: JupyterProxy
) -> list[Way]:
    """The proxies of others that were named, each at the service and before the forward."""
    ways = []
    if arguments.proxy:
        ways.append(Way("chp", proxy.run(arguments.proxy, service), "localhost"))
        ways.append(Way("chp+forward", proxy.run(arguments.proxy, forward), "localhost"))
    if arguments.jupyter:
        port = jupyter.run(arguments.jupyter)
        for name, target in (("jsp", service), ("jsp+forward", forward)):
            ways.append(Way(name, port, f"127.0.0.1:{port}", prefix=f"/proxy/{target}", most=HELD))
    return ways


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohakuriver", type=Path, required=True)
    parser.add_argument("--proxy", help="the program configurable-http-proxy; left out, it is not measured")
    parser.add_argument("--jupyter", help="the program jupyter-server, with jupyter-server-proxy; likewise")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of requests, in each round")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--connections", type=int, default=8)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        service, chain, proxy, jupyter = Web(), Served(arguments.kohakuriver), HttpProxy(), JupyterProxy()
        for contender in (service, chain, proxy, jupyter):
            stack.callback(contender.close)
        service.begin()
        chain.begin()
        ways = [Way("service", service.port, "localhost"), *chain.serve(service.port)]
        ways += others(arguments, service.port, ways[1].port, proxy, jupyter)
        samples: dict[str, dict[str, list[float]]] = {"MB/s": {}, "requests/s": {}, "messages/s": {}}
        for number in range(arguments.rounds):
            for way in ways if number % 2 else ways[::-1]:
                rate = requests(way, arguments.seconds, arguments.connections)
                samples["requests/s"].setdefault(way.name, []).append(rate)
                samples["messages/s"].setdefault(way.name, []).append(round_trip(way, arguments.seconds / 2))
                size = min(arguments.megabytes * 1_000_000, way.most)
                samples["MB/s"].setdefault(way.name, []).append(download(way, size))
    for unit, rates in samples.items():
        for name, each in rates.items():
            ratios = {
                ours: statistics.median(one / other for one, other in zip(rates[ours], each, strict=True))
                for ours in ("address", "host")
            }
            told = "  ".join(f"{ours} / {name}: {ratio:.2f}" for ours, ratio in ratios.items())
            print(f"{name:12} {statistics.median(each):9.0f} {unit:11} {told}")
    print(json.dumps(samples))
    return 0


if __name__ == "__main__":
    sys.exit(main())
