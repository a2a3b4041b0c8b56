"""How large a cluster two hosts on one PostgreSQL carry, and what each thousand of anything costs.

    python -m bench.size [--runners 50] [--tasks 2000] [--sessions 200] [--streams 500 1000 2000] [--seconds 10]

Two hosts, a PostgreSQL server and runners, as the programs that they are, on one machine. Most tasks are addresses,
which cost their node nothing; one of each runner is a process that sends 40 KB/s to each connection. Users, half of
them at each host, open sessions through it and streams in these. It is measured in steps: the hosts alone, with the
nodes and their heartbeats, with the tasks, with the sessions, and with each number of streams in turn, so that what a
step takes more is the cost of what it adds. Prints a table: processors' time in percent of one, memory, transactions a
second, and how much of what was sent arrived. Everything but the users counts as the cluster. As JSON with --json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

import kohakuriver
from kohakuriver.runtime import raise_file_limit, run

os.environ["KOHAKURIVER_TEST_FORKS"] = "0"  # before what starts programs: what they share would not count as theirs

from tests.support.postgres import Postgres, a_server
from tests.support.processes import eventually
from tests.support.services import port_in
from tests.support.two_hosts import NAMES, TwoHosts, two_hosts

RATE = 40_000
"""Bytes a second of each stream."""

EVERY = 0.2
"""Seconds between two messages of a stream."""

ELSEWHERE = "127.0.0.2"

SERVICE = f"""
import asyncio, socket, sys
PIECE, SLOTS = bytes(int({RATE} * {EVERY})), 20
slots = [set() for _ in range(SLOTS)]
class Sent(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
        self.slot = min(slots, key=len)
        self.slot.add(self)
    def connection_lost(self, _error):
        self.slot.discard(self)
async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Sent, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"port {{server.sockets[0].getsockname()[1]}}\\n")
    sys.stdout.flush()
    due = loop.time()
    while True:
        for slot in slots:
            for each in tuple(slot):
                if not each.transport.get_write_buffer_size():
                    each.transport.write(PIECE)
            due = max(due + {EVERY} / SLOTS, loop.time() - 1)
            await asyncio.sleep(due - loop.time())
asyncio.run(main())
"""


@dataclass
class Step:
    """What was measured while it was so: shares of one processor in percent, memory in MB, by kind of program."""

    name: str
    count: int
    processor: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    transactions: float = 0.0
    arrived: float | None = None

    @property
    def cluster(self) -> float:
        """Of all programs but the users'."""
        return sum(share for kind, share in self.processor.items() if kind != "users")


class Watch:
    """What the programs take. `kinds` gives the processes of each kind that there are."""

    def __init__(self, postgres: Postgres, kinds: Callable[[], dict[str, list[psutil.Process]]]) -> None:
        self._postgres, self._kinds = postgres, kinds

    async def step(self, name: str, count: int, seconds: float, arrived: Callable[[], int]) -> tuple[Step, int]:
        """Measure for so many seconds; how many bytes arrived meanwhile."""
        began, before, asked, had = time.monotonic(), self._seconds(), self._transactions(), arrived()
        await asyncio.sleep(seconds)
        took, bytes_then = time.monotonic() - began, arrived() - had
        step = Step(name, count, transactions=(self._transactions() - asked) / took)
        for kind, used in self._seconds().items():
            step.processor[kind] = 100 * max(0.0, used - before.get(kind, 0.0)) / took
            step.memory[kind] = sum(map(_private, self._kinds()[kind])) / 1e6
        return step, round(bytes_then / took)

    def _seconds(self) -> dict[str, float]:
        return {kind: sum(map(_processor, found)) for kind, found in self._kinds().items()}

    def _transactions(self) -> int:
        (row,) = self._postgres.ask("SELECT sum(xact_commit + xact_rollback) FROM pg_stat_database")
        return int(row[0])


