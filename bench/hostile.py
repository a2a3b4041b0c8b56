"""Measure how late another user's echo is while one peer attacks host and runner.

    python -m bench.hostile [--only ATTACK…] [--output DIR]

For each attack of tests/support/peers/attackers.py: the echo's median, 99th percentile and maximum, from its start
until all that it sent has been worked off; the longest that a list of nodes took meanwhile, and how many of the lists
called the node offline; the most memory that host and runner had more of, and what they wrote to their disks.

Forward, hops, attacker and who measures are processes of their own; on a machine with few cores they take turns:
`overslept` is how many milliseconds late the measuring process woke up at most, for which no hop can be blamed. `none`
is the same measurement without an attack, and `busy` while a process that only counts takes a core as the attacker
would.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from functools import partial
from pathlib import Path

from tests.support.peers.attackers import EVERY_ATTACK, attacked, attackers_own, process_task
from tests.support.peers.wire import Target, raise_file_limit
from tests.support.processes import Cluster, Program, a_cluster
from tests.support.services import echo

QUIET_SECONDS = 5.0
PAUSE = 0.002
MESSAGE = bytes(64)
BOUND_MS = 100.0
HEADS = ("echoes", "p50 ms", "p99 ms", "max ms", "overslept", "API ms", "offline", "host MiB", "node MiB", "disk MiB")


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
    """A thread that lists the nodes again and again: the longest that took, and how often one was offline."""

    def __init__(self, cluster: Cluster) -> None:
        self.longest = 0.0
        self.offline = 0
        self._cluster = cluster
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ending.wait(0.2):
            start = time.perf_counter()
            _, nodes = self._cluster.call("GET", "/api/nodes")
            self.longest = max(self.longest, (time.perf_counter() - start) * 1e3)
            self.offline += any(node["status"] != "online" for node in nodes)

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


def measure(port: int, cluster: Cluster, attack: AbstractContextManager[None]) -> dict[str, float]:
    """Echo times and the longest request in milliseconds, and how many MiB host and runner had more at most."""
    programs = [cluster.host, cluster.runners["n1"]]
    for program in programs:
        Path(f"/proc/{program.pid}/clear_refs").write_text("5")  # forget the maximum
    before = [memory(program, "VmRSS") for program in programs]
    written = on_disk(cluster.directory)
    measured, asked = Measured(port), Asked(cluster)
    try:
        with attack:
            seen = len(measured.took)
            while len(measured.took) < seen + 100:
                time.sleep(0.05)
    finally:
        measured.end()
        asked.end()
    grown = [memory(program, "VmHWM") - at_first for program, at_first in zip(programs, before, strict=True)]
    took = sorted(measured.took)
    return {
        "echoes": len(took),
        "p50_ms": statistics.median(took),
        "p99_ms": took[int(len(took) * 0.99)],
        "max_ms": took[-1],
        "overslept_ms": measured.overslept,
        "api_max_ms": asked.longest,
        "offline": asked.offline,
        "host_mib": grown[0] / 2**20,
        "runner_mib": grown[1] / 2**20,
        "disk_mib": (on_disk(cluster.directory) - written) / 2**20,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    time.sleep(QUIET_SECONDS)
    yield


@contextlib.contextmanager
def busy() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(QUIET_SECONDS)
        yield
        process.kill()


@contextlib.contextmanager
def forwarded(cluster: Cluster) -> Iterator[int]:
    """A local port, of a `kohakuriver forward` that somebody else runs."""
    task, _, port = process_task(cluster, *echo())
    argv = [sys.executable, "-m", "kohakuriver", "forward", task, f"0:{port}", "--json"]
    environment = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "listening":
                yield event["local_port"]
                break
        process.terminate()


def attacks(target: Target, only: list[str]) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    named = {name: partial(attacked, name, target) for name in EVERY_ATTACK if not only or name in only}
    return {"none": quiet, "busy": busy, **named}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=EVERY_ATTACK, default=[])
    parser.add_argument("--output", type=Path, help="a directory for hostile.json")
    options = parser.parse_args()
    raise_file_limit()
    results: dict[str, dict[str, float]] = {}
    row = "{:<24}" + "{:>10}" * 10
    heads = (
        "echoes",
        "p50 ms",
        "p99 ms",
        "max ms",
        "overslept",
        "API max",
        "offline",
        "host MiB",
        "node MiB",
        "disk MiB",
    )
    print(row.format("attack", *heads))
    with tempfile.TemporaryDirectory(prefix="kohakuriver-hostile-") as directory, a_cluster(Path(directory)) as cluster:
        cluster.start_runner("n1", "--backend", "process")
        with attackers_own(cluster, "n1") as target, forwarded(cluster) as port:
            for name, attack in attacks(target, options.only).items():
                seen = results[name] = measure(port, cluster, attack())
                print(row.format(name, int(seen["echoes"]), *(f"{value:.1f}" for value in list(seen.values())[1:])))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "hostile.json").write_text(json.dumps(results, indent=1) + "\n")
    late = [name for name, seen in results.items() if name not in ("none", "busy") and seen["p99_ms"] > BOUND_MS]
    if late:
        print(f"over {BOUND_MS:g} ms for more than one echo in a hundred: {', '.join(late)}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
