"""Measure what has an absolute bound: memory and cost of many streams, the extension's calls, the start of the program.

    python -m bench.limits --kohakuriver .venv/bin/kohakuriver [--gate bench/gates.toml] [--output DIR]

Linux only: memory and CPU time of the hops are read from /proc.
"""

from __future__ import annotations

import argparse
import os
import resource
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.chain import OURS, Results, exit_code, read_gates, write_json
from bench.contenders import HOPS, Contender, KohakuRiver, Services, ports_of
from kohakuriver import _frame
from tests.reference import frame as twin

IDLE_STREAMS = 10_000
ACTIVE_STREAMS = 1_000
WARM_UP, ENOUGH = 200 << 20, 600 << 20  # bytes; a session's windows are 64 MiB together
PAGE = os.sysconf("SC_PAGE_SIZE")
RUNS = 200  # of a single call
MORE = 2  # times that all is measured again where a gate is missed
UNITS = {
    **{f"{hop}_idle_stream": "KiB" for hop in HOPS},
    "many_streams": "of one stream's CPU time per GB",
    "pack_header": "times as fast as Python",
    "unpack_header": "times as fast as Python",
    "look_up": "ns",
    "mask": "GB/s",
    "help": "CPU s",
}


# ---- many streams ----


class Crowd(Contender):
    """The service that all streams lead to."""

    name = title = "crowd"

    def start(self, services: Services) -> None:
        [self.port] = ports_of(self.spawn(sys.executable, "-m", "bench.crowd", piped=True))


@dataclass
class Chain:
    """A started chain, and the local port of its crowd."""

    hops: list[int]
    port: int

    def cpu_seconds(self) -> float:
        return sum(self.each_hop(cpu_seconds_of))

    def each_hop(self, figure: Callable[[int], float]) -> list[float]:
        return [figure(pid) for pid in self.hops]


def cpu_seconds_of(pid: int) -> float:
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def resident_kib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1024


@contextmanager
def started(executable: Path, *options: str) -> Iterator[Chain]:
    """A chain whose forward has these options."""
    services, crowd, chain = Services(), Crowd(), KohakuRiver(executable)
    with ExitStack() as stack:
        for contender in (services, crowd, chain):
            stack.callback(contender.close)
            contender.start(services)
        [port] = chain.forward(crowd.port, options=options)
        yield Chain([chain.hop("forward", last=True), *chain.hops[1:]], port)


@contextmanager
def streams(chain: Chain, count: int) -> Iterator[list[socket.socket]]:
    """`count` connections whose far ends have been accepted."""
    with ExitStack() as stack:
        opened = []
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", chain.port), 30))
            if connection.recv(1) != b".":
                raise RuntimeError("a stream was closed")
            opened.append(connection)
        yield opened


def idle_memory(chain: Chain) -> dict[str, float]:
    """KiB of resident memory that each hop has more of, for each stream."""
    with streams(chain, 100):
        before = chain.each_hop(resident_kib)
        with streams(chain, IDLE_STREAMS):
            after = chain.each_hop(resident_kib)
    grown = zip(HOPS, before, after, strict=True)
    return {f"{hop}_idle_stream": (high - low) / IDLE_STREAMS for hop, low, high in grown}


def cpu_per_gb(chain: Chain, count: int) -> float:
    """CPU seconds of the four hops for a GB that `count` saturated streams bring together, once all of them flow."""
    with streams(chain, count) as opened, selectors.DefaultSelector() as selector:
        for connection in opened:
            selector.register(connection, selectors.EVENT_READ)
            connection.sendall(b"x")
        receive(selector, WARM_UP)
        before = chain.cpu_seconds()
        received = receive(selector, ENOUGH)
        return (chain.cpu_seconds() - before) / (received / 1e9)


def receive(selector: selectors.BaseSelector, enough: int) -> int:
    """Receive at least so many bytes from whoever has some; return how many."""
    buffer, received = bytearray(1 << 20), 0
    while received < enough:
        ready = selector.select(30)
        if not ready:
            raise RuntimeError(f"nothing came for 30 s, after {received} bytes")
        for key, _ in ready:
            assert isinstance(key.fileobj, socket.socket)
            size = key.fileobj.recv_into(buffer)
            if not size:
                raise RuntimeError(f"a stream was closed after {received} bytes")
            received += size
    return received


