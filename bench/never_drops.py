"""Streams that go on while what lies between their ends is killed, cut, frozen and started again.

    python -m bench.never_drops --kohakuriver .venv/bin/kohakuriver [--faults 50] [--streams 200] [--bytes 4G]

A host, a runner, a container and a forward, with a relay before the host and one before the runner. The container is of
busybox, and in it Python runs from this machine's own files: a Docker engine is needed, and root. Bulk goes both ways,
so many bytes each, with sha256 on both ends; a part of it is under way at each fault. Echo streams carry numbered
messages, and meanwhile one fault after the other happens, chosen by `--seed`: each kind once in the beginning. Prints a
JSON object a line for each: how long it lasted, and for how long the slowest echo stream stood still, in seconds.
That counts from the fault's beginning where something else can take over at once, and from its end where all has to
wait for it. Then come the totals, and a table of the kinds of faults: how often, the stalls of all echo streams, how
many streams ended, how many bytes were lost. Exits with 1 where a stream has ended, or a byte was lost, doubled or
changed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohakuriver.quotas import byte_count
from tests.support.docker_images import busybox_image

BLOCK = 1 << 20
MESSAGE = struct.Struct(">Q56x")
# Between two messages of an echo stream, in seconds.
PACE = 0.02
# For how long something is frozen, in seconds: longer than a link may be silent with something unacknowledged.
FROZEN = 8.0
# A stream that stands still for longer than this after a fault has ended, for its user.
TOO_LONG = 60.0
# Of these a user should notice no more than that something else takes over: their stalls count from the beginning.
TAKEN_OVER = ("drained", "cut", "silently")

SERVICE = r"""
import hashlib, socket, sys, threading
BLOCK = 1 << 20
def serve(c):
    with c:
        line = b""
        while not line.endswith(b"\n"):
            line += c.recv(1)
        word, _, size = line.decode().partition(" ")
        if word == "send":
            block, digest = bytes(range(256)) * (BLOCK // 256), hashlib.sha256()
            for n in range(int(size) // BLOCK):
                piece = n.to_bytes(8, "big") + block[8:]
                digest.update(piece); c.sendall(piece)
            c.sendall(digest.digest())
        elif word == "take":
            digest, left = hashlib.sha256(), int(size)
            while left and (data := c.recv(min(BLOCK, left))):
                digest.update(data); left -= len(data)
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


class Relay:
    """A TCP relay in between that can be cut, and frozen as a network is that swallows everything."""

    def __init__(self) -> None:
        self.target = 0
        self.port = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()

    async def listen(self) -> Relay:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=BLOCK)
        self.port = server.sockets[0].getsockname()[1]
        return self

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flows = self._flows
        await flows.wait()
        try:
            onward, back = await asyncio.open_connection("127.0.0.1", self.target, limit=BLOCK)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        with contextlib.suppress(asyncio.CancelledError):  # at the end: those that died wait for ever
            await asyncio.gather(self._pump(reader, back, flows), self._pump(onward, writer, flows))
        self._open -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(BLOCK):
                await flows.wait()
                writer.write(data)
                await writer.drain()
        await flows.wait()
        writer.close()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in self._open:
            writer.transport.abort()

    def die(self) -> None:
        """Swallow what comes on the connections that there are, and tell nobody; new ones work."""
        self._flows.clear()
        self._flows = asyncio.Event()
        self._flows.set()

    async def freeze(self, seconds: float) -> None:
        """Pass nothing on for a while, then all of it."""
        self._flows.clear()
        await asyncio.sleep(seconds)
        self._flows.set()


class Program:
    """A `kohakuriver` command that can be killed and started again."""

    def __init__(self, program: str, environment: dict[str, str], log: Path, *arguments: str) -> None:
        self._command = [program, *arguments, "--json"]
        self._environment = environment
        self._log = log
        self.process: subprocess.Popen[str]

    def start(self, *, event: str = "ready") -> dict[str, Any]:
        """Start it; what it says first of this kind."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said: dict[str, Any] = json.loads(line)
            if said["event"] == event:
                return said
        raise SystemExit(f"{self._command} did not start; see {self._log}: {self._log.read_text()[-2000:]}")

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait(30)

    def again(self, number: signal.Signals) -> None:
        """End it by a signal, and start it again."""
        self.end(number)
        self.start()

    def replace(self, port: int) -> None:
        """Ask it to end, and start another in its place once it listens no more: what it carries moves."""
        old = self.process
        old.send_signal(signal.SIGTERM)
        while listens(port):
            time.sleep(0.01)
        self.start()
        old.wait(30)

    async def freeze(self, seconds: float) -> None:
        """Stop its processor time for a while, as a sleeping laptop does."""
        self.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)


@dataclass
class Seen:
    """What the streams have seen: the longest gap of each since a fault, and what went wrong."""

    since: float = 0.0  # gaps count from here
    asked: float = 0.0  # a stream goes on when it has an answer to something that it said since then
    gaps: dict[str, float] = field(default_factory=dict)
    heard: set[str] = field(default_factory=set)
    echoes: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    messages: int = 0
    lost: int = 0

    def begin(self) -> None:
        """From now on streams may be expected to go on."""
        self.since, self.gaps = time.monotonic(), {}

    def over(self) -> None:
        """The fault is."""
        self.asked, self.heard = time.monotonic(), set()

    def note(self, name: str, began: float) -> None:
        """A message that this stream sent at `began` has come back."""
        now = time.monotonic()
        self.messages += 1
        if began >= self.asked:
            self.heard.add(name)
        self.gaps[name] = max(self.gaps.get(name, 0.0), now - max(began, self.since))

    def ended(self, name: str, why: object, lost: int) -> None:
        """A stream is over that should not be, and so many bytes of it have not arrived."""
        self.echoes.discard(name)
        self.wrong.append(f"{name}: {why!r}")
        self.lost += lost

    @property
    def all_go_on(self) -> bool:
        return self.echoes <= self.heard


class Share:
    """How much of the bulk may have been sent: a part of it for each fault, so that some is under way at each."""

    def __init__(self, size: int, parts: int) -> None:
        self._part = -(-size // max(parts, 1))
        self._allowed = 0
        self._more = asyncio.Event()

    def next(self, parts: int = 1) -> None:
        self._allowed += parts * self._part
        self._more.set()

    async def until(self, reached: int) -> None:
        """Wait until there may be more than this."""
        while reached >= self._allowed:
            self._more.clear()
            await self._more.wait()


FAILURES = (OSError, EOFError, ValueError, asyncio.TimeoutError)


async def echo(port: int, name: str, seen: Seen, over: asyncio.Event, ready: Callable[[], None]) -> None:
    """Numbered messages, one after the other, until it is over."""
    number = 0
    seen.echoes.add(name)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"echo\n")
        ready()
        while not over.is_set():
            began = time.monotonic()
            writer.write(MESSAGE.pack(number))
            back = await asyncio.wait_for(reader.readexactly(MESSAGE.size), TOO_LONG)
            if MESSAGE.unpack(back)[0] != number:
                raise ValueError(f"message {number} came back as {MESSAGE.unpack(back)[0]}")
            seen.note(name, began)
            number += 1
            await asyncio.sleep(PACE)
        writer.write_eof()
        if rest := await asyncio.wait_for(reader.read(), TOO_LONG):
            raise ValueError(f"{len(rest)} bytes too many")
        writer.close()
    except FAILURES as error:
        seen.ended(name, error, MESSAGE.size)


async def download(port: int, size: int, seen: Seen, share: Share) -> None:
    """So many bytes from the task, with their hash behind them."""
    digest, left = hashlib.sha256(), size
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=BLOCK)
        writer.write(f"send {size}\n".encode())
        while left:
            await share.until(size - left)
            data = await asyncio.wait_for(reader.read(min(BLOCK, left)), TOO_LONG)
            if not data:
                raise EOFError(f"{left} bytes are missing")
            digest.update(data)
            left -= len(data)
        if await asyncio.wait_for(reader.readexactly(32), TOO_LONG) != digest.digest():
            left = size
            raise ValueError("the hash differs")
        writer.close()
    except FAILURES as error:
        seen.ended("download", error, left)


async def upload(port: int, size: int, seen: Seen, share: Share) -> None:
    """So many bytes to the task, which answers with their hash."""
    digest, block, sent = hashlib.sha256(), os.urandom(BLOCK), 0
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=BLOCK)
        writer.write(f"take {size}\n".encode())
        for n in range(size // BLOCK):
            await share.until(sent)
            piece = n.to_bytes(8, "big") + block[8:]
            digest.update(piece)
            writer.write(piece)
            await asyncio.wait_for(writer.drain(), TOO_LONG)
            sent += BLOCK
        if await asyncio.wait_for(reader.readexactly(32), TOO_LONG) != digest.digest():
            sent = 0
            raise ValueError("the hash differs")
        writer.close()
    except FAILURES as error:
        seen.ended("upload", error, size - sent)


class Cluster:
    """Host, runner, task and forward, with a relay before each of the first two."""

    def __init__(self, program: str, directory: Path) -> None:
        self._run = program
        self._directory = directory
        self._environment = {**os.environ, "KOHAKURIVER_CONFIG_DIR": str(directory)}
        self.before_host, self.before_runner = Relay(), Relay()
        self.host: Program
        self.runner: Program
        self.forward: Program
        self.port = self.host_port = 0

    def _program(self, name: str, *arguments: str) -> Program:
        return Program(self._run, self._environment, self._directory / f"{name}.log", name, *arguments)

    async def start(self) -> None:
        await self.before_host.listen()
        await self.before_runner.listen()
        ports = [free_port() for _ in range(3)]
        self.host_port = ports[0]
        self.host = self._program(
            "host", "--bind=127.0.0.1", f"--port={ports[0]}", f"--ssh-port={ports[1]}", "--drain=20"
        )
        url = self.host.start()["url"]
        self.before_host.target = ports[0]
        state = self._directory / "host"
        self._environment["KOHAKURIVER_TOKEN"] = (state / "admin-token").read_text().strip()
        self._environment["KOHAKURIVER_HOST"] = f"http://127.0.0.1:{self.before_host.port}"
        self.before_runner.target = ports[2]
        self.runner = self._program(
            "runner",
            "--bind=127.0.0.1",
            f"--port={ports[2]}",
            f"--host-url={url}",
            f"--node-token-file={state / 'node-token'}",
            "--backend=docker",
            f"--advertise-url=http://127.0.0.1:{self.before_runner.port}",
        )
        self.runner.start()
        await self._task()
        self.forward = self._program("forward", "busy", f"0:{self._service_port}")
        self.port = (await asyncio.to_thread(self.forward.start, event="listening"))["local_port"]
        self._said = asyncio.ensure_future(asyncio.to_thread(self._forward_says))

    def _forward_says(self) -> None:
        assert self.forward.process.stdout is not None
        with (self._directory / "forward.events").open("w") as events:
            for line in self.forward.process.stdout:
                events.write(line)

    async def _task(self) -> None:
        told = self._directory / "port"
        os.mkfifo(told)
        create = [self._run, "vps", "create", "--name=busy", f"--image={busybox_image()}", "--mount=/:/host:ro", "--"]
        command = [*create, "/bin/busybox", "chroot", "/host", sys.executable, "-c", SERVICE, str(told)]
        for _ in range(50):  # the runner registers after it is ready
            done = await asyncio.create_subprocess_exec(*command, env=self._environment, stdout=subprocess.DEVNULL)
            if await done.wait() == 0:
                break
            await asyncio.sleep(0.2)
        self._service_port = await asyncio.to_thread(told.read_text)

    def stop(self) -> None:
        for name, number in (("forward", signal.SIGTERM), ("runner", signal.SIGTERM), ("host", signal.SIGTERM)):
            program = getattr(self, name, None)
            if program is not None and program.process.poll() is None:
                if name == "runner":
                    subprocess.run([self._run, "vps", "rm", "busy"], env=self._environment, check=False, timeout=60)
                program.process.send_signal(signal.SIGCONT)
                program.end(number)


def free_port() -> int:
    """A port that was free; programs that are started again must have the same."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether somebody does, on this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def faults(cluster: Cluster) -> dict[str, Callable[[], Awaitable[None]]]:
    """What can happen, by name."""

    async def restarted(program: Program, number: signal.Signals) -> None:
        await asyncio.to_thread(program.again, number)

    async def at_once(happen: Callable[[], None]) -> None:
        happen()

    return {
        "host drained": lambda: asyncio.to_thread(cluster.host.replace, cluster.host_port),
        "host killed": lambda: restarted(cluster.host, signal.SIGKILL),
        "host restarted": lambda: restarted(cluster.host, signal.SIGTERM),
        "runner killed": lambda: restarted(cluster.runner, signal.SIGKILL),
        "runner restarted": lambda: restarted(cluster.runner, signal.SIGTERM),
        "link to host cut": lambda: at_once(cluster.before_host.cut),
        "link to runner cut": lambda: at_once(cluster.before_runner.cut),
        "link to host silently dead": lambda: at_once(cluster.before_host.die),
        "link to runner silently dead": lambda: at_once(cluster.before_runner.die),
        "link to host a black hole": lambda: cluster.before_host.freeze(FROZEN),
        "link to runner a black hole": lambda: cluster.before_runner.freeze(FROZEN),
        "host frozen": lambda: cluster.host.freeze(FROZEN),
        "runner frozen": lambda: cluster.runner.freeze(FROZEN),
        "forward frozen": lambda: cluster.forward.freeze(FROZEN),
    }


@dataclass
class Kind:
    """What one kind of fault has done."""

    count: int = 0
    stalls: list[float] = field(default_factory=list)
    ended: int = 0
    lost: int = 0

    def row(self, name: str) -> str:
        stalls = sorted(self.stalls) or [0.0]
        p50, p99 = (stalls[min(len(stalls) - 1, int(len(stalls) * part))] for part in (0.5, 0.99))
        return ROW.format(name, self.count, f"{p50:.3f}", f"{p99:.3f}", f"{stalls[-1]:.3f}", self.ended, self.lost)


ROW = "{:30} {:>5} {:>9} {:>9} {:>9} {:>6} {:>10}"


def table(kinds: dict[str, Kind]) -> str:
    """The kinds of faults, a line each; stalls in seconds."""
    head = ROW.format("fault", "count", "stall p50", "p99", "max", "ended", "bytes lost")
    return "\n".join([head, *(kind.row(name) for name, kind in sorted(kinds.items()))])


async def one(name: str, happen: Callable[[], Awaitable[None]], seen: Seen, kind: Kind) -> None:
    """Have a fault happen, and tell how long streams stood still."""
    ended, lost, began = len(seen.wrong), seen.lost, time.monotonic()
    seen.begin()
    await happen()
    lasted = time.monotonic() - began
    if not any(word in name for word in TAKEN_OVER):
        seen.begin()
    seen.over()
    while not seen.all_go_on and time.monotonic() - seen.asked < TOO_LONG:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    stalls = list(seen.gaps.values())
    kind.count += 1
    kind.stalls += stalls
    kind.ended += len(seen.wrong) - ended
    kind.lost += seen.lost - lost
    slowest = round(max(stalls, default=0.0), 3)
    print(json.dumps({"fault": name, "lasted": round(lasted, 3), "stall": slowest}), flush=True)
    await asyncio.sleep(random.uniform(0.0, 2.0))  # so that faults meet streams at different moments


@contextlib.asynccontextmanager
async def busy(cluster: Cluster, options: argparse.Namespace, seen: Seen) -> AsyncIterator[list[Share]]:
    """Streams of every kind, around what happens to them."""
    over, size, opened = asyncio.Event(), options.bytes // BLOCK * BLOCK, asyncio.Semaphore(0)
    shares = [Share(size, options.faults) for _ in range(2)]
    ways = zip((download, upload), shares, strict=True)
    bulk = [asyncio.ensure_future(way(cluster.port, size, seen, share)) for way, share in ways if size]
    echoes = [
        asyncio.ensure_future(echo(cluster.port, f"echo {n}", seen, over, opened.release))
        for n in range(options.streams)
    ]
    for _ in range(options.streams):
        await opened.acquire()
    yield shares
    for share in shares:
        share.next(options.faults)
    await asyncio.gather(*bulk)
    over.set()
    await asyncio.gather(*echoes)


def _sockets(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(directory, name).is_file() or Path(directory, name).is_dir())]


