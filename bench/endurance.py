"""Much data, many streams and many connections through a real forward, with what it left behind.

    python -m bench.endurance --kohakuriver .venv/bin/kohakuriver [--gigabytes 10] [--streams 1000] [--cycles 5000]

Moves the bytes down and up with sha256 on both ends, holds the streams open at once with an echo on each, then opens
and closes connections one after the other. Prints one JSON object a line; the last has the descriptors and the resident
memory of every hop before and after. Exits with 1 if a hash differs or a descriptor is left.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

BLOCK = 1 << 20
TIMEOUT = 60.0
SETTLE = 30.0

SERVICE = r"""
import contextlib, hashlib, os, socket, struct, sys, threading
BLOCK = 1 << 20
NUMBERS = struct.pack(f">{BLOCK // 8}Q", *range(BLOCK // 8))
def serve(c):
    with c:
        line = b""
        while not line.endswith(b"\n"):
            line += c.recv(1)
        word, _, size = line.decode().partition(" ")
        if word == "send":
            block, digest, left = os.urandom(BLOCK), hashlib.sha256(), int(size)
            while left:
                piece = memoryview(block)[:min(left, BLOCK)]
                digest.update(piece); c.sendall(piece); left -= len(piece)
            c.sendall(digest.digest())
        elif word.strip() == "count":
            with contextlib.suppress(OSError):
                while True:
                    c.sendall(NUMBERS)
        elif word.strip() == "take":
            digest = hashlib.sha256()
            while data := c.recv(BLOCK):
                digest.update(data)
            c.sendall(digest.digest())
        else:
            while data := c.recv(65536):
                c.sendall(data)
listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
with open(sys.argv[1], "w") as told:
    told.write(str(listener.getsockname()[1]))
threading.stack_size(256 * 1024)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


class Forward:
    """A cluster, a task with the service, and a forward to it."""

    def __init__(self, program: str, directory: Path, stack: contextlib.ExitStack) -> None:
        self.program = str(Path(program).absolute())
        self.environment = {**os.environ, "KOHAKURIVER_CONFIG_DIR": str(directory)}
        self._stack = stack
        self.up, _ = self._start("ready", "up", "--json", "--host-port=0", "--runner-port=0", "--ssh-port=0")
        told = directory / "port"
        os.mkfifo(told)
        command = [sys.executable, "-c", SERVICE, str(told)]
        create = [self.program, "vps", "create", "--json", "--backend", "process", "--", *command]
        done = subprocess.run(create, env=self.environment, stdout=subprocess.PIPE, check=True)
        task = str(json.loads(done.stdout)["task_id"])
        self._wanted = [task, f"0:{told.read_text()}"]
        self.forward, self.port = self.another_user()

    def another_user(self) -> tuple[subprocess.Popen[str], int]:
        """One more forward to the same service, and its local port."""
        process, event = self._start("listening", "forward", *self._wanted, "--json")
        return process, int(event["local_port"])

    def _start(self, event: str, *arguments: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        process = subprocess.Popen([self.program, *arguments], env=self.environment, stdout=subprocess.PIPE, text=True)
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if said["event"] == event:
                return process, said
        raise SystemExit(f"`kohakuriver {arguments[0]}` ended with {process.wait()} before its {event!r} event")

    def connect(self, word: str, port: int | None = None) -> socket.socket:
        """A connection to the service, which does what `word` says; through another user's `port`, if given."""
        sock = socket.create_connection(("127.0.0.1", port or self.port), timeout=TIMEOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(word.encode() + b"\n")
        return sock

    def hops(self) -> dict[str, psutil.Process]:
        """The processes that relay, by what they are."""
        found = {"forward": psutil.Process(self.forward.pid)}
        for process in psutil.Process(self.up.pid).children(recursive=True):
            line = process.cmdline()
            for name in ("host", "runner"):
                if line[1:4] == ["-m", "kohakuriver", name]:
                    found[name] = process
            if line and Path(line[0]).name == "tunnel-client":
                found["tunnel client"] = process
        return found

    def state(self) -> dict[str, dict[str, int]]:
        """Descriptors, and KiB of resident memory, of each hop."""
        return {
            name: {"descriptors": hop.num_fds(), "rss_kib": hop.memory_info().rss // 1024}
            for name, hop in self.hops().items()
        }


def report(what: str, **fields: object) -> None:
    print(json.dumps({"what": what, **fields}), flush=True)


def received(stream: io.BufferedReader[Any], size: int, into: Callable[[bytes], object]) -> None:
    while size:
        data = stream.read(min(size, BLOCK))
        if not data:
            raise SystemExit(f"the stream ended {size} bytes early")
        into(data)
        size -= len(data)


def down(forward: Forward, size: int) -> bool:
    began = time.perf_counter()
    digest = hashlib.sha256()
    with forward.connect(f"send {size}") as sock, io.BufferedReader(socket.SocketIO(sock, "r"), BLOCK) as stream:
        received(stream, size, digest.update)
        equal = stream.read(32) == digest.digest()
    seconds = time.perf_counter() - began
    report("down", bytes=size, sha256=digest.hexdigest(), equal=equal, megabytes_per_second=round(size / seconds / 1e6))
    return equal


def up(forward: Forward, size: int) -> bool:
    began = time.perf_counter()
    block, digest, left = os.urandom(BLOCK), hashlib.sha256(), size
    with forward.connect("take") as sock:
        while left:
            piece = memoryview(block)[: min(left, BLOCK)]
            digest.update(piece)
            sock.sendall(piece)
            left -= len(piece)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as stream:
            equal = stream.read(32) == digest.digest()
    seconds = time.perf_counter() - began
    report("up", bytes=size, sha256=digest.hexdigest(), equal=equal, megabytes_per_second=round(size / seconds / 1e6))
    return equal


def streams(forward: Forward, count: int) -> None:
    """Open them all, then let each echo something of its own."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(forward.connect("echo")) for _ in range(count)]
        for number, sock in enumerate(socks):
            sock.sendall(number.to_bytes(4, "big") * 256)
        for number, sock in enumerate(socks):
            with sock.makefile("rb") as stream:
                if stream.read(1024) != number.to_bytes(4, "big") * 256:
                    raise SystemExit(f"stream {number} did not get its own bytes back")
        report("streams at once", count=count, state=forward.state())


def cycles(forward: Forward, count: int) -> None:
    began = time.perf_counter()
    for _ in range(count):
        with forward.connect("echo") as sock:
            sock.sendall(b"x")
            if sock.recv(1) != b"x":
                raise SystemExit("a connection did not echo")
    report("connect and close", count=count, per_second=round(count / (time.perf_counter() - began)))


def settled(forward: Forward, before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The state once the descriptors are back, or after SETTLE seconds."""
    end = time.monotonic() + SETTLE
    while True:
        state = forward.state()
        if time.monotonic() > end or all(state[hop]["descriptors"] <= before[hop]["descriptors"] for hop in before):
            return state
        time.sleep(0.2)


@contextlib.contextmanager
def started(program: str) -> Iterator[Forward]:
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        yield Forward(program, Path(directory), stack)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohakuriver", required=True)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--cycles", type=int, default=5000)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with started(arguments.kohakuriver) as forward:
        cycles(forward, 20)  # what is made once is made now
        before = forward.state()
        size = int(arguments.gigabytes * 1e9)
        equal = [down(forward, size), up(forward, size)]
        streams(forward, arguments.streams)
        cycles(forward, arguments.cycles)
        after = settled(forward, before)
        report("left behind", before=before, after=after)
    left = [hop for hop in before if after[hop]["descriptors"] > before[hop]["descriptors"]]
    return 0 if all(equal) and not left else 1


if __name__ == "__main__":
    sys.exit(main())
