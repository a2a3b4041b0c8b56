"""Readers that stop, one that goes on, and what others on the same forward and container notice of it.

    python -m bench.stalled --kohakuriver .venv/bin/kohakuriver [--readers 20] [--seconds 600]

The service sends numbers without end. Of the connections through one forward all but one stop reading; the last one
reads on at some 50 MB/s. Beside them, an echo of 64 bytes a hundred times a second, on the same forward and on another
user's. Prints one JSON object a line: what the echoes took, and the resident memory of each hop, every minute; at the
end, how many of those that stopped went on where they were. Exits with 1 if one did not, if an echo took 50 ms or more
at the 99th percentile, or if a hop grew by more than the windows.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import struct
import sys
import threading
import time

from bench.endurance import BLOCK, Forward, report, started

ECHOES = 400
BOUND_MS = 50.0
WINDOWS = 64 << 10  # KiB: the budget of a session
PIECE = 512 << 10
RATE = 50e6
EVERY = 60.0
NUMBERS = BLOCK // 8


def echo(forward: Forward, port: int) -> dict[str, float]:
    """Milliseconds of a request and its reply, as percentiles."""
    took = []
    with forward.connect("echo", port) as sock, sock.makefile("rb") as stream:
        for _ in range(ECHOES):
            began = time.perf_counter()
            sock.sendall(bytes(64))
            if stream.read(64) != bytes(64):
                raise SystemExit("an echo came back wrong")
            took.append((time.perf_counter() - began) * 1e3)
            time.sleep(max(0.0, 0.01 - (time.perf_counter() - began)))
    took.sort()
    return {
        "p50": round(statistics.median(took), 3),
        "p99": round(took[int(len(took) * 0.99)], 3),
        "max": round(took[-1], 3),
    }


def read_on(sock: socket.socket, stop: threading.Event) -> None:
    """Read at a rate that leaves the processors something for others."""
    while not stop.is_set():
        got = len(sock.recv(PIECE))
        stop.wait(got / RATE)


def goes_on(sock: socket.socket, first: bytes, size: int) -> bool:
    """Read `size` bytes more: whether the numbers go on where they stopped."""
    sock.settimeout(30)
    data = bytearray(first)
    try:
        while len(data) < size:
            data += sock.recv(PIECE)
    except TimeoutError:
        return False
    count = len(data) // 8
    return struct.unpack(f">{count}Q", data[: 8 * count]) == tuple(number % NUMBERS for number in range(count))


def watch(forward: Forward, other: int, seconds: float) -> float:
    """Echo now and then for so long; the worst 99th percentile."""
    worst, end = 0.0, time.monotonic() + seconds
    while True:
        took = {"same forward": echo(forward, forward.port), "other user": echo(forward, other)}
        worst = max(worst, *(each["p99"] for each in took.values()))
        memory = {name: hop["rss_kib"] // 1024 for name, hop in forward.state().items()}
        report("echo beside stalled readers, ms", **took, resident_mib=memory)
        left = end - time.monotonic()
        if left <= 0:
            return worst
        time.sleep(min(EVERY, left))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohakuriver", required=True)
    parser.add_argument("--readers", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    with started(arguments.kohakuriver) as forward, contextlib.ExitStack() as stack:
        _, other = forward.another_user()
        before = forward.state()
        stalled = [stack.enter_context(forward.connect("count")) for _ in range(arguments.readers)]
        first = [sock.recv(8) for sock in stalled]
        stop = threading.Event()
        reader = threading.Thread(target=read_on, args=(stack.enter_context(forward.connect("count")), stop))
        reader.start()
        try:
            worst = watch(forward, other, arguments.seconds)
            after = forward.state()
        finally:
            stop.set()
            reader.join()
        went_on = sum(goes_on(sock, begun, 8 << 20) for sock, begun in zip(stalled, first, strict=True))
    grown = {name: after[name]["rss_kib"] - before[name]["rss_kib"] for name in before}
    report("stalled readers", went_on=went_on, of=len(stalled), worst_p99_ms=worst, grown_kib=grown)
    return 0 if went_on == len(stalled) and worst < BOUND_MS and max(grown.values()) < WINDOWS else 1


if __name__ == "__main__":
    sys.exit(main())
