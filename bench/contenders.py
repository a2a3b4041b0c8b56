"""What chain.py measures: KohakuRiver's own chain, and the baselines beside it, all as real processes on loopback."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from bench.slowdown import SlowDown

ROOT = Path(__file__).resolve().parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
# From the user to the service.
HOPS = ("forward", "host", "runner", "client")


def free_port() -> int:
    """A port that nothing listens on now: for programs that can't say which one they chose."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[Any], seconds: float = 15) -> None:
    """Return once something accepts on 127.0.0.1:`port`; RuntimeError when `process` ends or `seconds` pass."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on 127.0.0.1:{port} after {seconds} s")


def process_tree(pid: int) -> list[int]:
    tree = [pid]
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                tree += process_tree(int(child))
    return tree


def cpu_seconds(pid: int) -> float:
    """User and system time of `pid`'s tree, the children that it has reaped included."""
    total = 0
    for member in process_tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
            total += sum(map(int, fields[11:15]))
    return total / TICKS


def own_cpu_seconds(pid: int) -> float:
    """CPU time of one process's threads, by the nanosecond."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def command_line(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


class Contender:
    """A chain of processes between local ports and the services. `iperf` and `echo` are its entries' ports."""

    name: str
    title: str
    is_ours = False

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.directory = tempfile.TemporaryDirectory(prefix="kohakuriver-bench-")
        self.iperf = 0
        self.echo = 0
        # Only where single hops are told apart: the other ports of bench.echo, its process, and that of each of HOPS.
        self.take = 0
        self.give = 0
        self.service = 0
        self.hops: list[int] = []

    def start(self, services: Services) -> None:
        raise NotImplementedError

    def spawn(self, *argv: str, env: dict[str, str] | None = None, piped: bool = False) -> subprocess.Popen[str]:
        log: IO[str] = (Path(self.directory.name) / "log").open("a")
        with log:
            process = subprocess.Popen(
                argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if piped else log, stderr=log,
                text=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def log(self) -> str:
        return (Path(self.directory.name) / "log").read_text(errors="replace")[-2000:]

    def cpu_seconds(self) -> float:
        return sum(cpu_seconds(process.pid) for process in self.processes)

    def hop_seconds(self) -> list[float]:
        """CPU time of each hop."""
        return [own_cpu_seconds(pid) for pid in self.hops]

    def close(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()
        self.directory.cleanup()


class Services(Contender):
    """What every contender leads to: an iperf3 server and an echo service."""

    name = title = "services"

    def start(self, services: Services) -> None:
        self.iperf = free_port()
        wait_for_port(self.iperf, self.spawn("iperf3", "-s", "-p", str(self.iperf)))
        echo = self.spawn(sys.executable, "-m", "bench.echo", piped=True)
        self.service = echo.pid
        self.echo, self.take, self.give = ports_of(echo)


def ports_of(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended with {process.wait()}")
    return [int(port) for port in line.split()]


class KohakuRiver(Contender):
    """`kohakuriver up`, one process task, and one forward of both ports, through the host."""

    name, title = "kohakuriver", "KohakuRiver"
    is_ours = True

    def __init__(self, executable: Path, slow_down: SlowDown | None = None) -> None:
        super().__init__()
        self.executable = str(executable.absolute())
        self.env = dict(os.environ, KOHAKURIVER_CONFIG_DIR=self.directory.name)
        for name in ("KOHAKURIVER_HOST", "KOHAKURIVER_TOKEN"):
            self.env.pop(name, None)
        if slow_down is not None:
            self.env |= slow_down.environment(Path(self.directory.name))

    def begin(self) -> None:
        """Start the cluster and its task."""
        ports = ("--host-port", "0", "--runner-port", "0", "--ssh-port", "0")
        up = self.kohakuriver("up", "--json", *ports, "--state-dir", f"{self.directory.name}/state")
        self.event(up, "ready")
        created = subprocess.run(
            [self.executable, "vps", "create", "--json", "--name", "bench", "--backend", "process"],
            env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if created.returncode:
            raise RuntimeError(f"`vps create` ended with {created.returncode}: {created.stderr[-1000:]}")

    def start(self, services: Services) -> None:
        self.begin()
        targets = (services.iperf, services.echo, services.take, services.give)
        self.iperf, self.echo, self.take, self.give = self.forward(*targets)
        self.service = services.service
        self.hops = [self.hop(name) for name in HOPS]

    def forward(self, *ports: int, options: Sequence[str] = (), path: str = "host") -> list[int]:
        """The local ports of a new forward of these, by this path, with such options."""
        named = [f"0:{port}" for port in ports]
        forward = self.kohakuriver("forward", "bench", *named, "--json", "--path", path, *options)
        entries: dict[int, int] = {}
        while len(entries) < len(ports):
            listening = self.event(forward, "listening")
            entries[listening["remote_port"]] = listening["local_port"]
        return [entries[port] for port in ports]

    def hop(self, name: str, *, last: bool = False) -> int:
        """The process that is the hop called so; the one started last, if there are several."""
        for process in reversed(self.processes) if last else self.processes:
            for pid in process_tree(process.pid):
                words = command_line(pid)[:4]
                if name in words or (name == "client" and any("tunnel-client" in word for word in words)):
                    return pid
        raise RuntimeError(f"no process of the cluster is its {name}")

    def kohakuriver(self, *args: str) -> subprocess.Popen[str]:
        return self.spawn(self.executable, *args, env=self.env, piped=True)

    def event(self, process: subprocess.Popen[str], name: str) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event.get("event") == name:
                return event
        raise RuntimeError(f"{process.args!r} ended with {process.wait()} before {name!r}:\n{self.log()}")


class Straight(Contender):
    """Another forward to the task of `chain`, past its host."""

    name, title = "straight", "KohakuRiver, past the host"

    def __init__(self, chain: KohakuRiver) -> None:
        super().__init__()
        self._chain = chain

    def start(self, services: Services) -> None:
        self.iperf, self.echo = self._chain.forward(services.iperf, services.echo, path="direct")
        self.processes.append(self._chain.processes.pop())

    def cpu_seconds(self) -> float:
        """That of its own forward, and of the cluster, which does nothing else meanwhile."""
        return super().cpu_seconds() + cpu_seconds(self._chain.processes[0].pid)


class Relay4(Contender):
    """Four plain TCP relays in a row: the practical limit of four hops."""

    name, title = "relay4", "4 × socat (plain TCP)"

    def start(self, services: Services) -> None:
        self.iperf, self.echo = self.chain(services.iperf), self.chain(services.echo)

    def chain(self, target: int, relays: int = len(HOPS)) -> int:
        for _ in range(relays):
            port = free_port()
            listen = f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr,nodelay,backlog=512"
            wait_for_port(port, self.spawn("socat", "-b", "262144", listen, f"TCP:127.0.0.1:{target},nodelay"))
            target = port
        return target


class Relay2(Relay4):
    """Two plain TCP relays in a row: what a tunnel of two processes can reach."""

    name, title = "relay2", "2 × socat (plain TCP)"

    def chain(self, target: int, relays: int = 2) -> int:
        return super().chain(target, relays)


class WebSockets4(Contender):
    """The same four hops written plainly on the `websockets` API."""

    name, title = "websockets4", "4 hops on websockets' API"

    def start(self, services: Services) -> None:
        self.iperf, self.echo = self.chain(services.iperf), self.chain(services.echo)

    def chain(self, target: int) -> int:
        for role in ("ws-to-tcp", "ws-to-ws", "ws-to-ws", "tcp-to-ws"):
            argv = (sys.executable, "-m", "bench.plain_websockets", role, str(target))
            [target] = ports_of(self.spawn(*argv, piped=True))
        return target


class Ssh(Contender):
    """One `ssh -L` to an sshd of our own: one encrypted hop."""

    name, title = "ssh", "ssh -L (one hop)"

    def start(self, services: Services) -> None:
        directory, sshd = Path(self.directory.name), shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert sshd is not None
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own start script makes it
        port = free_port()
        config = directory / "sshd_config"
        config.write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
            "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
        )
        wait_for_port(port, self.spawn(sshd, "-D", "-e", "-f", str(config)))
        self.iperf, self.echo = free_port(), free_port()
        forwards = (f"{self.iperf}:127.0.0.1:{services.iperf}", f"{self.echo}:127.0.0.1:{services.echo}")
        options = ("ExitOnForwardFailure=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null")
        client = self.spawn(
            "ssh", "-N", "-F", "none", "-i", f"{directory}/user", "-p", str(port), f"{getpass.getuser()}@127.0.0.1",
            *(part for forward in forwards for part in ("-L", f"127.0.0.1:{forward}")),
            *(part for option in options for part in ("-o", option)),
        )  # fmt: skip
        wait_for_port(self.echo, client)

    @staticmethod
    def is_here() -> bool:
        path = f"{os.environ['PATH']}:/usr/sbin"
        return all(shutil.which(program, path=path) for program in ("ssh", "sshd", "ssh-keygen"))