def many_streams(chain: Chain, rounds: int = 5) -> dict[str, float]:
    pairs = [(cpu_per_gb(chain, 1), cpu_per_gb(chain, ACTIVE_STREAMS)) for _ in range(rounds)]
    return {"many_streams": statistics.median(many / one for one, many in pairs)}


# ---- single calls ----


def fastest(call: Callable[..., object], *args: object, number: int) -> float:
    """Seconds of one call: of many runs the one that was disturbed least."""
    return fastest_of([call], *args, number=number)[0]


def fastest_of(calls: Sequence[Callable[..., object]], *args: object, number: int) -> list[float]:
    """The same of several, which take turns: what slows the machine down for a while is then not one's own."""
    names = {f"a{index}": value for index, value in enumerate(args)}
    timers = [timeit.Timer(f"call({', '.join(names)})", globals={**names, "call": call}) for call in calls]
    times = [[timer.timeit(number) for timer in timers] for _ in range(RUNS)]
    return [min(of_one) / number for of_one in zip(*times, strict=True)]


def times_faster(name: str, *args: object) -> float:
    plain, ours = fastest_of([getattr(module, name) for module in (twin, _frame)], *args, number=2000)
    return plain / ours


def look_up_ns() -> float:
    """A look-up among 2000 routes, with the header that asks for it."""
    table, count = _frame.RoutingTable(), 10_000
    for client_id in range(2000):
        table.add(client_id, None, 1)
    frames = (_frame.build_frame(_frame.TYPE_DATA, 0, 10_000 + i * 7919 % 4096, 0) for i in range(count))
    buf = bytearray(_frame.HEADROOM) + b"".join(frames)
    walker = _frame.RelayWalker(masked=False)
    return fastest(walker.relay, buf, _frame.HEADROOM, len(buf), table, number=1) / count * 1e9


def mask_gb_per_s() -> float:
    buf = bytearray(64 * 1024)
    return len(buf) / fastest(_frame.mask, buf, 0, len(buf), 0xA1B2C3D4, number=1000) / 1e9


def help_seconds(executable: Path) -> float:
    """Processor seconds, which is what it takes where nothing else runs: of several runs the least disturbed one."""

    def run() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([executable, "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(run() for _ in range(10))


def single_calls(executable: Path) -> dict[str, float]:
    header = _frame.pack_header(_frame.TYPE_DATA, 0, 7, 0)
    return {
        "pack_header": times_faster("pack_header", _frame.TYPE_DATA, 0, 7, 0),
        "unpack_header": times_faster("unpack_header", header),
        "look_up": look_up_ns(),
        "mask": mask_gb_per_s(),
        "help": help_seconds(executable),
    }


def measured(executable: Path) -> dict[str, float]:
    values = single_calls(executable)
    with started(executable) as chain:
        return values | many_streams(chain) | idle_memory(chain)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohakuriver", type=Path, required=True, help="the program to measure")
    parser.add_argument("--gate", type=Path, metavar="FILE", help="check the limits of FILE; exit 1 when one fails")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write limits.json into DIR")
    arguments = parser.parse_args()
    gates = [gate for gate in read_gates(arguments.gate)[0] if gate.measure in UNITS] if arguments.gate else []
    results = Results()
    results.add(OURS, measured(arguments.kohakuriver))
    if not all(gate.holds(results) for gate in gates):
        for _ in range(MORE):  # the median decides: a machine may be disturbed for as long as one takes
            print("measuring again", flush=True)
            results.add(OURS, measured(arguments.kohakuriver))
    medians = {name: results.median(name, OURS) for name in results.samples}
    for name, value in medians.items():
        print(f"{name:<19} {value:8.2f} {UNITS[name]}")
    write_json(arguments.output, "limits.json", medians)
    return exit_code(gates, results)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is stopped
    sys.exit(main())
