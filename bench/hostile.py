"""Measure how late another user's echo is while one peer attacks host and runner.

    python -m bench.hostile [--only ATTACK…] [--docker] [--output DIR]

For each attack of tests/support/peers/attack.py: the echo's median, 99th percentile and maximum, from its start
until all that it sent has been worked off, with what the attacker did as it counted itself (an attack that did not
happen fails the measurement); the longest that a list of nodes took meanwhile, how many of the lists
called the node offline, and for how long it had not been heard of at most (its heartbeats come every 5 s, and the list
tells whole seconds: on time is less than 6); the most memory that host and runner had more of, and what they wrote to
their disks.

Forward, hops, attacker and who measures are processes of their own; on a machine with few cores they take turns:
What is over its bound is marked by an asterisk: the echo's on a machine that does nothing else, the others on any.
`overslept` is how many milliseconds late the measuring process woke up at most, for which no hop can be blamed. `none`
is the same measurement without an attack, and `busy` while a process that only counts takes a core as the attacker
would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tests.support.docker_images import busybox_image
from tests.support.peers.attack import EVERY_ATTACK
from tests.support.peers.attackers import attacked, attackers_own, process_task
from tests.support.peers.wire import Counts, Target, raise_file_limit
from tests.support.processes import Cluster, Program, a_cluster
from tests.support.services import echo

QUIET_SECONDS = 5.0
PAUSE = 0.002
MESSAGE = bytes(64)
HEADS = {
    "echoes": "echoes",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "max_ms": "max ms",
    "overslept_ms": "overslept",
    "api_max_ms": "API max",
    "offline": "offline",
    "silent_s": "silent s",
    "host_mib": "host MiB",
    "runner_mib": "node MiB",
    "disk_mib": "disk MiB",
}
BOUNDS = {
    "p99_ms": 20.0,
    "max_ms": 100.0,
    "offline": 0.0,
    "silent_s": 7.0,
    "host_mib": 160.0,
    "runner_mib": 192.0,
    "disk_mib": 32.0,
}
"""What no attack may go beyond: a runner holds 128 MiB for a user and a host 64 MiB of bodies, besides its own work.

A heartbeat may be a second late.
"""
OTHER_BOUNDS = {("printing_tasks", "disk_mib"): 64.0}
"""What a user's tasks print may come to 16 MiB at once and 4 MiB a second."""


