"""The task of `kohakuriver demo`: a web page, and bytes to measure with; and the program that measures.

`GET /` is the page. `GET /bytes?size=N` answers with N random bytes and their sha256 in the `X-Sha256` header.
`POST /bytes` answers with `{"size", "sha256", "seconds"}` of what it was sent, timed from first to last byte.

With `--check HOST:PORT --size N` it is the other side: it fetches and sends N bytes, compares their sha256, and prints
one JSON line each way: `{"direction", "bytes", "seconds", "sha256", "intact"}`.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from kohakuriver.descriptors import prepare

__all__ = ["Handler", "check", "main", "receive"]

BLOCK = 4 << 20
MAX_SIZE = 1 << 31

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>KohakuRiver Tunnel</title>
<style>
  :root {{ color-scheme: light dark; --line: #c8791a; }}
  body {{ font: 17px/1.55 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem; }}
  h1 {{ font-weight: 650; }}
  ol {{ list-style: none; padding: 0; border-left: 3px solid var(--line); }}
  li {{ padding: .35rem 0 .35rem 1rem; }}
  code {{ background: color-mix(in srgb, currentColor 9%, transparent); padding: .1em .35em; border-radius: 4px; }}
  button {{ font: inherit; padding: .5rem 1rem; border: 1px solid var(--line); border-radius: 6px;
            background: none; cursor: pointer; }}
  output {{ margin-left: .75rem; font-variant-numeric: tabular-nums; }}
</style>
<h1>This page came through the tunnel</h1>
<p>It is served by task <code>{task}</code>, which listens on port {port} and knows nothing of tunnels.
On its way to your browser, each byte passed:</p>
<ol>
  <li>the service, process {pid} of the task</li>
  <li>the tunnel client beside it</li>
  <li>the runner of this node</li>
  <li>the host</li>
  <li><code>kohakuriver forward</code>, which listens on <code>{address}</code></li>
  <li>your browser</li>
</ol>
<p><button id="go">Fetch 64 MiB through it</button><output id="result"></output></p>
<script>
  const go = document.getElementById("go"), result = document.getElementById("result");
  go.onclick = async () => {{
    go.disabled = true;
    result.textContent = "fetching\\u2026";
    const begin = performance.now();
    try {{
      const answer = await fetch("/bytes?size=" + (64 << 20));
      const bytes = await answer.arrayBuffer();
      const seconds = (performance.now() - begin) / 1000;
      result.textContent = (bytes.byteLength / 1e6 / seconds).toFixed(0) + " MB/s";
      if (crypto.subtle) {{
        const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
        const hex = Array.from(digest, b => b.toString(16).padStart(2, "0")).join("");
        result.textContent += hex === answer.headers.get("X-Sha256") ? ", every byte as it was" : ", DAMAGED";
      }}
    }} catch (error) {{
      result.textContent = "failed: " + error.message;
    }}
    go.disabled = false;
  }};
</script>
</html>
"""


def receive(read_into: Callable[[memoryview], int | None], size: int) -> tuple[bytearray, float]:
    """`size` bytes from a `readinto` function, and the seconds from the first to the last of them.

    Raises ConnectionError when they end before that.
    """
    data = bytearray(size)
    view = memoryview(data)
    got, begin = 0, time.perf_counter()
    while got < size:
        count = read_into(view[got:])
        if not count:
            raise ConnectionError(f"the connection ended after {got} of {size} bytes")
        got += count
    return data, time.perf_counter() - begin


class Handler(BaseHTTPRequestHandler):
    """Answers as the module says. `block` is what its bytes are made of, `task` what the page calls itself."""

    protocol_version = "HTTP/1.1"
    task = ""
    block = b""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/":
            self._answer(200, "text/html; charset=utf-8", self._page().encode())
        elif url.path == "/bytes":
            self._send_bytes(parse_qs(url.query).get("size", ["0"])[0])
        else:
            self._answer(404, "text/plain", b"There is only this page.\n")

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", "0"))
        if self.path != "/bytes" or not 0 <= size <= MAX_SIZE:
            self.close_connection = True
            self._answer(400, "text/plain", b"POST up to 2 GiB to /bytes.\n")
            return
        data, seconds = receive(self.rfile.readinto1, size)
        answer = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "seconds": seconds}
        self._answer(200, "application/json", json.dumps(answer).encode())

    def _page(self) -> str:
        facts = {
            "task": self.task,
            "port": self.connection.getsockname()[1],
            "pid": os.getpid(),
            "address": self.headers.get("Host", "your machine"),
        }
        return PAGE.format(**{name: html.escape(str(value)) for name, value in facts.items()})

    def _send_bytes(self, text: str) -> None:
        size = int(text) if text.isdigit() else -1
        if not 0 <= size <= MAX_SIZE:
            self._answer(400, "text/plain", b"size goes up to 2 GiB.\n")
            return
        pieces = [self.block] * (size // BLOCK) + [self.block[: size % BLOCK]]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(size))
        self.send_header("X-Sha256", digest.hexdigest())
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def check(address: str, size: int, timeout: float = 120.0) -> bool:
    """Transfer `size` bytes each way through `address`, `HOST:PORT`; whether all arrived as they were."""
    intact = True
    for direction, transfer in (("down", _fetch), ("up", _send)):
        connection = http.client.HTTPConnection(address, timeout=timeout)
        expected, found, seconds = transfer(connection, size)
        connection.close()
        intact = intact and expected == found
        result = {"bytes": size, "seconds": round(seconds, 6), "sha256": found, "intact": expected == found}
        print(json.dumps({"direction": direction, **result}), flush=True)
    return intact


def _fetch(connection: http.client.HTTPConnection, size: int) -> tuple[str, str, float]:
    """The sha256 as it was sent and as it came, and the seconds of the transfer."""
    connection.request("GET", f"/bytes?size={size}")
    answer = connection.getresponse()
    data, seconds = receive(answer.readinto, size)
    return answer.headers["X-Sha256"], hashlib.sha256(data).hexdigest(), seconds


def _send(connection: http.client.HTTPConnection, size: int) -> tuple[str, str, float]:
    """The same, the other way."""
    data = memoryview(os.urandom(BLOCK) * (size // BLOCK + 1))[:size]
    connection.request("POST", "/bytes", body=data, headers={"Content-Length": str(size)})
    answer = json.load(connection.getresponse())
    return hashlib.sha256(data).hexdigest(), answer["sha256"], answer["seconds"]


def main() -> None:
    """Serve on `--port` of 127.0.0.1 until SIGTERM, or check what another one serves."""
    prepare()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--task", default="demo")
    parser.add_argument("--check", metavar="HOST:PORT")
    parser.add_argument("--size", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(0 if check(arguments.check, arguments.size) else 1)
    Handler.task = arguments.task
    Handler.block = os.urandom(BLOCK)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
