"""Several forwards at once through one host: what they carry, and what the host costs, with one worker and with two.

    python -m bench.workers --kohakuriver .venv/bin/kohakuriver --database URL --database URL [--rounds 5]

Each host has an empty PostgreSQL database of its own. They are measured in turns; a figure is the median of all rounds,
a ratio the median of the ratios of two runs that stood side by side. Linux only: processor time is read from /proc.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from bench.chain import Results, write_json
from bench.contenders import KohakuRiver, Services, cpu_seconds
from bench.resume_cost import Bulk, down

FORWARDS = 4
UNITS = {"together": "Gbit/s", "host_cpu": "CPU s/GB"}


class WithWorkers(KohakuRiver):
    """A host with so many workers, a runner, a process task, and forwards to the bulk service."""

    def __init__(self, executable: Path, workers: int, database: str) -> None:
        super().__init__(executable)
        self._workers, self._database = workers, database
        self.name = f"{workers} worker" + "s" * (workers > 1)
        self.ports: list[int] = []

    def begin(self) -> None:
        state = Path(self.directory.name)
        self.host = self.kohakuriver(
            *("host", "--json", "--bind=127.0.0.1", "--port=0", "--ssh-port=0", f"--workers={self._workers}"),
            *(f"--state-dir={state / 'host'}", f"--database={self._database}"),
        )
        url = self.event(self.host, "ready")["url"]
        self.env |= {"KOHAKURIVER_HOST": url, "KOHAKURIVER_TOKEN": (state / "host/admin-token").read_text().strip()}
        runner = self.kohakuriver(
            *("runner", "--json", "--bind=127.0.0.1", "--port=0", "--backend=process", f"--host-url={url}"),
            *(f"--state-dir={state / 'runner'}", f"--node-token-file={state / 'host/node-token'}"),
        )
        self.event(runner, "ready")
        self._create()

    def _create(self) -> None:
        """Make the task; again for as long as the node is not known to the host."""
        create = (self.executable, "vps", "create", "--json", "--name", "bench", "--backend", "process")
        for _ in range(50):
            made = subprocess.run(create, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
            if not made.returncode:
                return
            time.sleep(0.2)
        raise RuntimeError(f"`vps create` ended with {made.returncode}: {made.stderr[-1000:]!r}")

    def open(self, port: int) -> None:
        """Forwards to that port of the task."""
        self.begin()
        self.ports = [self.forward(port)[0] for _ in range(FORWARDS)]

    def measured(self, size: int) -> dict[str, float]:
        """Each forward brings so many bytes, all at once."""
        threads = [threading.Thread(target=down, args=(port, size)) for port in self.ports]
        spent, began = cpu_seconds(self.host.pid), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total, seconds = size * len(threads), time.perf_counter() - began
        return {"together": total * 8e-9 / seconds, "host_cpu": (cpu_seconds(self.host.pid) - spent) / (total / 1e9)}


def in_turns(hosts: list[WithWorkers], rounds: int, size: int) -> Results:
    results, services, bulk = Results(), Services(), Bulk()
    with ExitStack() as stack:
        stack.callback(bulk.close)
        bulk.start(services)
        for host in hosts:
            stack.callback(host.close)
            host.open(bulk.port)
            host.measured(size // 4)  # what is made once is made now
        for number in range(rounds):
            for host in hosts[:: 1 if number % 2 else -1]:
                results.add(host.name, host.measured(size))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kohakuriver", type=Path, required=True, help="the program to measure")
    parser.add_argument("--database", action="append", required=True, help="an empty one for each of the two hosts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256, help="of each forward")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write workers.json into DIR")
    arguments = parser.parse_args()
    if len(arguments.database) != 2:
        parser.error("--database is needed twice: hosts on one database would be one cluster")
    hosts = [WithWorkers(arguments.kohakuriver, 1 + each, url) for each, url in enumerate(arguments.database)]
    results = in_turns(hosts, arguments.rounds, arguments.megabytes * 1_000_000)
    one, two = (host.name for host in hosts)
    print(f"{'':<10} {one:>10} {two:>10} {'':<9} ratio")
    for measure, unit in UNITS.items():
        first, second = results.median(measure, one), results.median(measure, two)
        print(f"{measure:<10} {first:10.3f} {second:10.3f} {unit:<9} {results.ratio(measure, one, two):5.3f}")
    write_json(arguments.output, "workers.json", {"samples": results.samples})
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is stopped
    sys.exit(main())
