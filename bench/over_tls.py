"""Measure the chain with TLS between user, host and runner, beside four socat relays with TLS on the same two hops.

    python -m bench.over_tls --kohakuriver .venv/bin/kohakuriver [--gate bench/gates.toml] [--output DIR]

The measures are those of bench/chain.py. Without --gate the chain without TLS stands beside both. Needs iperf3, socat
and openssl.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.chain import (
    Results,
    as_json,
    exit_code,
    measure_in_turns,
    ratio_parser,
    read_gates,
    started,
    table,
    write_json,
)
from bench.contenders import HOPS, Contender, KohakuRiver, Relay4, Services, free_port, wait_for_port
from bench.measures import MEASURES
from bench.measures import RUNS as GIVES

HERE = "127.0.0.1"
RUNS = ("bulk_up", "bulk_down", "bulk_8", "rtt", "connect")
PREFIX = "tls_"
MEASURES |= {f"{PREFIX}{name}": measure for name, measure in MEASURES.items()}


class OverTls(KohakuRiver):
    """Host and runner with certificates of `init tls`, one process task, and one forward of both ports."""

    title = "KohakuRiver, TLS on two hops"

    def start(self, services: Services) -> None:
        made = Path(self.directory.name) / "tls"
        state = Path(self.directory.name) / "state"
        self.answer("init", "tls", f"--directory={made}", HERE)
        certificate = (f"--tls-cert={made}/{HERE}.pem", f"--tls-key={made}/{HERE}.key")
        self.env["KOHAKURIVER_CA_FILE"] = f"{made}/ca.pem"
        listen = (f"--bind={HERE}", "--port=0", "--json", *certificate)
        host = self.kohakuriver("host", *listen, "--ssh-port=0", f"--state-dir={state}/host")
        self.env["KOHAKURIVER_HOST"] = self.event(host, "ready")["url"]
        self.env["KOHAKURIVER_TOKEN"] = (state / "host" / "admin-token").read_text().strip()
        runner = self.kohakuriver(
            "runner", *listen, f"--host-url={self.env['KOHAKURIVER_HOST']}", "--backend=process",
            f"--node-token-file={state}/host/node-token", f"--state-dir={state}/runner",
        )  # fmt: skip
        self.event(runner, "ready")
        while not self.answer("node", "list")["nodes"]:  # it listens first and registers then
            if runner.poll() is not None:
                raise RuntimeError(f"the runner ended with {runner.returncode}:\n{self.log()}")
        self.answer("vps", "create", "--name=bench", "--backend=process")
        self.iperf, self.echo = self.forward(services.iperf, services.echo)

    def answer(self, *command: str) -> dict[str, Any]:
        """What a command says that ends by itself."""
        argv = (self.executable, *command, "--json")
        ended = subprocess.run(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
        said: dict[str, Any] = json.loads(ended.stdout)
        return said


class Plain(KohakuRiver):
    """The chain without TLS."""

    name, title = "plain", "KohakuRiver, plain"


class TlsRelay4(Relay4):
    """Four relays in a row, the second and the third of which are reached by TLS."""

    name, title = "relay4_tls", "4 × socat, TLS on two hops"

    def start(self, services: Services) -> None:
        directory = Path(self.directory.name)
        subprocess.run(
            ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
             "-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{HERE}",
             "-keyout", f"{directory}/key.pem", "-out", f"{directory}/cert.pem"),
            check=True, capture_output=True,
        )  # fmt: skip
        self.iperf, self.echo = self.chain(services.iperf), self.chain(services.echo)

    def chain(self, target: int, relays: int = len(HOPS)) -> int:
        files = Path(self.directory.name)
        to_tcp = "TCP:127.0.0.1:{},nodelay"
        to_tls = f"OPENSSL:127.0.0.1:{{}},nodelay,cafile={files}/cert.pem"
        from_tcp = "TCP-LISTEN:{},bind=127.0.0.1,fork,reuseaddr,nodelay,backlog=512"
        from_tls = (
            f"OPENSSL-LISTEN:{{}},bind=127.0.0.1,fork,reuseaddr,nodelay,backlog=512,verify=0,"
            f"cert={files}/cert.pem,key={files}/key.pem"
        )
        # From the service to the user: tunnel client, runner, host, forward.
        for listen, connect in ((from_tcp, to_tcp), (from_tls, to_tcp), (from_tls, to_tls), (from_tcp, to_tls)):
            port = free_port()
            relay = self.spawn("socat", "-b", "262144", listen.format(port), connect.format(target))
            wait_for_port(port, relay)
            target = port
        return target


def measure(
    results: Results, runs: Sequence[str], contenders: Sequence[Contender], rounds: int, seconds: float
) -> None:
    """Add samples, under names that tell them from those of the chain without TLS."""
    plain = Results()
    for run in runs:
        measure_in_turns(plain, run, contenders, rounds, seconds)
    for name, by_contender in plain.samples.items():
        for contender, values in by_contender.items():
            for value in values:
                results.add(contender, {PREFIX + name: value})


def main() -> int:
    arguments = ratio_parser(__doc__, "over_tls.json").parse_args()
    gates = read_gates(arguments.gate)[0] if arguments.gate else []
    gates = [gate for gate in gates if gate.measure.startswith(PREFIX)]
    wanted = {gate.measure for gate in gates}
    runs = [run for run in RUNS if not gates or any(PREFIX + given in wanted for given in GIVES[run])]
    results = Results()
    contenders: list[Contender] = [OverTls(arguments.kohakuriver), TlsRelay4()]
    if not gates:
        contenders.append(Plain(arguments.kohakuriver))
    with started(contenders):
        measure(results, runs, contenders, arguments.rounds, arguments.seconds)
        if not all(gate.holds(results) for gate in gates):
            print("measuring again, for longer", flush=True)
            measure(results, runs, contenders, 2 * arguments.rounds, arguments.seconds)
    titles = {contender.name: contender.title for contender in contenders}
    print(table(results, titles))
    write_json(arguments.output, "over_tls.json", as_json(results, titles))
    return exit_code(gates, results)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is stopped
    sys.exit(main())
