"""How one contender is measured once. Every function takes a started contender and returns plain numbers."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.contenders import Contender

REQUEST = b"x" * 64


@dataclass(frozen=True)
class Measure:
    """What a number means: its unit, and whether a higher one is better."""

    unit: str
    higher_is_better: bool


MEASURES = {
    "bulk_up": Measure("Gbit/s", True),
    "bulk_down": Measure("Gbit/s", True),
    "bulk_8": Measure("Gbit/s", True),
    "cpu_per_gb": Measure("s/GB", False),
    "rtt_p50": Measure("µs", False),
    "rtt_p99": Measure("µs", False),
    "loaded_p50": Measure("µs", False),
    "loaded_p99": Measure("µs", False),
    "connect": Measure("1/s", True),
}

# Measures that one run gives together.
RUNS: dict[str, tuple[str, ...]] = {
    "bulk_up": ("bulk_up",),
    "bulk_down": ("bulk_down", "cpu_per_gb"),
    "bulk_8": ("bulk_8",),
    "rtt": ("rtt_p50", "rtt_p99"),
    "loaded": ("loaded_p50", "loaded_p99"),
    "connect": ("connect",),
}

IPERF_OPTIONS = {"bulk_up": (), "bulk_down": ("-R",), "bulk_8": ("-R", "-P", "8")}


def run_once(run: str, contender: Contender, seconds: float) -> dict[str, float]:
    """One value for each measure of `run` (a key of RUNS); bulk runs last `seconds`."""
    if run in IPERF_OPTIONS:
        return bulk(run, contender, seconds)
    if run == "rtt":
        p50, p99 = round_trips(contender.echo, 1500)
        return {"rtt_p50": p50, "rtt_p99": p99}
    if run == "loaded":
        p50, p99 = loaded_round_trips(contender, seconds)
        return {"loaded_p50": p50, "loaded_p99": p99}
    return {"connect": connects_per_second(contender.echo, 200)}


def bulk(run: str, contender: Contender, seconds: float) -> dict[str, float]:
    cpu = contender.cpu_seconds()
    argv = ["iperf3", "-c", "127.0.0.1", "-p", str(contender.iperf), "-t", str(seconds), "-J", *IPERF_OPTIONS[run]]
    received = iperf(argv, contender)
    values = {run: received["bits_per_second"] / 1e9}
    if run == "bulk_down":
        values["cpu_per_gb"] = (contender.cpu_seconds() - cpu) / (received["bytes"] / 1e9)
    return values


def iperf(argv: Sequence[str], contender: Contender) -> dict[str, float]:
    """What the receiver of one iperf3 run counted: `bytes` and `bits_per_second`."""
    for _ in range(20):
        result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        report = json.loads(result.stdout or "{}")
        if not result.returncode or report.get("start", {}).get("connected"):
            break
        # The server is still ending the run before this one and turned us away. It has no way to say when it has ended.
        time.sleep(0.2)
    received: dict[str, float] = (report.get("end") or {}).get("sum_received") or {}
    if not received.get("bytes"):
        raise RuntimeError(f"iperf3 through {contender.name} failed: {result.stdout[-500:]}{contender.log()}")
    return received


def receive(connection: socket.socket, count: int) -> None:
    while count:
        data = connection.recv(count)
        if not data:
            raise RuntimeError("the echo stream was closed")
        count -= len(data)


def round_trips(port: int, count: int, warm_up: int = 50) -> tuple[float, float]:
    """Median and 99th percentile of a 64-byte request and its reply, in microseconds."""
    times = []
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(count + warm_up):
            start = time.perf_counter()
            connection.sendall(REQUEST)
            receive(connection, len(REQUEST))
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
