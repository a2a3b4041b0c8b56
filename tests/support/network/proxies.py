"""HTTP proxies: tinyproxy, and TLS in front of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from kohakuriver.cli.pki import Certificate

PATIENCE = 20.0


class Proxy:
    """A running proxy: its port on 127.0.0.1, and what it has logged."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self._log = log

    def tunnels(self) -> list[str]:
        """Where tunnels were asked for, in order: `name:port` each."""
        return [target for method, target in self._asked() if method == "CONNECT"]

    def requests(self) -> list[str]:
        """What was asked for without a tunnel: URLs."""
        return [target for method, target in self._asked() if method != "CONNECT"]

    def _asked(self) -> list[list[str]]:
        lines = self._log.read_text().splitlines()
        return [line.partition("): ")[2].split()[:2] for line in lines if ": Request (file descriptor " in line]


@contextlib.contextmanager
def tinyproxy(directory: Path, *settings: str) -> Iterator[Proxy]:
    """Debian's tinyproxy with `settings` (lines of its configuration) besides what it needs."""
    program = shutil.which("tinyproxy", path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin")
    assert program, "tinyproxy is not installed: run scripts/system-packages"
    port, log, config = _free_port(), directory / "tinyproxy.log", directory / "tinyproxy.conf"
    lines = [f"Port {port}", "Listen 127.0.0.1", "Timeout 600", f'LogFile "{log}"', "LogLevel Info", *settings]
    config.write_text("\n".join(lines) + "\n")
    with _running([program, "-d", "-c", str(config)], port):
        yield Proxy(port, log)


@contextlib.contextmanager
def behind_tls(proxy: Proxy, certificate: Certificate) -> Iterator[int]:
    """The port on which `proxy` is reached by TLS."""
    port = _free_port()
    files = f"cert={certificate.cert},key={certificate.key},verify=0"
    listen = f"OPENSSL-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr,{files}"
    with _running(["socat", listen, f"TCP:127.0.0.1:{proxy.port}"], port):
        yield port


def _free_port() -> int:
    """A port that nothing listens on now: neither program can say which one it has chosen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _running(arguments: list[str], port: int) -> Iterator[None]:
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not _listens(port):
                assert process.poll() is None, f"{arguments[0]} has ended"
                assert time.monotonic() < deadline, f"{arguments[0]} does not listen"
                time.sleep(0.01)
            yield
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
