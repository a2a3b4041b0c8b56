"""Two hosts on one PostgreSQL behind HAProxy, two runners, and streams that notice whatever happens to any of them.

    python -m bench.cluster [--minutes 10] [--streams 200] [--kills 5] [--away 60] [--rights 20] [--only rolling …]

All are programs of their own on this machine: Debian's PostgreSQL and HAProxy (as docs/guide/cluster.md configures it),
and containers on a Docker engine, in which Python runs from this machine's own files; root is needed. Streams go by
forwards to both nodes, half of them by the balancer and half by a list of both hosts. Each keeps several messages of
random bytes under way, and compares the sha256 of all that it sent and of all that came back. Beside them somebody asks
the API to read and to change something, on new connections and on one that is kept, opens connections in a forward, and
opens sessions. Then, one after the other:

- `rolling`: hosts and runners are ended by SIGTERM and started again, in turns, for so many minutes.
- `killed`: a host is killed (SIGKILL) under full load, so many times; how long until every stream goes on.
- `database`: PostgreSQL is stopped for so many seconds; what users are told meanwhile, and when all is well again.
- `rights`: a token, a share and a user end at one host, so many times each; how long until sessions at the other have.

Prints a JSON object a line for each event, then a table. Stalls are in seconds: the longest that a message took to come
back. Exits with 1 where a byte is lost or changed, a request fails that should not, or a bound is not held.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from kohakuriver.errors import UnavailableError
from kohakuriver.quotas import byte_count
from kohakuriver.runtime import raise_file_limit

os.environ["KOHAKURIVER_TEST_FORKS"] = "0"  # before what starts programs: they start as those of users do

from tests.support.docker_images import busybox_image
from tests.support.postgres import Postgres, a_server
from tests.support.processes import eventually
from tests.support.services import echo
from tests.support.two_hosts import NAMES, TwoHosts, balancer, two_hosts
from tests.support.up import connect, echoes

NODES = ("n1", "n2")
OUTSIDE = ("/bin/busybox", "chroot", "/host")
"""What leads from the container's image to this machine's programs."""
AHEAD = 4
"""Messages that a stream has under way at most."""
PATIENCE = 60.0
"""Seconds after which a stream or a request that stands still has ended, for its user."""
RESUMED, REVOKED = 3.0, 0.2
"""Seconds that all may stand still after a host was killed, and by which a right may end later at the other host."""
PHASES = ("rolling", "killed", "database", "rights")


def say(event: str, **more: Any) -> None:
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in more.items()}
    print(json.dumps({"event": event, **rounded}), flush=True)


class Stream:
    """Random messages to an echo and back. `worst` is the longest that one took; `since`, when the last one began."""

    def __init__(self, port: int, size: int) -> None:
        self._port, self._size = port, size
        self.sent = self.came = 0
        self.worst = 0.0
        self.since = 0.0
        self.wrong: str | None = None
        self._said, self._heard = hashlib.sha256(), hashlib.sha256()
        self._under_way: list[float] = []
        self._room = asyncio.Semaphore(AHEAD)

    async def run(self, load: Load) -> None:
        """Until the load is over; `wrong` says what was not as it should be."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            sending = asyncio.ensure_future(self._send(writer, load))
            try:
                await self._receive(reader)
                await sending
            finally:
                sending.cancel()
                writer.close()
            if (self.sent, self._said.digest()) != (self.came, self._heard.digest()):
                raise ValueError(f"{self.sent} bytes were sent, {self.came} came back, or others")
        except (OSError, ValueError) as error:
            self.wrong = f"{error!r} after {self.came} bytes"

    async def _send(self, writer: asyncio.StreamWriter, load: Load) -> None:
        while not load.over.is_set():
            await self._room.acquire()
            message = os.urandom(self._size)
            self._said.update(message)
            self.sent += self._size
            self._under_way.append(time.monotonic())
            writer.write(message)
            await writer.drain()
            await asyncio.sleep(load.every)
        writer.write_eof()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(1 << 16):
            before, self.came = self.came // self._size, self.came + len(data)
            self._heard.update(data)
            for _ in range(self.came // self._size - before):
                if not self._under_way:
                    raise ValueError("more came back than was sent")
                self.since = self._under_way.pop(0)
                self.worst = max(self.worst, time.monotonic() - self.since)
                self._room.release()

    def waits(self) -> float:
        """For how long the oldest message is under way."""
        return time.monotonic() - self._under_way[0] if self._under_way else 0.0


class Load:
    """All streams, and `every` how many seconds each sends a message."""

    def __init__(self, ports: Sequence[int], streams: int, size: int, every: float) -> None:
        self.every = every
        self.over = asyncio.Event()
        self.streams = [Stream(ports[number % len(ports)], size) for number in range(streams)]
        self._running = [asyncio.ensure_future(stream.run(self)) for stream in self.streams]

    @property
    def lost(self) -> int:
        """Bytes that have not come back of streams that are over, or all of those that came back changed."""
        return sum(max(each.sent - each.came, 1) for each in self.streams if each.wrong)

    @property
    def moved(self) -> int:
        """Bytes that came back."""
        return sum(each.came for each in self.streams)

    def begin(self) -> None:
        """From now on it is looked at how long messages take."""
        for each in self.streams:
            each.worst = 0.0

    def worst(self) -> float:
        return max(max(each.worst, each.waits()) for each in self.streams)

    async def go_on(self) -> float:
        """Wait until a message of every stream that began from now on has come back; how many seconds that took."""
        began = time.monotonic()
        while any(each.since < began and not each.wrong for each in self.streams):
            if time.monotonic() - began > PATIENCE:
                for each in self.streams:
                    each.wrong = each.wrong or (None if each.since >= began else "stands still")
            await asyncio.sleep(0.005)
        return time.monotonic() - began

    async def end(self) -> None:
        self.over.set()
        await asyncio.wait(self._running, timeout=PATIENCE)
        for running, stream in zip(self._running, self.streams, strict=True):
            if running.cancel():
                stream.wrong = stream.wrong or "does not end"


class Asking(threading.Thread):
    """Something that is done again and again, until the end. `failed` are those times that it went wrong."""

    def __init__(self, name: str, ask: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._ask = ask
        self.asked = 0
        self.slowest = 0.0
        self.failed: list[str] = []
        self.wanted = threading.Event()
        self.wanted.set()
        self._over = False
        self._busy = threading.Lock()
        self.start()

    def run(self) -> None:
        while not self._over:
            self.wanted.wait()
            with self._busy:
                began = time.monotonic()
                try:
                    self._ask()
                except Exception as error:
                    self.failed.append(f"{type(error).__name__}: {error}")
                    say("failed", request=self.name, why=self.failed[-1])
                self.asked += 1
                self.slowest = max(self.slowest, time.monotonic() - began)
            time.sleep(0.05)

    def pause(self) -> None:
        """Ask no more until `wanted` is set again; what is being asked is waited for."""
        self.wanted.clear()
        with self._busy:
            pass

    def begin(self) -> None:
        """From now on it is asked again, and counted anew."""
        self.asked, self.slowest, self.failed = 0, 0.0, []
        self.wanted.set()

    def end(self) -> None:
        self._over = True
        self.wanted.set()
        self.join()


@dataclass
class Bench:
    """The cluster, what is on it, and what was found: `faults` is whatever should not be."""

    hosts: TwoHosts
    postgres: Postgres
    load: Load
    asking: list[Asking]
    wanted: argparse.Namespace
    rows: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def row(self, what: str, found: str, *, holds: bool = True) -> None:
        self.rows.append((what, found))
        if not holds:
            self.faults.append(f"{what}: {found}")

    @property
    def failed(self) -> int:
        return sum(len(each.failed) for each in self.asking)

    def well(self, of: str) -> None:
        """Rows of what has to be well at all times: bytes, and requests."""
        self.row(f"bytes lost or changed by {of}", str(self.load.lost), holds=self.load.lost == 0)
        for each in filter(lambda each: each.asked, self.asking):
            told = f"{len(each.failed)} of {each.asked}, slowest {each.slowest:.2f} s"
            self.row(f"failed by {of}: {each.name}", told, holds=not each.failed)


def start(hosts: TwoHosts) -> None:
    """Both runners, and on each a task that echoes and outlives them."""
    for node in NODES:
        hosts.start_runner(node, "--backend=docker")
        eventually(partial(hosts.online, node))
        more = {"node": node, "backend": "docker", "image": busybox_image(), "mounts": ["/:/host"]}
        hosts.ports[node] = hosts.echo_task(f"on-{node}", **more, command=[*OUTSIDE, *echo()])


def forwards(hosts: TwoHosts, ways: Sequence[str], path: str) -> list[int]:
    """The local ports of a forward to each node by each way: a host's URL, or several."""
    ports = []
    for way in ways:
        for node in NODES:
            words = ("forward", f"on-{node}", f"0:{hosts.ports[node]}", "--json", f"--path={path}")
            ports.append(hosts.start(*words, KOHAKURIVER_HOST=way).listening())
    return ports


def ask_all(hosts: TwoHosts, url: str, ports: Sequence[int]) -> list[Asking]:
    """Whoever asks the API, and opens connections and sessions, until they are ended."""
    headers = {"Authorization": f"Bearer {hosts.token}"}
    kept = hosts.client(url)
    both, turn = (url, ",".join(hosts.urls.values())), iter(range(1 << 60))

    def read() -> None:
        httpx.get(f"{url}/api/tasks", headers=headers, trust_env=False, timeout=PATIENCE).raise_for_status()

    def kept_read() -> None:
        kept.get("/api/nodes").raise_for_status()

    def change() -> None:
        made = kept.post("/api/tokens", json={"name": f"bench-{next(turn)}"}).raise_for_status().json()
        kept.delete(f"/api/tokens/{made['id']}").raise_for_status()

    def connection() -> None:
        with connect(ports[next(turn) % len(ports)]) as opened:
            assert echoes(opened, os.urandom(4096)), "other bytes came back"

    def session() -> None:
        number = next(turn)
        node = NODES[number // 2 % 2]
        with hosts.forward(f"on-{node}", hosts.ports[node], host=both[number % 2]) as forward:
            with connect(forward.local_port) as opened:
                assert echoes(opened, os.urandom(4096)), "other bytes came back"

    return [
        Asking("to read, on a new connection", read),
        Asking("to read, on a kept connection", kept_read),
        Asking("to change, on a kept connection", change),
        Asking("a connection in a forward", connection),
        Asking("a session", session),
    ]


async def rolling(bench: Bench) -> None:
    """Everything is restarted in turns."""
    hosts, load, began = bench.hosts, bench.load, time.monotonic()
    stalls: dict[str, list[float]] = {"host": [], "runner": []}
    turns = [("host", name) for name in NAMES] + [("runner", name) for name in NODES]
    while time.monotonic() - began < 60 * bench.wanted.minutes:
        for kind, name in turns:
            load.begin()
            restart = hosts.restart_host if kind == "host" else hosts.restart_runner
            at = time.monotonic()
            await asyncio.to_thread(restart, name)
            took = time.monotonic() - at
            await load.go_on()
            stalls[kind].append(load.worst())
            say("restarted", what=f"{kind} {name}", took=took, stall=stalls[kind][-1], failed=bench.failed)
    bench.row("restarts, one after the other", f"{sum(map(len, stalls.values()))} in {time.monotonic() - began:.0f} s")
    for kind, seconds in stalls.items():
        bench.row(f"longest stall while a {kind} is restarted", spread(seconds))
    bench.well("all of it")


async def killed(bench: Bench) -> None:
    """Hosts are killed in turn, while streams send as much as they can."""
    hosts, load, took, stalls = bench.hosts, bench.load, list[float](), list[float]()
    for each in bench.asking:
        await asyncio.to_thread(each.pause)  # what a host does that is killed may be lost
    usual, load.every = load.every, 0.0
    for number in range(bench.wanted.kills):
        name, before, at = NAMES[number % 2], load.moved, time.monotonic()
        await asyncio.sleep(3)
        rate = (load.moved - before) / (time.monotonic() - at) / 1e6
        load.begin()
        hosts.hosts[name].process.send_signal(signal.SIGKILL)
        took.append(await load.go_on())
        stalls.append(load.worst())
        say("killed", host=name, all_go_on=took[-1], stall=stalls[-1], megabytes_a_second=rate)
        await asyncio.to_thread(hosts.restart_host, name)
        await load.go_on()
    load.every = usual
    bench.row("from the kill of a host until all streams go on", spread(took), holds=max(took) <= RESUMED)
    bench.row("longest stall of a stream then", spread(stalls))
    bench.well("kills")


async def database(bench: Bench) -> None:
    """PostgreSQL is stopped for a while."""
    hosts, load, seconds = bench.hosts, bench.load, bench.wanted.away
    for each in bench.asking:
        await asyncio.to_thread(each.pause)
    node = NODES[0]
    commands = (("vps", "list"), ("forward", f"on-{node}", f"0:{hosts.ports[node]}", "--path=host", "--", "true"))
    load.begin()
    bench.postgres.end()
    until, told = time.monotonic() + seconds, set[tuple[int, str]]()
    while time.monotonic() < until:
        for words in commands:
            at = time.monotonic()
            done = await asyncio.to_thread(hosts.run, *words)
            said = done.stderr.partition(" (request ")[0].strip()
            if (done.returncode, said) not in told:
                say("told", command=words[0], code=done.returncode, said=said, took=time.monotonic() - at)
            told.add((done.returncode, said))
        await asyncio.sleep(1)
    worst = load.worst()
    bench.postgres.start()
    at = time.monotonic()
    for words in commands:
        await asyncio.to_thread(eventually, lambda words=words: hosts.run(*words).returncode == 0)
    await asyncio.to_thread(eventually, lambda: all(hosts.online(node, name) for node in NODES for name in NAMES))
    bench.row(f"longest stall of a stream while the database is away for {seconds:.0f} s", f"{worst:.2f} s")
    bench.row("what users are told then", "; ".join(f"{said} ({code})" for code, said in sorted(told)),
              holds=len(told) == 1 and {code for code, _ in told} == {7})  # fmt: skip
    bench.row("from its start until commands and nodes are well again", f"{time.monotonic() - at:.1f} s")
    bench.well("the database away")


def one_right(hosts: TwoHosts, kind: str, name: str) -> tuple[float, float]:
    """A right of a new user ends at host `a`: seconds until sessions at `a` and at `b` end, from the request on."""
    admin, task, token = hosts.http["a"], f"/api/tasks/on-{NODES[0]}", hosts.new_user(name)
    admin.post(f"{task}/shares", json={"user": name}).raise_for_status()
    (own,) = admin.get(f"/api/tokens?user={name}").json()
    ends = {"token": f"/api/tokens/{own['id']}", "share": f"{task}/shares/{name}", "user": f"/api/users/{name}"}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        opened = []
        for at in NAMES:
            forward = hosts.forward(f"on-{NODES[0]}", hosts.ports[NODES[0]], host=hosts.urls[at], token=token)
            opened.append(stack.enter_context(connect(stack.enter_context(forward).local_port)))
            assert echoes(opened[-1])
        began = time.monotonic()
        asked = threads.submit(admin.delete, ends[kind])
        told, other = threads.map(partial(ended_after, began=began), opened)
        asked.result().raise_for_status()
    return told, other


def ended_after(connection: socket.socket, began: float) -> float:
    """How many seconds after a moment a connection has ended, however it does."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return time.monotonic() - began


async def rights(bench: Bench) -> None:
    """Rights end, with nothing else going on but the streams; then the sessions of one user are counted."""
    for each in bench.asking:
        await asyncio.to_thread(each.pause)
    for kind in ("token", "share", "user"):
        took = []
        for number in range(bench.wanted.rights):
            took.append(await asyncio.to_thread(one_right, bench.hosts, kind, f"{kind}-{number}"))
            say("ended", right=kind, at_the_host_told=took[-1][0], at_the_other=took[-1][1])
        told, other, later = zip(*((at, there, there - at) for at, there in took), strict=True)
        bench.row(f"from the request that ends a {kind} until its sessions at the other host end", spread(other))
        bench.row("  until those at the host that was told do", spread(told))
        bench.row("  how much later the other host is", spread(later), holds=max(later) <= REVOKED)
    bench.row(
        "a user's third session, of two that the limit lets in", await asyncio.to_thread(third_session, bench.hosts)
    )


def third_session(hosts: TwoHosts) -> str:
    """What a user is told who has a session at each host, and may have two."""
    token, task, port = hosts.new_user("two", sessions=2), f"on-{NODES[0]}", hosts.ports[NODES[0]]
    hosts.http["a"].post(f"/api/tasks/{task}/shares", json={"user": "two"}).raise_for_status()

    def refused(url: str) -> str:
        try:
            with hosts.forward(task, port, host=url, token=token):
                return "was let in"
        except UnavailableError as error:
            return str(error).partition(" (request ")[0]

    with hosts.forward(task, port, host=hosts.urls["a"], token=token):
        with hosts.forward(task, port, host=hosts.urls["b"], token=token):
            return " / ".join(sorted({refused(url) for url in hosts.urls.values()}))


def spread(seconds: Sequence[float]) -> str:
    return f"median {statistics.median(seconds):.3f} s, longest {max(seconds):.3f} s, of {len(seconds)}"


@contextlib.contextmanager
def cluster() -> Iterator[tuple[TwoHosts, Postgres, str]]:
    """All programs, with their tasks, and the balancer's URL."""
    with tempfile.TemporaryDirectory() as directory, a_server() as postgres:
        drains = ("--drain=20", "--drain-notice=1")
        with two_hosts(Path(directory), postgres.new_database(), *drains) as hosts:
            try:
                start(hosts)
                with balancer(hosts) as url:
                    yield hosts, postgres, url
            finally:
                for node in NODES:
                    hosts.http["a"].delete(f"/api/tasks/on-{node}")


async def measure(wanted: argparse.Namespace, hosts: TwoHosts, postgres: Postgres, url: str) -> Bench:
    ports = await asyncio.to_thread(forwards, hosts, (url, ",".join(hosts.urls.values())), wanted.path)
    load = Load(ports, wanted.streams, wanted.size, wanted.every)
    asking = ask_all(hosts, url, ports)
    bench = Bench(hosts, postgres, load, asking, wanted)
    phases = {"rolling": rolling, "killed": killed, "database": database, "rights": rights}
    try:
        await load.go_on()
        for name in wanted.only:
            for each in asking:
                await asyncio.to_thread(each.pause)
                each.begin()
            say("begins", what=name)
            await phases[name](bench)
    finally:
        for each in asking:
            await asyncio.to_thread(each.end)
        await load.end()
    wrong = [f"{each.wrong}" for each in load.streams if each.wrong]
    sums = f"{len(load.streams) - len(wrong)} of {len(load.streams)}, {load.moved / 1e9:.2f} GB each way"
    bench.row("streams whose bytes and sha256 are the same at both ends", sums, holds=not wrong)
    for why in sorted(set(wrong))[:5]:
        say("wrong", stream=why)
    return bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--size", type=byte_count, default=4096, help="of a message")
    parser.add_argument("--every", type=float, default=0.1, help="seconds between two messages of a stream")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--away", type=float, default=60.0, help="seconds for which there is no database")
    parser.add_argument("--rights", type=int, default=20)
    parser.add_argument("--path", default="host", help="which way the streams' forwards go: host, auto")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=PHASES)
    wanted = parser.parse_args()
    raise_file_limit()
    with cluster() as (hosts, postgres, url):
        bench = asyncio.run(measure(wanted, hosts, postgres, url))
    for what, found in bench.rows:
        print(f"{what}: {found}")
    for fault in bench.faults:
        print(f"WRONG {fault}")
    return 1 if bench.faults else 0


if __name__ == "__main__":
    sys.exit(main())