async def main(options: argparse.Namespace) -> int:
    choose = random.Random(options.seed)  # which fault comes next
    seen = Seen()
    done: dict[str, Kind] = {}
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(str(Path(options.kohakuriver).absolute()), Path(directory))
        try:
            await cluster.start()
            kinds = faults(cluster)
            names = [name for name in kinds if not options.only or options.only in name]
            choose.shuffle(names)
            async with busy(cluster, options, seen) as shares:
                for n in range(options.faults):
                    name = names[n] if n < len(names) else choose.choice(names)
                    for share in shares:
                        share.next()
                    await one(name, kinds[name], seen, done.setdefault(name, Kind()))
        finally:
            await asyncio.to_thread(cluster.stop)
            if seen.wrong and options.keep:
                await asyncio.to_thread(shutil.copytree, directory, options.keep, dirs_exist_ok=True, ignore=_sockets)
    totals = {"messages": seen.messages, "ended": len(seen.wrong), "lost": seen.lost, "wrong": seen.wrong[:5]}
    print(json.dumps(totals))
    print(table(done))
    return 1 if seen.wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kohakuriver", default=str(Path(sys.executable).with_name("kohakuriver")))
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--bytes", type=byte_count, default=4 << 30, help="each way, as in 512M or 4G")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--keep", default="", help="where logs are copied to when something went wrong")
    raise SystemExit(asyncio.run(main(parser.parse_args())))
