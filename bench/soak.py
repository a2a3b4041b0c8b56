"""Mixed load through two real forwards to one task for a long time, with what every hop holds meanwhile.

    python -m bench.soak --kohakuriver .venv/bin/kohakuriver [--seconds 900] [--output docs/images]

Bulk both ways, small requests, connections that come and go, half-closed uploads with a checksum, readers that stall
and go on, datagrams from many sources. Every few seconds: descriptors and resident memory of each hop, and the streams
that the runner has in its tables. Writes `soak.json` and `soak.svg`, and exits with 1 if something grew, was left
behind or came back wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil

from bench.soak_plot import plot

SAMPLE_EVERY = 5.0
# Until then caches fill and windows grow; what comes after is to be flat.
WARM_UP = 0.2
MEMORY_SLACK = 12 << 20
DESCRIPTOR_SLACK = 16
PATIENCE = 30.0
BULK_RATE = 8 << 20
STALLED = 5


class Cluster:
    """`kohakuriver up`, a task that serves, and two forwards to it, each a process of its own."""

    def __init__(self, kohakuriver: str, directory: Path) -> None:
        self._program = [kohakuriver]
        self._environment = {**os.environ, "KOHAKURIVER_CONFIG_DIR": str(directory)}
        self._children: list[subprocess.Popen[str]] = []
        self._directory = directory
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self.up = self._start("up", "--json", "--host-port=0", "--runner-port=0", "--ssh-port=0")
        self._event(self.up, "ready")
        self.task, port = self._create()
        self.forwards = [self._start("forward", self.task, f"0:{port}", f"0:{port}/udp", "--json") for _ in range(2)]
        self.ports = [
            (self._event(forward, "listening"), self._event(forward, "listening")) for forward in self.forwards
        ]
        for forward in self.forwards:
            self._drain(forward)

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [*self._program, *arguments], env=self._environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._children.append(child)
        return child

    def run(self, *arguments: str) -> Any:
        """A command's JSON."""
        command = [*self._program, *arguments[:2], "--json", *arguments[2:]]
        return json.loads(subprocess.run(command, env=self._environment, stdout=subprocess.PIPE, check=True).stdout)

    def _event(self, child: subprocess.Popen[str], name: str) -> int:
        assert child.stdout is not None
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == name:
                return int(event.get("local_port", 0))
        raise SystemExit(f"a command ended before it said {name!r}")

    @staticmethod
    def _drain(child: subprocess.Popen[str]) -> None:
        """Let the events of a forward go nowhere, so that it never waits for a reader."""
        assert child.stdout is not None
        fd = child.stdout.fileno()
        asyncio.get_running_loop().add_reader(fd, lambda: os.read(fd, 1 << 16))

    def _create(self) -> tuple[str, int]:
        fifo = self._directory / "port"
        os.mkfifo(fifo)
        serve = f"exec {sys.executable} -m bench.soak_service > {fifo}"
        root = Path(__file__).resolve().parents[1]
        created = self.run("vps", "create", "--backend=process", f"--env=PYTHONPATH={root}", "--", "sh", "-c", serve)
        with fifo.open() as lines:
            return created["name"], int(lines.readline())

    def hops(self) -> dict[str, psutil.Process]:
        """The processes that bytes pass through."""
        found = {f"forward {i}": psutil.Process(forward.pid) for i, forward in enumerate(self.forwards, 1)}
        for process in psutil.Process(self.up.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                for hop in ("host", "runner"):
                    if "kohakuriver" in line and hop in line:
                        found[hop] = process
                if line and line[0].rpartition("/")[2].startswith("tunnel-client"):
                    found["tunnel client"] = process
        return found

    def traffic(self) -> dict[str, int]:
        """What the runner counts for the task."""
        counts: dict[str, int] = self.run("vps", "status", self.task)["traffic"]
        return counts

    def close(self) -> None:
        for child in reversed(self._children):
            child.terminate()
            child.wait(PATIENCE)


class Load:
    """Everything that goes through the forwards, counted."""

    def __init__(self, ports: list[tuple[int, int]]) -> None:
        self._ports = itertools.cycle(ports)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.round_trips: list[float] = []
        self._random = random.Random(1)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.download, 2), (self.upload, 2), (self.request, 8), (self.come_and_go, 2),
            (self.half_close, 2), (self.stall, STALLED), (self.datagrams, 4),
        ]  # fmt: skip
        for kind, many in kinds:
            self._tasks += [asyncio.ensure_future(self._again(kind)) for _ in range(many)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _again(self, kind: Callable[[], Awaitable[None]]) -> None:
        """One kind of load, again and again."""
        while True:
            await self._once(kind)

    async def _once(self, kind: Callable[[], Awaitable[None]]) -> None:
        """Once; if it fails that is noted."""
        try:
            await asyncio.wait_for(kind(), 10 * PATIENCE)
            self.counts[kind.__name__] += 1
        except (OSError, EOFError, AssertionError, asyncio.TimeoutError) as error:
            self.failures.append(f"{kind.__name__}: {type(error).__name__} {error}")
            await asyncio.sleep(1)

    @contextlib.asynccontextmanager
    async def _open(self, kind: bytes) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", next(self._ports)[0])
        try:
            writer.write(kind)
            yield reader, writer
        finally:
            writer.close()

    async def download(self) -> None:
        """A few hundred megabytes at a moderate rate, then a new connection."""
        async with self._open(b"s") as (reader, _):
            for _ in range(30):
                began = time.monotonic()
                await reader.readexactly(BULK_RATE // 2)
                self.counts["bytes down"] += BULK_RATE // 2
                await asyncio.sleep(max(0.0, 0.5 - (time.monotonic() - began)))

    async def upload(self) -> None:
        """The other way."""
        block = bytes(256 * 1024)
        async with self._open(b"d") as (_, writer):
            for _ in range(30):
                began = time.monotonic()
                for _ in range(BULK_RATE // 2 // len(block)):
                    writer.write(block)
                    await writer.drain()
                self.counts["bytes up"] += BULK_RATE // 2
                await asyncio.sleep(max(0.0, 0.5 - (time.monotonic() - began)))

    async def request(self) -> None:
        """A connection that asks now and then."""
        async with self._open(b"e") as (reader, writer):
            for _ in range(100):
                asked = self._random.randbytes(self._random.randrange(1, 2000))
                began = time.monotonic()
                writer.write(asked)
                assert await reader.readexactly(len(asked)) == asked
                self.round_trips.append(time.monotonic() - began)
                self.counts["requests"] += 1
                await asyncio.sleep(0.05)

    async def come_and_go(self) -> None:
        """Open, ask once, close."""
        async with self._open(b"e") as (reader, writer):
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
        await asyncio.sleep(0.05)

    async def half_close(self) -> None:
        """An upload that ends with end-of-file, and the answer after it."""
        data = self._random.randbytes(200_000)
        async with self._open(b"h") as (reader, writer):
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == hashlib.sha256(data).digest()
        await asyncio.sleep(0.2)

    async def stall(self) -> None:
        """A reader that stops for a while, then goes on where it was."""
        async with self._open(b"s") as (reader, _):
            await reader.readexactly(1 << 16)
            await asyncio.sleep(self._random.uniform(5, 25))
            await reader.readexactly(4 << 20)

    async def datagrams(self) -> None:
        """A new source address with some datagrams, of which none may be another's."""
        sock = _Datagrams(await _connected(next(self._ports)[1]))
        try:
            for _ in range(50):
                asked = self._random.randbytes(self._random.randrange(0, 1400))
                answer = await sock.ask(asked)
                assert answer in (asked, None)
                self.counts["datagrams lost" if answer is None else "datagrams"] += 1
                await asyncio.sleep(0.02)
        finally:
            sock.close()


async def _connected(port: int) -> tuple[asyncio.DatagramTransport, asyncio.Queue[bytes]]:
    got: asyncio.Queue[bytes] = asyncio.Queue()

    class Client(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: object) -> None:
            got.put_nowait(data)

    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Client, remote_addr=("127.0.0.1", port))
    return transport, got


class _Datagrams:
    """One source address."""

    def __init__(self, ends: tuple[asyncio.DatagramTransport, asyncio.Queue[bytes]]) -> None:
        self._transport, self._got = ends
        self._count = itertools.count()

    async def ask(self, data: bytes) -> bytes | None:
        """The echo of a datagram, or None where it was lost; each is numbered, so a late one is not taken for it."""
        number = next(self._count).to_bytes(4, "big")
        self._transport.sendto(number + data)
        while True:
            try:
                answer = await asyncio.wait_for(self._got.get(), 2)
            except asyncio.TimeoutError:
                return None
            if answer[:4] == number:
                return answer[4:]

    def close(self) -> None:
        self._transport.close()


def sample(cluster: Cluster, began: float) -> dict[str, Any]:
    """What every hop holds now."""
    hops = {}
    for name, process in cluster.hops().items():
        memory = process.memory_info().rss
        hops[name] = {"rss": memory, "descriptors": process.num_fds(), "threads": process.num_threads()}
    return {"seconds": round(time.monotonic() - began, 1), "hops": hops, "traffic": cluster.traffic()}


def judge(samples: list[dict[str, Any]]) -> list[str]:
    """What grew: the last quarter beside the first one after the warm-up, by their medians."""
    steady = samples[int(len(samples) * WARM_UP) :]
    quarter = max(1, len(steady) // 4)
    grown = []
    for hop in steady[0]["hops"]:
        for what, slack in (("rss", MEMORY_SLACK), ("descriptors", DESCRIPTOR_SLACK), ("threads", 4)):
            first, last = (
                statistics.median(held(s, hop, what) for s in part) for part in (steady[:quarter], steady[-quarter:])
            )
            if last > first + slack:
                grown.append(f"{what} of {hop}: {first:.0f} -> {last:.0f}")
    return grown


def held(sample: dict[str, Any], hop: str, what: str) -> int:
    """What a hop holds; of the tunnel client's descriptors, which each open stream has one of, those beyond that."""
    amount = int(sample["hops"][hop][what])
    return amount - int(sample["traffic"]["streams"]) if (hop, what) == ("tunnel client", "descriptors") else amount


async def settled(cluster: Cluster, before: dict[str, Any], began: float) -> tuple[dict[str, Any], list[str]]:
    """Wait until all is given back that the load had; what was not. UDP streams go by themselves when they are idle."""
    loop, deadline = asyncio.get_running_loop(), time.monotonic() + 120
    while True:
        after = await loop.run_in_executor(None, sample, cluster, began)
        left = [
            f"{hop['descriptors'] - before['hops'][name]['descriptors']} descriptors of {name} are left"
            for name, hop in after["hops"].items()
            if hop["descriptors"] > before["hops"][name]["descriptors"] + 2
        ]
        if after["traffic"]["streams"]:
            left.append(f"{after['traffic']['streams']} streams are left")
        if not left or time.monotonic() > deadline:
            return after, left
        await asyncio.sleep(2)


async def soak(kohakuriver: str, seconds: float, directory: Path) -> dict[str, Any]:
    """Run the load; all that was seen."""
    loop = asyncio.get_running_loop()
    cluster = Cluster(kohakuriver, directory)
    try:
        began = time.monotonic()
        before = sample(cluster, began)
        load = Load(cluster.ports)
        load.start()
        samples = []
        while time.monotonic() - began < seconds:
            await asyncio.sleep(SAMPLE_EVERY)
            samples.append(await loop.run_in_executor(None, sample, cluster, began))
        await load.stop()
        after, left = await settled(cluster, before, began)
        times = sorted(load.round_trips)
        return {
            "seconds": round(samples[-1]["seconds"]),
            "machine": f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}",
            "load": dict(load.counts),
            "request_ms": {p: round(1e3 * times[int(len(times) * int(p) / 1000)], 2) for p in ("500", "990", "999")},
            "failures": load.failures,
            "grown": judge(samples),
            "left": left,
            "before": before,
            "samples": samples,
            "after": after,
        }
    finally:
        cluster.close()


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kohakuriver", default="kohakuriver", help="the program")
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="a directory")
    arguments = parser.parse_args()
    program = str(Path(arguments.kohakuriver).absolute()) if "/" in arguments.kohakuriver else arguments.kohakuriver
    with tempfile.TemporaryDirectory(prefix="kohakuriver-soak-") as directory:
        seen = asyncio.run(soak(program, arguments.seconds, Path(directory)))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "soak.json").write_text(json.dumps(seen) + "\n")
    (arguments.output / "soak.svg").write_text(plot(seen))
    verdict = {key: seen[key] for key in ("seconds", "load", "request_ms", "failures", "grown", "left")}
    print(json.dumps(verdict, indent=1))
    return 1 if seen["failures"] or seen["grown"] or seen["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