def _processor(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _private(process: psutil.Process) -> float:
    """Its memory in bytes, with its part of what it shares."""
    with contextlib.suppress(psutil.Error):
        return float(process.memory_full_info().pss)
    return 0.0


def kinds_of(cluster: TwoHosts, postgres: Postgres) -> Callable[[], dict[str, list[psutil.Process]]]:
    """The processes of each kind. The tasks' own, which stand for users' programs, are left out."""

    def look() -> dict[str, list[psutil.Process]]:
        hosts = [psutil.Process(program.process.pid) for program in cluster.hosts.values()]
        runners = [psutil.Process(program.process.pid) for program in cluster.runners.values()]
        below = [child for runner in runners for child in runner.children(recursive=True)]
        server = psutil.Process(postgres.pid)
        return {
            "hosts": hosts,
            "PostgreSQL": [server, *server.children(recursive=True)],
            "runners": runners,
            "tunnel clients": [each for each in below if _is_client(each)],
            "users": [psutil.Process()],
        }

    return look


def _is_client(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name().startswith("tunnel-client")
    return False


class Users:
    """Sessions, and streams in them, all of this process. `bytes` is what has arrived."""

    def __init__(self) -> None:
        self.bytes = 0
        self.open = 0
        self._forwards: list[Any] = []
        self._stack = contextlib.AsyncExitStack()

    async def enter(self, cluster: TwoHosts, sessions: int) -> None:
        """Open so many sessions, in turn at each host, and to each of the tasks that send."""
        tasks, urls = list(cluster.ports.items()), [cluster.urls[name] for name in NAMES]
        for number in range(sessions):
            task, port = tasks[number // 2 % len(tasks)]
            opening = kohakuriver.forward(task, port, host=urls[number % 2], token=cluster.token, path="host")
            self._forwards.append(await self._stack.enter_async_context(opening))

    async def connect(self, streams: int) -> None:
        """Have so many streams open, evenly in all sessions."""
        loop, users = asyncio.get_running_loop(), self

        class Reading(asyncio.BufferedProtocol):
            buffer = bytearray(64 * 1024)

            def connection_lost(self, _error: Exception | None) -> None:
                users.open -= 1

            def get_buffer(self, _hint: int) -> bytearray:
                return self.buffer

            def buffer_updated(self, size: int) -> None:
                users.bytes += size

        while self.open < streams:
            port = self._forwards[self.open % len(self._forwards)].local_port
            self.open += 1
            transport, _ = await loop.create_connection(Reading, "127.0.0.1", port)
            self._stack.callback(transport.abort)

    async def leave(self) -> None:
        await self._stack.aclose()


@contextlib.contextmanager
def several(of: str) -> Iterator[ThreadPoolExecutor]:
    """Threads for many of something, and on stderr how long that took."""
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        yield pool
    print(f"{of}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def start_nodes(cluster: TwoHosts, runners: int) -> None:
    names = [f"node-{number}" for number in range(runners)]
    with several("started the runners") as pool:
        list(pool.map(lambda name: cluster.start_runner(name, "--backend=address", "--backend=process"), names))
    eventually(lambda: all(cluster.online(name, at) for name in names for at in ("a",)))


def make_tasks(cluster: TwoHosts, tasks: int) -> None:
    """One task on each node that sends, and addresses."""
    nodes = list(cluster.runners)
    service = [sys.executable, "-u", "-c", SERVICE]

    def sends(node: str) -> tuple[str, int]:
        order = {"backend": "process", "name": f"sends-{node}", "node": node, "command": service}
        made = cluster.http["a"].post("/api/tasks", json=order)
        assert made.status_code == 201, made.text
        return order["name"], eventually(lambda: port_in(_printed(cluster, str(order["name"]))))  # type: ignore[return-value]

    def adopt(number: int) -> None:
        order = {"address": ELSEWHERE, "node": nodes[number % len(nodes)], "name": f"address-{number}"}
        made = cluster.http[NAMES[number % 2]].post("/api/tasks/adopt", json=order)
        assert made.status_code == 201, made.text

    with several("made the tasks") as pool:
        cluster.ports.update(pool.map(sends, nodes))
        list(pool.map(adopt, range(tasks - len(nodes))))


def _printed(cluster: TwoHosts, task: str) -> str:
    lines = cluster.http["b"].get(f"/api/tasks/{task}/logs").text.splitlines()
    return "\n".join(str(json.loads(line).get("text")) for line in lines)


async def measure(cluster: TwoHosts, postgres: Postgres, wanted: argparse.Namespace) -> list[Step]:
    """All steps, one after the other."""
    watch, users = Watch(postgres, kinds_of(cluster, postgres)), Users()
    steps: list[Step] = []

    async def step(name: str, count: int) -> None:
        await asyncio.sleep(1)  # what the last one began should be over
        found, rate = await watch.step(name, count, wanted.seconds, lambda: users.bytes)
        if users.open:
            found.arrived = rate / (users.open * RATE)
        steps.append(found)

    try:
        await step("hosts", 2)
        await asyncio.to_thread(start_nodes, cluster, wanted.runners)
        await step("runners", wanted.runners)
        await asyncio.to_thread(make_tasks, cluster, wanted.tasks)
        await step("tasks", wanted.tasks)
        await users.enter(cluster, wanted.sessions)
        await step("sessions", wanted.sessions)
        for streams in wanted.streams:
            await users.connect(streams)
            await step("streams", streams)
        return steps
    finally:
        await users.leave()


def table(steps: Sequence[Step]) -> str:
    """The steps as rows in Markdown."""
    kinds = list(steps[-1].processor)
    head = ["step", *(f"{kind}, % and MB" for kind in kinds), "transactions/s", "arrived"]
    rows = [head, ["---"] * len(head)]
    for step in steps:
        taken = [f"{step.processor.get(kind, 0):.1f} {step.memory.get(kind, 0):.0f}" for kind in kinds]
        arrived = "" if step.arrived is None else f"{100 * step.arrived:.1f} %"
        rows.append([f"{step.count} {step.name}", *taken, f"{step.transactions:.1f}", arrived])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def per_thousand(steps: Sequence[Step]) -> str:
    """What each step takes more than that before it, for a thousand of what it adds."""
    lines = []
    for before, step in itertools.pairwise(steps):
        added = step.count - (before.count if before.name == step.name else 0)
        if added > 0:
            share, memory = step.cluster - before.cluster, _cluster_memory(step) - _cluster_memory(before)
            asked = step.transactions - before.transactions
            lines.append(
                f"1,000 {step.name}: {1000 * share / added:.1f} % of a processor, {1000 * memory / added:.0f} MB, "
                f"{1000 * asked / added:.1f} transactions/s"
            )
    return "\n".join(lines)


def _cluster_memory(step: Step) -> float:
    return sum(size for kind, size in step.memory.items() if kind != "users")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("runners", 50), ("tasks", 2000), ("sessions", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--streams", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    if wanted.tasks < wanted.runners:
        parser.error("each runner has a task that sends: --tasks must be as many as --runners, or more")
    raise_file_limit()
    with tempfile.TemporaryDirectory() as directory, a_server() as postgres:
        with two_hosts(Path(directory), postgres.new_database()) as cluster:
            steps = run(measure(cluster, postgres, wanted))
    print(json.dumps([asdict(step) for step in steps]) if wanted.json else f"{table(steps)}\n\n{per_thousand(steps)}")


if __name__ == "__main__":
    main()
