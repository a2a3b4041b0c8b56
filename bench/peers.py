"""Measure beside other tunnels: through the host, past it, plain relays of as many hops, and what of the peers is here.

    python -m bench.peers --kohakuriver .venv/bin/kohakuriver [--rounds 5] [--seconds 3] [--only NAME,…] [--output DIR]

Peers are those of `ssh -L`, rathole, frp (frps and frpc), wstunnel and chisel that are on PATH; of the others a line
says that they are missing. They have two processes where we have four through the host and three past it, so two plain
relays stand beside four. Everything is on loopback and plaintext, but for ssh and chisel, which encrypt. Figures and
ratios are as in bench/chain.py. Needs Linux, iperf3 and socat.
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

from bench.chain import Results, as_json, measure_in_turns, ratio_parser, started, table, write_json
from bench.contenders import (
    Contender,
    KohakuRiver,
    Relay2,
    Relay4,
    Services,
    Ssh,
    Straight,
    free_port,
    wait_for_port,
)

RUNS = ("bulk_up", "bulk_down", "bulk_8", "rtt", "loaded", "connect")


class Peer(Contender):
    """A tunnel of two processes, whose programs must be on PATH."""

    programs: tuple[str, ...]

    @classmethod
    def is_here(cls) -> bool:
        return all(shutil.which(program) for program in cls.programs)

    def write(self, name: str, text: str) -> str:
        """A file of configuration; its path."""
        path = Path(self.directory.name) / name
        path.write_text(text)
        return str(path)


class Rathole(Peer):
    """rathole: the side of the service dials out, as our tunnel client does."""

    name, title, programs = "rathole", "rathole (2 hops)", ("rathole",)

    def start(self, services: Services) -> None:
        control, self.iperf, self.echo = free_port(), free_port(), free_port()
        ends = {"iperf": (self.iperf, services.iperf), "echo": (self.echo, services.echo)}
        server = f'[server]\nbind_addr = "127.0.0.1:{control}"\ndefault_token = "t"\n'
        client = f'[client]\nremote_addr = "127.0.0.1:{control}"\ndefault_token = "t"\n'
        for name, (public, local) in ends.items():
            server += f'[server.services.{name}]\nbind_addr = "127.0.0.1:{public}"\n'
            client += f'[client.services.{name}]\nlocal_addr = "127.0.0.1:{local}"\n'
        wait_for_port(control, self.spawn("rathole", "--server", self.write("server.toml", server)))
        wait_for_port(self.echo, self.spawn("rathole", "--client", self.write("client.toml", client)))
        wait_for_port(self.iperf, self.processes[-1])


class Frp(Peer):
    """frp, with its multiplexer, as it comes."""

    name, title, programs = "frp", "frp (2 hops)", ("frps", "frpc")

    def start(self, services: Services) -> None:
        control, self.iperf, self.echo = free_port(), free_port(), free_port()
        client = f'serverAddr = "127.0.0.1"\nserverPort = {control}\ntransport.tls.enable = false\n'
        for name, remote, local in (("iperf", self.iperf, services.iperf), ("echo", self.echo, services.echo)):
            client += f'[[proxies]]\nname = "{name}"\ntype = "tcp"\nlocalPort = {local}\nremotePort = {remote}\n'
        server = f'bindAddr = "127.0.0.1"\nproxyBindAddr = "127.0.0.1"\nbindPort = {control}\n'
        wait_for_port(control, self.spawn("frps", "-c", self.write("frps.toml", server)))
        wait_for_port(self.echo, self.spawn("frpc", "-c", self.write("frpc.toml", client)))
        wait_for_port(self.iperf, self.processes[-1])


class Wstunnel(Peer):
    """wstunnel: a WebSocket for each connection."""

    name, title, programs = "wstunnel", "wstunnel (2 hops)", ("wstunnel",)

    def start(self, services: Services) -> None:
        control, self.iperf, self.echo = free_port(), free_port(), free_port()
        wait_for_port(control, self.spawn("wstunnel", "server", f"ws://127.0.0.1:{control}"))
        ends = ((self.iperf, services.iperf), (self.echo, services.echo))
        local = [part for ours, there in ends for part in ("-L", f"tcp://127.0.0.1:{ours}:127.0.0.1:{there}")]
        wait_for_port(self.echo, self.spawn("wstunnel", "client", *local, f"ws://127.0.0.1:{control}"))


class Chisel(Peer):
    """chisel: SSH over one WebSocket, which it encrypts."""

    name, title, programs = "chisel", "chisel (2 hops)", ("chisel",)

    def start(self, services: Services) -> None:
        control, self.iperf, self.echo = free_port(), free_port(), free_port()
        wait_for_port(control, self.spawn("chisel", "server", "--host", "127.0.0.1", "--port", str(control)))
        ends = ((self.iperf, services.iperf), (self.echo, services.echo))
        tunnels = [f"127.0.0.1:{ours}:127.0.0.1:{there}" for ours, there in ends]
        wait_for_port(self.echo, self.spawn("chisel", "client", f"http://127.0.0.1:{control}", *tunnels))


PEERS: tuple[type[Rathole | Frp | Wstunnel | Chisel | Ssh], ...] = (Rathole, Frp, Wstunnel, Chisel, Ssh)


def contenders_of(executable: Path, only: set[str]) -> list[Contender]:
    """Ours, plain relays, and those of the peers that are wanted and here."""
    ours = KohakuRiver(executable)
    found: list[Contender] = [ours, Straight(ours), Relay4(), Relay2()]
    for peer in PEERS:
        if only and peer.name not in only:
            continue
        if peer.is_here():
            found.append(peer())
        else:
            print(f"no {peer.name}: its program is not on PATH", file=sys.stderr)
    return found


def main() -> int:
    parser = ratio_parser(__doc__, "peers.json")
    parser.add_argument("--only", default="", metavar="NAME,…", help="of the peers")
    arguments = parser.parse_args()
    results = Results()
    contenders = contenders_of(arguments.kohakuriver, set(filter(None, arguments.only.split(","))))
    with started(contenders):
        for run in RUNS:
            measure_in_turns(results, run, contenders, arguments.rounds, arguments.seconds)
    titles = {contender.name: contender.title for contender in contenders}
    print(table(results, titles))
    write_json(arguments.output, "peers.json", as_json(results, titles))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is stopped
    sys.exit(main())