class Measured:
    """A thread that asks and waits for the answer, with a pause in between; `took` has the milliseconds of each."""

    def __init__(self, port: int) -> None:
        self.took: list[float] = []
        self.overslept = 0.0  # ms that this process itself was late at most, when it wanted to wake up
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._run, self._sleep)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._ending.wait(PAUSE):
            start = time.perf_counter()
            self._sock.sendall(MESSAGE)
            left = len(MESSAGE)
            while left:
                left -= len(self._sock.recv(left)) or sys.exit("the echo was closed")
            self.took.append((time.perf_counter() - start) * 1e3)

    def _sleep(self) -> None:
        start = time.perf_counter()
        while not self._ending.wait(PAUSE):
            now = time.perf_counter()
            self.overslept = max(self.overslept, (now - start - PAUSE) * 1e3)
            start = now

    def end(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        self._sock.close()


class Asked:
    """A thread that lists the nodes again and again.

    `longest`: the milliseconds that this took at most. `offline`: how often one was. `silent`: the seconds for which
    one had not been heard of at most.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.longest = 0.0
        self.offline = 0
        self.silent = 0.0
        self._cluster = cluster
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(0.2):
            start = time.perf_counter()
            nodes = self._nodes()
            self.longest = max(self.longest, (time.perf_counter() - start) * 1e3)
            self.offline += any(node["status"] != "online" for node in nodes)
            ages = [time.time() - datetime.fromisoformat(node["last_seen"]).timestamp() for node in nodes]
            self.silent = max(self.silent, *ages)

    def _nodes(self) -> list[dict[str, Any]]:
        """The list, by a second request where the first one's connection had to go for others: that takes its time."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                found: list[dict[str, Any]] = self._cluster.call("GET", "/api/nodes")[1]
                return found

    def end(self) -> None:
        self._ending.set()
        self._thread.join()


def on_disk(directory: Path) -> int:
    """Bytes of all files below it."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def memory(program: Program, field: str) -> int:
    """Bytes of resident memory: now (`VmRSS`) or at most (`VmHWM`)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{program.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(port: int, cluster: Cluster, attack: AbstractContextManager[Counts]) -> tuple[dict[str, float], Counts]:
    """Echo times and the longest request in milliseconds, and how many MiB host and runner had more at most.

    And what the attacker did.
    """
    programs = [cluster.host, cluster.runners["n1"]]
    for program in programs:
        Path(f"/proc/{program.pid}/clear_refs").write_text("5")  # forget the maximum
    before = [memory(program, "VmRSS") for program in programs]
    written = on_disk(cluster.directory)
    measured, asked = Measured(port), Asked(cluster)
    try:
        with attack as did:
            seen = len(measured.took)
            while len(measured.took) < seen + 100:
                time.sleep(0.05)
            on_disk_then = on_disk(cluster.directory)
    finally:
        measured.end()
        asked.end()
    grown = [memory(program, "VmHWM") - at_first for program, at_first in zip(programs, before, strict=True)]
    took = sorted(measured.took)
    seen_all = {
        "echoes": len(took),
        "p50_ms": statistics.median(took),
        "p99_ms": took[int(len(took) * 0.99)],
        "max_ms": took[-1],
        "overslept_ms": measured.overslept,
        "api_max_ms": asked.longest,
        "offline": asked.offline,
        "silent_s": asked.silent,
        "host_mib": grown[0] / 2**20,
        "runner_mib": grown[1] / 2**20,
        "disk_mib": (max(on_disk_then, on_disk(cluster.directory)) - written) / 2**20,
    }
    return seen_all, did


@contextlib.contextmanager
def quiet() -> Iterator[Counts]:
    time.sleep(QUIET_SECONDS)
    yield {}


@contextlib.contextmanager
def busy() -> Iterator[Counts]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            time.sleep(QUIET_SECONDS)
            yield {}
        finally:
            process.kill()


@contextlib.contextmanager
def forwarded(cluster: Cluster) -> Iterator[int]:
    """A local port, of a `kohakuriver forward` that somebody else runs."""
    task, _, port = process_task(cluster, *echo())
    argv = [sys.executable, "-m", "kohakuriver", "forward", task, f"0:{port}", "--path", "host", "--json"]
    environment = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "listening":
                    yield event["local_port"]
                    break
        finally:
            process.terminate()


def attacks(target: Target, only: list[str]) -> dict[str, Callable[[], AbstractContextManager[Counts]]]:
    named = {name: partial(attacked, name, target) for name in EVERY_ATTACK if not only or name in only}
    return {"none": quiet, "busy": busy, **named}


ROW = "{:<24}" + "{:>10}" * len(HEADS)


def bound(attack: str, head: str) -> float:
    """What is too much of that."""
    return OTHER_BOUNDS.get((attack, head), BOUNDS.get(head, math.inf))


def beyond(attack: str, seen: dict[str, float]) -> list[str]:
    """What of it is over its bound."""
    return [head for head in BOUNDS if seen[head] > bound(attack, head)]


def shown(attack: str, head: str, value: float) -> str:
    """A number of the table, with a mark where it is over its bound."""
    text = f"{value:.0f}" if head in ("echoes", "offline") else f"{value:.1f}"
    return f"{text}*" if value > bound(attack, head) else text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=EVERY_ATTACK, default=[])
    parser.add_argument("--docker", action="store_true", help="terminals are in containers, of the engine that is here")
    parser.add_argument("--output", type=Path, help="a directory for hostile.json")
    options = parser.parse_args()
    raise_file_limit()
    results: dict[str, dict[str, float]] = {}
    print(ROW.format("attack", *HEADS.values()))
    print(ROW.format("bound", *(f"{BOUNDS[name]:g}" if name in BOUNDS else "" for name in HEADS)))
    with tempfile.TemporaryDirectory(prefix="kohakuriver-hostile-") as directory, a_cluster(Path(directory)) as cluster:
        os.environ["HOME"] = directory  # what a user's start files do costs as much as a shell, and is none of ours
        backends = ["process", *(["docker"] if options.docker else [])]
        cluster.start_runner("n1", "--user-processes", *(f"--backend={each}" for each in backends))
        image = busybox_image() if options.docker else ""
        with attackers_own(cluster, "n1", image) as target, forwarded(cluster) as port:
            for name, attack in attacks(target, options.only).items():
                results[name], did = measure(port, cluster, attack())
                done = ", ".join(f"{what} {count:,}" for what, count in did.items())
                print(ROW.format(name, *(shown(name, head, results[name][head]) for head in HEADS)), done, flush=True)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "hostile.json").write_text(json.dumps(results, indent=1) + "\n")
    over = {name: beyond(name, seen) for name, seen in results.items() if name not in ("none", "busy")}
    over = {name: heads for name, heads in over.items() if heads}
    for name, heads in over.items():
        print(f"{name} goes beyond the bound: {', '.join(HEADS[head] for head in heads)}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
