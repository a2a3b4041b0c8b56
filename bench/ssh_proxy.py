"""Measure the SSH proxy's relay beside as many plain TCP relays: host, runner and tunnel client against three of socat.

    python -m bench.ssh_proxy --kohakuriver .venv/bin/kohakuriver [--gate bench/gates.toml] [--output DIR]

What is behind the relays takes or gives bytes and does nothing else: ciphers would hide what the way there costs.
A ratio is the median of the ratios of runs that stood side by side.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.bulk import PIECE
from bench.chain import OURS, Results, exit_code, ratio_parser, read_gates, write_json
from bench.contenders import ROOT, Contender, KohakuRiver, Relay4, Services, ports_of

RELAYS = ("host", "runner", "client")
MEASURES = {"ssh_proxy_up": b"u", "ssh_proxy_down": b"d"}
STAND_IN = '#!/bin/sh\ncd "{root}" && exec "{python}" -m bench.bulk "$@"\n'


class Proxied(KohakuRiver):
    """A task whose SSH server is the service, by way of the SSH proxy."""

    def start(self, services: Services) -> None:
        directory = Path(self.directory.name)
        service, key = directory / "service", directory / "key.pub"
        service.write_text(STAND_IN.format(root=ROOT, python=sys.executable))
        service.chmod(0o755)
        key.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMRkPj6ZEhhLk0hLg2KJ8Yp4pjV4mJ5Yb1nCz9vS9GxB nobody\n")
        self.env["KOHAKURIVER_TUNNEL_SSHD"] = str(service)
        ports = ("--host-port", "0", "--runner-port", "0", "--ssh-port", "0")
        up = self.kohakuriver("up", "--json", *ports, "--state-dir", f"{directory}/state")
        self.proxy = int(self.event(up, "ready")["ssh_proxy"].rpartition(":")[2])
        create = (self.executable, "vps", "create", "--backend=process", "--name=bench", f"--public-key-file={key}")
        subprocess.run(create, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        self.token = (directory / "state" / "admin-token").read_text().strip()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.proxy), 30)
        connection.sendall(f"REQUEST_TUNNEL bench {self.token}\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            if not (more := connection.recv(1)):
                raise RuntimeError(f"the SSH proxy said {answer!r}")
            answer += more
        if answer != b"SUCCESS\n":
            raise RuntimeError(f"the SSH proxy said {answer!r}")
        return connection


class Relay3(Relay4):
    """Three plain TCP relays in a row."""

    name, title = "relay3", "3 × socat (plain TCP)"

    def start(self, services: Services) -> None:
        [target] = ports_of(self.spawn(sys.executable, "-m", "bench.bulk", piped=True))
        self.entry = self.chain(target, len(RELAYS))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.entry), 30)


def gigabits_per_second(connection: socket.socket, kind: bytes, seconds: float) -> float:
    """How fast bytes went, as their receiver counted them."""
    with connection:
        connection.settimeout(60)
        connection.sendall(kind)
        return (_up if kind == b"u" else _down)(connection, seconds)


def _up(connection: socket.socket, seconds: float) -> float:
    block = bytes(PIECE)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        connection.sendall(block)
    connection.shutdown(socket.SHUT_WR)
    answer = b""
    while len(answer) < 8:
        if not (more := connection.recv(8 - len(answer))):
            raise RuntimeError("the service did not say how much it took")
        answer += more
    return int.from_bytes(answer, "big") * 8e-9 / (time.perf_counter() - begin)


def _down(connection: socket.socket, seconds: float) -> float:
    space = memoryview(bytearray(PIECE))
    connection.recv_into(space)
    total, begin = 0, time.perf_counter()
    while (now := time.perf_counter() - begin) < seconds:
        total += connection.recv_into(space)
    return total * 8e-9 / now


def measure(results: Results, contenders: Sequence[Proxied | Relay3], rounds: int, seconds: float) -> None:
    for name, kind in MEASURES.items():
        for number in range(rounds):
            for contender in contenders if number % 2 else reversed(contenders):
                results.add(contender.name, {name: gigabits_per_second(contender.connect(), kind, seconds)})


def main() -> int:
    arguments = ratio_parser(__doc__, "ssh_proxy.json").parse_args()
    results, contenders = Results(), (Proxied(arguments.kohakuriver), Relay3())
    gates = [gate for gate in read_gates(arguments.gate)[0] if gate.measure in MEASURES] if arguments.gate else []
    try:
        for contender in contenders:
            contender.start(Services())
        measure(results, contenders, arguments.rounds, arguments.seconds)
        if not all(gate.holds(results) for gate in gates):
            print("measuring again, for longer", flush=True)
            measure(results, contenders, 2 * arguments.rounds, arguments.seconds)
    finally:
        for contender in contenders:
            Contender.close(contender)
    for name in MEASURES:
        ours, theirs = (results.median(name, contender.name) for contender in contenders)
        ratio = results.ratio(name, Relay3.name)
        print(f"{name:<19} {OURS} {ours:.2f} Gbit/s, {Relay3.title} {theirs:.2f} Gbit/s, ratio {ratio:.2f}")
    write_json(arguments.output, "ssh_proxy.json", results.samples)
    return exit_code(gates, results)


if __name__ == "__main__":
    sys.exit(main())
