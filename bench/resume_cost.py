"""What it costs that connections outlive their links: a forward that keeps them beside one with `--no-resume`.

    python -m bench.resume_cost --kohakuriver .venv/bin/kohakuriver [--rounds 9] [--megabytes 512] [--streams 1000]

Both lead over the same host, runner and tunnel client to the same services, and are measured in turns. A figure is the
median of all rounds, a ratio the median of the ratios of two runs that stood side by side. Memory is that of two chains
which have done nothing else, since a process does not give back what it had. Linux only: it is read from /proc.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.chain import OURS, Results, write_json
from bench.contenders import Contender, KohakuRiver, Services, own_cpu_seconds, ports_of
from bench.limits import resident_kib, started, streams
from bench.measures import connects_per_second, round_trips

OFF = "--no-resume"
BOUNDS = {"cpu_up": 1.05, "cpu_down": 1.05, "rtt_p50": 1.03, "connects": 0.9}  # what it may cost
UNITS = {
    "cpu_up": "CPU s/GB",
    "cpu_down": "CPU s/GB",
    "forward_up": "CPU s/GB",
    "forward_down": "CPU s/GB",
    "rtt_p50": "µs",
    "connects": "1/s",
}
PIECE = bytes(1 << 20)
ROUND_TRIPS = 1500
CONNECTS = 300
AT_REST = 30.0  # seconds
IDLE = 0.005  # seconds of processor time, of each second


class Bulk(Contender):
    """The service that takes and gives bytes as fast as it can."""

    name = title = "bulk"

    def start(self, services: Services) -> None:
        [self.port] = ports_of(self.spawn(sys.executable, "-m", "bench.bulk", piped=True))


@dataclass
class Way:
    """One of the two forwards: its ports, and its process and those behind it."""

    name: str
    echo: int
    bulk: int
    hops: list[int]

    def measured(self, size: int) -> dict[str, float]:
        """One round."""
        values = {}
        for direction, move in (("up", up), ("down", down)):
            before = [own_cpu_seconds(pid) for pid in self.hops]
            move(self.bulk, size)
            spent = [own_cpu_seconds(pid) - then for pid, then in zip(self.hops, before, strict=True)]
            values[f"cpu_{direction}"] = sum(spent) / (size / 1e9)
            values[f"forward_{direction}"] = spent[0] / (size / 1e9)
        values["rtt_p50"] = round_trips(self.echo, ROUND_TRIPS)[0]
        values["connects"] = connects_per_second(self.echo, CONNECTS)
        return values


def up(port: int, size: int) -> None:
    """Send so many bytes, and wait until the service has them."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(b"u")
        for at in range(0, size, len(PIECE)):
            connection.sendall(PIECE[: size - at])
        connection.shutdown(socket.SHUT_WR)
        if (taken := int.from_bytes(connection.recv(8), "big")) != size:
            raise RuntimeError(f"of {size} bytes {taken} arrived")


def down(port: int, size: int) -> None:
    """Receive so many bytes."""
    space = memoryview(bytearray(1 << 20))
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(b"d")
        while size > 0:
            count = connection.recv_into(space[: min(size, len(space))])
            if not count:
                raise RuntimeError(f"{size} bytes are missing")
            size -= count


def in_turns(executable: Path, rounds: int, size: int) -> Results:
    """Both ways over one chain; who is first changes from round to round."""
    services, bulk, chain = Services(), Bulk(), KohakuRiver(executable)
    results = Results()
    with ExitStack() as stack:
        for contender in (services, bulk, chain):
            stack.callback(contender.close)
            contender.start(services)
        ways = []
        for name, options in ((OURS, ()), (OFF, (OFF,))):
            echo_port, bulk_port = chain.forward(services.echo, bulk.port, options=options)
            ways.append(Way(name, echo_port, bulk_port, [chain.hop("forward", last=True), *chain.hops[1:]]))
        for way in ways:
            way.measured(size // 4)  # what is made once is made now
        for number in range(rounds):
            for way in ways[:: 1 if number % 2 else -1]:
                results.add(way.name, way.measured(size))
    return results


def wait_until_idle(pid: int) -> None:
    """Return once a process has hardly anything to do, or after AT_REST seconds."""
    end, now = time.monotonic() + AT_REST, own_cpu_seconds(pid)
    while time.monotonic() < end:
        time.sleep(1.0)
        last, now = now, own_cpu_seconds(pid)
        if now - last < IDLE:
            return


def memory(executable: Path, count: int, *options: str) -> dict[str, float]:
    """KiB of the two ends for each of `count` idle streams, and of the tunnel client once their forward was killed."""
    with started(executable, *options) as chain, ExitStack() as stack:
        stack.enter_context(streams(chain, 20))
        forward, *_, client = chain.hops
        before = resident_kib(forward), resident_kib(client)
        stack.enter_context(streams(chain, count))
        values = {
            "forward_idle": (resident_kib(forward) - before[0]) / count,
            "client_idle": (resident_kib(client) - before[1]) / count,
        }
        os.kill(forward, signal.SIGKILL)
        wait_until_idle(client)
        return values | {"client_detached": (resident_kib(client) - before[1]) / count}


def line(measure: str, results: Results) -> str:
    ours, off, ratio = results.median(measure, OURS), results.median(measure, OFF), results.ratio(measure, OFF)
    bound = BOUNDS.get(measure)
    may = "" if bound is None else f"may be {bound:.2f}"
    return f"{measure:<15} {ours:9.3f} {off:9.3f}  {UNITS[measure]:<8} {ratio:6.3f}  {may}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohakuriver", type=Path, required=True, help="the program to measure")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=512, help="of each transfer")
    parser.add_argument("--streams", type=int, default=1000, help="of which the memory is measured")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write resume_cost.json into DIR")
    arguments = parser.parse_args()
    results = in_turns(arguments.kohakuriver, arguments.rounds, arguments.megabytes * 1_000_000)
    print(f"{'':<15} {'kept':>9} {OFF:>9}  {'':<8} {'ratio':>6}")
    for measure in results.samples:
        print(line(measure, results))
    each = {
        OURS: memory(arguments.kohakuriver, arguments.streams),
        OFF: memory(arguments.kohakuriver, arguments.streams, OFF),
    }
    for measure, kib in each[OURS].items():
        print(f"{measure:<15} {kib:9.2f} {each[OFF][measure]:9.2f}  KiB/stream")
    write_json(arguments.output, "resume_cost.json", {"samples": results.samples, "memory": each})
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is stopped
    sys.exit(main())
