"""How one contender is measured once. Every function takes a started contender and returns plain numbers."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.contenders import HOPS, Contender
from bench.echo import BLOCK

ROUND_TRIPS = 1500
BLOCKS = 600


@dataclass(frozen=True)
class Measure:
    """What a number means: its unit, and whether a higher one is better."""

    unit: str
    higher_is_better: bool


MEASURES = {
    "bulk_up": Measure("Gbit/s", True),
    "bulk_down": Measure("Gbit/s", True),
    "bulk_8": Measure("Gbit/s", True),
    "fair_8": Measure("of mean", True),
    "cpu_per_gb": Measure("s/GB", False),
    "rtt_p50": Measure("µs", False),
    "rtt_p99": Measure("µs", False),
    "loaded_p50": Measure("µs", False),
    "loaded_p99": Measure("µs", False),
    "connect": Measure("1/s", True),
}
# What a chain costs as a whole; the rest says which hop it is that costs.
HEADLINES = tuple(MEASURES)
# The workloads whose cost is told hop by hop. Each request waits for the reply before it, so that however busy the
# machine is, every hop reads and writes each message once.
WAYS = {"rtt": "64 bytes there and back", "up": "32 KiB to the task", "down": "32 KiB from the task"}
MEASURES |= {f"{hop}_{way}": Measure("µs CPU", False) for way in WAYS for hop in HOPS}


def of_hops(way: str) -> tuple[str, ...]:
    return tuple(f"{hop}_{way}" for hop in HOPS)


# Measures that one run gives together.
RUNS: dict[str, tuple[str, ...]] = {
    "bulk_up": ("bulk_up",),
    "bulk_down": ("bulk_down", "cpu_per_gb"),
    "bulk_8": ("bulk_8", "fair_8"),
    "rtt": ("rtt_p50", "rtt_p99"),
    "loaded": ("loaded_p50", "loaded_p99"),
    "connect": ("connect",),
    **{f"hops_{way}": of_hops(way) for way in WAYS},
}

IPERF_OPTIONS = {"bulk_up": (), "bulk_down": ("-R",), "bulk_8": ("-R", "-P", "8")}


def run_once(run: str, contender: Contender, seconds: float) -> dict[str, float]:
    """One value for each measure of `run` (a key of RUNS); bulk runs last `seconds`."""
    if run in IPERF_OPTIONS:
        return bulk(run, contender, seconds)
    if run == "rtt":
        p50, p99 = round_trips(contender.echo, ROUND_TRIPS)
        return {"rtt_p50": p50, "rtt_p99": p99}
    if run.startswith("hops_"):
        return hop_costs(contender, run.removeprefix("hops_")) if contender.hops else {}
    if run == "loaded":
        p50, p99 = loaded_round_trips(contender, seconds)
        return {"loaded_p50": p50, "loaded_p99": p99}
    return {"connect": connects_per_second(contender.echo, 200)}


def processor_vendor() -> str:
    """Who made this machine's processor, as `AuthenticAMD`; empty where the kernel does not say."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def pin(pids: Sequence[int], cpus: set[int]) -> None:
    for pid in pids:
        for thread in list(Path(f"/proc/{pid}/task").iterdir()):
            with suppress(ProcessLookupError):  # a service's thread ends with its connection
                os.sched_setaffinity(int(thread.name), cpus)


@contextmanager
def on_one_cpu(pids: Sequence[int], cpu: int) -> Iterator[None]:
    """Keep these processes, and this one, on one processor.

    Who shares a processor, and its caches, with whom is chance otherwise, and lasts for a whole run.
    """
    before, everybody = os.sched_getaffinity(0), (os.getpid(), *pids)
    pin(everybody, {cpu})
    try:
        yield
    finally:
        pin(everybody, before)


def hop_costs(contender: Contender, way: str) -> dict[str, float]:
    """CPU time of each hop for one request and its reply of one of WAYS, in microseconds."""
    port, request, reply = {
        "rtt": (contender.echo, 64, 64),
        "up": (contender.take, BLOCK, 1),
        "down": (contender.give, 1, BLOCK),
    }[way]
    runs = []
    for cpu in sorted(os.sched_getaffinity(0)):
        with on_one_cpu((*contender.hops, contender.service), cpu):
            before = contender.hop_seconds()
            round_trips(port, BLOCKS, request=request, reply=reply)
            after = contender.hop_seconds()
        runs.append([now - then for then, now in zip(before, after, strict=True)])
    return {
        name: min(seconds) / BLOCKS * 1e6 for name, seconds in zip(of_hops(way), zip(*runs, strict=True), strict=True)
    }


def bulk(run: str, contender: Contender, seconds: float) -> dict[str, float]:
    cpu = contender.cpu_seconds()
    argv = ["iperf3", "-c", "127.0.0.1", "-p", str(contender.iperf), "-t", str(seconds), "-J", *IPERF_OPTIONS[run]]
    received = iperf(argv, contender)
    values = {run: received["bits_per_second"] / 1e9}
    if run == "bulk_8":
        values["fair_8"] = received["slowest"] / received["mean"]
    if run == "bulk_down":
        values["cpu_per_gb"] = (contender.cpu_seconds() - cpu) / (received["bytes"] / 1e9)
    return values


def iperf(argv: Sequence[str], contender: Contender) -> dict[str, float]:
    """What the receiver of one iperf3 run counted: `bytes`, `bits_per_second`; `slowest` and `mean` of its streams."""
    for _ in range(20):
        result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        report = json.loads(result.stdout or "{}")
        end = report.get("end") or {}
        received: dict[str, float] = end.get("sum_received") or {}
        if received.get("bytes"):
            each = [stream["receiver"]["bytes"] for stream in end["streams"]]
            return received | {"slowest": min(each), "mean": statistics.mean(each)}
        # With -J a failed run exits with 0 too. The usual reason is that the server is still ending the run before
        # this one and turned us away; it has no way to say when it has ended.
        time.sleep(0.2)
    raise RuntimeError(f"iperf3 through {contender.name} failed: {result.stdout[-500:]}{contender.log()}")


def receive(connection: socket.socket, count: int) -> None:
    while count:
        data = connection.recv(count)
        if not data:
            raise RuntimeError("the echo stream was closed")
        count -= len(data)


def round_trips(port: int, count: int, *, warm_up: int = 50, request: int = 64, reply: int = 64) -> tuple[float, float]:
    """Median and 99th percentile of a request and its reply (sizes in bytes), in microseconds."""
    data = b"x" * request
    times = []
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(count + warm_up):
            start = time.perf_counter()
            connection.sendall(data)
            receive(connection, reply)
            if number >= warm_up:
                times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def loaded_round_trips(contender: Contender, seconds: float) -> tuple[float, float]:
    """Round trips beside one saturated download of the same contender."""
    argv = ["iperf3", "-c", "127.0.0.1", "-p", str(contender.iperf), "-R", "-t", "60", "-i", "0.2", "--forceflush"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as load:
        try:
            assert load.stdout is not None
            for line in load.stdout:  # until a first interval was reported, the download has not begun
                if "bits/sec" in line:
                    break
            return round_trips(contender.echo, int(200 * seconds), warm_up=10)
        finally:
            load.terminate()


def connects_per_second(port: int, count: int) -> float:
    """Connect, one byte there and back, close: one after the other."""
    start = time.perf_counter()
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(b"x")
            receive(connection, 1)
    return count / (time.perf_counter() - start)
